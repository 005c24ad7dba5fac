"""Every data set from files laid out as they are published, with real photographs and digits in them."""

from __future__ import annotations

import pickle  # noqa: TID251  # writes the files of CIFAR
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_sample_images
from torchvision.datasets.utils import calculate_md5

import workers.data
from contract.settings import Data
from contract.settings.checks import SettingsError
from workers.data import DataError, fingerprint, load
from workers.data.digits import load as digits
from workers.data.files import Files, pictures_in
from workers.data.imagenet100 import WNIDS

PHOTOS = load_sample_images().images
SOME = [*WNIDS[:3], "n00000001", "n99999999"]  # three of ImageNet-100's classes, and two that are not


def photo(n: int, size: int = 40) -> Image.Image:
    """A different piece of a photograph for each n."""
    y, x = (n * 37) % 300, (n * 53) % 500
    return Image.fromarray(PHOTOS[n % 2][y : y + size, x : x + size])


def place(path: Path, n: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(n).save(path, "JPEG", **options)
    return path


def labels(pictures) -> list[int]:
    return [pictures[i][1] for i in range(len(pictures))]


def names(pictures: Files) -> list[str]:
    return [str(pictures.path(i).relative_to(pictures.root)) for i in range(len(pictures))]


# -- class folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    for n, name in enumerate(["b/2.jpg", "b/10.JPEG", "a/x.png", "a/deep/y.jpg", "c/z.webp"]):
        place(tmp_path / "train" / name, n)
    for name in ["a/1.jpg", "c/1.jpg"]:
        place(tmp_path / "val" / name)
    for ignored in ["a/notes.txt", "a/._x.png", ".cache/q.jpg"]:
        place(tmp_path / "train" / ignored)
    return tmp_path


def test_class_folders(tree):
    train, val = load("imagefolder", "train", tree), load("imagefolder", "val", tree)
    assert train.classes == val.classes == ["a", "b", "c"]
    assert names(train) == ["a/deep/y.jpg", "a/x.png", "b/10.JPEG", "b/2.jpg", "c/z.webp"]
    assert labels(train) == [0, 0, 1, 1, 2]
    assert labels(val) == [0, 2]  # c stays 2 although validation has no b
    image, label = train[4]
    assert image.shape == (3, 40, 40)
    assert label == 2


def test_links_are_followed_to_classes_and_pictures_but_not_in_circles(tree):
    (tree / "train" / "d").symlink_to(tree / "train" / "c")
    (tree / "train" / "c" / "link.jpg").symlink_to(tree / "train" / "b" / "2.jpg")
    (tree / "train" / "c" / "up").symlink_to(tree)
    train = load("imagefolder", "train", tree)
    assert train.classes == ["a", "b", "c", "d"]
    assert labels(train) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "name", ["blank s", "quo'te\"", "$(rm -rf x);", "ünï-çødé 猫", "new\nline", b"\xff\xfe"], ids=repr
)
def test_names_of_any_kind(tmp_path, name):
    name = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
    for split in ("train", "val"):
        place(tmp_path / split / name / f"{name}.jpg")
    (tmp_path / "train" / name / f"{name} bad.jpg").write_bytes(b"")
    train = load("imagefolder", "train", tmp_path)
    assert names(train) == [f"{name}/{name} bad.jpg", f"{name}/{name}.jpg"]
    assert train[1][0].shape == (3, 40, 40)
    assert train.classes == [name]
    assert len(fingerprint(train)) == 16
    with pytest.raises(DataError, match="not a readable picture") as error:
        train[0]
    assert "\n" not in str(error.value)
    str(error.value).encode()  # can be written to a log


def test_folders_that_will_not_do(tree):
    with pytest.raises(DataError, match="needs data_path=ROOT"):
        load("imagefolder", "train", None)
    with pytest.raises(DataError, match=r"elsewhere: no such folder; expected train/CLASS/PICTURE.jpg"):
        load("imagefolder", "train", tree / "elsewhere")
    (tree / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="class folders without pictures: 'empty'"):
        load("imagefolder", "train", tree)
    (tree / "val" / "new").mkdir()
    with pytest.raises(DataError, match="classes that train/ does not have: 'new'"):
        load("imagefolder", "val", tree)
    (tree / "bare" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no pictures in class folders"):
        load("imagefolder", "train", tree / "bare")
    with pytest.raises(DataError, match="has no folder 'val'"):
        load("imagefolder", "val", tree / "bare")


def test_fingerprints_change_with_names_and_labels_only(tree):
    first = fingerprint(load("imagefolder", "train", tree))
    assert first == fingerprint(load("imagefolder", "train", tree))
    assert first != fingerprint(load("imagefolder", "val", tree))
    (tree / "train" / "a" / "x.png").rename(tree / "train" / "b" / "x.png")
    assert first != fingerprint(load("imagefolder", "train", tree))
    assert fingerprint(digits("train")) == fingerprint(digits("train")) != fingerprint(digits("val"))


def test_a_listing_asks_nothing_of_the_files(tree, monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("stat", "lstat"):
            patch.setattr(f"os.{name}", lambda *_, **__: pytest.fail("a stat"))
        assert pictures_in(tree / "train" / "a") == ["deep/y.jpg", "x.png"]


# -- ImageNet ----------------------------------------------------------------------------------------------------------


def write_meta(path: Path, wnids: list[str], first: int = 1) -> None:
    """A meta.mat: leaves in a shuffled order, and two inner nodes after them."""
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(np.uint16(n), wnid, f"word {n}, other", np.uint8(0)) for n, wnid in enumerate(wnids, first)][::-1]
    rows += [(np.uint16(len(wnids) + n), f"n1111111{n}", "inner", np.uint8(2)) for n in (1, 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})


@pytest.fixture(params=["anno", "ILSVRC2012_devkit_t12/data"])
def devkit(tmp_path, request):
    """As the archives unpack: ids 1 to 5 go to the classes in the order of ``SOME``, which is not the alphabet's."""
    for n, wnid in enumerate(SOME):
        for picture in range(2):
            place(tmp_path / "train" / wnid / f"{wnid}_{picture}.JPEG", n)
    truth = [5, 3, 1, 1, 2, 4]
    for n in range(1, 7):
        place(tmp_path / "val" / f"ILSVRC2012_val_{n:08d}.JPEG", n)
    kit = tmp_path / request.param
    write_meta(kit / "meta.mat", SOME)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in truth))
    return tmp_path


