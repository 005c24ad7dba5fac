"""Latent MIM, a few steps of AdamW, against the published training loop; its schedules and its evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity import published_lmim as published
from tests.parity.stored import arrays, assert_close, cases, facts
from workers import main_lmim
from workers.engine import optim, probe
from workers.main_lmim import LatentMIM

SCHEDULED = ("min_lr_frac", "warmup_epochs", "epochs", "target_mom", "sim_init", "sim_end", "lr")


def train(path: Path, dtype: torch.dtype) -> tuple[LatentMIM, dict[str, list[float]]]:
    """The steps that the engine would make of the stored micro-batches, and what it would log."""
    facts_, stored, stem = facts(path), arrays(path.with_suffix(".npz")), path.name.split("_train")[0]
    config, state = facts(path.with_name(f"{stem}_config.json")), arrays(path.with_name(f"{stem}_state.npz"))
    method = published.module(config, state, dtype, avg_sim_coeff=config["reg_coeff"])
    settings = published.settings(weight_decay=facts_["weight_decay"], **{key: facts_[key] for key in SCHEDULED})
    schedules = main_lmim.schedules(settings)
    optimizer = optim.adamw(main_lmim.groups(method, settings), lr=settings.peak_lr)
    accumulate, batches = facts_["accum_iter"], facts_["n_micro"]
    seen: dict[str, list[float]] = {}
    values: dict[str, float] = {}
    for i in range(batches):
        if i % accumulate == 0:
            now = (facts_["epoch"] + i / batches) / settings.epochs
            values = {name: schedule(now) for name, schedule in schedules.items()}
            for group in optimizer.param_groups:
                group["lr"] = values["lr"]
            method.before_step(values["momentum"], values["sim_target"])
        scalars = method(stored["images"][i].to(dtype), published.draws(stored, i))
        (scalars["loss"] / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        for name, value in {**scalars, **values}.items():
            seen.setdefault(name, []).append(value.item() if isinstance(value, Tensor) else value)
    return method, seen


@pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*_train*.json"))
@pytest.mark.parametrize(
    ("dtype", "suffix", "relative"),
    [pytest.param(torch.float64, "", 1e-9, id="float64"), pytest.param(torch.float32, "_f32", 1e-4, id="float32")],
)
def test_training_passes_through_the_published_losses(
    path: Path, dtype: torch.dtype, suffix: str, relative: float
) -> None:
    stored = arrays(path.with_suffix(".npz"))
    _, seen = train(path, dtype)
    for ours, theirs in {"lr": "lr", "momentum": "mom", "sim_target": "sim_trg"}.items():
        assert_close(torch.tensor(seen[ours]), stored[theirs], 1e-6, theirs)
    for name in ("loss", "avg_sim_pred", "avg_sim_vis", "avg_sim_trg"):
        assert_close(torch.tensor(seen[name], dtype=torch.float64), stored[name + suffix], relative, name)


@pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*_train*.json"))
def test_training_ends_with_the_published_weights(path: Path) -> None:
    method, _ = train(path, torch.float64)
    weights = {name: p.detach() for name, p in method.named_parameters()}
    for kind in ("online", "target"):
        final = arrays(path.with_name(f"{path.stem}_final_{kind}.npz"))
        assert final
        for name, value in published.ours(final).items():
            assert_close(weights[name], value, 1e-7, name)
    norms = torch.stack([p.detach().norm() for p in published.named(method, facts(path)["all_param_names"])])
    torch.testing.assert_close(norms, arrays(path.with_suffix(".npz"))["final_param_l2"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*schedules.json"))
def test_schedules_follow_the_published_ones(path: Path) -> None:
    stored = arrays(path.with_suffix(".npz"))
    for i, values in enumerate(facts(path)):
        settings = published.settings(**{key: values[key] for key in SCHEDULED})
        schedules = main_lmim.schedules(settings)
        times = [epoch / settings.epochs for epoch in stored[f"s{i}_epoch"].tolist()]
        for ours, theirs in {"lr": "lr", "momentum": "mom", "sim_target": "sim_trg"}.items():
            found = torch.tensor([schedules[ours](t) for t in times], dtype=torch.float64)
            assert_close(found, stored[f"s{i}_{theirs}"], 1e-12, theirs)
            for key in stored:  # a group's own factor, as the training loop applies it
                if key.startswith(f"s{i}_{theirs}_group_scale"):
                    assert_close(found * float(key.split("scale")[1]), stored[key], 1e-12, key)


@pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*knn.npz"))
def test_nearest_neighbours_are_the_published_ones(path: Path) -> None:
    stored, agree = arrays(path), []
    used = int(stored["used"])
    images, labels = stored["images"][:used].double(), stored["labels"][:used]
    for config_path in sorted(path.parent.glob("lmim_*_config.json")):  # the file does not say whose weights it used
        config = facts(config_path)
        side = config["grid_size"] * config["patch_size"]
        if config["embed_dim"] != stored["features_l2"].shape[1] or images.shape[2:] != (side, side):
            continue
        state = arrays(config_path.with_name(config_path.name.replace("_config.json", "_state.npz")))
        method = published.module(config, state, torch.float64).eval()
        with torch.no_grad():
            features = probe.pool(method.encoder.tokens(images), "gap")
        unit = torch.nn.functional.normalize(features)
        if torch.allclose(unit, stored["features_l2"], rtol=1e-9, atol=1e-9):
            agree.append(features)
            nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
            assert torch.equal(nearest, stored["nn_index"].long())
            assert probe.leave_one_out(features, labels) * 100 == pytest.approx(stored["acc1"].item(), abs=1e-4)
    assert agree, "no stored weights give these features"


def test_the_published_recipe_decays_to_a_quarter() -> None:
    schedules = main_lmim.schedules(published.settings(lr=2.4e-3, epochs=800, warmup_epochs=40, min_lr_frac=0.25))
    assert [schedules["lr"](t) for t in (0.0, 0.05, 1.0)] == pytest.approx([6e-4, 2.4e-3, 6e-4])
