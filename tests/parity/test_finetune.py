"""Fine-tuning: its model, layer decay, mixing, losses and a short training, against MAE's published program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract.settings.main_finetune import Settings
from tests.parity.stored import arrays, assert_close, cases, facts, part
from workers import main_finetune, models
from workers.engine import optim
from workers.main_finetune import Classifier
from workers.models.vit import ViT
from workers.transforms.mixing import Draw, Mixing, box, smoothed


def settings(**values: Any) -> Settings:
    return Settings(worker="main_finetune", encoder="somewhere", **values)


def classifier(state: dict[str, Tensor], heads: int, **kwargs: Any) -> Classifier:
    """The model whose published state this is; ``fc_norm`` is there where the patches are averaged."""
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    shape = {"dim": dim, "depth": depth, "heads": heads, "patch_size": patch, "grid_size": grid}
    encoder = models.build("vit", {**shape, "pos": "mae", "learn_pos": True})
    pool = "gap" if "fc_norm.weight" in state else "cls"
    model = Classifier(encoder, len(state["head.weight"]), pool=pool, **kwargs)
    lacking = model.load_state_dict({our_name(name): value for name, value in state.items()}, strict=False)
    assert not lacking.unexpected_keys
    assert all(name.startswith("encoder.norm.") and pool == "gap" for name in lacking.missing_keys)
    return model


def our_name(name: str) -> str:
    return name if name.startswith(("head.", "fc_norm.")) else f"encoder.{name}"


def heads_of(path: Path) -> int:
    return int(facts(path.with_name("mae_meta.json"))["heads"])


@pytest.mark.parametrize("path", cases("beyond_cls/mae_finetune_model.safetensors"))
def test_features_and_logits_are_the_published_ones(path: Path) -> None:
    stored = arrays(path)
    variants = {name.split(".")[0] for name in stored if ".sd." in name}
    assert variants
    for name in variants:
        model = classifier(part(stored, f"{name}.sd."), heads_of(path)).eval()
        assert_close(model.features(stored["imgs"]), stored[f"{name}.features"], 1e-4, "features")
        assert_close(model.logits(stored["imgs"]), stored[f"{name}.logits"], 1e-4, "logits")


@pytest.mark.parametrize("path", cases("beyond_cls/mae_finetune_train_meta.json"))
def test_training_passes_through_the_published_losses_to_the_published_weights(path: Path) -> None:
    meta, stored = facts(path), arrays(path.with_name("mae_finetune_train.safetensors"))
    file, which = meta["initial"].split()
    start = part(arrays(path.with_name(file)), which.removesuffix("*"))
    smoothing, decay = (
        float(meta["criterion"].split()[-1]),
        float(meta["optimizer"].split("weight_decay ")[1].split()[0]),
    )
    said = settings(
        epochs=meta["epochs"],
        warmup_epochs=meta["warmup_epochs"],
        lr=meta["lr"],
        min_lr=meta["min_lr"],
        layer_decay=meta["layer_decay"],
        weight_decay=decay,
    )
    model = classifier(start, heads_of(path), smoothing=smoothing).train()
    parts = main_finetune.groups(model.named_parameters(), model.encoder.depth, said)
    optimizer = optim.adamw(parts, lr=said.peak_lr, betas=main_finetune.BETAS)
    schedule, batches = main_finetune.schedules(said)["lr"], meta["batches"]
    logged: list[tuple[float, float]] = []
    for step in range(batches * meta["epochs"]):
        rate = schedule(step / batches / meta["epochs"])
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        loss = model((stored[f"x{step % batches}"], stored[f"y{step % batches}"]))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append((loss.item(), max(group["lr"] for group in optimizer.param_groups)))
    for at, tag in enumerate(("loss", "lr")):
        theirs = [value for name, value, _ in meta["tensorboard"] if name == tag]
        assert_close(torch.tensor([each[at] for each in logged]), torch.tensor(theirs), 1e-4, tag)
    final = part(stored, "final.")
    assert final
    weights = dict(model.named_parameters())
    for name, value in final.items():
        ours = weights[our_name(name)]
        if name.endswith("qkv.bias"):  # the keys' third: its gradient is rounding, which Adam scales up
            ours, value = (torch.cat(each.chunk(3)[::2]) for each in (ours, value))
        assert ((ours - value).abs() / (1 + value.abs())).max() < 2e-3, name


@pytest.mark.parametrize("path", cases("beyond_cls/layer_decay.json"))
def test_every_parameter_has_the_published_rate_and_decay(path: Path) -> None:
    stored = facts(path)
    tables = {name: said for name, said in stored.items() if isinstance(said, dict)}
    assert tables
    for key, said in tables.items():
        layer_decay = float(key.removeprefix("decay").split("_")[0])
        depth = 1 + max(int(name.split(".")[1]) for name in said if name.startswith("blocks."))
        # shapes do not matter but for whether there is more than one dimension
        flat = {name for name in said if name.endswith(".bias") or "norm" in name}
        parameters = {name: nn.Parameter(torch.zeros(2) if name in flat else torch.zeros(2, 2)) for name in said}
        wanted = settings(layer_decay=layer_decay, weight_decay=max(row["weight_decay"] for row in said.values()))
        found = main_finetune.groups(((our_name(name), p) for name, p in parameters.items()), depth, wanted)
        of = {p: name for name, p in parameters.items()}
        ours = {of[p]: group for group in found for p in group["params"]}
        assert set(ours) == set(said)
        for name, row in said.items():
            assert ours[name]["lr_scale"] == pytest.approx(row["lr_scale"], rel=1e-9), name
            assert ours[name]["weight_decay"] == row["weight_decay"], name
        scales = sorted({group["lr_scale"] for group in found})
        assert scales == pytest.approx(stored[f"scales_decay{layer_decay}"], rel=1e-9)
    for key in (key for key in stored if key.startswith("drop_path_rates_")):
        rate, depth = float(key.split("_")[3]), int(key.split("_depth")[1])
        encoder = ViT(dim=4, depth=depth, heads=1, patch_size=1, grid_size=2, drop_path=rate, drop_path_linear=True)
        ours_ = [block.drop_path.rate for block in encoder.blocks]  # type: ignore[union-attr]
        assert ours_ == pytest.approx(stored[key], rel=1e-6)


@pytest.mark.parametrize("path", cases("beyond_cls/simmim_layer_ids.json"))
def test_layers_of_a_simmim_encoder_are_the_published_ones(path: Path) -> None:
    said = facts(path)
    depth = max(said.values()) - 1
    assert {name: main_finetune.layer_of(our_name(name), depth) for name in said} == said


@pytest.mark.parametrize("path", cases("beyond_cls/mixup_losses_meta.json"))
def test_mixing_is_the_published_one_for_the_same_draws(path: Path) -> None:
    meta, stored = facts(path), arrays(path.with_name("mixup_losses.safetensors"))
    height, width = stored["x"].shape[-2:]
    hard = smoothed(stored["y"], meta["num_classes"], meta["smoothing"])
    for i, row in enumerate(meta["rows"]):
        if f"s{i}.x" not in stored:
            continue
        drawn = np.random.RandomState(row["np_seed"])  # that of the published program
        assert [drawn.rand(), drawn.rand()] == [row["u_apply"], row["u_switch"]]
        assert row["use_cutmix"] == (row["u_switch"] < meta["switch_prob"])
        alpha = meta["cutmix"] if row["use_cutmix"] else meta["mixup"]
        share, centre = drawn.beta(alpha, alpha), None
        assert share == row["lam_drawn"]
        if row["use_cutmix"]:
            centre = int(drawn.randint(0, height)), int(drawn.randint(0, width))
            assert list(box(share, centre, height, width)) == row["bbox"]
        images, targets = Mixing.mixed(stored["x"], hard, Draw(share, centre))
        assert_close(images, stored[f"s{i}.x"], 1e-6, "images")
        assert_close(targets, stored[f"s{i}.target"], 1e-6, "targets")
    first = stored["s0.target"]
    assert_close(F.cross_entropy(stored["logits"], first), stored["soft_ce_first_seed"], 1e-6, "mixed")
    assert_close(F.cross_entropy(stored["logits"], hard), stored["label_smoothing_ce"], 1e-6, "smoothed")
