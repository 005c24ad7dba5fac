"""The figure of the methods that rebuild pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def draw_reconstructions(images: Tensor, hidden: Tensor, rebuilt: Tensor, folder: Path) -> None:
    """``reconstruction.png``: a row of pictures, what the encoder saw of them, and what was made of it.

    images and rebuilt (B, 3, H, W), hidden (B, 1, H, W) of 0 and 1; each picture is shown from its darkest to its
    brightest pixel.
    """
    from matplotlib.figure import Figure

    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    original, rebuilt = (((each - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) for each in (images, rebuilt))
    shown = {"original": original, "seen": torch.where(hidden > 0, 0.5, original), "rebuilt": rebuilt}
    figure = Figure(figsize=(1.2 * len(images) + 0.4, 1.2 * len(shown) + 0.2), layout="constrained")
    panels = figure.subplots(len(shown), len(images), squeeze=False)
    for row, (name, pictures) in zip(panels, shown.items(), strict=True):
        for panel, picture in zip(row, pictures.permute(0, 2, 3, 1).cpu(), strict=True):
            panel.imshow(picture.numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    figure.savefig(folder / "reconstruction.png", dpi=150)
