"""Latent MIM, forward and backward, against what the published program computes from the same weights and draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.parity import published_lmim as published
from tests.parity.stored import arrays, assert_close, cases, facts
from workers import main_lmim
from workers.main_lmim import LatentMIM
from workers.masking.patches import patchify, take
from workers.masking.random import split

PRECISIONS = [
    pytest.param((torch.float64, "", 1e-9), id="float64"),
    pytest.param((torch.float32, "_f32", 1e-4), id="float32"),
]
FORWARD = pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*_forward.npz"))
PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


def load(path: Path, dtype: torch.dtype, **changes: object) -> tuple[LatentMIM, dict[str, Tensor]]:
    stem = path.name.removesuffix("_forward.npz")
    config, state = facts(path.with_name(f"{stem}_config.json")), arrays(path.with_name(f"{stem}_state.npz"))
    return published.module(config, state, dtype, **changes), arrays(path)


def config_of(path: Path) -> dict[str, object]:
    found: dict[str, object] = facts(path.with_name(path.name.replace("_forward.npz", "_config.json")))
    return found


def listen(method: LatentMIM, seen: dict[str, Tensor]) -> None:
    """Note down the outputs of the parts under the names of the stored arrays."""

    def note(key: str, part: nn.Module) -> None:
        part.register_forward_hook(lambda _m, _i, out: seen.__setitem__(key, out))

    note("enc_patch_embed", method.encoder.patch_embed)
    note("enc_norm", method.encoder)
    note("enc_out", method.projector)
    note("dec_embed", method.decoder.embed)
    note("dec_norm", method.decoder.norm)
    for prefix, part in (("enc", method.encoder), ("tgt", method.target_encoder), ("dec", method.decoder)):
        for i, block in enumerate(part.blocks):
            note(f"{prefix}_block{i}", block)


@FORWARD
def test_the_pixels_and_the_views_are_the_published_ones(path: Path) -> None:
    method, stored = load(path, torch.float64)
    draws = published.draws(stored)
    patches = patchify(stored["images"], method.encoder.patch_size, method.patch_gap, draws.jitter)
    assert torch.equal(patches, stored["patch_pix"])
    visible, hidden = split(draws.noise, method.num_vis)
    assert torch.equal(visible, stored["vis_idx"])
    assert torch.equal(hidden, stored["mask_idx"])
    assert torch.equal(stored["trg_idx"], hidden if method.mask_target else torch.cat([visible, hidden], 1))


@FORWARD
@PRECISION
def test_every_intermediate_is_the_published_one(path: Path, precision: tuple[torch.dtype, str, float]) -> None:
    dtype, suffix, relative = precision
    config, seen = config_of(path), dict[str, Tensor]()
    method, stored = load(path, dtype)
    listen(method, seen)
    method.before_step(config["mom"], config["sim_trg"])
    out = method(stored["images"].to(dtype), published.draws(stored))

    visible, hidden = split(stored["view_noise"], method.num_vis)
    table = method.decoder.pos_embed[0, 1:]
    if method.decoder.with_cues:
        seen["dec_mask_cue"] = method.decoder.cues(seen["dec_embed"][:, 1:], table[hidden], table[visible])
    seen["dec_out_full"] = method.decoder.head(seen["dec_norm"])
    ids = hidden if method.mask_target else torch.cat([visible, hidden], 1)
    patches = take(stored["patch_pix"].to(dtype), ids)
    seen["tgt_out"] = method.target_projector(method.target_encoder(patches, ids))
    seen["metrics"] = torch.stack([out["avg_sim_pred"], out["avg_sim_vis"], out["avg_sim_trg"]])
    linear = [p for name, p in method.target_projector.named_parameters() if name == "0.weight"]
    seen["target_params_after_ema_sample"] = linear[0] if linear else method.target_encoder.norm.weight

    wanted = [k for k in stored if k.startswith(("enc_", "tgt_", "dec_", "metrics", "target_params"))]
    wanted = [k for k in wanted if not k.endswith("_without_ema") and k.endswith("_f32") == bool(suffix)]
    assert {"enc_out", "dec_out_full", "tgt_out", "metrics"} <= {k.removesuffix(suffix) for k in wanted}
    for key in wanted:
        assert_close(seen[key.removesuffix(suffix)], stored[key], relative, key)


@FORWARD
@PRECISION
def test_every_loss_and_its_gradients_are_the_published_ones(
    path: Path, precision: tuple[torch.dtype, str, float]
) -> None:
    dtype, suffix, relative = precision
    config = config_of(path)
    losses = [k for k in arrays(path) if k.startswith("loss_") and k[-1] in "01"]
    assert losses
    for key in losses:
        name, regularised = key.removeprefix("loss_").rsplit("_reg", 1)
        coefficient = config["reg_coeff"] if int(regularised) else 0.0
        method, stored = load(path, dtype, loss=name, avg_sim_coeff=coefficient)
        method.before_step(config["mom"], config["sim_trg"])
        loss = method(stored["images"].to(dtype), published.draws(stored))["loss"]
        loss.backward()
        assert_close(loss, stored[key + suffix], relative, key)

        gradients = [p.grad for p in published.named(method, config["names_with_grad"])]
        assert sum(p.grad is not None for p in method.parameters()) == len(gradients)
        norms = torch.stack([g.norm() for g in gradients if g is not None])
        expected = stored[f"gradnorm_per_param_{name}_reg{regularised}{suffix}"].to(dtype)
        rounding = relative / 100 * expected.max().item()  # all that the gradients of constant directions are
        torch.testing.assert_close(norms, expected, rtol=relative, atol=rounding, msg=lambda m, k=key: f"{k}: {m}")
        per_group = [
            torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for group in main_lmim.groups(method, published.settings())
        ]
        assert_close(
            torch.stack(per_group), stored[f"gradnorm_per_group_{name}_reg{regularised}{suffix}"], relative, key
        )


@FORWARD
def test_without_the_moving_average_the_target_is_what_was_loaded(path: Path) -> None:
    method, stored = load(path, torch.float64)
    seen: dict[str, Tensor] = {}
    method.target_projector.register_forward_hook(lambda _m, _i, out: seen.__setitem__("tgt_out", out))
    loss = method(stored["images"].double(), published.draws(stored))["loss"]
    assert_close(loss, stored["loss_infonce_patches_reg0_without_ema"], 1e-9)
    assert_close(seen["tgt_out"], stored["tgt_out_without_ema"][:, -seen["tgt_out"].shape[1] :], 1e-9)


@FORWARD
def test_the_parameter_groups_are_the_published_ones(path: Path) -> None:
    method, _ = load(path, torch.float64)
    names = {id(p): name for name, p in method.named_parameters()}
    wanted = config_of(path)["param_groups"]
    decay = max(group["weight_decay"] for group in wanted)
    found = main_lmim.groups(method, published.settings(weight_decay=decay))
    assert [group["weight_decay"] for group in found] == [group["weight_decay"] for group in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert sorted(names[id(p)] for p in ours["params"]) == sorted(map(published.our_name, theirs["names"]))
