"""Attention statistics of a frozen encoder (Przewięźlikowski et al., "Beyond [cls]", ICCV 2025, section 3).

The formulas and names stand in ``workers/pooling/attention.py``. Every picture of the split counts once, in any number
of processes, in float32; no more than one block's attention is ever held.

``metrics.jsonl`` has a line per block, whose step is the block (from 0): ``attention/STATISTIC``, the mean over
pictures and heads. The final metrics are the last block's under the same names, and every block's as
``attention/STATISTIC_bBLOCK``. ``tables/attention.csv`` and ``.npz`` have the means and standard deviations over
pictures, per block and head.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.utils.data import DataLoader

from contract import rundir
from contract.settings.main_attention_stats import Settings
from workers.engine import distributed, pictures
from workers.engine.encoder import EncoderError, load_encoder
from workers.engine.run import open_run
from workers.models import Encoder
from workers.pooling import attention
from workers.transforms.crops import ResizeCenterCrop

log = logging.getLogger(__name__)

CLASSES = 10  # in the t-SNE: the first ones
COLOURS = ("#0072B2", "#D55E00")
COLUMNS = 6  # blocks beside each other in the maps
CURVES = (  # panels of attention.png
    ("class token to itself", ("cls_cls",)),
    ("entropy of the class token's attention to patches", ("entropy",)),
    ("patches to themselves", ("patch_self",)),
    ("patches to the class token", ("patch_cls",)),
    ("entropy of the patches' attention to patches", ("patch_entropy",)),
    ("norm of the attention branch over that of its input", ("cls_magnitude", "patch_magnitude")),
)


class Tally:
    """Sums over pictures of every block's statistics and of their squares, in float64."""

    def __init__(self, encoder: Encoder, device: torch.device):
        self.names, self.magnitudes = attention.names(encoder.has_cls), attention.magnitude_names(encoder.has_cls)
        self.per_head = torch.zeros(
            2, encoder.depth, encoder.heads, len(self.names), dtype=torch.float64, device=device
        )
        self.per_block = torch.zeros(2, encoder.depth, len(self.magnitudes), dtype=torch.float64, device=device)
        self.seen = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def look(self, encoder: Encoder, images: Tensor) -> Tensor:
        """Count the normalised ``images`` (B, 3, H, W) in; gives the last block's output (B, T, D)."""
        for block, each in enumerate(encoder.look(images)):
            self._add(self.per_head[:, block], attention.statistics(each.logits, encoder.has_cls))
            self._add(self.per_block[:, block], attention.magnitudes(each.input, each.branch, encoder.has_cls))
            last = each.output
            del each  # before the next block has its own maps
        self.seen += len(images)
        return last

    @staticmethod
    def _add(sums: Tensor, values: Tensor) -> None:
        values = values.double()
        sums += torch.stack([values.sum(0), values.square().sum(0)])

    def result(self) -> Table:
        """Over the pictures of all ranks, which must all call it."""
        seen = distributed.total(self.seen)
        per_head, per_block = (
            torch.stack([m, (square - m * m).clamp_min(0).sqrt()]).cpu()
            for m, square in (distributed.total(each) / seen for each in (self.per_head, self.per_block))
        )
        return Table(self, int(seen), per_head, per_block)


class Table:
    """Means and standard deviations over pictures: ``per_head`` (2, L, H, S), ``per_block`` (2, L, M)."""

    def __init__(self, tally: Tally, seen: int, per_head: Tensor, per_block: Tensor):
        self.names, self.magnitudes, self.seen = tally.names, tally.magnitudes, seen
        self.per_head, self.per_block = per_head, per_block

    def means(self) -> dict[str, Tensor]:
        """Of each statistic the mean over pictures and heads, (L,)."""
        found = dict(zip(self.names, self.per_head[0].mean(1).unbind(-1), strict=True))
        return found | dict(zip(self.magnitudes, self.per_block[0].unbind(-1), strict=True))

    def rows(self) -> Iterator[tuple[int, int | str, str, float, float]]:
        """(block, head, statistic, mean, std), the magnitudes without a head."""
        for block in range(self.per_head.shape[1]):
            for head in range(self.per_head.shape[2]):
                for name, mean, std in zip(self.names, *self.per_head[:, block, head].tolist(), strict=True):
                    yield block, head, name, mean, std
            for name, mean, std in zip(self.magnitudes, *self.per_block[:, block].tolist(), strict=True):
                yield block, "", name, mean, std

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("block", "head", "statistic", "mean", "std"))
        writer.writerows(self.rows())
        rundir.write_atomic(folder / "attention.csv", text.getvalue())
        data = io.BytesIO()
        heads, blocks = self.per_head.numpy(), self.per_block.numpy()
        np.savez(
            data,
            statistics=np.array(self.names),
            mean=heads[0],
            std=heads[1],
            magnitudes=np.array(self.magnitudes),
            magnitude_mean=blocks[0],
            magnitude_std=blocks[1],
            pictures=np.array(self.seen),
        )
        rundir.write_atomic(folder / "attention.npz", data.getvalue())


