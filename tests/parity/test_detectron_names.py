"""Files for Detectron2 against those of the published converter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity.stored import arrays, cases, facts
from workers import models
from workers.interop import detectron_names, detectron_pickle

PREFIX = "module.encoder_q."  # what it takes of a checkpoint, and where our encoders have no prefix


@pytest.mark.parametrize("path", cases("lmim_mixmask/detectron2_*keymap.json"))
def test_every_name_and_their_order(path: Path) -> None:
    for arch, said in facts(path).items():
        ours = {PREFIX + theirs: detectron_names.residual(theirs) for theirs in map(stripped, said["map"])}
        assert ours == said["map"]
        back = {name: detectron_names.torchvisions(name) for name in said["map"].values()}
        assert {PREFIX + name for name in back.values()} == set(said["map"])
        encoder = models.build("resnet", {"arch": arch.removesuffix("_mlp")})
        named = detectron_names.named(encoder)
        heads = [name for name in said["map"].values() if name.startswith("stem.fc")]  # which nothing there matches
        assert list(named.arrays) == [name for name in said["map"].values() if name not in heads]
        assert said["n"] == len(named.arrays) + len(heads)
        whole = detectron_names.content(named.arrays)
        assert list(whole) == said["top_level_keys"]
        assert whole["__author__"] == said["author"]
        assert whole["matching_heuristics"] is said["matching_heuristics"]
        assert {type(each).__name__ for each in named.arrays.values()} == {said["array_type"]}


@pytest.mark.parametrize("path", cases("lmim_mixmask/detectron2_*_output.pkl"))
def test_the_same_file_from_the_same_checkpoint(path: Path) -> None:
    published = detectron_pickle.read(path.read_bytes())
    taken = arrays(path.with_name(path.name.replace("output.pkl", "input.npz")))
    state = {stripped(name): value.numpy() for name, value in taken.items() if name.startswith(PREFIX)}
    ours = detectron_names.content({detectron_names.residual(name): value for name, value in state.items()})
    again = detectron_pickle.read(detectron_pickle.written(ours))
    assert list(again) == list(published)
    assert list(again["model"]) == list(published["model"])
    for name, value in published["model"].items():
        assert again["model"][name].dtype == value.dtype
        assert np.array_equal(again["model"][name], value), name
    assert {k: v for k, v in again.items() if k != "model"} == {k: v for k, v in published.items() if k != "model"}


def stripped(name: str) -> str:
    return name.removeprefix(PREFIX)
