"""Decoded pictures: made once, whole or not at all, and never those of another folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from workers.data import DataError, Unreadable, cache, load
from workers.data.cache import decoded
from workers.data.decode import shrink

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = load_sample_images().images


@pytest.fixture
def files(tmp_path):
    """Photographs of many sizes, grey ones too."""
    for n in range(12):
        path = tmp_path / "photos" / "train" / "abc"[n % 3] / f"{n}.{'jpg' if n % 4 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PHOTOS[n % 2][5 * n : 5 * n + 40 + 3 * n, 9 * n : 9 * n + 90 - 4 * n]).save(path)
        if n == 5:
            Image.open(path).convert("L").save(path)
    return load("imagefolder", "train", tmp_path / "photos")


def built(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("side", [None, 32])
def test_a_cache_holds_the_very_pixels(files, tmp_path, side, workers):
    kept = decoded(files, side, tmp_path / "cache", workers=workers)
    assert len(kept) == len(files)
    assert kept.classes == files.classes
    for n in range(len(files)):
        (image, label), (mine, my_label) = files[n], kept[n]
        image = image if side is None else shrink(image, side)
        assert torch.equal(image, mine)
        assert image.stride() == mine.stride()
        assert label == my_label
    kept[0][0].zero_()  # a copy: the cache cannot be spoilt
    assert kept[0][0].any()


def test_it_is_made_once(files, tmp_path, monkeypatch):
    builds, lock, real = [], threading.Event(), cache._build

    def slow(*args):
        lock.wait(0.3)
        builds.append(args)
        real(*args)

    monkeypatch.setattr(cache, "_build", slow)
    threads = [threading.Thread(target=decoded, args=(files, 32, tmp_path / "cache")) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(builds) == 1
    decoded(files, 32, tmp_path / "cache")
    (name,) = built(tmp_path / "cache")
    assert len(builds) == 1
    for mode in (0o500, 0o700):  # one that is made is read where nothing may be written
        (tmp_path / "cache").chmod(mode)
        assert decoded(files, 32, tmp_path / "cache").folder.name == name


def test_other_pictures_sizes_and_folders_have_their_own(files, tmp_path):
    folder, photos = tmp_path / "cache", tmp_path / "photos"
    names = {decoded(files, side, folder).folder.name for side in (None, 32, 33)}
    assert len(names) == 3
    shutil.copy(photos / "train/a/0.png", photos / "train/a/another.png")
    grown = decoded(load("imagefolder", "train", photos), 32, folder)
    assert len(grown) == 13
    shutil.copytree(photos, tmp_path / "copy")
    copied = decoded(load("imagefolder", "train", tmp_path / "copy"), 32, folder)
    assert len({*names, grown.folder.name, copied.folder.name}) == 5 == len(built(folder))


def test_a_killed_build_leaves_nothing_and_is_begun_again(files, tmp_path):
    script = """
import os, signal, sys, pathlib
from workers.data import cache, files, load
read, seen = files.read_rgb, []
def dying(path):
    seen.append(path)
    if len(seen) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(path)
files.read_rgb = dying
cache.decoded(load("imagefolder", "train", pathlib.Path(sys.argv[1])), 32, pathlib.Path(sys.argv[2]))
"""
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", script, str(tmp_path / "photos"), str(folder)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = built(folder)
    assert left.endswith(".part")
    kept = decoded(files, 32, folder)
    assert built(folder) == [kept.folder.name]
    assert torch.equal(kept[7][0], shrink(files[7][0], 32))


def test_damaged_pictures(files, tmp_path):
    folder, bad = tmp_path / "cache", files.path(4)
    bad.write_bytes(bad.read_bytes()[:300])
    for workers in (0, 1):
        with pytest.raises(Unreadable) as error:
            decoded(files, 32, folder, workers=workers)
        assert str(error.value).startswith(f"{bad}: not a readable picture")
        assert built(folder) == []
    kept = decoded(files, 32, folder, on_error="skip")
    with pytest.raises(Unreadable, match=f"{bad.name}: was not readable when .*cache.* was made"):
        kept[4]
    assert torch.equal(kept[5][0], shrink(files[5][0], 32))
    about = json.loads((kept.folder / cache.ABOUT).read_text())
    assert about["unreadable"] == [str(bad)]
    assert about["shorter_side"] == 32


def test_a_damaged_cache_is_named(files, tmp_path):
    kept = decoded(files, 32, tmp_path / "cache")
    pixels, index = kept.folder / cache.PIXELS, kept.folder / cache.INDEX
    good = pixels.read_bytes()
    pixels.write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"a damaged cache \(.*pixels.bin: has .*\); delete this folder"):
        decoded(files, 32, tmp_path / "cache")
    pixels.write_bytes(good)
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(DataError, match="a damaged cache"):
        decoded(files, 32, tmp_path / "cache")
    np.save(index, np.zeros((3, 3), np.int64))
    with pytest.raises(DataError, match="a damaged cache"):
        decoded(files, 32, tmp_path / "cache")


def test_a_disk_that_is_too_small_is_noticed_early(files, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(cache, "PROGRESS_S", 0.0)
    decoded(files, 32, tmp_path / "cache")
    assert "11 of 12 pictures" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"needs about .* GB, 1e-06 GB are left; set data\.shorter_side"):
        decoded(files, 31, tmp_path / "cache")
    assert len(built(tmp_path / "cache")) == 1


def test_a_disk_that_fills_up_is_said(files, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"data.cache=.*cache: No space left on device"):
        decoded(files, 32, tmp_path / "cache")
    assert built(tmp_path / "cache") == []
