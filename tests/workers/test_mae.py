"""MAE without reference numbers, and its worker on pictures of noise."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from torch import Tensor

from contract import rundir
from contract.settings import SettingsError
from contract.settings.main_mae import Settings
from workers import main_mae
from workers.engine.encoder import load_encoder
from workers.main_mae import MAE
from workers.masking.patches import patchify

SMALL = {"patch_size": 2, "input_size": 8, "decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}
WORK = {"worker": "main_mae", "data": {"name": "fake", "size": 16, "length": 64}, "input_size": 16, "batch_size": 8,
        "decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1, "log_every": 4, "blr": 8e-3}  # fmt: skip


def settings(**values: object) -> Settings:
    return Settings(worker="main_mae", **{"lr": 1e-3, **SMALL, **values})


def method(**values: object) -> MAE:
    torch.manual_seed(0)
    return main_mae.build(settings(**values))


def test_the_encoder_runs_on_the_kept_patches_only():
    model, seen = method(), []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[1]))
    model(torch.randn(2, 3, 8, 8))
    assert seen == [1 + 4] * model.encoder.depth  # a quarter of 16, and the class token


def test_hidden_pixels_change_the_loss_but_not_the_prediction():
    model = method(norm_pix_loss=False)
    images, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 16)
    hidden, rebuilt = model.rebuild(images, noise)
    assert hidden.mean().item() == 0.75
    others = torch.where(hidden > 0, torch.randn_like(images), images)
    again, same = model.rebuild(others, noise)
    assert torch.equal(hidden, again)
    torch.testing.assert_close(same, rebuilt)
    shown = torch.where(hidden > 0, 0.0, images)
    torch.testing.assert_close(torch.where(hidden > 0, 0.0, rebuilt), shown)
    assert (model(others, noise)["loss"] - model(images, noise)["loss"]).abs() > 1e-3
    error = ((rebuilt - images).square() * hidden).sum() / (3 * hidden.sum())
    torch.testing.assert_close(model(images, noise)["loss"], error)


def test_targets_have_no_mean_and_no_contrast_of_their_own():
    model, images = method(), 3 * torch.randn(2, 3, 8, 8) + 5
    target = model.target(patchify(images, 2))
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std(-1), torch.ones(2, 16), atol=1e-3, rtol=0)
    flat = model.target(torch.full((1, 1, 12), 2.0))
    assert torch.equal(flat, torch.zeros_like(flat))


def test_all_that_is_trained_gets_a_gradient_and_positions_do_not_move():
    model = method()
    model(torch.randn(2, 3, 8, 8))["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {"encoder.pos_embed", "decoder.pos_embed"} <= set(dict(model.named_buffers()))


def loss_under(model: MAE, images: Tensor, noise: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss: Tensor = model(images, noise)["loss"]
    return loss


def test_the_loss_is_of_float32_under_bf16():
    model, images, noise = method(), torch.randn(4, 3, 8, 8), torch.rand(4, 16)
    full, low = (loss_under(model, images, noise, dtype) for dtype in (None, torch.bfloat16))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.02, atol=0)


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.5, 8), (0.01, 15), (0.99, 1), (0.9, 2)])
def test_at_least_one_patch_is_kept_and_one_hidden(ratio, kept):
    assert settings(mask_ratio=ratio).kept == kept
    assert torch.isfinite(method(mask_ratio=ratio)(torch.randn(2, 3, 8, 8))["loss"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio=1.0.*above 0 and below 1"),
        ({"mask_ratio": 0.0}, r"mask_ratio=0.0.*above 0 and below 1"),
        ({"input_size": 9}, r"input_size=9.*choose 4, 6, \.\.\."),
        ({"input_size": 1}, r"input_size=1.*patch_size=2"),
        ({"input_size": 2}, r"input_size=2.*two or more patches"),
        ({"decoder_dim": 18}, r"decoder_dim=18.*multiple of 4"),
        ({"min_crop": 0.0}, r"min_crop=0.0.*above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(values, message):
    with pytest.raises(SettingsError, match=message) as caught:
        settings(**values)
    assert "\n" not in str(caught.value)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images of 6 x 8 pixels: expected 8 x 8"):
        method()(torch.randn(1, 3, 6, 8))
    model = method()
    with pytest.raises(ValueError, match=r"kept=16: of 16 patches choose 1 to 15"):
        MAE(model.encoder, model.decoder, kept=16)


def test_a_run_leaves_an_encoder_a_figure_and_a_falling_loss(tmp_path, make_run, work):
    folder = make_run(tmp_path / "mae", **WORK, epochs=6, warmup_epochs=1, eval_freq=3)
    done = work(folder)
    assert done.returncode == 0, done.stderr
    assert "knn/loo1" in json.loads((folder / rundir.DONE).read_text())["metrics"]
    lines = [json.loads(line) for line in (folder / rundir.METRICS).read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.97 * losses[0]
    assert (folder / rundir.FIGURES / "reconstruction.png").stat().st_size > 1000
    encoder = load_encoder(str(folder))
    said = yaml.safe_load((folder / rundir.CONFIG).read_text())
    assert encoder.image_size == said["input_size"]
    assert encoder.tokens(torch.randn(2, 3, 16, 16)).shape == (2, 17, encoder.width)
