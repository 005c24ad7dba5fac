"""SimCLR's loss, schedule, linear evaluation and checkpoints against the published program's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis.conditions import difference, smoothed
from contract.settings.main_simclr import Settings
from tests.parity.stored import arrays, assert_close, cases
from workers import main_simclr
from workers.engine.logistic import logistic
from workers.interop import published
from workers.losses.ntxent import accuracy, ntxent, pairs, similarities


@pytest.mark.parametrize("path", cases("bio/bio_ntxent.npz"))
def test_the_loss_its_gradient_and_the_accuracy(path: Path) -> None:
    stored = arrays(path)
    for k in (name.removeprefix("loss") for name in stored if name.startswith("loss")):
        x = stored[f"features{k}"].double().requires_grad_()
        z = F.normalize(x, dim=1)
        place, positive = pairs(len(z))
        logits = similarities(z, z, place, stored[f"temperature{k}"].item())
        loss = ntxent(logits, positive)
        loss.backward()
        assert_close(loss, stored[f"loss{k}"], 2e-6)
        assert x.grad is not None
        assert_close(x.grad, stored[f"grad{k}"], 2e-6)
        tops = [accuracy(logits, positive, top).item() for top in (1, 5)]
        assert [100 * top for top in tops] == pytest.approx([stored[f"top{top}_{k}"].item() for top in (1, 5)])
        others = logits.masked_fill(F.one_hot(positive, len(z)).bool(), -torch.inf)
        mine = torch.cat([logits.gather(1, positive[:, None]), others[others.isfinite()].view(len(z), -1)], dim=1)
        assert_close(mine, stored[f"logits{k}"], 2e-6)  # the positive first, the others in their order


@pytest.mark.parametrize("path", cases("bio/bio_linear_eval.npz"))
def test_the_linear_evaluation_epoch_by_epoch(path: Path) -> None:
    stored = arrays(path)
    curve = stored["train_loss_acc_per_epoch"]
    train, val = ((stored[f"X_{split}"], stored[f"y_{split}"]) for split in ("train", "test"))
    found = logistic(train, val, stored["W_init"], epochs=len(curve), batch_means=True)
    assert_close(found.curve, curve, 1e-3)
    assert_close(found.weight, stored["W_final"], 1e-3)
    assert_close(found.bias, stored["b_final"], 1e-3)
    assert found.loss == pytest.approx(stored["final_test_loss"].item(), rel=1e-3)
    assert found.top1 == pytest.approx(stored["final_test_acc"].item(), abs=1e-6)


@pytest.mark.parametrize("path", cases("bio/bio_resnet_keys.npz"))
@pytest.mark.parametrize("wrapped", [True, False])
def test_checkpoints_of_the_program_are_read(path: Path, wrapped: bool) -> None:
    """Of the wrapper, as at the end of training, and of the network in it, as along the way."""
    stored = np.load(path)
    for arch in (name.removesuffix("_keys") for name in stored.files if name.endswith("_keys")):
        shapes = [[int(n) for n in re.findall(r"\d+", shape)] for shape in stored[f"{arch}_shapes"].tolist()]
        named = dict(zip(stored[f"{arch}_keys"].tolist(), shapes, strict=True))
        torch.manual_seed(0)
        state = {key: torch.rand(shape) for key, shape in named.items()}
        inner = {key.removeprefix("backbone."): value for key, value in state.items()}
        saved = {"arch": arch, "state_dict": state if wrapped else inner, "optimizer": {}}
        encoder, words = published.encoder(saved)
        assert encoder.kwargs["arch"] == arch in words
        assert encoder.std == (1.0, 1.0, 1.0)
        ours = encoder.state_dict()
        assert set(ours) == {key for key in inner if not key.startswith("fc.")}
        assert all(torch.equal(ours[key].float(), inner[key].to(ours[key].dtype).float()) for key in ours)

        dim = int(stored[f"{arch}_out_dim"])
        settings = Settings(worker="main_simclr", arch=arch, projector_dim=dim)
        parameters = sum(p.numel() for p in main_simclr.build(settings).parameters())
        assert parameters == stored[f"{arch}_n_params"]


@pytest.mark.parametrize("path", cases("bio/bio_schedule_posthoc.npz"))
def test_the_published_rate_of_every_epoch(path: Path) -> None:
    stored = arrays(path)
    rates, epochs = stored["lr_used_in_epoch"], len(stored["lr_used_in_epoch"])
    settings = Settings(
        worker="main_simclr",
        epochs=epochs,
        lr=rates[0].item(),
        schedule="published",
        period=int(stored["T_max"]),
    )
    rate = main_simclr.schedules(settings)["lr"]
    for within in (0.0, 0.99):
        assert [rate((e + within) / epochs) for e in range(epochs)] == pytest.approx(rates.tolist(), rel=1e-9)


@pytest.mark.parametrize("path", cases("bio/bio_schedule_posthoc.npz"))
def test_smoothed_curves_and_the_bootstrap_of_a_difference(path: Path) -> None:
    stored = arrays(path)
    series = stored["series"].tolist()
    for name in (name for name in stored if name.startswith("ema_alpha_")):
        alpha = float(name.removeprefix("ema_alpha_").replace("_", "."))
        assert smoothed(series, alpha) == pytest.approx(stored[name].tolist(), rel=1e-9)
    one, other = stored["boot_group1"].numpy(), stored["boot_group2"].numpy()
    draws = stored["boot_index1"].long().numpy(), stored["boot_index2"].long().numpy()
    found = difference(one, other, draws)
    assert found.mean == pytest.approx(stored["boot_mean"].item(), rel=1e-6)
    assert [found.low, found.high] == pytest.approx(stored["boot_quantiles"].tolist(), rel=1e-6)
