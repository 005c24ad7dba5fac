"""Pictures of detections: a contact sheet, and curves of precision over recall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .measure import RECALLS, THRESHOLDS, Measured, Truth

TRUE, PREDICTED = "#2ca02c", "#ff7f0e"
COLUMNS = 4
SHOWN = 12  # names in the legend of the curves


def contact_sheet(
    pictures: Sequence[Tensor],
    truths: Sequence[Truth],
    found: Sequence[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]],
    classes: Sequence[str],
    caption: str,
    path: Path,
) -> None:
    """Pictures (3, H, W) uint8 with their true boxes, and what was found: boxes (n, 4), scores and labels of each."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    rows = -(-len(pictures) // COLUMNS)
    figure = Figure(figsize=(3.0 * COLUMNS, 3.0 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, picture, truth, (boxes, scores, labels) in zip(panels, pictures, truths, found, strict=False):
        panel.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        for (left, top, right, bottom), ignored in zip(truth.boxes - 0.5, truth.ignored, strict=True):
            style = ":" if ignored else "-"
            panel.add_patch(
                Rectangle((left, top), right - left, bottom - top, fill=False, lw=3, color=TRUE, ls=style, alpha=0.9)
            )
        for (left, top, right, bottom), score, label in zip(boxes - 0.5, scores, labels, strict=True):
            panel.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, lw=1.2, color=PREDICTED))
            place = {"ha": "left", "va": "bottom"} if top > 0.1 * picture.shape[1] else {"ha": "left", "va": "top"}
            panel.text(
                max(left, 0), top if place["va"] == "bottom" else bottom, f"{classes[label]} {score:.2f}",
                fontsize=8, color="white", bbox={"facecolor": "black", "alpha": 0.6, "pad": 1, "lw": 0}, **place,
            )  # fmt: skip
    handles = [Line2D([], [], color=TRUE, lw=3), Line2D([], [], color=PREDICTED, lw=1.2)]
    figure.legend(handles, ["true", "predicted"], loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(caption, fontsize=10)
    figure.savefig(path, dpi=110)


def curves(measured: Measured, classes: Sequence[str], caption: str, path: Path) -> None:
    """Precision over recall at two thresholds: each class thin, their mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    there = [n for n in range(len(classes)) if np.isfinite(measured.by_class[0, n])]
    for panel, place in zip(figure.subplots(1, 2, sharey=True), (0, 5), strict=True):
        for n in there:
            name = classes[n] if len(there) <= SHOWN else None
            panel.plot(RECALLS, measured.curves[place, :, n], lw=1, alpha=0.6, label=name)
        if there:
            mean = measured.curves[place][:, there].mean(1)
            panel.plot(RECALLS, mean, lw=2.5, color="black", label="mean")
        average = np.mean(measured.by_class[place, there]) if there else 0.0
        panel.set_title(f"intersection over union {THRESHOLDS[place]:.2f}, AP {average:.3f}", fontsize=10)
        panel.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("precision")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(caption, fontsize=10)
    figure.savefig(path, dpi=110)
