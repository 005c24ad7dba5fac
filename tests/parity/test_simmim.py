"""SimMIM's forward pass, masks, schedule and a few epochs of its training, against the published program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.settings.main_simmim import Settings
from tests.parity.stored import arrays, assert_close, cases, facts, part
from workers import main_simmim, models
from workers.engine import optim
from workers.main_simmim import SimMIM
from workers.models.beit import BEiT


def method(meta: dict[str, Any], case: dict[str, Any], state: dict[str, Tensor]) -> SimMIM:
    """The method of the stored sizes and weights, without drop path."""
    kwargs = {
        "dim": meta["D"],
        "depth": meta["depth"],
        "heads": meta["heads"],
        "mlp_ratio": float(meta["mlp_ratio"]),
        "patch_size": meta["patch"],
        "grid_size": meta["img"] // meta["patch"],
        "bias": "shared" if case["shared_rel_pos_bias"] else "per_block",
        "absolute": case["absolute_pos_embed"],
        "drop_path": 0.0,
    }
    encoder = models.build("beit", kwargs)
    assert isinstance(encoder, BEiT)
    model = SimMIM(encoder, cell=meta["mask_patch"] // meta["patch"], hidden=meta["mask_count"])
    model.load_state_dict(state)
    return model


def noise_of(order: Tensor) -> Tensor:
    """The noise (B, cells) whose order is the given one."""
    return order.argsort(1).float() / order.shape[1]


def noise_behind(model: SimMIM, mask: Tensor) -> Tensor:
    """A noise that hides the patches of ``mask`` (B, rows, columns), which is made of whole cells."""
    noise = 1.0 - mask[:, :: model.cell, :: model.cell].flatten(1).float()
    assert torch.equal(model.mask(noise), mask.flatten(1).bool())
    return noise


def each_case(pattern: str) -> Any:
    return [
        pytest.param(found.values[0], name, id=f"{found.id}-{name}")
        for found in cases(pattern)
        for name, said in facts(found.values[0]).items()
        if isinstance(said, dict) and "loss" in said
    ]


@pytest.mark.parametrize(("path", "name"), each_case("beyond_cls/simmim_meta.json"))
def test_the_forward_pass_is_the_published_one(path: Path, name: str) -> None:
    meta, stored = facts(path), arrays(path.with_name("simmim.safetensors"))
    case, found = meta[name], part(stored, f"{name}.")
    model = method(meta, case, part(found, "sd."))
    noise = noise_of(stored["perm"])
    mask = model.mask(noise)
    assert torch.equal(mask.unflatten(1, model.encoder.grid).long(), stored["mask"])
    tokens = model.encoder(stored["imgs"], mask)[:, 1:]
    assert_close(tokens.transpose(1, 2).unflatten(2, model.encoder.grid), found["z"], 1e-4, "tokens")
    if "x_rec" in found:
        assert_close(model.rebuild(stored["imgs"], mask), found["x_rec"], 1e-4, "pixels")
    loss = model(stored["imgs"], noise)["loss"]
    assert_close(loss, torch.tensor(case["loss"]), 1e-5, "loss")
    loss.backward()
    for parameter, norm in case["grad_norms"].items():
        if norm is not None:
            gradient = model.get_parameter(parameter).grad
            assert gradient is not None, parameter
            assert_close(gradient.norm(), torch.tensor(norm), 1e-3, parameter)
    for parameter, gradient in part(found, "grad.").items():
        ours = model.get_parameter(parameter).grad
        assert ours is not None
        assert_close(ours, gradient, 1e-3, parameter)


@pytest.mark.parametrize("path", cases("beyond_cls/simmim_meta.json"))
def test_masks_are_the_published_ones_for_the_same_order(path: Path) -> None:
    for row in facts(path)["mask_generator"]:
        side, cell = row["input_size"], row["mask_patch_size"]
        settings = Settings(
            worker="main_simmim",
            input_size=side,
            patch_size=row["model_patch_size"],
            mask_patch_size=cell,
            mask_ratio=row["mask_ratio"],
        )
        assert settings.cells == row["token_count"]
        assert settings.hidden_cells == row["mask_count"]
        kwargs = {"dim": 4, "depth": 1, "heads": 1, "patch_size": 1, "grid_size": row["mask_shape"][0]}
        encoder = models.build("beit", kwargs)
        assert isinstance(encoder, BEiT)
        model = SimMIM(encoder, cell=row["scale"], hidden=row["mask_count"])
        mask = model.mask(noise_of(torch.tensor([row["permutation"]])))
        assert int(mask.sum()) == row["masked_tokens"]
        if row["masked_flat_indices"] is not None:
            assert mask[0].nonzero().flatten().tolist() == row["masked_flat_indices"]


@pytest.mark.parametrize("path", cases("beyond_cls/simmim_train_meta.json"))
def test_training_passes_through_the_published_losses_to_the_published_weights(path: Path) -> None:
    meta, stored = facts(path), arrays(path.with_name("simmim_train.safetensors"))
    model_meta, start = facts(path.with_name("simmim_meta.json")), arrays(path.with_name("simmim.safetensors"))
    name = meta["initial"].split()[1].split(".")[0]
    model = method(model_meta, model_meta[name], part(start, f"{name}.sd."))
    settings = Settings(
        worker="main_simmim",
        epochs=meta["epochs"],
        warmup_epochs=meta["warmup_epochs"],
        lr=meta["lr"],
        warmup_lr_frac=meta["warmup_lr"] / meta["lr"],
        milestones=meta["multisteps"],
        gamma=meta["gamma"],
        weight_decay=meta["weight_decay"],
    )
    optimizer = optim.adamw(main_simmim.groups(model, settings), lr=settings.peak_lr)
    names = {p: name for name, p in model.named_parameters()}
    for ours, theirs in zip(optimizer.param_groups, meta["param_groups"], strict=True):
        assert list(ours["betas"]) == meta["betas"]
        decay = meta["weight_decay"] if theirs["weight_decay"] == "default" else theirs["weight_decay"]
        assert ours["weight_decay"] == decay
        assert {names[p] for p in ours["params"]} == set(theirs["params"])

    schedule = main_simmim.schedules(settings)["lr"]
    total = len(meta["losses"])
    batches = total // meta["epochs"]
    for i in range(total):
        late = max(i - 1, 0)  # the published program sets the rate after the step, so it lags by one
        rate = schedule(late / total)
        assert rate == pytest.approx(meta["lr_before_each_step"][i], rel=1e-6)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = i % batches
        loss = model(stored[f"x{batch}"], noise_behind(model, stored[f"mask{batch}"]))["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), meta["clip_grad"])
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(meta["losses"][i], rel=1e-3)
        assert norm.item() == pytest.approx(meta["grad_norms_before_clip"][i], rel=1e-3)
    final = part(stored, "final.")
    assert final
    for name, value in final.items():
        assert ((model.get_parameter(name) - value).abs() / (1 + value.abs())).max() < 2e-3, name


@pytest.mark.parametrize("path", cases("beyond_cls/simmim_lr_schedule.json"))
def test_the_schedule_is_the_published_one(path: Path) -> None:
    rows = facts(path)
    epochs = max(row["update_index"] // row["iters_per_epoch"] for row in rows) + 1
    for row in rows:
        settings = Settings(
            worker="main_simmim",
            epochs=epochs,
            warmup_epochs=row["warmup_epochs"],
            lr=row["base"],
            warmup_lr_frac=row["warmup_lr"] / row["base"],
            milestones=row["multisteps"],
        )
        rate = main_simmim.schedules(settings)["lr"](row["update_index"] / (epochs * row["iters_per_epoch"]))
        assert rate == pytest.approx(row["lr_after"], rel=1e-6)
