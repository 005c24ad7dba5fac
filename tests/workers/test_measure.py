"""Average precision against figures that are worked out by hand, and the pictures of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from workers.boxes import drawing, measure
from workers.boxes.measure import Found, Truth, average_precision, overlap
from workers.data import digits_on_photos
from workers.main_detection import truths


def truth(*boxes, labels=None, ignored=None) -> Truth:
    boxes = np.array(boxes, float).reshape(-1, 4)
    labels = np.array(labels if labels is not None else [0] * len(boxes), np.int64)
    ignored = np.array(ignored if ignored is not None else [False] * len(boxes), bool)
    return Truth(boxes, labels, ignored, (boxes[:, 2:] - boxes[:, :2]).prod(1))


def found(*rows) -> Found:
    """Rows of (picture, box, score, label)."""
    table = np.array([(p, *box, score, label) for p, box, score, label in rows], float).reshape(-1, 7)
    return Found(table[:, 0].astype(int), table[:, 1:5], table[:, 5], table[:, 6].astype(int))


ONE, TWO, FAR = (0, 0, 10, 10), (20, 20, 40, 40), (60, 60, 70, 70)


def test_overlap_is_that_of_half_open_boxes():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 4]], float)
    assert overlap(boxes[0], boxes).tolist() == pytest.approx([1, 1 / 3, 0, 0.04])


def test_both_of_vocs_rules_on_a_curve_worked_out_by_hand():
    recall, precision = np.array([0.25, 0.25, 0.5, 0.75]), np.array([1.0, 0.5, 2 / 3, 0.75])
    # best from here on: 1 until 0.25, then 0.75 until 0.75, then nothing
    assert average_precision(recall, precision, eleven_points=False) == pytest.approx(0.25 + 0.5 * 0.75)
    # 0, .1, .2 -> 1; .3 to .7 -> .75; .8, .9, 1 -> 0
    assert average_precision(recall, precision, eleven_points=True) == pytest.approx((3 + 5 * 0.75) / 11)
    none = np.zeros(0)
    assert average_precision(none, none, eleven_points=True) == average_precision(none, none, eleven_points=False) == 0


def test_an_object_is_found_once_and_the_best_comes_first():
    given = [truth(ONE, TWO), truth(ONE)]
    said = found((0, ONE, 0.9, 0), (0, ONE, 0.8, 0), (1, FAR, 0.7, 0), (1, ONE, 0.6, 0))
    measured = measure.voc(given, said, 1, eleven_points=False)
    # right, again, wrong, right: recall 1/3 .. 2/3, precision 1, 1/2, 1/3, 2/4
    assert measured.by_class[:, 0] == pytest.approx([1 / 3 + 1 / 3 / 2] * 10)
    assert measured.figures == pytest.approx({"AP": 0.5, "AP50": 0.5, "AP75": 0.5})
    points = measure.voc(given, said, 1, eleven_points=True).by_class[0, 0]
    assert points == pytest.approx((4 * 1 + 3 * 0.5) / 11)


def test_the_overlap_has_to_be_above_the_threshold():
    half = (0, 0, 10, 5)  # exactly 0.5 of ONE
    said = found((0, half, 0.9, 0))
    assert measure.voc([truth(ONE)], said, 1, eleven_points=False).by_class[0, 0] == 0
    assert measure.coco([truth(ONE)], said, 1).by_class[0, 0] == pytest.approx(1)  # at least, by COCO's rule
    more = found((0, (0, 0, 10, 5.1), 0.9, 0))
    assert measure.voc([truth(ONE)], more, 1, eleven_points=False).by_class[:, 0].tolist() == [1] + [0] * 9


def test_difficult_objects_count_neither_way():
    given = [truth(ONE, TWO, ignored=[False, True])]
    said = found((0, TWO, 0.9, 0), (0, TWO, 0.85, 0), (0, ONE, 0.8, 0))
    for rule in (True, False):
        assert measure.voc(given, said, 1, eleven_points=rule).figures["AP"] == pytest.approx(1)
    assert measure.coco(given, said, 1).figures["AP"] == pytest.approx(1)
    only = [truth(TWO, ignored=[True])]
    assert np.isnan(measure.voc(only, said, 1, eleven_points=False).by_class).all()


def test_classes_without_objects_are_left_out_of_the_mean_and_nothing_found_is_zero():
    given = [truth(ONE, TWO, labels=[0, 2]), truth()]
    said = found((0, ONE, 0.9, 0), (1, ONE, 0.9, 1))
    for measured in (measure.voc(given, said, 3, eleven_points=False), measure.coco(given, said, 3)):
        assert np.isnan(measured.by_class[0, 1])
        assert measured.figures["AP50"] == pytest.approx(0.5)
    for measured in (measure.voc(given, found(), 3, eleven_points=True), measure.coco(given, found(), 3)):
        assert measured.figures == {"AP": 0, "AP50": 0, "AP75": 0}
    assert measure.voc([truth()], found(), 3, eleven_points=True).figures["AP"] == 0


def test_the_order_of_detections_changes_nothing():
    given = [truth(ONE, TWO), truth(ONE)]
    rows = [(0, ONE, 0.9, 0), (0, FAR, 0.8, 0), (1, ONE, 0.7, 0), (0, TWO, 0.6, 0)]
    expected = measure.voc(given, found(*rows), 1, eleven_points=True)
    again = measure.voc(given, found(*rows[::-1]), 1, eleven_points=True)
    np.testing.assert_array_equal(again.by_class, expected.by_class)
    np.testing.assert_allclose(measure.coco(given, found(*rows[::-1]), 1).by_class,
                               measure.coco(given, found(*rows), 1).by_class)  # fmt: skip


@pytest.fixture(scope="module")
def perfect():
    """Scenes, their truths, and detections that are exactly these."""
    val = digits_on_photos.load("val", number=12)
    expected = truths(val, masks=True)
    rows = [(p, box, 0.9, label) for p, each in enumerate(expected)
            for box, label in zip(each.boxes, each.labels, strict=True)]  # fmt: skip
    masks = [mask for each in expected for mask in each.masks]
    return val, expected, found(*rows)._replace(masks=masks)


def test_a_perfect_detection_has_an_average_precision_of_one(perfect):
    _, expected, said = perfect
    for measured in (
        measure.voc(expected, said, 10, eleven_points=True),
        measure.voc(expected, said, 10, eleven_points=False),
        measure.coco(expected, said, 10),
        measure.coco(expected, said, 10, masks=True),
    ):
        assert measured.figures == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})


def test_masks_are_measured_by_themselves(perfect):
    _, expected, said = perfect
    moved = said._replace(masks=[*said.masks[1:], said.masks[0]])
    assert measure.coco(expected, moved, 10).figures["AP"] == pytest.approx(1)
    assert measure.coco(expected, moved, 10, masks=True).figures["AP"] < 0.3


def test_the_pictures_are_drawn(perfect, tmp_path):
    val, expected, said = perfect
    drawn = [(said.boxes[said.pictures == p], said.scores[said.pictures == p], said.labels[said.pictures == p])
             for p in range(len(val))]  # fmt: skip
    drawing.contact_sheet(
        [val.picture(p) for p in range(len(val))], expected, drawn, val.classes, "-", tmp_path / "a.png"
    )
    drawing.curves(measure.coco(expected, said, 10), val.classes, "-", tmp_path / "b.png")
    nothing = measure.voc([truth()], found(), 10, eleven_points=True)
    drawing.curves(nothing, val.classes, "-", tmp_path / "c.png")
    for name in "abc":
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
        assert pixels.float().std() > 5
