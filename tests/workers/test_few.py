"""Low-shot splits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import workers.data
from workers.data import DataError
from workers.data.cache import Shrunk
from workers.data.few import few, labels_of
from workers.data.files import Files


class Some:
    """Pictures of known labels; reading one is an error."""

    def __init__(self, labels):
        self.labels = np.array(labels)
        self.classes = [f"class {c}" for c in range(4)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise AssertionError("a split reads no picture")


def files(tmp_path, order) -> Files:
    names = [f"class {i % 4}/{i:03}.png" for i in order]
    return Files(tmp_path, names, [i % 4 for i in order], [f"class {c}" for c in range(4)])


def test_every_class_gives_as_many_whatever_its_size():
    pictures = Some([0] * 50 + [1] * 7 + [-1] * 9 + [2] * 20 + [3] * 5)
    assert np.bincount(few(pictures, shots=5).labels).tolist() == [5, 5, 5, 5]
    assert np.bincount(few(pictures, fraction=0.1).labels).tolist() == [5, 1, 2, 1]  # at least one
    assert few(pictures) is pictures


def test_a_seed_is_a_split_and_fewer_shots_are_a_part_of_more():
    pictures = workers.data.load("digits", "train", None)
    five, again, other = (few(pictures, shots=5, seed=seed) for seed in (3, 3, 4))
    assert five.chosen.tolist() == again.chosen.tolist() != other.chosen.tolist()
    assert set(few(pictures, shots=2, seed=3).chosen) < set(five.chosen)
    assert [five[i][1] for i in range(len(five))] == five.labels.tolist()
    assert workers.data.fingerprint(five) != workers.data.fingerprint(other)


def test_a_split_of_files_goes_by_their_names_not_by_their_order(tmp_path):
    forward, backward = files(tmp_path, range(80)), files(tmp_path / "elsewhere", range(79, -1, -1))
    chosen = [
        {each.pictures.name_of(int(place)) for place in each.chosen}
        for each in (
            few(forward, shots=3, seed=1),
            few(backward, shots=3, seed=1),
            few(Shrunk(forward, 8), shots=3, seed=1),
        )
    ]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 12


@pytest.mark.parametrize("options", [{"shots": 6}, {"fraction": 1.0}])
def test_classes_with_too_few_pictures_are_one_line(options):
    pictures = Some([0] * 50 + [1] * 5 + [2] * 9)  # none of class 3
    with pytest.raises(DataError) as error:
        few(pictures, **options)
    assert "'class 3'" in str(error.value)
    assert ("'class 1'" in str(error.value)) == ("shots" in options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_data_sets_know_their_labels_without_reading(name):
    pictures = workers.data.load(name, "val", None)
    places = torch.arange(0, len(pictures), 37).tolist()
    assert [int(labels_of(pictures)[place]) for place in places] == [pictures[place][1] for place in places]
