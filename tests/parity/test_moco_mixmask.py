"""MoCo, MixMask and Un-Mix against numbers of the published programs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parity import published_moco as published
from tests.parity.stored import ROOT, arrays, assert_close, cases, facts
from workers import main_lincls, main_moco_mixmask
from workers.main_moco_mixmask import Mixed, MoCo
from workers.masking.mix import block_mask, discrete_mask, enlarged
from workers.transforms.mixing import box

HERE = Path(__file__)
RUNS = [each for each in cases("lmim_mixmask/moco_*.json") if "schedules" not in str(each) and "ddp" not in str(each)]


@pytest.mark.parametrize("path", cases("lmim_mixmask/mixmask_masks_draws.json"))
def test_masks_are_the_published_ones(path: Path) -> None:
    stored = arrays(path.with_name(path.name.replace("_draws.json", ".npz")))
    for i, spec in enumerate(facts(path)):
        side, pixels = spec["grid_size"], stored[f"m{i}_pixel_shape"].tolist()
        for j, draws in enumerate(spec["draws"]):
            recorded = published.Recorded(draws)
            if spec["kind"] == "block":
                hidden = block_mask(recorded, side, spec["num_masking_patches"], redraw=False)
            else:
                hidden = discrete_mask(recorded, side, spec["mask_lam"])
            assert not len(recorded)
            assert torch.equal(~hidden, stored[f"m{i}_grid"][j].bool())
            large = ~enlarged(hidden, spec["size"], spec["size"])
            packed = np.packbits(large.numpy(), axis=-1)
            assert pixels[-2:] == list(large.shape)
            assert np.array_equal(packed, stored[f"m{i}_pixel"][j].numpy())
            assert large.double().mean().item() == pytest.approx(stored[f"m{i}_lambda"][j].item(), abs=1e-7)


@pytest.mark.parametrize("path", cases("lmim_mixmask/mixmask_rand_bbox.npz"))
def test_boxes_are_the_published_ones(path: Path) -> None:
    (rows,) = arrays(path).values()
    for height, width, share, row, column, *expected in rows.tolist():
        top, bottom, left, right = box(share, (int(row), int(column)), int(height), int(width))
        corrected = 1 - (bottom - top) * (right - left) / (height * width)
        assert [top, left, bottom, right] == expected[:4]
        assert corrected == pytest.approx(expected[4], abs=1e-12)


def logits(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """(B, 1 + K), the positive first."""
    return torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], dim=1) / temperature


def watch(method: MoCo, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a forward pass sees: mixtures, queries, keys."""
    seen: dict[str, Any] = {}
    mixtures, embed, keys = method.mixtures, method.embed, method.keys

    def seeing(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.setdefault(name, []).append(found := function(*args))
            return found

        return call

    for name, function in {"mixtures": mixtures, "embed": embed, "keys": keys}.items():
        monkeypatch.setattr(method, name, seeing(name, function))
    return seen


def column(mixture: Mixed, method: str) -> str:
    return "mask" if mixture.kind == "mask" and method == "both" else "m"


@pytest.mark.parametrize("path", RUNS)
@pytest.mark.parametrize(
    ("dtype", "relative", "after"),
    [
        pytest.param(torch.float64, 1e-9, 1e-7, id="float64"),
        pytest.param(torch.float32, 1e-3, 1e-3, id="float32"),
    ],
)
def test_training_goes_through_the_published_numbers(
    path: Path, dtype: torch.dtype, relative: float, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, stored = facts(path), arrays(path.with_suffix(".npz"))
    method = published.module(said, arrays(path.with_name(f"{path.stem}_state_init.npz"), dtype), dtype)
    recorded = published.Recorded(said["draws"], unused_first=said["method"] == "mixmask")
    optimizer, seen = published.optimizer(method, said), watch(method, monkeypatch)
    share = max(relative, 1e-7)  # the published share of a mask has float32's precision
    for i in range(len(stored["loss_total"])):
        seen.clear()
        recorded.begin()
        queue = method.queue.clone()
        method.before_step(said["m"])
        assert_close(published.flat(method, [n.replace("_q.", "_k.") for n in said["grad_names"]]),
                     stored[f"s{i}_key_params_flat"], after, "keys")  # fmt: skip
        views = torch.stack([stored["images_q"][i], stored["images_k"][i]], dim=1).to(dtype)
        found = method(views, recorded)
        recorded.permutation(len(views))  # theirs, of the keys: one process with whole BatchNorms has no need of it
        found["loss"].backward()

        terms = torch.stack([value for name, value in found.items() if name.startswith("loss_")])
        assert_close(terms, stored["loss_terms"][i], share, "terms")
        assert_close(found["loss"], stored["loss_total"][i], share, "loss")
        parameters = dict(method.named_parameters())
        norms = torch.stack([parameters[published.our_name(n)].grad.norm() for n in said["grad_names"]])
        assert_close(norms, stored["grad_norms"][i], 10 * share, "gradients")
        check_queries(said, stored, i, queue, seen, relative)
        optimizer.step()
        optimizer.zero_grad()
        assert_close(method.queue.T, stored[f"s{i}_queue_after"], after, "queue")
        assert method.place.item() == stored[f"s{i}_ptr_after"].item()
        assert_close(published.flat(method, said["grad_names"]), stored[f"s{i}_query_params_flat_after_sgd"], after)
    final = path.with_name(f"{path.stem}_state_final.npz")
    if dtype is torch.float64 and final.exists():  # a shorter file of the same layout has none
        published.assert_state(method, arrays(final), after)


def check_queries(
    said: dict[str, Any], stored: dict[str, Tensor], i: int, queue: Tensor, seen: dict[str, Any], relative: float
) -> None:
    """Mixed pictures and logits of step ``i``."""
    ((keys, _),), (mixtures,) = seen["keys"], seen["mixtures"]
    clean, *mixed = seen["embed"][: 1 + len(mixtures)]
    if f"s{i}_logits" in stored:
        assert_close(logits(clean, keys, queue, said["T"]), stored[f"s{i}_logits"], relative, "logits")
    for mixture, queries in zip(mixtures, mixed, strict=True):
        name = column(mixture, said["method"])
        picture = f"s{i}_im_q_mask" if name == "mask" else f"s{i}_im_qm"
        if picture in stored:
            assert_close(mixture.images, stored[picture], relative, picture)
        if name == "mask":
            assert torch.equal(mixture.guest_in.argsort(), stored[f"s{i}_index_mask"])
        for ending, order in (("", slice(None)), ("_flip", mixture.guest_in)):
            if f"s{i}_logits_{name}{ending}" in stored:
                expected = stored[f"s{i}_logits_{name}{ending}"]
                assert_close(logits(queries[order], keys, queue, said["T"]), expected, relative, name + ending)


@pytest.mark.parametrize("path", cases("lmim_mixmask/moco_ddp*.json"))
def test_processes_train_together_as_published(path: Path) -> None:
    world = facts(path)["world"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2]), "SIGHTLINE_GOLDEN": str(ROOT)}
    done = subprocess.run(
        [*command, str(HERE.with_name("moco_together.py")), str(path)],
        env=env, text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        f"rank {rank} agrees" for rank in range(world)
    ]


