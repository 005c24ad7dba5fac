"""Pictures with objects: VOC's and COCO's layouts, what is wrong in them, and what the loaders make of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from workers import data
from workers.data import DataError, coco, digits_on_photos, scenes, voc
from workers.data.digits_on_photos import write_coco, write_voc
from workers.data.scenes import Learnable, Stream, one_by_one, streamed
from workers.engine.distributed import fold
from workers.transforms.objects import Objects, Shorter


@pytest.fixture(scope="module")
def few():
    return digits_on_photos.load("train", number=8)


@pytest.fixture
def layouts(tmp_path, few):
    """VOC's and COCO's folders with eight pictures to learn from, and five to measure on."""
    test = digits_on_photos.load("val", number=5)
    for made, part, name in ((few, "trainval", "train2017"), (test, "test", "val2017")):
        write_voc(made, tmp_path, part)
        write_coco(made, tmp_path, name)
    return tmp_path


SETS = {"train_sets": ["2007_trainval"], "classes": 0}


# -- what is painted, and both layouts ---------------------------------------------------------------------------------


def test_masks_are_what_was_painted_and_boxes_the_smallest_around_them(few):
    for index in range(len(few)):
        objects = few.objects(index)
        assert objects.masks is not None
        assert not len(objects.masks) or objects.masks.sum(0).max() == 1
        for box, mask, area in zip(objects.boxes.tolist(), objects.masks, objects.areas.tolist(), strict=True):
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert area == mask.sum()


def test_scenes_are_the_same_every_time_and_validation_shares_nothing_with_training(few):
    digits_on_photos._painted.cache_clear()
    again = digits_on_photos.load("train", number=8)
    assert all(torch.equal(again.picture(i), few.picture(i)) for i in range(8))
    assert data.fingerprint(again) == data.fingerprint(few)
    assert not set(digits_on_photos.PHOTOS["train"]) & set(digits_on_photos.PHOTOS["val"])


def test_cocos_layout_gives_back_pixels_boxes_and_masks(layouts, few):
    back = coco.load("train", layouts)
    assert (back.classes, back.metric, len(back)) == (few.classes, "coco", len(few))
    for index in range(len(few)):
        (image, objects), _ = back[index]
        assert torch.equal(image, few.picture(index))
        for ours, theirs in zip(few.objects(index), objects, strict=True):
            assert torch.equal(ours, theirs)
    assert coco.load("train", layouts, masks=False).objects(1).masks is None
    assert coco.load("val", layouts, sets=["val2017"]).classes == few.classes


def test_vocs_layout_gives_back_boxes(layouts, few):
    back = voc.load("train", layouts, sets=["2007_trainval"], **SETS)
    present = sorted({few.classes[label] for i in range(len(few)) for label in few.objects(i).labels})
    assert back.classes == present
    assert back.metric == "voc07"
    for index in range(len(few)):
        theirs, ours = back.objects(index), few.objects(index)
        assert torch.equal(theirs.boxes, ours.boxes)
        assert [back.classes[n] for n in theirs.labels] == [few.classes[n] for n in ours.labels]
        (image, _), _ = back[index]
        assert (image.float() - few.picture(index).float()).abs().mean() < 8  # JPEG


def test_the_devkits_folder_is_found_and_several_sets_are_one(layouts):
    kit = layouts / "root" / "VOCdevkit"
    kit.mkdir(parents=True)
    (layouts / "VOC2007").rename(kit / "VOC2007")
    sets = ["2007_trainval", "2007_test"]
    assert len(voc.load("train", kit.parent, sets=sets, train_sets=sets, classes=0)) == 13


# -- VOC ---------------------------------------------------------------------------------------------------------------


def annotation(*objects: str, size: str = "<width>50</width><height>40</height>") -> bytes:
    return f"<annotation><size>{size}</size>{''.join(objects)}</annotation>".encode()


def thing(box: str = "1 1 10 20", name: str = "cat", more: str = "<truncated></truncated>") -> str:
    edges = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{edges}</bndbox></object>"


def parse(*objects: str, **size: str):
    return voc.parsed(annotation(*objects, **size), Path("a.xml"), voc.CLASSES)


def test_vocs_pixels_count_from_one_and_include_the_last():
    height, width, (one, two, three) = parse(
        thing("1 1 1 1"),
        thing("5.5 1.25 10 20.75", "dog", "<difficult>1</difficult>"),
        thing("2 2 50 40", "person", "<difficult></difficult><truncated/>"),
    )
    assert (height, width) == (40, 50)
    assert one.box == (0, 0, 1, 1)
    assert two.box == (4.5, 0.25, 10, 20.75)
    assert three.box == (1, 1, 50, 40)
    assert [voc.CLASSES[each.label] for each in (one, two, three)] == ["cat", "dog", "person"]
    assert [each.difficult for each in (one, two, three)] == [False, True, False]
    assert parse()[2] == []


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (annotation(thing(name="unicorn")), "a.xml: a 'unicorn' is none of the 20 classes: aeroplane, "),
        (annotation(thing("1 1 x 4")), "a.xml: xmax is 'x'; expected a number"),
        (annotation(thing("1 1 1e999 4")), "a.xml: xmax is '1e999'; expected a number"),
        (annotation("<object><name>cat</name></object>"), "a.xml: a cat without bndbox"),
        (annotation("<object><bndbox/></object>"), "a.xml: a object without name"),
        (annotation(size="<width>5</width>"), "a.xml: a size without height"),
        (b"<annotation></annotation>", "a.xml: has no size"),
        (b"<annotation>", "a.xml: not XML"),
        (b"", "a.xml: not XML"),
        (
            b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>',
            "a.xml: has a document type, which annotations do not need; refused",
        ),
        (
            b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>',
            "a.xml: has a document type",
        ),
    ],
)
def test_an_annotation_that_cannot_be_meant_is_one_line(content, line):
    with pytest.raises(DataError, match=line) as caught:
        voc.parsed(content, Path("a.xml"), voc.CLASSES)
    assert "\n" not in str(caught.value)


def test_vocs_lists_and_files_are_checked(layouts):
    listing = layouts / "VOC2007" / "ImageSets" / "Main" / "trainval.txt"
    names = listing.read_text()

    def load():
        return voc.load("train", layouts, sets=["2007_trainval"], **SETS)

    listing.write_text(names + "train_0003\n")
    with pytest.raises(DataError, match=r"trainval\.txt: train_0003 is listed twice"):
        load()
    listing.write_text("../../etc/passwd\n")
    with pytest.raises(DataError, match="is not the name of a file beside it"):
        load()
    listing.write_text("\n")
    with pytest.raises(DataError, match="lists no picture"):
        load()
    listing.write_text(names + "train_9999\n")
    with pytest.raises(DataError, match=r"train_9999\.xml: No such file or directory; expected its annotation"):
        load()
    listing.write_text(names)
    (layouts / "VOC2007" / "JPEGImages" / "train_0002.jpg").unlink()
    with pytest.raises(DataError, match=r"train_0002\.jpg: no such file; 1 of 8 are missing"):
        load()
    with pytest.raises(DataError, match=r"VOC2012/ImageSets/Main/trainval\.txt: No such file"):
        voc.load("train", layouts, classes=0)
    with pytest.raises(DataError, match="data=voc: needs data_path=ROOT, with VOC2007/"):
        voc.load("train", None)


# -- COCO --------------------------------------------------------------------------------------------------------------


def edited(layouts: Path, name: str = "train2017"):
    """(the annotations, a function that writes them)"""
    path = layouts / "annotations" / f"instances_{name}.json"
    saved = json.loads(path.read_text())
    return saved, lambda: path.write_text(json.dumps(saved))


def double(saved, key):
    saved[key].append(saved[key][0])


def change(saved, key, **values):
    saved[key][0] |= values


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda s: double(s, "images"), "image 1 is there twice"),
        (lambda s: double(s, "annotations"), "annotation 1 is there twice"),
        (lambda s: double(s, "categories"), "category 1 is there twice"),
        (lambda s: change(s, "annotations", category_id=77), "annotation 1 is of category 77, which is not listed"),
        (lambda s: change(s, "annotations", image_id=77), "annotation 1 is of image 77, which is not listed"),
        (lambda s: change(s, "annotations", bbox=[1, 2, 3]), r"the box \[1, 2, 3\]; expected \[left, top, width"),
        (
            lambda s: change(s, "annotations", bbox=[1, 2, -3, 4]),
            r"the box \[1, 2, -2, 6\] of a \d; expected left",
        ),
        (lambda s: change(s, "annotations", bbox=[1, 2, float("nan"), 4]), r"the box \[1, 2, nan, 6\]"),
        (lambda s: change(s, "images", width=0), "image 1: a picture of 0 x 128 pixels"),
        (lambda s: change(s, "images", file_name="../a.png"), r"'\.\.' is not the name of a file beside it"),
        (lambda s: change(s, "images", file_name="/etc/a.png"), "'' is not the name of a file beside it"),
        (lambda s: change(s, "images", id="one"), "id is 'one'; expected a number"),
        (lambda s: s.pop("categories"), "has no lists of images and categories"),
        (lambda s: s["images"].clear() or s["annotations"].clear(), "no pictures are listed"),
        (lambda s: s["annotations"][0].pop("segmentation"), "annotation 1 has no segmentation; say masks=false"),
    ],
)
def test_what_is_wrong_in_cocos_annotations_is_one_line(layouts, edit, line):
    saved, write = edited(layouts)
    edit(saved)
    write()
    with pytest.raises(DataError, match=line) as caught:
        coco.load("train", layouts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [[[1, 2, 3, 4]], [], {"size": [1, 1], "counts": [1]}, {"counts": [1]}, "x"])
def test_a_mask_that_cannot_be_read_is_one_line(shape):
    with pytest.raises(DataError, match=r"a\.png: a segmentation that cannot be read"):
        scenes.run_length(shape, 8, 8, "a.png")


def test_polygons_and_run_lengths_of_numbers_become_masks():
    square = [[1.0, 1.0, 5.0, 1.0, 5.0, 4.0, 1.0, 4.0]]
    mask = scenes.coco_mask.decode(scenes.run_length(square, 8, 8, "-"))
    assert mask[1:4, 1:5].all()
    assert mask.sum() == 12
    counts = {"size": [2, 2], "counts": [1, 2, 1]}
    assert scenes.coco_mask.decode(scenes.run_length(counts, 2, 2, "-")).tolist() == [[0, 1], [1, 0]]


def test_files_that_are_not_cocos_are_named(layouts):
    (layouts / "val2017" / "val_0001.png").unlink()
    with pytest.raises(DataError, match=r"val_0001\.png: no such file; 1 of 5 are missing"):
        coco.load("val", layouts)
    saved, write = edited(layouts)
    saved["categories"][0]["name"] = "zero"
    write()
    with pytest.raises(DataError, match=r"instances_val2017\.json: category 1, '0', is not the same in train2017"):
        coco.load("val", layouts)
    (layouts / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        coco.load("train", layouts)


# -- boxes that no picture holds, and empty pictures -------------------------------------------------------------------


def test_boxes_beyond_the_edge_are_cut_those_outside_or_without_area_left_out_and_counted(layouts, caplog):
    saved, write = edited(layouts)
    odd = [[-5, -5, 20, 20], [120, 120, 30, 30], [200, 10, 5, 5], [10, 10, 0, 5], [-9, 3, 9, 3]]
    same = {k: v for k, v in saved["annotations"][0].items() if k not in ("id", "bbox", "area")}
    saved["annotations"] = [{**same, "id": n, "image_id": 3, "bbox": box} for n, box in enumerate(odd)]
    saved["annotations"].append({**same, "id": 9, "image_id": 4, "bbox": [1, 1, 9, 9], "iscrowd": 1})
    write()
    with caplog.at_level(logging.INFO):
        found = coco.load("train", layouts)
    said = "8 pictures, 3 objects of 10 classes; 6 pictures without any, 2 boxes cut at the edge, 3 outside or without"
    assert said in caplog.text
    assert found.objects(2).boxes.tolist() == [[0, 0, 15, 15], [120, 120, 128, 128]]
    assert found.objects(2).areas.tolist() == [225, 64]
    assert found.objects(0).boxes.shape == (0, 4)
    assert found.objects(0).masks.shape == (0, 128, 128)
    assert found.objects(3).crowd.tolist() == [True]

    learnable = Learnable(found)  # the empty ones, and that of the crowd, teach nothing
    assert learnable.places.tolist() == [2]
    (_, objects), _ = learnable[0]
    assert len(objects.boxes) == 2
    saved["annotations"] = saved["annotations"][-1:]
    write()
    with pytest.raises(DataError, match="no picture has an object to learn from"):
        Learnable(coco.load("train", layouts))


def test_a_picture_of_another_size_than_its_annotation_says_is_one_line(layouts):
    found = coco.load("train", layouts)
    Image.new("RGB", (64, 32)).save(layouts / "train2017" / "train_0000.png")
    with pytest.raises(DataError, match=r"train_0000\.png: 64 x 32 pixels, but its annotation says 128 x 128"):
        found[0]


# -- loaders -----------------------------------------------------------------------------------------------------------


def test_the_shorter_side_is_resized_and_the_longer_one_bounded():
    size = Shorter([800], 1333).size
    assert size(480, 640, 800) == (800, 1067)
    assert size(375, 500, 480) == (480, 640)
    assert size(300, 900, 800) == (444, 1333)
    assert size(900, 300, 800) == (1333, 444)


def test_boxes_and_masks_follow_their_picture():
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, 5:15, 4:12] = 200
    masks = (image[:1] > 0).byte()
    no = torch.tensor([False])
    objects = Objects(torch.tensor([[4.0, 5, 12, 15]]), torch.tensor([3]), no, no, torch.tensor([80.0]), masks)
    for hflip, box in ((0.0, [8, 10, 24, 30]), (1.0, [56, 10, 72, 30])):
        seen = Shorter([40], 1000, hflip)((image, objects))
        assert seen.image.shape == (3, 40, 80)
        assert seen.objects.boxes.tolist() == [box]
        left, top, right, bottom = box
        assert seen.image[0, top + 3 : bottom - 3, left + 3 : right - 3].float().mean() == 200
        assert seen.image.float().mean() == pytest.approx(200 * 80 / 800, rel=0.02)
        assert seen.size == (20, 40)
        assert seen.objects.masks is not None
        where = seen.objects.masks[0].any(0).nonzero().flatten()
        assert (where[0] * 2, (where[-1] + 1) * 2) == (left, right)


def test_a_stream_sees_every_picture_once_a_turn_and_can_begin_anywhere():
    def ranks(world: int, batches: int = 9):
        return [Stream(7, 2, batches, seed=3, rank=r, world=world, fold=fold) for r in range(world)]

    (alone,) = ranks(1, 18)
    whole = list(alone)
    assert len(whole) == 36
    for turn in range(5):
        assert sorted(index for of, index in whole if of == turn) == list(range(7))
    both = [list(each) for each in ranks(2)]
    assert [pair for step in zip(*both, strict=True) for pair in step] == whole
    (late,) = ranks(1, 18)
    late.start(0, 5)
    assert list(late) == whole[10:]


def test_loaders_do_not_depend_on_their_processes(few):
    def images(workers: int):
        options = {"rank": 0, "world": 1, "fold": fold, "workers": workers}
        loader = streamed(Learnable(few), Shorter([64, 80, 96], 200, 0.5), 3, 3, seed=1, **options)
        return [seen.image for batch in loader for seen, _, _ in batch]

    for ours, theirs in zip(images(0), images(2), strict=True):
        assert torch.equal(ours, theirs)
    assert len({tuple(image.shape) for image in images(0)}) > 1


def test_every_picture_is_measured_once_over_all_ranks(few):
    seen = [
        index
        for rank in range(3)
        for ((_, _, index),) in one_by_one(few, Shorter([32], 200), rank=rank, world=3, fold=fold)
    ]
    assert sorted(seen) == list(range(len(few)))
