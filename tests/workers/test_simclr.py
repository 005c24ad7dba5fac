"""SimCLR: its loss over all processes, its linear evaluation, saliency maps, and real runs of the workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import contract.settings
from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.main_simclr import Linear
from workers import main_simclr
from workers.data import DataError
from workers.data.maps import Maps
from workers.engine.encoder import load_encoder
from workers.engine.logistic import logistic
from workers.losses.ntxent import ntxent, pairs, similarities
from workers.main_simclr import Settings, SimCLR
from workers.transforms import spectral

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "worker": "main_simclr",
    "data": {"name": "fake", "size": 16, "length": 48},
    "image_size": 16,
    "epochs": 2,
    "batch_size": 8,
    "projector_dim": 16,
    "eval_freq": 1,
    "log_every": 2,
}


def build(**values) -> SimCLR:
    torch.manual_seed(0)
    return main_simclr.build(Settings(**{**TINY, "data": contract.settings.Data(), **values}))


def batch() -> torch.Tensor:
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_loss_is_that_of_the_paper_written_out():
    z = F.normalize(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    terms = []
    for i in range(10):
        other = (i + 5) % 10
        over = sum(torch.exp(z[i] @ z[j] / 0.3) for j in range(10) if j != i)
        terms.append(-torch.log(torch.exp(z[i] @ z[other] / 0.3) / over))
    place, positive = pairs(10)
    assert ntxent(similarities(z, z, place, 0.3), positive).item() == pytest.approx(sum(terms).item() / 10, rel=1e-5)


def test_two_processes_have_the_loss_and_the_gradients_of_one_with_the_whole_batch(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("simclr_together.py")), str(tmp_path / "found.pt")],
        env=env, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model = build().double().eval()
    alone = model(batch())
    alone["loss"].backward()
    for name, value in alone.items():
        assert found["scalars"][name].item() == pytest.approx(value.item(), rel=1e-10)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found["gradients"][name], p.grad, rtol=1e-7, atol=1e-10, msg=name)


def test_the_linear_evaluation_finds_what_can_be_told_apart_by_a_line():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    x = torch.randn(300, 5, generator=generator) + 4 * F.one_hot(labels, 5)
    found = logistic(
        (x[:200], labels[:200]), (x[200:], labels[200:]), torch.zeros(3, 5), epochs=40, lr=0.05, batch_size=64
    )
    assert found.top1 > 0.95
    logits = F.linear(x[200:], found.weight, found.bias)
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels[200:]).item(), rel=1e-5)  # pictures weigh alike


def test_an_evaluation_leaves_the_network_as_it_was():
    encoder = build().encoder
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    loader = [(torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.long), torch.arange(4))]
    by_batch, _ = main_simclr.features(encoder, loader, lambda x: x, "train")
    by_estimate, _ = main_simclr.features(encoder, loader, lambda x: x, "eval")
    assert not torch.allclose(by_batch, by_estimate)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_rates_rise_fall_and_stay_through_an_epoch():
    values = {**TINY, "data": contract.settings.Data(), "epochs": 10, "lr": 1.0, "warmup_epochs": 2}
    by_step, by_epoch = (main_simclr.schedules(Settings(**values, lr_every=e))["lr"] for e in ("step", "epoch"))
    assert by_step(0.1) == pytest.approx(0.5)
    assert by_epoch(0.19) == by_epoch(0.1) == pytest.approx(0.5)
    assert by_step(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"augment": "saliency_crop"}, "saliency_path=null"),
        ({"augment": "simclr", "saliency_path": "maps.npy"}, "saliency_path=maps.npy"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"crop_temperature": 0.0}, "crop_temperature=0"),
        ({"schedule": "published", "warmup_epochs": 1}, "warmup_epochs=1"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(values, says):
    with pytest.raises(SettingsError, match=says) as refused:
        contract.settings.read({**TINY, **values})
    assert "\n" not in str(refused.value)


def test_maps_that_do_not_belong_to_the_pictures_are_refused(tmp_path):
    good = np.random.default_rng(0).random((6, 1, 8, 8), np.float32)
    holed = good.copy()
    holed[3, 0, 0, 0] = np.nan
    for name, each in {
        "good": good, "other": good[:, :, :4], "flat": np.ones_like(good), "three": np.tile(good, (1, 3, 1, 1)),
        "few": good[:5], "holed": holed, "bare": good[:, 0],
    }.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", each)
    (tmp_path / "text.npy").write_text("no array")
    index = torch.tensor([4, 0])
    for name in ("good", "bare"):
        assert torch.equal(Maps(tmp_path / f"{name}.npy", 6, 8)[index], torch.from_numpy(good[[4, 0]]))
    for name, says in {
        "none": "no file", "other": "expected 1 x 8 x 8", "flat": "flat", "three": "3 x 8 x 8",
        "few": "5 maps for 6 pictures", "text": "not a .npy file", "holed": "picture 3 is not finite",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=says) as refused:
            Maps(tmp_path / f"{name}.npy", 6, 8)
        assert "\n" not in str(refused.value)


def test_the_spectral_residual_sees_the_odd_one():
    pictures = 0.4 + 0.1 * torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    pictures[0, :, 30:36, 10:16] = 1
    pictures[1] = 0.3
    maps = spectral.residual(pictures)
    row, column = divmod(int(maps[0].argmax()), 48)
    assert 30 <= row < 36
    assert 10 <= column < 16
    assert not maps[1].any()
    assert maps[0].std().item() == pytest.approx(1, rel=1e-3)


def test_maps_are_made_and_trained_with(make_run, work, tmp_path):
    data = TINY["data"]
    maps = make_run(tmp_path / "maps", worker="make_saliency", data=data, image_size=16, batch_size=20)
    ended = work(maps)
    assert ended.returncode == 0, ended.stdout
    assert np.load(maps / "saliency.npy").shape == (48, 1, 16, 16)

    values = {**TINY, "augment": "saliency_crop", "linear": {"epochs": 3, "batch_size": 8, "bn_mode": "train"}}
    run = make_run(tmp_path / "run", **values, saliency_path=str(maps))
    ended = work(run)
    assert ended.returncode == 0, ended.stdout
    done = json.loads((run / rundir.DONE).read_text())["metrics"]
    assert {"linear/top1", "linear/loss", "linear/train_top1", "knn/loo1"} <= set(done)
    assert 0 <= done["linear/top1"] <= 1
    encoder = load_encoder(str(run))
    assert encoder.mean == (0.0, 0.0, 0.0)


def test_the_published_linear_evaluation_can_be_asked_for():
    said = Linear(epochs=500, lr=3e-4, image_size=224, bn_mode="train", drop_last=True)
    assert Settings(worker="main_simclr", linear=said).linear.drop_last


def test_two_files_of_maps_with_one_name_are_two_sciences(tmp_path):
    known = []
    for folder, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "maps.npy"
        path.write_bytes(content)
        said = {"worker": "main_simclr", "augment": "saliency_crop", "saliency_path": str(path)}
        known.append(contract.settings.read(said).science()["saliency_path"])
    assert known[0] == known[2] != known[1]