class Chosen:
    """Features of the first ``number`` pictures of each of the first classes, for the t-SNE."""

    def __init__(self, number: int, classes: int):
        self.number, self.room = number, [number] * classes
        self.found: list[tuple[Tensor, int, int]] = []

    def add(self, features: Tensor, labels: Tensor, index: Tensor) -> None:
        """(B, D), (B,), (B,)"""
        for i, label in enumerate(labels.tolist()):
            if 0 <= label < len(self.room) and self.room[label]:
                self.room[label] -= 1
                self.found.append((features[i].float(), label, int(index[i])))

    def gathered(self, width: int) -> tuple[Tensor, Tensor]:
        """Features (n, D) and labels (n,), in the order of the data set, the same on every rank."""
        device = distributed.device()
        x = torch.stack([each for each, _, _ in self.found]) if self.found else torch.zeros(0, width, device=device)
        marks = torch.tensor([mark for _, *mark in self.found], dtype=torch.long, device=device).view(-1, 2)
        x, marks = distributed.gather(x), distributed.gather(marks)
        order = marks[:, 1].argsort()
        x, labels = x[order].cpu(), marks[order, 0].cpu()
        keep = [i for c in range(len(self.room)) for i in (labels == c).nonzero().flatten()[: self.number].tolist()]
        return x[keep], labels[keep]


def check(encoder: Encoder, said: str) -> None:
    """Raises EncoderError where there is no attention to look at."""
    blank = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device=distributed.device())
    try:
        next(encoder.look(blank))
    except ValueError as error:
        raise EncoderError(f"encoder={said}: {error}") from error


