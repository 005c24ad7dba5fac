"""The training loop, on a model whose loss is random, so that a lost random state would show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from contract.rundir import Journal, read_journal
from workers.data.loader import train_loader
from workers.engine.checkpoint import Checkpoint, CheckpointError
from workers.engine.distributed import fold
from workers.engine.fit import NotFinite, fit

EPOCHS = 3


@pytest.fixture(autouse=True)
def look_at_every_step(monkeypatch):
    monkeypatch.setattr("workers.engine.fit.LOOK_EVERY_S", 0.0)


class Points:
    classes = ("only",)

    def __init__(self, n: int = 50):
        self.x = torch.arange(4.0 * n).reshape(n, 4) / (4 * n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index], 0


def jitter(x):
    return x + 0.01 * torch.randn(4)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.momentum: list[float] = []

    def before_step(self, momentum: float) -> None:
        self.momentum.append(momentum)

    def forward(self, x):
        loss = (self.layer(x) - torch.randn(len(x), 1)).square().mean()
        return {"loss": loss, "half": loss.detach() / 2}


def train(folder: Path, *, stop_after=None, workers=0, accumulate=1, batch_size=4, spoil=None, **options):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    journal = Journal(folder / "metrics.jsonl")

    def track(step, of, scalars):
        journal.append({"step": step, "of": of, **scalars})

    def prepare(batch):
        x = batch[0]
        return x * math.nan if spoil is not None and spoil in batch[2] else x

    done = fit(
        model,
        train_loader(Points(), jitter, batch_size, seed=1, rank=0, world=1, fold=fold, workers=workers),
        optimizer,
        epochs=EPOCHS,
        schedules={"lr": lambda t: 0.1 * (1 - t), "momentum": lambda t: t},
        checkpoint=Checkpoint(folder / "checkpoint.pt", journal, model=model, optimizer=optimizer),
        prepare=prepare,
        track=track,
        stop=lambda: len(model.momentum) == stop_after,
        seed=5,
        accumulate=accumulate,
        log_every=5,
        **options,
    )
    journal.close()
    return done, model


def lines(folder: Path) -> list[dict]:
    return read_journal(folder / "metrics.jsonl")[0]


def test_a_run_stopped_twice_between_two_lines_of_its_journal_equals_one_that_never_was(tmp_path):
    done, whole = train(tmp_path / "whole")
    assert done
    assert train(tmp_path / "parts", stop_after=7)[0] is False
    assert train(tmp_path / "parts", stop_after=13)[0] is False
    done, parts = train(tmp_path / "parts")
    assert done
    assert torch.equal(parts.layer.weight, whole.layer.weight)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(tmp_path, workers):
    _, alone = train(tmp_path / "alone")
    _, helped = train(tmp_path / "helped", workers=workers)
    assert torch.equal(alone.layer.weight, helped.layer.weight)
    assert lines(tmp_path / "alone") == lines(tmp_path / "helped")


def test_a_resume_with_other_loader_processes_is_exact(tmp_path):
    _, whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_after=15, workers=2)
    _, parts = train(tmp_path / "parts")
    assert torch.equal(parts.layer.weight, whole.layer.weight)


def test_schedules_see_the_fraction_of_training_and_leftover_batches_are_not_used(tmp_path):
    _, model = train(tmp_path, accumulate=5)  # 12 batches: 2 steps of 5, 2 left over
    assert len(model.momentum) == 2 * EPOCHS
    assert model.momentum == pytest.approx([(e + w * 5 / 12) / EPOCHS for e in range(EPOCHS) for w in range(2)])


class Exact(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


def test_two_small_micro_batches_make_the_gradient_of_one_large_batch(tmp_path):
    weights = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model = Exact()
        fit(
            model,
            train_loader(Points(48), lambda x: x, batch_size, seed=1, rank=0, world=1, fold=fold),
            torch.optim.SGD(model.parameters(), lr=0.0),
            epochs=2,
            schedules={"lr": lambda t: 0.1},
            checkpoint=Checkpoint(tmp_path / f"{batch_size}.pt", model=model),
            prepare=lambda batch: batch[0],
            track=lambda *_: None,
            stop=lambda: False,
            accumulate=accumulate,
        )
        weights.append(model.layer.weight)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(tmp_path, amp):
    done, model = train(tmp_path, amp=amp, clip=1.0)
    assert done
    assert model.layer.weight.isfinite().all()


def test_a_loss_that_is_not_finite_stops_with_step_and_rank_and_saves_nothing(tmp_path):
    with pytest.raises(NotFinite, match=r"at step \d+ on rank 0"):
        train(tmp_path, spoil=17)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_too_much_accumulation_is_refused_with_the_number_that_fits(tmp_path):
    with pytest.raises(ValueError, match="accum_iter=13: an epoch has only 12 batches"):
        train(tmp_path, accumulate=13)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        middle = data.find(b"layer.weight")
        place = len(data) // 2 if middle < 0 else middle + 200
        data[place] ^= 0xFF
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, how):
    _, whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_after=7)
    train(tmp_path / "parts", stop_after=13)
    damage(tmp_path / "parts" / "checkpoint.pt", how)
    _, parts = train(tmp_path / "parts")
    assert torch.equal(parts.layer.weight, whole.layer.weight)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_two_damaged_checkpoints_are_an_error_that_says_what_to_do(tmp_path):
    train(tmp_path, stop_after=7)
    train(tmp_path, stop_after=13)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        damage(tmp_path / name, "truncated")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt and .*previous\.pt: damaged; delete to start"):
        train(tmp_path)


def test_the_journal_is_cut_back_to_the_checkpoint(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "parts", stop_after=7)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "train/loss": 1.0}) + '\n{"step": 9, "tra')  # died while writing
    train(tmp_path / "parts")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"step": 0, "offset": 0, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
        train(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_the_first_steps_alone_are_those_of_the_whole(tmp_path):
    train(tmp_path / "whole")
    done, _ = train(tmp_path / "first", most=15)  # into the second epoch
    assert done
    assert lines(tmp_path / "first") == lines(tmp_path / "whole")[:3]  # every fifth step has a line
    done, rest = train(tmp_path / "first")
    _, whole = train(tmp_path / "whole")
    assert torch.equal(rest.layer.weight, whole.layer.weight)
