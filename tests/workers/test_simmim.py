"""SimMIM without reference numbers, and its worker on pictures of noise."""

from __future__ import annotations

import json

import pytest
import torch

from contract import rundir
from contract.settings import SettingsError
from contract.settings.main_simmim import Settings
from workers import main_simmim
from workers.engine.encoder import load_encoder
from workers.main_simmim import SimMIM

SMALL = {"patch_size": 2, "input_size": 12, "mask_patch_size": 4, "drop_path": 0.0}


def settings(**values: object) -> Settings:
    return Settings(worker="main_simmim", **{"lr": 1e-3, **SMALL, **values})


def method(**values: object) -> SimMIM:
    torch.manual_seed(0)
    return main_simmim.build(settings(**values))


def test_whole_cells_are_hidden_equally_many_in_every_picture():
    model = method()
    mask = model.mask(model.draw(torch.empty(200, 3, 1, 1))).view(200, 3, 2, 3, 2).float()
    assert torch.equal(mask.amax((2, 4)), mask.amin((2, 4)))
    assert mask.amax((2, 4)).sum((1, 2)).unique().tolist() == [6]  # of 9, 0.6 rounded up
    assert (mask.mean(0) - 6 / 9).abs().max() < 0.15  # no place is preferred


def test_only_hidden_pixels_count_and_none_of_them_is_seen():
    model = method()
    images, noise = torch.randn(2, 3, 12, 12), torch.rand(2, 9)
    mask = model.mask(noise)
    hidden = model.pixels(mask)
    rebuilt = model.rebuild(images, mask)
    others = torch.where(hidden > 0, torch.randn_like(images), images)
    torch.testing.assert_close(model.rebuild(others, mask), rebuilt)
    expected = (rebuilt - images).abs()[(hidden > 0).expand_as(images)].mean()
    torch.testing.assert_close(model(images, noise)["loss"], expected)


def test_all_that_is_trained_gets_a_gradient():
    for values in ({}, {"bias": "per_block", "absolute": True}):
        model = method(**values)
        model(torch.randn(2, 3, 12, 12))["loss"].backward()
        assert all(p.grad is not None for p in model.parameters())


def test_the_rate_rises_and_falls_in_steps():
    s = settings(epochs=10, warmup_epochs=2, milestones=[6, 9], gamma=0.5, warmup_lr_frac=0.1)
    rate = main_simmim.schedules(s)["lr"]
    expected = {0: 1e-4, 1: 5.5e-4, 2: 1e-3, 5.99: 1e-3, 6: 5e-4, 8.9: 5e-4, 9: 2.5e-4, 9.9: 2.5e-4}
    assert {epoch: rate(epoch / 10) for epoch in expected} == pytest.approx(expected)


def test_the_rate_is_per_512_pictures():
    s = Settings(worker="main_simmim", blr=1e-4, batch_size=128)
    s.resolve_batch(16)
    assert s.peak_lr == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio=1.0.*of 9 cells"),
        ({"mask_ratio": 0.95}, r"mask_ratio=0.95.*up to 0.889"),
        ({"mask_ratio": 0.0}, r"mask_ratio=0.0.*above 0"),
        ({"mask_patch_size": 3}, r"mask_patch_size=3.*multiple of patch_size=2"),
        ({"input_size": 14}, r"input_size=14.*choose 8, 12"),
        ({"input_size": 4}, r"input_size=4.*two or more cells"),
        ({"milestones": [5, 3]}, r"milestones=\[5, 3\].*rising"),
        ({"milestones": [0]}, r"milestones=\[0\].*from 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(values, message):
    with pytest.raises(SettingsError, match=message) as caught:
        settings(**values)
    assert "\n" not in str(caught.value)
    model = method()
    with pytest.raises(ValueError, match=r"hidden=9: of 9 cells choose 1 to 8"):
        SimMIM(model.encoder, cell=2, hidden=9)


def test_a_run_leaves_an_encoder_a_figure_and_a_falling_loss(tmp_path, make_run, work):
    data = {"name": "fake", "size": 16, "length": 64}
    sizes = {"input_size": 16, "patch_size": 4, "mask_patch_size": 4, "batch_size": 8}
    said = {"worker": "main_simmim", "data": data, **sizes, "epochs": 6, "warmup_epochs": 1, "milestones": [5]}
    folder = make_run(tmp_path / "simmim", **said, log_every=4, blr=0.2, eval_freq=3)
    done = work(folder)
    assert done.returncode == 0, done.stderr
    assert "knn/loo1" in json.loads((folder / rundir.DONE).read_text())["metrics"]
    lines = [json.loads(line) for line in (folder / rundir.METRICS).read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.97 * losses[0]
    assert (folder / rundir.FIGURES / "reconstruction.png").stat().st_size > 1000
    encoder = load_encoder(str(folder))
    assert encoder.tokens(torch.randn(2, 3, 16, 16)).shape == (2, 17, encoder.width)
