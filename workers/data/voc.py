"""PASCAL VOC (Everingham et al., IJCV 2010), 2007 and 2012, and other sets in its layout.

``data_path`` is the folder with ``VOC2007/`` and ``VOC2012/`` (or the ``VOCdevkit/`` that has them): in each of them
``Annotations/ID.xml``, ``JPEGImages/ID.jpg`` and ``ImageSets/Main/SET.txt``. A set is named YEAR_SET, as in
2007_trainval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from workers.data import DataError, Split, needed, shown
from workers.data.files import file_name
from workers.data.scenes import Scenes, Thing, check_there, read_text

CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
SETS: dict[Split, list[str]] = {"train": ["2007_trainval", "2012_trainval"], "val": ["2007_test"]}
LAYOUT = "VOC2007/ and VOC2012/, each with Annotations/, ImageSets/Main/ and JPEGImages/"


def load(
    split: Split,
    root: Path | None,
    *,
    sets: Sequence[str] = (),
    train_sets: Sequence[str] = (),
    classes: int = 20,
    **_: Any,
) -> Scenes:
    """``sets``: which ones, where not those of the published protocol. ``classes=0``: whatever the training sets name.

    Raises DataError in one line for what is missing or cannot be meant.
    """
    root = needed(root, "voc", LAYOUT)
    root = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    chosen = list(sets) or SETS[split]
    named = CLASSES if classes == len(CLASSES) else _classes(root, list(train_sets) or SETS["train"])
    rule = "voc07" if all(each.startswith("2007_") for each in chosen) else "voc"
    found = Scenes(root, named, metric=rule)
    seen: set[str] = set()
    for folder, identities, listing in (_listed(root, each) for each in chosen):
        for identity in identities:
            name = f"{folder.name}/JPEGImages/{identity}.jpg"
            if name in seen:
                raise DataError(f"{shown(listing)}: {identity} is listed twice; every picture once")
            seen.add(name)
            path = folder / "Annotations" / f"{identity}.xml"
            height, width, things = parsed(read_text(path, "its annotation"), path, named)
            found.add(name, height, width, things, shown(path))
    check_there(root, found.names)
    return found.sealed()


def _listed(root: Path, name: str) -> tuple[Path, list[str], Path]:
    """The folder of a set, its pictures, and the file that lists them."""
    year, _, part = name.partition("_")
    folder = root / f"VOC{year}"
    listing = folder / "ImageSets" / "Main" / f"{part}.txt"
    lines = read_text(listing, f"the list of {name}").decode("utf-8", "replace").split("\n")
    identities = [file_name(line.split()[0], listing) for line in lines if line.strip()]
    if not identities:
        raise DataError(f"{shown(listing)}: lists no picture")
    return folder, identities, listing


def _classes(root: Path, sets: Sequence[str]) -> list[str]:
    found: set[str] = set()
    for folder, identities, _ in (_listed(root, each) for each in sets):
        for identity in identities:
            path = folder / "Annotations" / f"{identity}.xml"
            tree = _tree(read_text(path, "its annotation"), path)
            found |= {_text(each, "name", path) for each in tree.iter("object")}
    return sorted(found)


def parsed(content: bytes, path: Path, classes: Sequence[str]) -> tuple[int, int, list[Thing]]:
    """Height, width and objects of one annotation.

    VOC counts pixels from 1 and includes the last, so that its box 1, 1, 1, 1 is one pixel: here 0, 0, 1, 1. Boxes may
    be fractions, as some programs write them; ``difficult`` may be missing or empty; other tags are not read.
    """
    tree = _tree(content, path)
    size = tree.find("size")
    if size is None:
        raise DataError(f"{shown(path)}: has no size")
    height, width = (int(_number(size, side, path)) for side in ("height", "width"))
    things = []
    for each in tree.iter("object"):
        name, box = _text(each, "name", path), each.find("bndbox")
        if name not in classes:
            raise DataError(f"{shown(path)}: a {name!r} is none of the {len(classes)} classes: {', '.join(classes)}")
        if box is None:
            raise DataError(f"{shown(path)}: a {name} without bndbox")
        left, top, right, bottom = (_number(box, side, path) for side in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (each.findtext("difficult") or "").strip() not in ("", "0")
        things.append(Thing(classes.index(name), (left - 1, top - 1, right, bottom), difficult))
    return height, width, things


def _tree(content: bytes, path: Path) -> ElementTree.Element:
    """The standard library's tree, without document types: only these can define entities, which may grow to gigabytes
    or name other files."""
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def refused(*_: Any) -> None:
        raise DataError(f"{shown(path)}: has a document type, which annotations do not need; refused")

    parser.StartDoctypeDeclHandler = refused
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
        found = builder.close()
    except (expat.ExpatError, AssertionError, ValueError) as error:
        raise DataError(f"{shown(path)}: not XML ({error})") from None
    return found


def _text(element: ElementTree.Element, tag: str, path: Path) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise DataError(f"{shown(path)}: a {element.tag} without {tag}")
    return text


def _number(element: ElementTree.Element, tag: str, path: Path) -> float:
    text = _text(element, tag, path)
    if not re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", text, re.IGNORECASE) or not math.isfinite(float(text)):
        raise DataError(f"{shown(path)}: {tag} is {text!r}; expected a number")
    return float(text)