def test_imagenet_with_its_development_kit(devkit, caplog):
    caplog.set_level("INFO")
    train, val = load("imagenet", "train", devkit), load("imagenet", "val", devkit)
    assert "development kit" in caplog.text
    assert train.classes == val.classes == SOME
    assert labels(train) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert names(train)[0] == f"{SOME[0]}/{SOME[0]}_0.JPEG"
    assert labels(val) == [4, 2, 0, 0, 1, 3]
    assert names(val)[0] == "ILSVRC2012_val_00000001.JPEG"
    (devkit / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    assert labels(load("imagenet", "val", devkit)) == [4, 0, 0, 1, 3]  # by number, not by place


def test_imagenet_in_class_folders(devkit, caplog):
    caplog.set_level("INFO")
    for n in range(1, 7):
        (devkit / "val" / f"ILSVRC2012_val_{n:08d}.JPEG").unlink()
    for wnid in SOME:
        place(devkit / "val" / wnid / "1.JPEG")
    train, val = load("imagenet", "train", devkit), load("imagenet", "val", devkit)  # although the kit is there
    assert "labels in the order of the alphabet" in caplog.text
    assert train.classes == val.classes == sorted(SOME)
    assert labels(val) == [0, 1, 2, 3, 4]


def test_imagenet100_is_a_place_in_the_published_list(devkit, monkeypatch):
    assert len(set(WNIDS)) == 100
    with pytest.raises(DataError, match="97 of 100 class folders are missing"):
        load("imagenet100", "train", devkit)
    chosen = [SOME[2], SOME[0]]
    monkeypatch.setattr("workers.data.imagenet100.WNIDS", chosen)
    train, val = load("imagenet100", "train", devkit), load("imagenet100", "val", devkit)
    assert train.classes == val.classes == chosen
    assert {name.split("/")[0]: label for name, label in zip(names(train), labels(train), strict=True)} == {
        SOME[2]: 0,
        SOME[0]: 1,
    }
    assert list(zip(names(val), labels(val), strict=True)) == [
        ("ILSVRC2012_val_00000002.JPEG", 0),
        ("ILSVRC2012_val_00000003.JPEG", 1),
        ("ILSVRC2012_val_00000004.JPEG", 1),
    ]
    for path in (devkit / "val").iterdir():
        path.unlink()
    for wnid in SOME:
        place(devkit / "val" / wnid / "1.JPEG")
    assert list(zip(names(load("imagenet100", "val", devkit)), [0, 1], strict=True)) == [
        (f"{SOME[2]}/1.JPEG", 0),
        (f"{SOME[0]}/1.JPEG", 1),
    ]


def test_a_damaged_development_kit_is_named(devkit):
    kit = next(path for path in devkit.rglob("meta.mat"))
    truth = kit.with_name("ILSVRC2012_validation_ground_truth.txt")
    good = truth.read_text()
    for text, said in (("1\n2\n", "no such line"), ("1\n9\n", "ids from 1 to 9"), ("one\n", "unreadable")):
        truth.write_text(text)
        with pytest.raises(DataError, match=said):
            load("imagenet", "val", devkit)
    truth.write_text(good)
    write_meta(kit, SOME, first=2)
    with pytest.raises(DataError, match="the ids of the leaves are not 1, 2, 3"):
        load("imagenet", "train", devkit)
    kit.write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"not the development kit's meta\.mat"):
        load("imagenet", "train", devkit)
    kit.unlink()
    with pytest.raises(DataError, match=r"unpack ILSVRC2012_devkit_t12\.tar\.gz beside it"):
        load("imagenet", "train", devkit)


