"""The linear probe, its poolings, its optimizer, its schedule and its crop, against the published program's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.settings import Training
from contract.settings.features import AbMILP as Said
from contract.settings.features import head
from contract.settings.main_linprobe import Settings
from tests.parity.stored import arrays, cases, facts, part
from workers import models
from workers.engine.frozen import Frozen, Reading, block_of
from workers.engine.optim import LARS, warmup_cosine
from workers.main_linprobe import Probe, build_head, build_optimizer, evaluate
from workers.models import Encoder
from workers.pooling.abmilp import AbMILP
from workers.transforms.crops import OneShotCrop

ONE_BY_ONE, STEPS = 1e-4, 5e-4  # of a forward pass; of the parameters after a training
OURS = {"pos": "gap"}


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    torch.testing.assert_close(
        actual.detach(), expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def vit(state: dict[str, Tensor], heads: int) -> Encoder:
    """The published encoder, whose classifier is left out; its sizes are those of the tensors."""
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    if "fc_norm.weight" in state:
        state = {name.replace("fc_norm.", "norm."): value for name, value in state.items()}
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    cls = "cls_token" in state
    kwargs = {
        "dim": dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "heads": heads,
        "patch_size": patch,
        "grid_size": round((state["pos_embed"].shape[1] - int(cls)) ** 0.5),
        "cls": cls,
    }
    encoder = models.build("vit", kwargs)
    encoder.load_state_dict(state)
    return encoder


@pytest.mark.parametrize("path", cases("beyond_cls/vit.safetensors"))
def test_poolings_give_the_published_vectors(path: Path) -> None:
    stored, meta = arrays(path), facts(path.with_name("vit_meta.json"))
    encoder, oracle = (vit(part(stored, prefix), meta["heads"]) for prefix in ("sd.", "oracle_sd."))
    seen = 0
    for prefix, block in (("pool.", None), ("pool_rb1.", 1)):
        pooled = part(stored, prefix)
        readings = {
            name: Reading("abmilp" if name == "raw" else OURS.get(name, name), block_of(encoder, block))
            for name in pooled
        }
        found = Frozen(encoder, list(readings.values()), oracle=oracle)(stored["input"])
        for name, reading in readings.items():
            close(found[reading], pooled[name], ONE_BY_ONE, prefix + name)
            seen += 1
    assert seen
    if "tokens.block0" in stored:  # published: block 0 silently means the last
        first = Frozen(encoder, [Reading("cls", block_of(encoder, 0))])(stored["input"])
        close(first[Reading("cls", 0)], stored["tokens.block0"][:, 0], ONE_BY_ONE)


@pytest.mark.parametrize("path", cases("beyond_cls/vit_nocls.safetensors"))
def test_poolings_of_an_encoder_without_class_token(path: Path) -> None:
    stored, meta = arrays(path), facts(path.with_name("vit_meta.json"))
    last = meta["depth"] - 1
    encoder = vit(part(stored, "sd."), meta["heads"])
    found = Frozen(encoder, [Reading("gap", last), Reading("abmilp", last)])(stored["input"])
    close(found[Reading("gap", last)], stored["pool.pos"], ONE_BY_ONE)
    close(found[Reading("abmilp", last)], stored["pool.raw"], ONE_BY_ONE)


@pytest.mark.parametrize("path", cases("beyond_cls/abmilp.safetensors"))
def test_abmilp_weighs_and_learns_as_published(path: Path) -> None:
    stored, meta = arrays(path), facts(path.with_name("abmilp_meta.json"))
    assert meta["configs"]
    for config in meta["configs"]:
        positions = stored["pos_embed.all"] if config["cond"] == "pe" else None
        said = {key: config[key] for key in ("act", "depth", "sa", "content")}
        module = AbMILP(meta["dim"], positions=positions, **said)
        state = part(stored, f"{config['id']}.sd.")
        table = state.pop("pos_embed", None)  # published: a parameter
        module.load_state_dict(state)
        if positions is not None:
            close(module.pos_embed, stored[f"pos_embed.{config['content']}"] if table is None else table, 1e-6)

        out, weights = module.weigh(stored["x"])
        close(out, stored[f"{config['id']}.out"], ONE_BY_ONE, config["id"])
        close(weights, stored[f"{config['id']}.map"], ONE_BY_ONE, config["id"])
        (out * stored["grad_out"]).sum().backward()
        for name, norm in config["grad_norms"].items():
            if name != "pos_embed":
                grad = module.get_parameter(name).grad
                assert grad is not None
                close(grad.norm(), torch.tensor(norm), ONE_BY_ONE, f"{config['id']} {name}")


@pytest.mark.parametrize("path", cases("beyond_cls/bn_head.safetensors"))
def test_batchnorm_before_the_classifier(path: Path) -> None:
    stored = arrays(path)
    classes, dim = stored["sd0.1.weight"].shape
    module = build_head((dim,), classes, Settings(worker="main_linprobe", encoder="-"))
    module.load_state_dict(part(stored, "sd0."))
    module.train()
    for i in (1, 2):
        close(module(stored[f"f{i}"]), stored[f"train{i}"], ONE_BY_ONE)
    for name, value in part(stored, "sd2.").items():
        close(module.state_dict()[name], value, 1e-6, name)
    close(module.eval()(stored["f3"]), stored["eval3"], ONE_BY_ONE)


@pytest.mark.parametrize("path", cases("beyond_cls/lars.safetensors"))
def test_lars_steps_as_published(path: Path) -> None:
    stored = arrays(path)
    for case, said in facts(path.with_name("lars_meta.json")).items():
        weights = {name: nn.Parameter(value.clone()) for name, value in part(stored, "p0.").items()}
        optimizer = LARS(
            weights.values(),
            weight_decay=said["weight_decay"],
            momentum=said["momentum"],
            trust=said["trust_coefficient"],
        )
        for step, lr in enumerate(said["lrs"]):
            optimizer.param_groups[0]["lr"] = lr
            for name, weight in weights.items():
                weight.grad = stored[f"grad{step}.{name}"].clone()
            optimizer.step()
            for name, weight in weights.items():
                close(weight, stored[f"{case}.step{step}.p.{name}"], 1e-6, f"{case} {step} {name}")
                close(optimizer.state[weight]["momentum"], stored[f"{case}.step{step}.mu.{name}"], 1e-6, name)


@pytest.mark.parametrize("path", cases("beyond_cls/lr_schedule.json"))
def test_the_learning_rate_rises_and_falls_as_published(path: Path) -> None:
    stored = facts(path)

    def rate(said: dict[str, Any], epoch: float) -> float:
        warmup = said["warmup_epochs"] / said["epochs"]
        return warmup_cosine(epoch / said["epochs"], peak=said["lr"], warmup=warmup, floor=said["min_lr"])

    for sample in stored["samples"]:
        found = rate(sample, sample["epoch_float"])
        assert found == pytest.approx(sample["lr_out"], rel=1e-6, abs=1e-12)
        for key in sample:
            if "lr_scale" in key:
                scale = float(key.split("lr_scale_")[1].replace("p", "."))
                assert found * scale == pytest.approx(sample[key], rel=1e-6, abs=1e-12)
    example = stored["accum_example"]
    per_epoch, accumulate = example["iters_per_epoch"], example["accum_iter"]
    for i, expected in enumerate(example["lr_per_iteration"]):
        epoch, batch = divmod(i, per_epoch)
        window = batch - batch % accumulate
        assert rate(example, epoch + window / per_epoch) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    for said in stored["lr_scaling"]:
        settings = Training(worker="-", blr=said["blr"], batch_size=said["batch"], accum_iter=said["accum"])
        settings.resolve_batch(said["world"])
        assert settings.peak_lr == pytest.approx(said["lr"])


@pytest.mark.parametrize("path", cases("beyond_cls/random_resized_crop.json"))
def test_the_crop_of_a_single_try_draws_the_published_boxes(path: Path) -> None:
    for case in facts(path):
        crop = OneShotCrop(8, tuple(case["scale"]), tuple(case["ratio"]))
        torch.manual_seed(case["seed"])
        assert crop.box(case["height"], case["width"]) == tuple(case[key] for key in "ijhw"), case


RUNS = [
    pytest.param(each.values[0], variant, id=f"{variant}")
    for each in cases("beyond_cls/probe_runs.safetensors")
    for variant in facts(each.values[0].with_name("probe_runs_meta.json"))["variants"]
]


@pytest.mark.parametrize(("path", "variant"), RUNS)
def test_probes_train_through_the_published_weights_and_accuracies(path: Path, variant: str) -> None:
    meta, stored = facts(path.with_name("probe_runs_meta.json")), part(arrays(path), f"{variant}.")
    data, encoder_file = arrays(path.with_name("probe_data.safetensors")), arrays(path.with_name("vit.safetensors"))
    encoder = vit(part(encoder_file, "sd."), facts(path.with_name("vit_meta.json"))["heads"])
    model, settings = probe_of(meta, variant, stored, encoder)
    optimizer = build_optimizer(model, [head(settings.features)], settings, settings.peak_lr)

    every, per_epoch = meta["common"]["accum_iter"], meta["common"]["train_batches"]
    train, val = (
        [(data[f"{split}{i}.x"], data[f"{split}{i}.y"]) for i in range(n)]
        for split, n in (("train", per_epoch), ("val", len(meta["common"]["val_batches"])))
    )
    for epoch, expected in enumerate(meta["variants"][variant]["epochs"]):
        losses, top1 = [], []
        model.train()
        for i, batch in enumerate(train):
            if i % every == 0:
                now = (epoch + i / per_epoch) / settings.epochs
                rate = warmup_cosine(now, peak=settings.peak_lr, warmup=settings.warmup_epochs / settings.epochs)
                optimizer.param_groups[0]["lr"] = rate
            found = model(batch)
            if i < per_epoch - per_epoch % every:  # what fills no window moves BatchNorm's estimates only
                (found["loss"] / every).backward()
            if i % every == every - 1:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(found["loss"].item())
            top1.append(found["top1"].item())
        assert sum(losses) / per_epoch == pytest.approx(expected["train"]["loss"], rel=1e-4)
        assert 100 * sum(top1) / per_epoch == pytest.approx(expected["train"]["acc1"], abs=1e-4)
        for name, value in model.heads[0].state_dict().items():
            if f"epoch{epoch}.{name}" in stored or "pos_embed" not in name:  # the table is stored at the end only
                close(value, stored[f"epoch{epoch}.{name}"], STEPS, f"epoch {epoch} {name}")

        measured = 100 * evaluate(model, val, lambda batch: batch)[0]
        assert measured[0].item() == pytest.approx(expected["test"]["acc1"], abs=1e-4)
        assert measured[1].item() == pytest.approx(expected["test"]["acc5"], abs=1e-4)
        # published: the mean over the batches, however few pictures the last one has
        batches = [evaluate(model, [batch], lambda batch: batch)[0, 2].item() for batch in val]
        assert sum(batches) / len(batches) == pytest.approx(expected["test"]["loss"], rel=1e-4)


def probe_of(meta: dict[str, Any], variant: str, stored: dict[str, Tensor], encoder: Encoder) -> tuple[Probe, Settings]:
    """Our probe with the stored first weights, and the settings that say the same as the published ones."""
    common, said = meta["common"], meta["variants"][variant]
    features = OURS.get(said["cls_features"], said["cls_features"])
    abmilp = said["abmilp"] or {}
    settings = Settings(
        worker="main_linprobe",
        encoder="-",
        features=features,
        optimizer=said["optimizer"],
        momentum=common[f"momentum_{said['optimizer']}"],
        abmilp=Said(**{key: value or "none" for key, value in abmilp.items()}),
        **{key: common[key] for key in ("lr", "epochs", "warmup_epochs", "weight_decay")},
    )
    reading = Reading(features, block_of(encoder, None))
    frozen = Frozen(encoder, [reading])
    state = part(stored, "init.")
    head = build_head(frozen.shapes[reading], len(state[max(k for k in state if k.endswith(".bias"))]), settings)
    first, last = (stored.get(f"{when}.0.pos_embed") for when in ("init", f"epoch{settings.epochs - 1}"))
    if first is not None and last is not None and not torch.equal(first, last):  # published: the fixed table is trained
        del head[0].pos_embed
        head[0].pos_embed = nn.Parameter(first.clone())
    elif settings.abmilp.cond == "pe":
        close(head[0].pos_embed, first, 1e-6)
    head.load_state_dict({name: state[name] for name in head.state_dict()})
    return Probe([head], [reading], frozen), settings
