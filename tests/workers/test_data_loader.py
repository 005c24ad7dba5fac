"""What loaders promise: the same pictures whatever the loader processes do, and damaged ones accounted for."""

from __future__ import annotations

import json
import os
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from contract.settings import read
from workers.data import DataError, Unreadable, load
from workers.data.digits import load as digits
from workers.data.loader import Views, eval_loader, train_loader, unreadable
from workers.engine import pictures
from workers.engine.distributed import fold
from workers.transforms.crops import RandomResizedCrop, ResizeCenterCrop

ALONE = {"rank": 0, "world": 1, "fold": fold}
PHOTOS = load_sample_images().images
BAD = ("a/3.jpg", "b/0.jpg", "b/1.jpg", "b/7.jpg")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """16 photographs in two classes, 4 of them damaged, in both splits."""
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for n in range(16):
            path = folder / split / "ab"[n // 8] / f"{n % 8}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            y, x = 11 * n, 17 * n
            Image.fromarray(PHOTOS[n % 2][y : y + 60, x : x + 80]).save(path)
        for name in BAD:
            path = folder / split / name
            path.write_bytes(path.read_bytes()[:500])
    return folder


def passes(loader, epochs: int = 2) -> list[list[torch.Tensor]]:
    found = []
    for epoch in range(epochs):
        if hasattr(loader.sampler, "start"):
            loader.sampler.start(epoch, 0)
        found += list(loader)
    return found


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_loader_processes_change_nothing(root):
    train = load("imagefolder", "train", root)
    crop, centre = RandomResizedCrop(32), ResizeCenterCrop(32)
    passed = {}
    for workers in (0, 2):
        loader = train_loader(train, crop, 4, seed=3, workers=workers, skip=True, **ALONE)
        in_order = eval_loader(train, centre, 4, workers=workers, skip=True, **ALONE)
        passed[workers] = (passes(loader), passes(in_order, 1))
        assert np.flatnonzero(unreadable(loader)).tolist() == [3, 8, 9, 15]  # once each, whatever process saw them
        assert unreadable(in_order).sum() == 4
    assert same(passed[0][0], passed[2][0])
    assert same(passed[0][1], passed[2][1])
    assert len({tuple(i.tolist()) for _, _, i in passed[0][0]}) == 8  # two epochs in two orders


def test_training_replaces_what_it_skips_and_evaluation_leaves_it_out(root, caplog):
    train = load("imagefolder", "train", root)
    loader = train_loader(train, RandomResizedCrop(32), 4, seed=0, skip=True, **ALONE)
    batches = passes(loader, 3)
    assert all(len(x) == 4 for x, _, _ in batches)
    index = torch.cat([i for _, _, i in batches]).reshape(3, 16)
    readable = [n for n in range(16) if n not in (3, 8, 9, 15)]
    for epoch in index:
        expected = [*readable, 4, 10, 10, 0]  # 8 and 9 give way to 10, the last to the first
        assert sorted(epoch.tolist()) == sorted(expected)
    for _, label, i in batches:
        assert label.tolist() == [n // 8 for n in i.tolist()]  # the label is that of the picture that is shown
    assert [r.getMessage().startswith("skipped: ") for r in caplog.records] == [True] * 4

    for batch_size, sizes in ((4, [3, 4, 2, 3]), (1, [1] * 12)):
        loader = eval_loader(train, ResizeCenterCrop(32), batch_size, skip=True, **ALONE)
        batches = passes(loader, 1)
        assert [len(x) for x, _, _ in batches] == sizes
        assert torch.cat([i for _, _, i in batches]).tolist() == readable


@pytest.mark.parametrize("workers", [0, 1])
def test_without_skipping_the_first_damaged_picture_ends_it_in_one_line(root, workers):
    train = load("imagefolder", "train", root)
    loader = eval_loader(train, ResizeCenterCrop(32), 4, workers=workers, **ALONE)
    with pytest.raises(Unreadable) as error:
        list(loader)
    assert str(error.value).startswith(f"{root}/train/a/3.jpg: not a readable picture (")
    assert "\n" not in str(error.value)
    assert len(unreadable(loader)) == 0


class Broken:
    classes = ("only",)

    def __init__(self, n: int, bad: int):
        self.n, self.bad = n, bad

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        if index < self.bad:
            raise Unreadable(f"{index}.jpg: cut")
        return torch.zeros(3, 8, 8, dtype=torch.uint8), 0


@pytest.mark.parametrize(("n", "bad", "said"), [(4, 4, "4 of 4"), (40, 13, "13 of 40"), (400, 100, "31 of 400")])
@pytest.mark.parametrize("make", ["train", "eval"])
def test_too_many_damaged_pictures_are_not_skipped(n, bad, said, make):
    if make == "train":
        loader = train_loader(Broken(n, bad), ResizeCenterCrop(8), 4, seed=0, skip=True, **ALONE)
    else:
        loader = eval_loader(Broken(n, bad), ResizeCenterCrop(8), 4, skip=True, **ALONE)
    with pytest.raises(DataError, match=f"{said} pictures cannot be read, too many to skip; the last: .*jpg: cut"):
        list(loader)


class WhichCores:
    classes = ("only",)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        return torch.zeros(3, 8, 8, dtype=torch.uint8), len(os.sched_getaffinity(0))


def test_loader_processes_leave_the_core_that_a_library_pinned_this_one_to():
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("needs two cores")
    try:
        os.sched_setaffinity(0, {min(mine)})
        for all_cores, expected in ((False, 1), (True, len(mine))):
            loader = eval_loader(WhichCores(), ResizeCenterCrop(8), 2, workers=1, all_cores=all_cores, **ALONE)
            ((_, cores, _),) = list(loader)
            assert cores.tolist() == [expected] * 2
    finally:
        os.sched_setaffinity(0, mine)


def test_what_travels_to_a_spawned_loader_process_is_small(root, tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    np.zeros((50, 3, 96, 96), np.uint8).tofile(folder / "train_X.bin")
    np.ones(50, np.uint8).tofile(folder / "train_y.bin")
    settings = {"name": "imagefolder", "classes": 0, "cache": str(tmp_path / "cache"), "on_error": "skip"}
    cached = pictures.load(read({"worker": "main_lmim", "data": settings, "data_path": str(root)}), "train")
    for each in (load("stl10", "train", tmp_path), load("imagefolder", "train", root), cached):
        each[0]  # what was opened here is opened there again
        views = Views(each, ResizeCenterCrop(8), 0, fold, "replace")
        sent = bytes(ForkingPickler.dumps(views))
        assert len(sent) < 5000
        got = ForkingPickler.loads(sent)
        assert torch.equal(got[0, 0][0], views[0, 0][0])


# -- through the settings of a run -------------------------------------------------------------------------------------


def settings_for(root: Path, **data):
    return read({"worker": "main_lmim", "data_path": str(root), "data": {"name": "imagefolder", "classes": 2, **data}})


@pytest.mark.parametrize("side", [None, 32])
def test_a_cache_and_no_cache_give_the_same_batches(root, tmp_path, side):
    batches = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        settings = settings_for(root, on_error="skip", shorter_side=side, cache=cache)
        train, val = pictures.load(settings, "train"), pictures.load(settings, "val")
        assert train[0][0].shape[1:] == ((60, 80) if side is None else (32, 42))
        loader = pictures.shuffled(settings, train, RandomResizedCrop(24), 4)
        val_loader = pictures.in_order(settings, val, ResizeCenterCrop(24), 4)
        batches.append(passes(loader) + passes(val_loader, 1))
        assert pictures.skipped(settings, loader, val_loader) == {"data/skipped": 8}
    assert same(batches[0], batches[1])
    assert same(batches[0], batches[2])
    assert pictures.skipped(settings_for(root), loader) == {}


def test_examples_come_from_all_over_and_are_readable(root):
    train = load("imagefolder", "train", root)
    centre = ResizeCenterCrop(32)
    shown = pictures.examples(train, centre, 8)
    assert torch.equal(shown, torch.stack([centre(train[n][0]) for n in (0, 2, 4, 6, 10, 12, 14)]))  # 8 is damaged


def test_what_a_run_says_of_its_pictures(root, caplog):
    caplog.set_level("INFO")
    pictures.load(settings_for(root), "train")
    assert "imagefolder train: 16 pictures of 2 classes, fingerprint " in caplog.text
    with pytest.raises(DataError, match=r"data.classes=5: imagefolder train has 2 classes"):
        pictures.load(settings_for(root, classes=5), "train")


def test_only_pretraining_sees_pictures_without_labels(tmp_path):
    for name, n in (("train", 5), ("unlabeled", 7)):
        np.zeros((n, 3, 96, 96), np.uint8).tofile(tmp_path / f"{name}_X.bin")
        np.ones(n, np.uint8).tofile(tmp_path / f"{name}_y.bin")
    settings = read({"worker": "main_lmim", "data_path": str(tmp_path), "data": {"name": "stl10", "part": "all"}})
    assert len(pictures.load(settings, "train", labelled=False)) == 12
    assert len(pictures.load(settings, "train")) == 5


def test_digits_can_be_shrunk_and_need_no_cache(tmp_path):
    data = {"shorter_side": 14, "cache": str(tmp_path / "cache")}
    small = pictures.load(read({"worker": "main_lmim", "data": data}), "val")
    assert small[0][0].shape == (3, 14, 14)
    assert small[0][1] == digits("val")[0][1]
    assert not (tmp_path / "cache").exists()


def test_a_worker_stops_at_a_damaged_picture_or_goes_on_without_it(root, tmp_path, make_run, work, tiny):
    data = {"name": "imagefolder", "classes": 2}
    tiny |= {"epochs": 1, "eval_freq": 0, "data_path": str(tmp_path), "env": {"workers": 1}}
    for split in ("train", "val"):
        shutil.copytree(root / "train", tmp_path / split)
    for name in BAD:
        (tmp_path / "val" / name).unlink()
    ended = work(make_run(tmp_path / "stop", **{**tiny, "data": data}))
    assert ended.returncode == 1
    (line,) = [each for each in ended.stdout.splitlines() if "error: " in each]
    assert f"error: {tmp_path}/train/" in line
    assert "not a readable picture" in line
    run = make_run(tmp_path / "skip", **{**tiny, "data": {**data, "on_error": "skip"}})
    ended = work(run)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("skipped: ") >= 4
    assert json.loads((run / "done.json").read_text())["steps"] == 2