# -- small pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stl(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pictures = {}
    for name, n in (("train", 5), ("test", 3), ("unlabeled", 4)):
        x = np.stack([np.asarray(photo(10 * len(name) + i, 96)) for i in range(n)]).transpose(
            0, 3, 1, 2
        )  # (n, 3, H, W)
        x.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
        (np.arange(n) * 3 % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
        pictures[name] = torch.from_numpy(x.copy())
    return tmp_path, pictures


def test_stl10_reads_the_published_binaries(stl, monkeypatch):
    root, pictures = stl
    parts = {"labelled": ["train"], "unlabelled": ["unlabeled"], "all": ["train", "unlabeled"]}
    for part, said in parts.items():
        train = load("stl10", "train", root, part=part)
        assert torch.equal(
            torch.stack([train[i][0] for i in range(len(train))]), torch.cat([pictures[name] for name in said])
        )
        assert labels(train) == ([0, 3, 6, 9, 2] if "train" in said else []) + [-1] * 4 * ("unlabeled" in said)
        assert torch.equal(load("stl10", "val", root, part=part)[2][0], pictures["test"][2])
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda _: True)
    theirs = torchvision.datasets.STL10(str(root), "train")
    ours = load("stl10", "train", root)
    assert (theirs.data == torch.stack([ours[i][0] for i in range(5)]).numpy()).all()
    assert theirs.labels.tolist() == labels(ours)
    assert ours.classes == workers.data.load("stl10", "val", root / "stl10_binary").classes


def test_stl10_cut_short(stl):
    root, _ = stl
    path = root / "stl10_binary" / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train_X.bin: has 138239 bytes, expected a multiple of 27648"):
        load("stl10", "train", root)
    path.write_bytes(bytes(4 * 27648))
    with pytest.raises(DataError, match=r"train_y.bin: has 5 bytes, expected 4"):
        load("stl10", "train", root)
    (root / "stl10_binary" / "test_X.bin").unlink()
    with pytest.raises(DataError, match=r"test_X.bin: No such file"):
        load("stl10", "val", root)


def test_only_stl10_has_pictures_without_labels():
    Data(name="stl10", part="all")
    with pytest.raises(SettingsError, match=r"data.part=all: of stl10 only"):
        Data(name="cifar10", part="all")


@pytest.mark.parametrize(
    ("name", "kind"), [("cifar10", torchvision.datasets.CIFAR10), ("cifar100", torchvision.datasets.CIFAR100)]
)
def test_cifar_through_torchvision(tmp_path, monkeypatch, name, kind):
    with pytest.raises(DataError, match=r"is not there or damaged; expected cifar.*data\.download=True"):
        load(name, "train", tmp_path)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"

    def write(file: str, content) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return calculate_md5(folder / file)

    x = np.stack([np.asarray(photo(n, 32)) for n in range(4)])
    batch = {"data": x.transpose(0, 3, 1, 2).reshape(4, -1), key: [3, 1, 0, 9]}
    for lists in ("train_list", "test_list"):
        monkeypatch.setattr(kind, lists, [[file, write(file, batch)] for file, _ in getattr(kind, lists)])
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"c{n}" for n in range(10)]})
    monkeypatch.setattr(kind, "meta", meta)
    val = load(name, "val", tmp_path)
    assert (torch.stack([val[i][0] for i in range(4)]).numpy() == x.transpose(0, 3, 1, 2)).all()
    assert labels(val) == [3, 1, 0, 9]
    assert len(load(name, "train", tmp_path)) == 4 * len(kind.train_list)
    write(kind.test_list[0][0], "something else")  # whatever is in it is not read
    with pytest.raises(DataError, match="is not there or damaged"):
        load(name, "val", tmp_path)


def test_a_download_that_fails_says_from_where(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"data.download=True: no CIFAR10 from https://.*no route to host"):
        load("cifar10", "train", tmp_path / "new", download=True)


@pytest.fixture
def tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for n, wnid in enumerate(["n02", "n01"]):
        for picture in range(2):
            place(root / "train" / wnid / "images" / f"{wnid}_{picture}.JPEG", n)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for n in range(3):
        place(root / "val" / "images" / f"val_{n}.JPEG", n)
    (root / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t9\t9\nval_2.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn02\t0\t0\t9\t9\n"
    )
    return tmp_path


def test_tiny_imagenet(tiny_imagenet):
    train, val = load("tiny_imagenet", "train", tiny_imagenet), load("tiny_imagenet", "val", tiny_imagenet)
    assert train.classes == val.classes == ["n01", "n02"]
    assert labels(train) == [0, 0, 1, 1]
    assert names(val) == ["val_0.JPEG", "val_2.JPEG", "val_1.JPEG"]
    assert labels(val) == [1, 0, 1]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..", "a/b.JPEG", ""])
def test_an_annotation_cannot_point_elsewhere(tiny_imagenet, name):
    path = tiny_imagenet / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text(f"{name}\tn01\t0\t0\t9\t9\n")
    with pytest.raises(DataError, match="is not the name of a file beside it"):
        load("tiny_imagenet", "val", tiny_imagenet)
    path.write_text("val_0.JPEG\tn77\t0\t0\t9\t9\n")
    with pytest.raises(DataError, match="train/ has no class 'n77'"):
        load("tiny_imagenet", "val", tiny_imagenet)
