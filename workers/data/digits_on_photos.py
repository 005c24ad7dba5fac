"""Real digits pasted on real photographs, with exact boxes and masks: detection for any machine, without a download.

MNIST's digits are those of ``data=digits``, the photographs scikit-image's and scikit-learn's own. Those of the
validation pictures, digits and photographs, are in no training picture. A digit's mask is exactly the pixels that were
painted, its box the smallest around them; digits never touch. The scenes are made up: figures on them say nothing about
any paper.

    python -m workers.data.digits_on_photos FOLDER

writes them in the layouts of VOC (as year 2007) and COCO, to try ``data=voc`` and ``data=coco`` on.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from workers.data import DataError, Split, digits
from workers.data.decode import read_rgb
from workers.data.scenes import RLE, Scenes, Thing

SIDE = 128  # of a picture
NUMBER: dict[Split, int] = {"train": 400, "val": 100}
MOST = 4  # digits in a picture; the first one in twenty has none
SIDES = (28, 64)  # of a digit with its margin
TRIES = 20  # at a place for a digit that touches no other
PHOTOS: dict[Split, list[tuple[str, str]]] = {
    "train": [
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/rocket.jpg"),
        ("sklearn", "datasets/images/flower.jpg"),
    ],
    "val": [
        ("skimage", "data/gravel.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("sklearn", "datasets/images/china.jpg"),
    ],
}


class Painted(Scenes):
    """Scenes in memory."""

    def __init__(self, pictures: list[Tensor], classes: list[str]):
        super().__init__(Path("digits_on_photos"), classes, metric="coco", masks=True)
        self.pictures = pictures

    def picture(self, index: int) -> Tensor:
        return self.pictures[index]


def load(split: Split, root: Path | None = None, *, number: int | None = None, **_: Any) -> Painted:
    """The same pictures every time; the first ``number`` of them."""
    return _painted(split, number or NUMBER[split])


@functools.cache
def _painted(split: Split, number: int) -> Painted:
    photos = [photo(*each) for each in PHOTOS[split]]
    shapes = digits.load(split)
    pictures, listed = [], []
    for index in range(number):
        generator = torch.Generator().manual_seed(10**6 * (split == "val") + index)
        picture, things = paint(photos, shapes, generator)
        pictures.append(picture)
        listed.append(things)
    found = Painted(pictures, shapes.classes)
    for index, things in enumerate(listed):
        found.add(f"{split}_{index:04d}", SIDE, SIDE, things, f"digits_on_photos {split} {index}")
    sealed = found.sealed()
    assert isinstance(sealed, Painted)
    return sealed


def photo(package: str, name: str) -> Tensor:
    """(3, H, W) uint8, brought down to twice the side of a picture."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"data=digits_on_photos: the package {package} is missing; pip install 'sightline[train]'")
    image = read_rgb(Path(spec.submodule_search_locations[0]) / name)
    scale = 2 * SIDE / min(image.shape[1:])
    size = [round(side * scale) for side in image.shape[1:]]
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).byte()


def paint(photos: list[Tensor], shapes: digits.Digits, generator: torch.Generator) -> tuple[Tensor, list[Thing]]:
    """A part of a photograph, and on it up to ``MOST`` digits in bright colours."""

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    source = photos[draw(len(photos))]
    top, left = (draw(side - SIDE + 1) for side in source.shape[1:])
    picture = source[:, top : top + SIDE, left : left + SIDE].clone()
    taken = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    things: list[Thing] = []
    number = 0 if draw(20) == 0 else 1 + draw(MOST)
    for _ in range(number):
        which, side = draw(len(shapes)), SIDES[0] + draw(SIDES[1] - SIDES[0] + 1)
        colour = 0.5 + 0.5 * torch.rand(3, generator=generator)
        strokes = F.interpolate(shapes.images[which][None, None].float() / 255, (side, side), mode="bilinear")[0, 0]
        for _ in range(TRIES):
            y, x = draw(SIDE - side + 1), draw(SIDE - side + 1)
            mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
            mask[y : y + side, x : x + side] = strokes >= 0.5
            rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            if taken[max(box[1] - 1, 0) : box[3] + 1, max(box[0] - 1, 0) : box[2] + 1].any():
                continue
            taken[box[1] : box[3], box[0] : box[2]] = True
            shade = torch.zeros(SIDE, SIDE)
            shade[y : y + side, x : x + side] = strokes
            painted = (255 * colour[:, None, None] * shade).round().byte()
            picture = torch.where(mask, painted, picture)
            area = float(mask.sum())
            things.append(Thing(int(shapes.labels[which]), box, area=area, segmentation=as_text(mask)))
            break
    return picture, things


def as_text(mask: Tensor) -> RLE:
    """(H, W) bool as run lengths that JSON can hold."""
    found: RLE = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


# -- the two layouts ---------------------------------------------------------------------------------------------------


def write_voc(scenes: Scenes, root: Path, part: str) -> None:
    """``VOC2007`` with the set 2007_PART. JPEG changes the pixels a little; the boxes stay exact."""
    folder = root / "VOC2007"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(scenes.names):
        height, width = scenes.sizes[index]
        tree, objects = ElementTree.Element("annotation"), scenes.objects(index, masks=False)
        size = ElementTree.SubElement(tree, "size")
        for tag, value in (("width", width), ("height", height), ("depth", 3)):
            ElementTree.SubElement(size, tag).text = str(value)
        for box, label in zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True):
            each = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(each, "name").text = scenes.classes[label]
            ElementTree.SubElement(each, "difficult").text = "0"
            edges = ElementTree.SubElement(each, "bndbox")
            voc = (box[0] + 1, box[1] + 1, box[2], box[3])
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), voc, strict=True):
                ElementTree.SubElement(edges, tag).text = f"{value:g}"
        ElementTree.ElementTree(tree).write(folder / "Annotations" / f"{name}.xml")
        _image(scenes, index).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in scenes.names))


def write_coco(scenes: Scenes, root: Path, name: str) -> None:
    """``annotations/instances_NAME.json`` and ``NAME/*.png``."""
    for folder in ("annotations", name):
        (root / folder).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, file in enumerate(scenes.names):
        height, width = scenes.sizes[index]
        images.append({"id": index + 1, "file_name": f"{file}.png", "height": height, "width": width})
        objects = scenes.objects(index, masks=False)
        for n, shape in enumerate(scenes.run_lengths(index)):
            left, top, right, bottom = objects.boxes[n].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(objects.labels[n]) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(objects.areas[n]),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": shape["counts"].decode()},
                }
            )
        _image(scenes, index).save(root / name / f"{file}.png")
    categories = [{"id": n + 1, "name": each} for n, each in enumerate(scenes.classes)]
    saved = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(saved))


def _image(scenes: Scenes, index: int) -> Image.Image:
    return Image.fromarray(scenes.picture(index).permute(1, 2, 0).contiguous().numpy())


def main(folder: str) -> None:
    for split, part, name in (("train", "trainval", "train2017"), ("val", "test", "val2017")):
        scenes = load(split)  # type: ignore[arg-type]  # both are splits
        write_voc(scenes, Path(folder), part)
        write_coco(scenes, Path(folder), name)
        print(f"{folder}: {len(scenes)} pictures as 2007_{part} and {name}")
    print(
        f"python launcher.py worker=main_detection data=voc data_path={folder} data.classes=0 "
        "train_sets=[2007_trainval] data.fingerprint=digits_on_photos"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m workers.data.digits_on_photos FOLDER")
    main(sys.argv[1])
