"""MAE's forward pass and a few epochs of its training, against the published PyTorch program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.settings.main_mae import Settings
from tests.parity.stored import arrays, assert_close, cases, facts, part
from workers import main_mae, models
from workers.engine import optim
from workers.main_mae import MAE
from workers.masking.patches import take
from workers.masking.random import split
from workers.models.mae_decoder import MAEDecoder
from workers.models.vit import ViT

OURS = {"mask_token": "decoder.mask_token"}


def our_name(name: str) -> str:
    """A name in the published state dict -> that of our module."""
    if name.startswith("decoder_"):
        return f"decoder.{name.removeprefix('decoder_')}"
    return OURS.get(name, f"encoder.{name}")


def method(meta: dict[str, Any], stored: dict[str, Tensor], *, kept: int, norm_pix_loss: bool) -> MAE:
    """The method of the stored sizes and weights."""
    grid, ratio = meta["img"] // meta["patch"], float(meta["mlp_ratio"])
    shape = {"dim": meta["D"], "depth": meta["depth"], "heads": meta["heads"], "mlp_ratio": ratio}
    encoder = models.build("vit", {**shape, "patch_size": meta["patch"], "grid_size": grid, "pos": "mae"})
    assert isinstance(encoder, ViT)
    decoder = MAEDecoder(
        meta["D"],
        encoder.grid,
        meta["patch"],
        dim=meta["decoder_dim"],
        depth=meta["decoder_depth"],
        heads=meta["decoder_heads"],
        mlp_ratio=ratio,
    )
    model = MAE(encoder, decoder, kept=kept, norm_pix_loss=norm_pix_loss)
    tables = {name: model.get_buffer(name).clone() for name in ("encoder.pos_embed", "decoder.pos_embed")}
    model.load_state_dict({our_name(name): value for name, value in part(stored, "sd.").items()})
    for name, table in tables.items():  # the fixed ones are ours already
        assert_close(table, model.get_buffer(name), 1e-6, name)
    return model


def each_case(pattern: str) -> Any:
    return [
        pytest.param(found.values[0], each, id=f"{found.id}-{each['id']}")
        for found in cases(pattern)
        for each in facts(found.values[0])["cases"]
    ]


@pytest.mark.parametrize(("path", "case"), each_case("beyond_cls/mae_meta.json"))
def test_the_forward_pass_is_the_published_one(path: Path, case: dict[str, Any]) -> None:
    meta, stored = facts(path), arrays(path.with_name("mae.safetensors"))
    found = part(stored, f"{case['id']}.")
    model = method(meta, stored, kept=case["len_keep"], norm_pix_loss=case["norm_pix_loss"])
    patches = model.encoder.patchify(stored["imgs"])
    visible, hidden = split(stored["noise"], model.kept)
    if "patches" in stored:
        assert_close(patches, stored["patches"], 1e-6, "patches")
    assert torch.equal(torch.zeros_like(found["mask"]).scatter(1, hidden, 1), found["mask"])
    assert torch.equal(torch.cat([visible, hidden], dim=1).argsort(1), found["ids_restore"])
    if case["norm_pix_loss"] and "patches_normalized" in stored:
        assert_close(model.target(patches), stored["patches_normalized"], 1e-5, "target")

    latents = model.encoder(take(patches, visible), visible)
    assert_close(latents, found["latent"], 1e-4, "latent")
    assert_close(model.decoder(latents, visible, hidden), take(found["pred"], hidden), 1e-4, "prediction")
    everything = model.decoder.pred(model.decoder.norm(model.decoder.tokens(latents, visible, hidden)))[:, 1:]
    assert_close(everything, take(found["pred"], torch.cat([visible, hidden], dim=1)), 1e-4, "all predictions")

    loss = model(stored["imgs"], stored["noise"])["loss"]
    assert_close(loss, torch.tensor(case["loss"]), 1e-5, "loss")
    loss.backward()
    for name, norm in case["grad_norms"].items():
        if norm is not None:
            gradient = model.get_parameter(our_name(name)).grad
            assert gradient is not None, name
            assert_close(gradient.norm(), torch.tensor(norm), 1e-3, name)
    for name, gradient in part(found, "grad.").items():
        assert_close(model.get_parameter(our_name(name)).grad, gradient, 1e-3, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", cases("beyond_cls/mae_train_meta.json"))
def test_training_passes_through_the_published_losses_to_the_published_weights(path: Path) -> None:
    meta, stored = facts(path), arrays(path.with_name("mae_train.safetensors"))
    model_meta, start = facts(path.with_name("mae_meta.json")), arrays(path.with_name("mae.safetensors"))
    betas, decay = tuple(meta["optimizer"]["betas"]), meta["optimizer"]["weight_decay"]
    settings = Settings(
        worker="main_mae",
        mask_ratio=meta["mask_ratio"],
        norm_pix_loss=meta["norm_pix_loss"],
        input_size=model_meta["img"],
        patch_size=model_meta["patch"],
        epochs=meta["epochs"],
        warmup_epochs=meta["warmup_epochs"],
        lr=meta["lr"],
        min_lr=meta["min_lr"],
        weight_decay=decay,
    )
    model = method(model_meta, start, kept=settings.kept, norm_pix_loss=settings.norm_pix_loss)
    optimizer = optim.adamw(main_mae.groups(model, settings), lr=settings.peak_lr)
    names = {p: name for name, p in model.named_parameters()}
    for ours, theirs in zip(optimizer.param_groups, meta["param_groups"], strict=True):
        assert ours["weight_decay"] == theirs["weight_decay"]
        assert ours["betas"] == betas
        assert {names[p] for p in ours["params"]} == {our_name(name) for name in theirs["params"]}

    schedule, accumulate, batches = main_mae.schedules(settings)["lr"], meta["accum_iter"], meta["batches"]
    logged: list[tuple[float, float]] = []
    for epoch in range(meta["epochs"]):
        for i in range(batches - batches % accumulate):
            if i % accumulate == 0:
                rate = schedule((epoch + i / batches) / meta["epochs"])
                for group in optimizer.param_groups:
                    group["lr"] = rate
            loss = model(stored[f"x{i}"], stored[f"noise{epoch * batches + i}"])["loss"]
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                logged.append((loss.item(), rate))
    for at, tag in enumerate(("train_loss", "lr")):
        theirs = [value for name, value, _ in meta["tensorboard"] if name == tag]
        assert_close(torch.tensor([each[at] for each in logged]), torch.tensor(theirs), 1e-4, tag)
    final = part(stored, "final.")
    assert final
    for name, value in final.items():
        close_after_adamw(model.state_dict()[our_name(name)], value, name)


def close_after_adamw(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Equal but for the keys' third of a qkv bias: its gradient is rounding, which Adam scales up."""
    if name.endswith("qkv.bias"):
        ours, theirs = (torch.cat(each.chunk(3)[::2]) for each in (ours, theirs))
    assert ((ours - theirs).abs() / (1 + theirs.abs())).max() < 2e-3, name


@pytest.mark.parametrize("path", cases("beyond_cls/mae_meta.json"))
def test_as_many_patches_are_kept_as_published_but_for_the_rounding(path: Path) -> None:
    squares = [row for row in facts(path)["len_keep_table"] if round(row["L"] ** 0.5) ** 2 == row["L"]]
    assert squares
    for row in squares:
        side, ratio = round(row["L"] ** 0.5), row["ratio"]
        kept = Settings(worker="main_mae", input_size=4 * side, patch_size=4, mask_ratio=ratio).kept
        assert 0 <= kept - row["len_keep"] <= 1, row
        assert abs(kept - row["L"] * (1 - ratio)) <= 0.5 + 1e-9
