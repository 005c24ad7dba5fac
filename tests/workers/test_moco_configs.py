"""The recipes of MoCo, MixMask and Un-Mix compose to the published values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import contract.settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def settings(*overrides: str, processes: int = 8) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    found: Any = contract.settings.read(values)
    found.resolve_batch(processes)
    return found


@pytest.mark.parametrize(
    ("recipe", "method"),
    [("moco_v2", "moco"), ("mixmask", "mixmask"), ("unmix", "unmix"), ("both", "both")],
)
def test_the_published_pretraining(recipe, method):
    found = settings("worker=main_moco_mixmask", f"recipe={recipe}_imagenet")
    assert (found.method, found.arch, found.epochs, found.data.name) == (method, "resnet50", 200, "imagenet")
    assert (found.effective_batch_size, found.accum_iter, found.peak_lr) == (256, 1, pytest.approx(0.03))
    assert (found.queue_size, found.temperature, found.target_mom) == (65536, 0.2, 0.999)
    if method in ("mixmask", "both"):
        assert (found.mask_type, found.grid_size, found.mask_ratio) == ("block", 8, 0.5)


def test_small_pictures_follow_unmix():
    for recipe, size in (("moco_cifar100", 32), ("moco_tiny_imagenet", 64)):
        found = settings("worker=main_moco_mixmask", f"recipe={recipe}", "method=both", processes=1)
        assert (found.image_size, found.data.name) == (size, recipe.removeprefix("moco_"))
        assert (found.peak_lr, found.bn_splits, found.stem) == (pytest.approx(0.06), 8, "cifar")


def test_the_published_classifications():
    linear = settings("worker=main_lincls", "recipe=lincls_imagenet", "encoder=e")
    assert (linear.peak_lr, linear.milestones, linear.epochs) == (pytest.approx(30), [60, 80], 100)
    few = settings("worker=main_lincls", "recipe=semisup_imagenet", "encoder=e")
    assert (few.peak_lr, few.peak_lr * few.backbone_scale) == (pytest.approx(0.5), pytest.approx(0.005))
    assert (few.freeze, few.fraction, few.epochs) == (False, 0.01, 20)