def measure(
    encoder: Encoder, loader: DataLoader[Any], prepare: Callable[[Tensor], Tensor], chosen: Chosen, log_every: int
) -> Table:
    """All pictures of the loader, and of those of the other ranks."""
    tally, began = Tally(encoder, distributed.device()), time.monotonic()
    for number, (images, labels, index) in enumerate(loader, 1):
        tokens = tally.look(encoder, prepare(images))
        chosen.add(tokens[:, 0] if encoder.has_cls else tokens.mean(1), labels, index)
        if number % log_every == 0 or number == len(loader):
            speed = tally.seen.item() / (time.monotonic() - began)
            log.info("batch %d of %d  %.3g pictures/s per process", number, len(loader), speed)
    return tally.result()


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_curves(table: Table, patches: int) -> Figure:
    """Over the blocks: the mean over pictures and heads as a line, every head a dot."""
    means, blocks = table.means(), range(table.per_head.shape[1])
    panels = [(title, here) for title, names in CURVES if (here := [n for n in names if n in means])]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 2.7 * lines + 0.3), layout="constrained")
    every = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (title, names) in zip(every, panels, strict=False):
        if "entropy" in names[0]:
            axes.axhline(math.log(patches), color="0.4", linestyle=":", label="spread evenly")
        for name, colour, marker in zip(names, COLOURS, "os", strict=False):
            if name in table.names:
                heads = table.per_head[0, :, :, table.names.index(name)]
                axes.plot(blocks, heads.numpy(), ".", color="0.7", markersize=4)
            label = None if name in table.names else "class token" if name.startswith("cls") else "patches"
            axes.plot(blocks, means[name].numpy(), marker=marker, markersize=4, color=colour, label=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        if "entropy" not in names[0] and names[0] in table.names:
            axes.set_ylim(bottom=0)
        elif "magnitude" in names[0]:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("block", fontsize=9)
    figure.suptitle(f"Attention over {table.seen} pictures: mean, and every head (grey)", fontsize=10)
    return figure


def draw_maps(images: Tensor, found: Tensor, titles: list[str], headline: str) -> Figure:
    """A line per picture: images (n, 3, h, w) uint8, beside each its maps (n, m, rows, columns), which add up to 1."""
    n, m, rows, columns = found.shape
    shades = (found * rows * columns).cpu()  # 1: what even attention would give
    most = max(2.0, shades.quantile(0.995).item())
    figure = Figure(figsize=(1.25 * (m + 1) + 0.9, 1.25 * n + 0.75), layout="constrained")
    panels = figure.subplots(n, m + 1, squeeze=False)
    for picture, own, (first, *others) in zip(images, shades, panels, strict=True):
        first.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        for axes, each in zip(others, own, strict=True):
            drawn = axes.imshow(each.numpy(), vmin=0, vmax=most, cmap="magma", interpolation="nearest")
    for axes, title in zip(panels[0], ["picture", *titles], strict=True):
        axes.set_title(title, fontsize=9)
    for axes in panels.flat:
        axes.set_axis_off()
    figure.colorbar(drawn, ax=panels[:, -1].tolist(), label="attention (1: spread evenly)", shrink=min(1.0, 3 / n))
    figure.suptitle(headline, fontsize=10)
    return figure


@torch.no_grad()
def maps(encoder: Encoder, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> dict[str, Figure]:
    """Where each of ``images`` (n, 3, h, w) uint8 is looked at: block by block, and by the last block's heads."""
    every = [attention.saliency(each.logits, encoder.has_cls) for each in encoder.look(prepare(images))]
    seen = torch.stack(every, 1).view(
        len(images), encoder.depth, encoder.heads, *encoder.grid
    )  # (n, L, H, rows, columns)
    blocks = sorted({round(i * (encoder.depth - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    heads = range(min(encoder.heads, 2 * COLUMNS))
    who = "The class token's attention to the patches" if encoder.has_cls else "Attention that the patches receive"
    over_blocks = f"{who}, mean of heads", seen[:, blocks].mean(2), [f"block {b}" for b in blocks]
    over_heads = f"{who}, block {encoder.depth - 1}", seen[:, -1, : len(heads)], [f"head {h}" for h in heads]
    return {
        f"attention_{name}": draw_maps(images, found, titles, headline)
        for name, (headline, found, titles) in (("maps", over_blocks), ("heads", over_heads))
    }


def draw_tsne(x: Tensor, labels: Tensor, classes: list[str], seed: int, headline: str) -> Figure | None:
    """Features (n, D) in the plane, a colour per class; None where there are too few, or all are alike."""
    if len(x) < 5 or not (x != x[0]).any():
        return None
    from sklearn.manifold import TSNE

    embed = TSNE(perplexity=min(30.0, (len(x) - 1) / 3), init="pca", random_state=seed)
    place = embed.fit_transform(x.numpy())
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.subplots()
    for label in sorted(set(labels.tolist())):
        here = place[(labels == label).numpy()]
        axes.scatter(here[:, 0], here[:, 1], s=14, color=f"C{label}", label=classes[label][:20])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", "datalim")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"t-SNE of {headline}, {len(x)} pictures", fontsize=10)
    return figure


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        encoder = load_encoder(settings.encoder, image_size=settings.image_size)
        check(encoder, settings.encoder)
        transform = ResizeCenterCrop(encoder.image_size, settings.eval_crop)
        prepare = pictures.normaliser(settings, encoder)
        split = pictures.load(settings, settings.split)
        loader = pictures.in_order(settings, split, transform, settings.batch_size)
        chosen = Chosen(settings.tsne, min(CLASSES, len(split.classes)))
        table = measure(encoder, loader, prepare, chosen, settings.log_every)
        skipped = pictures.skipped(settings, loader)
        features = chosen.gathered(encoder.width)

        means = {f"attention/{name}": each.tolist() for name, each in table.means().items()}
        for block in range(encoder.depth):
            run.track(block, encoder.depth - 1, {name: each[block] for name, each in means.items()})
        if distributed.rank() == 0:
            table.write(run.folder / rundir.TABLES)
            figures = {"attention": draw_curves(table, math.prod(encoder.grid))}
            if settings.maps:
                figures |= maps(encoder, pictures.examples(split, transform, settings.maps), prepare)
            what = "the class token" if encoder.has_cls else "the mean of the patches"
            tsne = draw_tsne(*features, split.classes, settings.seed, what) if settings.tsne else None
            (run.folder / rundir.FIGURES).mkdir(exist_ok=True)
            for name, figure in (figures | ({"tsne": tsne} if tsne else {})).items():
                figure.savefig(run.folder / rundir.FIGURES / f"{name}.png", dpi=150)
        final = {name: each[-1] for name, each in means.items()}
        final |= {f"{name}_b{block}": value for name, each in means.items() for block, value in enumerate(each)}
        run.finish(final | skipped, encoder.depth - 1)


if __name__ == "__main__":
    main()
