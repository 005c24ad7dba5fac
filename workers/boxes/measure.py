"""Average precision of detections, by VOC's rules and by COCO's.

A picture's place in the list of truths is its name. Figures are fractions.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of intersection over union
RECALLS = np.linspace(0, 1, 101)  # at which curves are drawn


class Truth(NamedTuple):
    """The objects of a picture."""

    boxes: Floats  # (n, 4)
    labels: NDArray[np.int64]  # (n,)
    ignored: NDArray[np.bool_]  # (n,) finding them is neither right nor wrong
    areas: Floats  # (n,)
    masks: Sequence[dict[str, Any]] = ()  # run lengths


class Found(NamedTuple):
    """The detections of all pictures, in any order."""

    pictures: NDArray[np.int64]  # (m,) places in the list of truths
    boxes: Floats  # (m, 4)
    scores: Floats  # (m,)
    labels: NDArray[np.int64]  # (m,)
    masks: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Measured:
    by_class: Floats  # (thresholds, classes) average precision; NaN for a class that no truth has
    curves: Floats  # (thresholds, 101, classes) precision at RECALLS

    @property
    def figures(self) -> dict[str, float]:
        """AP (the mean over ten thresholds), AP50 and AP75: means over the classes that there are."""
        by_threshold = np.nanmean(self.by_class, axis=1) if np.isfinite(self.by_class).any() else np.zeros(10)
        return {"AP": float(by_threshold.mean()), "AP50": float(by_threshold[0]), "AP75": float(by_threshold[5])}


def voc(truths: Sequence[Truth], found: Found, classes: int, *, eleven_points: bool) -> Measured:
    """VOC's rule (Everingham et al., IJCV 2010, section 4.2): ``eleven_points`` until 2009, the area from 2010 on.

    Detections in order of score; each belongs to the object of its class that it overlaps most. It is right where the
    intersection over union is *above* the threshold and no better one found the object before; one that belongs to a
    difficult object does not count.
    """
    by_class = np.full((len(THRESHOLDS), classes), np.nan)
    curves = np.full((len(THRESHOLDS), len(RECALLS), classes), np.nan)
    for label in range(classes):
        own = [truth.labels == label for truth in truths]
        number = sum(int((mine & ~truth.ignored).sum()) for mine, truth in zip(own, truths, strict=True))
        if not number:
            continue
        chosen = np.flatnonzero(found.labels == label)
        chosen = chosen[np.argsort(-found.scores[chosen], kind="stable")]
        overlaps, objects = np.full(len(chosen), -1.0), np.full(len(chosen), -1)
        for n, each in enumerate(chosen):
            place = int(found.pictures[each])
            boxes = truths[place].boxes[own[place]]
            if len(boxes):
                shared = overlap(found.boxes[each], boxes)
                objects[n] = shared.argmax()
                overlaps[n] = shared[objects[n]]
        for t, threshold in enumerate(THRESHOLDS):
            right, wrong = np.zeros(len(chosen)), np.zeros(len(chosen))
            taken: set[tuple[int, int]] = set()
            for n, each in enumerate(chosen):
                if overlaps[n] <= threshold:
                    wrong[n] = 1
                    continue
                place = int(found.pictures[each])
                key = (place, int(objects[n]))
                if truths[place].ignored[own[place]][objects[n]]:
                    continue
                (wrong if key in taken else right)[n] = 1
                taken.add(key)
            recall = right.cumsum() / number
            counted = (right + wrong).cumsum()
            precision = right.cumsum() / np.maximum(counted, 1)
            by_class[t, label] = average_precision(recall, precision, eleven_points=eleven_points)
            curves[t, :, label] = [_best_from(recall, precision, r) for r in RECALLS]
    return Measured(by_class, curves)


def average_precision(recall: Floats, precision: Floats, *, eleven_points: bool) -> float:
    """Of a curve (m,) in order of falling score: the mean of the best precision at recalls of at least 0, 0.1, ..., 1;
    or the area under the best precision at each recall and beyond."""
    if eleven_points:
        return float(np.mean([_best_from(recall, precision, r) for r in np.arange(11) / 10]))
    edges = np.concatenate([[0.0], recall])
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(edges) * best).sum())


def _best_from(recall: Floats, precision: Floats, least: float) -> float:
    reached = precision[recall >= least - 1e-12]
    return float(reached.max()) if len(reached) else 0.0


def overlap(box: Floats, boxes: Floats) -> Floats:
    """Intersection over union of a box (4,) with each of (n, 4): -> (n,). Both kinds are half open, which is what VOC's
    one pixel more does to its inclusive ones."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = sides.clip(min=0).prod(1)
    both = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared
    out: Floats = shared / np.maximum(both, 1e-12)
    return out


def coco(truths: Sequence[Truth], found: Found, classes: int, *, masks: bool = False) -> Measured:
    """COCO's rule by its own program, pycocotools; of boxes, or of masks."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": place + 1, **_size(truth)} for place, truth in enumerate(truths)]
    categories = [{"id": label + 1} for label in range(classes)]
    expected, given = COCO(), COCO()
    annotations: list[dict[str, Any]] = []
    for place, truth in enumerate(truths):
        for n, box in enumerate(truth.boxes):
            more = {"segmentation": truth.masks[n]} if masks else {}
            crowd = int(truth.ignored[n])
            same = {"id": len(annotations) + 1, "image_id": place + 1, "category_id": int(truth.labels[n]) + 1}
            annotations.append({**same, "bbox": _sides(box), "area": truth.areas[n], "iscrowd": crowd, **more})
    expected.dataset = {"images": images, "categories": categories, "annotations": annotations}
    detections: list[dict[str, Any]] = []
    for n, box in enumerate(found.boxes):
        more = {"segmentation": found.masks[n]} if masks else {}
        same = {"id": n + 1, "image_id": int(found.pictures[n]) + 1, "category_id": int(found.labels[n]) + 1}
        sides, score = _sides(box), float(found.scores[n])
        detections.append({**same, "bbox": sides, "area": sides[2] * sides[3], "iscrowd": 0, "score": score, **more})
    given.dataset = {"images": images, "categories": categories, "annotations": detections}
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how long it takes
        expected.createIndex()
        given.createIndex()
        measure = COCOeval(expected, given, "segm" if masks else "bbox")
        measure.evaluate()
        measure.accumulate()
    # (thresholds, recalls, classes, areas, most detections); -1 for a class that no truth has
    precision = measure.eval["precision"][:, :, :, 0, -1].astype(np.float64)
    precision[precision < 0] = np.nan
    return Measured(precision.mean(1), precision)


def _size(truth: Truth) -> dict[str, int]:
    """The picture's, which masks need; it is asked for even where there is none."""
    height, width = truth.masks[0]["size"] if len(truth.masks) else (0, 0)
    return {"height": height, "width": width}


def _sides(box: Floats) -> list[float]:
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]