@pytest.mark.parametrize("path", cases("lmim_mixmask/moco_lr_schedules.json"))
def test_the_rate_follows_the_published_one(path: Path) -> None:
    stored = arrays(path.with_suffix(".npz"))
    for i, said in enumerate(facts(path)):
        rate = {"lr": said["lr"], "epochs": said["epochs"], "milestones": said["schedule"], "lr_every": "epoch"}
        rate["schedule"] = "cosine" if said["cos"] else "steps"
        for worker in (main_moco_mixmask, main_lincls):
            encoder = {"encoder": "e"} if worker is main_lincls else {}
            settings: Any = worker.Settings(worker=worker.__name__, **rate, **encoder)
            schedule = worker.schedules(settings)["lr"]
            for inside in (0.0, 0.3, 0.9):  # an epoch has one rate
                times = [(epoch + inside) / said["epochs"] for epoch in range(said["epochs"])]
                found = torch.tensor([schedule(t) for t in times], dtype=torch.float64)
                assert_close(found, stored[f"s{i}_lr"], 1e-12, f"s{i}")


def test_a_cosine_ends_at_nothing_where_it_changes_every_step() -> None:
    settings = main_moco_mixmask.Settings(worker="main_moco_mixmask", lr=1.0, lr_every="step")
    assert main_moco_mixmask.schedules(settings)["lr"](1.0) == pytest.approx(0)
    assert math.isclose(main_moco_mixmask.schedules(settings)["lr"](0.5), 0.5, abs_tol=1e-6)
