"""The configurations of Latent MIM compose, in every order a user may write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import contract.settings
from contract.settings.main_lmim import Settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = (
    "worker=main_lmim encoder=vit_base decoder_depth=3 avg_sim_coeff=0.1 loss=infonce_patches patch_gap=4 epochs=800 "
    "warmup_epochs=40 blr=1.5e-4 min_lr_frac=0.25 weight_decay=0.05 batch_size=256 accum_iter=2 data=imagenet"
)


def settings(primary: str, overrides: str, processes: int = 8) -> Settings:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose(primary, overrides.split()), resolve=True)
    found = contract.settings.read(values)
    assert isinstance(found, Settings)
    found.resolve_batch(processes, {each.split("=")[0] for each in overrides.split()})
    return found


def test_the_published_command_is_the_published_recipe():
    command, recipe = settings("lmim", PUBLISHED), settings("lmim", "recipe=lmim_imagenet")
    assert command.science() == recipe.science()
    assert (command.effective_batch_size, command.peak_lr) == (4096, pytest.approx(2.4e-3))
    assert (command.data.name, command.grid_size, command.proj.mlp_dim) == ("imagenet", 14, 4096)


@pytest.mark.parametrize("recipe", ["lmim", "lmim_imagenet", "lmim_imagenet100"])
def test_a_recipe_is_whole_whatever_it_is_added_to(recipe):
    alone = settings("config", f"worker=main_lmim recipe={recipe}", processes=2)
    assert alone.science() == settings("lmim", f"recipe={recipe}", processes=2).science()


def test_the_published_defaults_are_for_imagenet100():
    found = settings("lmim", "")
    assert (found.data.name, found.encoder, found.epochs, found.avg_sim_coeff) == ("imagenet100", "vit_base", 300, 0)


def test_the_command_line_has_the_last_word_on_the_data():
    assert settings("lmim", "data=digits").data.name == "digits"
    assert settings("config", "worker=main_lmim recipe=lmim_imagenet data=digits").data.name == "digits"


def test_hardware_does_not_change_the_development_run():
    one, four = (settings("lmim", "recipe=lmim_imagenet100", processes=n) for n in (1, 4))
    assert (one.accum_iter, four.accum_iter) == (8, 2)
    assert one.science() == four.science()
