"""Masks of the main object of every picture to pretrain on: what ``segments_path`` of ``worker=main_eyemim`` reads.

``segments/segments.npy`` (N, side, side) uint8 has all masks, ``segments/kept.npy`` (N,) bool which the filter kept,
``segments/segments.json`` how many. Pictures are shared out over processes and their loader processes; what is done is
kept in ``segments/parts/``, so that an interrupted run goes on.
"""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contract import rundir
from contract.settings.segment_objects import Settings
from workers.data import Pictures, segmenters
from workers.data.segmenters import Segmenter
from workers.data.segments import FOLDER, KEPT, MASKS, as_bytes, enough
from workers.engine import distributed, pictures
from workers.engine.run import Run, open_run
from workers.transforms.crops import ResizeCenterCrop

log = logging.getLogger(__name__)

PARTS = "parts"
TOGETHER = 64  # masks in a file of what is done
SHOWN = 8


class Segmenting:
    """The pictures at ``chosen`` places as their masks: (1, side, side) uint8, and the place instead of a label."""

    def __init__(self, of: Pictures, chosen: NDArray[np.int64], segmenter: Segmenter, side: int):
        self.of, self.chosen, self.segmenter = of, chosen, segmenter
        self.classes, self.resize = of.classes, ResizeCenterCrop(side, crop=1.0)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        index = int(self.chosen[place])
        image = self.resize(self.of[index][0])
        return as_bytes(self.segmenter(image, index))[None], index


def as_it_is(mask: Tensor) -> Tensor:
    return mask


def parts(folder: Path, *names: str) -> Iterator[list[NDArray[Any]]]:
    """What is done so far, a file at a time: arrays ``places`` (n,) and ``masks`` (n, side, side)."""
    for path in sorted((folder / PARTS).glob("*.npz")):
        with np.load(path, allow_pickle=False) as part:
            yield [part[name] for name in names]


def save_part(folder: Path, masks: Tensor, places: Tensor) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, masks=masks[:, 0].numpy(), places=places.numpy())
    rundir.write_atomic(folder / PARTS / f"{int(places[0]):08d}.npz", data.getvalue())


def segment(run: Run[Settings], of: Pictures, segmenter: Segmenter, folder: Path) -> bool:
    """Make the masks that are missing. False where it was asked to stop."""
    settings = run.settings
    done = [places for (places,) in parts(folder, "places")]
    missing = np.setdiff1d(np.arange(len(of)), np.concatenate([np.zeros(0, np.int64), *done]))
    distributed.barrier()  # nobody writes before all have looked
    log.info("%d of %d pictures are without a mask", len(missing), len(of))
    todo = Segmenting(of, missing, segmenter, settings.image_size)
    rounds = len(missing) // distributed.world_size() // TOGETHER  # of these every rank has one more
    batches = pictures.in_order(settings, todo, as_it_is, TOGETHER)
    for i, (masks, places, _) in enumerate(batches, start=1):
        save_part(folder, masks, places)
        if i <= rounds:
            if any(asked for (asked,) in distributed.exchange([run.stop()])):
                return False
            if i % settings.log_every == 0:
                log.info("%d of %d pictures", i * TOGETHER * distributed.world_size(), len(missing))
    distributed.barrier()
    return True


def join(settings: Settings, number: int, folder: Path) -> dict[str, float]:
    """All parts in one file, the filter, and the counts."""
    every = np.zeros((number, settings.image_size, settings.image_size), np.uint8)
    known = np.zeros(number, bool)
    for places, masks in parts(folder, "places", "masks"):
        every[places], known[places] = masks, True
    kept = known.copy()
    if not settings.keep_all:
        for start in range(0, number, 4096):
            some = torch.from_numpy(every[start : start + 4096]).float() / 255
            kept[start : start + 4096] &= enough(some, settings.min_pixels, settings.min_confidence).numpy()
    for name, array in ((MASKS, every), (KEPT, kept)):
        data = io.BytesIO()
        np.save(data, array)
        rundir.write_atomic(folder / name, data.getvalue())
    found = {"pictures": number, "masks": int(known.sum()), "kept": int(kept.sum())}
    said = {"model": settings.model, "min_pixels": settings.min_pixels, "min_confidence": settings.min_confidence}
    rundir.write_json(folder / "segments.json", {**found, **said, "keep_all": settings.keep_all})
    return {f"segments/{name}": float(value) for name, value in found.items()}


def draw(of: Pictures, side: int, folder: Path, figures: Path) -> None:
    """``segments.png``: pictures, their masks, and whether these were kept."""
    from matplotlib.figure import Figure

    masks, kept = np.load(folder / MASKS, mmap_mode="r"), np.load(folder / KEPT)
    resize, shown = ResizeCenterCrop(side, crop=1.0), range(0, len(of), max(1, len(of) // SHOWN))[:SHOWN]
    figure = Figure(figsize=(1.2 * len(shown) + 0.4, 3.0), layout="constrained")
    for panels, index in zip(figure.subplots(2, len(shown), squeeze=False).T, shown, strict=True):
        panels[0].imshow(resize(of[index][0]).permute(1, 2, 0).numpy(), interpolation="nearest")
        panels[1].imshow(masks[index], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        panels[0].set_title(f"{index}: {'kept' if kept[index] else 'left out'}", fontsize=8)
        for panel in panels:
            panel.set(xticks=[], yticks=[])
    figure.savefig(figures / "segments.png", dpi=150)


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        path = Path(settings.model_path) if settings.model_path else None
        segmenter = segmenters.build(settings.model, path, settings.rembg_model, settings.data.download)
        if settings.model == "contrast":
            log.warning("model=contrast: no network, but contrast with the border; to try things out only")
        of = pictures.load(settings, "train", labelled=False)
        folder = run.folder / FOLDER
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        if not segment(run, of, segmenter, folder):
            return
        metrics: dict[str, float] = {}
        if distributed.rank() == 0:
            metrics = join(settings, len(of), folder)
            (run.folder / rundir.FIGURES).mkdir(exist_ok=True)
            draw(of, settings.image_size, folder, run.folder / rundir.FIGURES)
        run.track(1, 1, metrics)
        run.finish(metrics, 1)
        if distributed.rank() == 0:
            shutil.rmtree(folder / PARTS)


if __name__ == "__main__":
    main()
