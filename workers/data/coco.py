"""COCO (Lin et al., ECCV 2014), 2017's split, and other sets in its layout.

``data_path`` is the folder with ``annotations/instances_SET.json`` and ``SET/*.jpg``; a set is train2017 or val2017.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.data import DataError, Split, needed, shown
from workers.data.files import file_name
from workers.data.scenes import Scenes, Thing, check_there, read_text

SETS: dict[Split, list[str]] = {"train": ["train2017"], "val": ["val2017"]}
LAYOUT = "annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/ and val2017/"


def load(
    split: Split,
    root: Path | None,
    *,
    sets: Sequence[str] = (),
    train_sets: Sequence[str] = (),
    masks: bool = True,
    **_: Any,
) -> Scenes:
    """``sets``: which ones, where not those of the published protocol; classes are those of the first training set.

    Raises DataError in one line for what is missing or cannot be meant.
    """
    root = needed(root, "coco", LAYOUT)
    chosen = list(sets) or SETS[split]
    first = (list(train_sets) or SETS["train"])[0]
    found: Scenes | None = None
    categories: dict[int, str] = {}
    for name in chosen:
        path = _path(root, name)
        saved = _read(path)
        own = _categories(saved, path)
        if found is None:
            categories = own if name == first or not _path(root, first).is_file() else _categories_of(root, first)
            found = Scenes(root, list(categories.values()), metric="coco", masks=masks)
        if own != categories:
            odd = sorted(set(own.items()) ^ set(categories.items()))[0]
            raise DataError(f"{shown(path)}: category {odd[0]}, {odd[1]!r}, is not the same in {first}")
        _add(found, saved, name, path, categories)
    assert found is not None
    check_there(root, found.names)
    return found.sealed()


def _path(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(read_text(path, "COCO's annotations"))
    except ValueError as error:
        raise DataError(f"{shown(path)}: not JSON ({error})") from None
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k), list) for k in ("images", "categories")):
        raise DataError(f"{shown(path)}: has no lists of images and categories; expected COCO's annotations")
    return saved


def _categories_of(root: Path, name: str) -> dict[int, str]:
    path = _path(root, name)
    return _categories(_read(path), path)


def _categories(saved: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Number -> name, by rising numbers: a label is a place in this order."""
    found: dict[int, str] = {}
    for each in saved["categories"]:
        number, name = _field(each, "id", int, path), _field(each, "name", str, path)
        if number in found:
            raise DataError(f"{shown(path)}: category {number} is there twice")
        found[number] = name
    return dict(sorted(found.items()))


def _add(found: Scenes, saved: Mapping[str, Any], name: str, path: Path, categories: Mapping[int, str]) -> None:
    places = {number: place for place, number in enumerate(categories)}
    images: dict[int, Mapping[str, Any]] = {}
    for image in saved["images"]:
        number = _field(image, "id", int, path)
        if number in images:
            raise DataError(f"{shown(path)}: image {number} is there twice")
        images[number] = image
    things: dict[int, list[Thing]] = {number: [] for number in images}
    seen: set[int] = set()
    for each in saved.get("annotations", ()):
        number, image = _field(each, "id", int, path), _field(each, "image_id", int, path)
        if number in seen:
            raise DataError(f"{shown(path)}: annotation {number} is there twice")
        seen.add(number)
        if image not in images:
            raise DataError(f"{shown(path)}: annotation {number} is of image {image}, which is not listed")
        category = _field(each, "category_id", int, path)
        if category not in places:
            raise DataError(f"{shown(path)}: annotation {number} is of category {category}, which is not listed")
        box = each.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise DataError(
                f"{shown(path)}: annotation {number} has the box {box}; expected [left, top, width, height]"
            )
        if found.has_masks and "segmentation" not in each:
            raise DataError(f"{shown(path)}: annotation {number} has no segmentation; say masks=false")
        left, top, width, height = map(float, box)
        things[image].append(
            Thing(
                places[category],
                (left, top, left + width, top + height),
                crowd=bool(each.get("iscrowd", 0)),
                area=float(each["area"]) if "area" in each else None,
                segmentation=each.get("segmentation"),
            )
        )
    for number, image in images.items():
        file = _field(image, "file_name", str, path)
        for part in file.split("/"):  # a folder below the set's, but never one outside
            file_name(part, path)
        height, width = (_field(image, side, int, path) for side in ("height", "width"))
        found.add(f"{name}/{file}", height, width, things[number], f"{shown(path)}, image {number}")


def _field(record: Any, key: str, kind: type[Any], path: Path) -> Any:
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{shown(path)}: {key} is {value!r}; expected {'a number' if kind is int else 'text'}")
    return value
