"""MIM across eye movements against stored numbers: network, loss, statistics, early stopping, filter of masks."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contract.settings.main_eyemim import Readout
from contract.settings.segment_objects import Settings as SegmentSettings
from tests.parity.stored import arrays, assert_close, cases, part
from workers.data.segments import enough
from workers.engine.readout import EarlyStopping
from workers.losses.sparsity import covariance, hidden_error, population_sparsity, unit_sparsity
from workers.main_eyemim import EyeMIM
from workers.models.conv_autoencoder import BLOCKS, ConvDecoder, ConvEncoder, published
from workers.transforms import windows
from workers.transforms.hide import EyeMovement


def method(state: dict[str, Tensor], image_size: int) -> EyeMIM:
    """The network of a published state's sizes, with its weights."""
    firsts = sorted({int(k.split(".")[1]) for k in state if k.startswith("encoder.")})[::BLOCKS]
    widths = [len(state[f"encoder.{number}.conv1.weight"]) for number in firsts]
    model = EyeMIM(ConvEncoder(widths, image_size), ConvDecoder(widths))
    for name in ("encoder", "decoder"):
        getattr(model, name).load_state_dict(published(state, name))
    return model


def by_formula(stored: Any) -> dict[str, Tensor]:
    """The weights that the file describes instead of holding them."""
    slope, step = stored["fill_phase"].tolist()
    state = {}
    names = zip(stored["state_keys"].tolist(), stored["state_shapes"].tolist(), strict=True)
    for number, (key, text) in enumerate(names):
        shape = ast.literal_eval(text)
        size = math.prod(shape)
        amplitude = 0.05 if key.endswith("bias") else 1 / math.sqrt(size // shape[0])
        values = amplitude * np.sin(slope * np.arange(size) + step * number + 0.2)
        state[key] = torch.from_numpy(values.reshape(shape)).float()
    return state


def images(u8: Any) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W)."""
    return torch.as_tensor(u8).permute(0, 3, 1, 2).float() / 255


def gradients(model: EyeMIM, names: Any) -> dict[str, Tensor | None]:
    """Under the published names; None for the skips that nothing passes."""
    found: dict[str, Tensor | None] = dict.fromkeys(names)
    for name in ("encoder", "decoder"):
        places = published({n: torch.full(_shape(n, model), i) for i, n in enumerate(names)}, name)
        for own, parameter in getattr(model, name).named_parameters():
            found[list(names)[int(places[own].flatten()[0])]] = parameter.grad
    return found


def _shape(name: str, model: EyeMIM) -> tuple[int, ...]:
    """Enough of a shape for ``published`` to see which skips are used."""
    network, number, layer, kind = name.split(".")
    block = getattr(model, network).blocks[int(number) // 2]
    if layer != "match_dim" or kind == "bias":
        return (1,)
    return (1, 2) if isinstance(block.skip, nn.Module) and not isinstance(block.skip, nn.Identity) else (1, 1)


@pytest.mark.parametrize("path", cases("bio/eyemim_model_full*.npz"))
def test_the_network_of_full_size(path: Path):
    with np.load(path) as file:
        stored = {name: file[name] for name in file.files}
    state, x = by_formula(stored), images(stored["image_u8"])
    model = method(state, x.shape[-1])
    unused = sum(v.numel() for k, v in state.items() if "match_dim" in k) - sum(
        p.numel() for n, p in model.named_parameters() if ".skip." in n
    )
    assert sum(p.numel() for p in model.parameters()) + unused == sum(v.numel() for v in state.values())

    latent = model.encoder(x)
    output = model.decoder(latent)
    for name, found in (("latent", latent), ("output", output)):
        if name in stored:
            assert_close(found, torch.from_numpy(stored[name]), 1e-4, name)
    weight = torch.zeros_like(x[:, :1])
    weight[:, :, 24:72, 16:80] = 1
    loss = hidden_error(output, x, weight)
    assert_close(loss, torch.tensor(float(stored["loss"])), 1e-5, "loss")
    loss.backward()
    norms = torch.from_numpy(stored["grad_norm"])
    grads = gradients(model, stored["state_keys"].tolist())
    for (name, gradient), expected in zip(grads.items(), norms, strict=True):
        assert (gradient is None) == bool(expected.isnan()), name
        if gradient is not None:
            assert_close(gradient.norm(), expected, 3e-2, name)  # as far as these are from double precision


@pytest.mark.parametrize("path", cases("bio/eyemim_model_tiny*.npz"))
def test_a_step_of_the_network(path: Path):
    stored = arrays(path)
    state, x, target = part(stored, "sd/"), stored["input"], stored["target"]
    model, weight = method(state, x.shape[-1]), stored["mask"][:, None]
    latent = model.encoder(x)
    assert_close(latent, stored["latent"], 1e-4, "latent")
    assert_close(model.decoder(latent), stored["output"], 1e-5, "output")

    rate, decay = next(
        (float(lr.replace("e_", "e-")), float(wd.replace("e_", "e-")))
        for lr, wd in (name.partition("_lr")[2].split("_wd") for name in stored if "_adam_step_lr" in name)
    )
    optimizer = torch.optim.Adam(model.parameters(), rate, weight_decay=decay, fused=True)
    loss = hidden_error(model.decoder(latent), target, weight)
    assert_close(loss, stored["loss"], 1e-5, "loss")
    loss.backward()
    wanted = part(stored, "grad/")
    found = gradients(model, list(state))
    assert set(wanted) <= {name for name, g in found.items() if g is not None}
    for name, gradient in wanted.items():
        mine = found[name]
        assert mine is not None
        assert_close(mine, gradient, 1e-3, name)
    optimizer.step()
    after = next(value for name, value in stored.items() if "_adam_step_lr" in name)
    assert_close(hidden_error(model.decoder(model.encoder(x)), target, weight), after, 1e-5, "loss after a step")


@pytest.mark.parametrize("path", cases("bio/eyemim_earlystop*.npz"))
def test_early_stopping(path: Path):
    stored = arrays(path)
    settings = Readout()
    for series, epochs, best in zip(stored["val_loss"], stored["epochs_run"], stored["best_epoch_1based"], strict=True):
        rule, lowest, ran = EarlyStopping(settings.patience, settings.min_delta), 0, -1
        for epoch, loss in enumerate(series.tolist(), start=1):
            if rule.see(loss):
                lowest = epoch
            if rule.stop:
                ran = epoch
                break
        assert ran == int(epochs)
        assert int(best) in (lowest, -1)


@pytest.mark.parametrize("path", cases("bio/eyemim_segfilter*.npz"))
def test_the_filter_of_masks(path: Path):
    stored = arrays(path)
    settings = SegmentSettings(worker="segment_objects", image_size=stored["masks"].shape[-1])
    assert torch.equal((stored["masks"] >= settings.min_confidence).sum((1, 2)), stored["n_confident"])
    kept = enough(stored["masks"], settings.min_pixels, settings.min_confidence)
    assert torch.equal(kept, stored["saved_by_filter"])


@pytest.mark.parametrize("path", cases("bio/eyemim_segment_loss*.npz"))
def test_the_loss_on_the_main_object(path: Path):
    stored = arrays(path)
    x = images(stored["image_u8"])
    sure = torch.ones_like(x[:, 0])
    for name, mask in stored.items():
        if name.startswith("seg_image"):
            sure[int(name.removeprefix("seg_image"))] = mask
    has = [i for i in range(len(x)) if f"seg_image{i}" in stored]
    assert stored["kept_indices"].tolist() == has
    for place, mask in part(stored, "kept_mask_").items():
        assert torch.equal(mask, stored["mask_periphery"][has[int(place)]])
    predicted = stored["recon_u8"].float() / 255
    for name in (name for name in stored if name.startswith("loss_")):
        mode = name.removeprefix("loss_")
        weight = stored[f"mask_{mode}"]
        assert_close(hidden_error(predicted, x, weight[:, None]), stored[name], 1e-5, mode)
        eye = EyeMovement(x.shape[-1], "none" if mode == "None" else mode, crop=False)  # type: ignore[arg-type]
        if mode in ("foveate", "None"):  # these draw nothing and have no ratio
            draws = eye.draw(torch.zeros(len(x), eye.numbers, dtype=torch.float64), (x.shape[2], x.shape[3]))
            assert_close(eye.apply(x, draws).mask[:, 0] * sure, weight, 1e-6, mode)
    where = stored["cropped_seg_top_left_h_w"][None]
    index = next(int(place) for place in part(stored, "cropped_seg_mask_index"))
    cropped = windows.cut(sure[index][None, None], where, x.shape[-1])
    assert_close(cropped[0, 0], stored[f"cropped_seg_mask_index{index}"], 1e-5, "the mask in a crop")


@pytest.mark.parametrize("path", cases("bio/eyemim_sparsity*.npz"))
def test_statistics_of_a_representation(path: Path):
    stored = arrays(path)
    x = stored["reps"]
    assert_close(unit_sparsity(x), stored["unit"], 1e-5, "unit")
    assert_close(unit_sparsity(x).mean(), stored["unit_mean"], 1e-5, "unit mean")
    assert_close(population_sparsity(x), stored["population"], 1e-5, "population")
    assert_close(population_sparsity(x).mean(), stored["population_mean"], 1e-5, "population mean")
    assert_close(covariance(x), stored["cov_loss_divisor_B_minus_1"], 1e-5, "covariance")
    for divisor, value in part(stored, "cov_loss_divisor_").items():
        if divisor.isdigit():
            assert_close(covariance(x, int(divisor)), value, 1e-5, divisor)
