"""Semantic maps: the patches of a picture in groups of like features, by agglomerative clustering (Ward, JASA 1963).

Features are a block's patch tokens, scaled to unit length, so that Euclidean distance is a matter of the angle. Each
picture has a tree of its own, and all pictures together have one, whose groups have the same colour everywhere.

``figures/patch_clusters.png`` shows both beside the pictures, ``figures/patch_tsne.png`` all patches in the plane.
``clusters/silhouette_K`` says how well K groups are apart (Rousseeuw, 1987; at most 1), the mean over the pictures;
``clusters/silhouette_all_K`` the same of all pictures together. ``tables/patch_clusters.npz`` has the labels.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray
from torch import Tensor

from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.main_patch_clusters import Settings
from workers.engine import distributed, pictures
from workers.engine.encoder import load_encoder
from workers.engine.frozen import block_of
from workers.engine.run import open_run
from workers.masking.patches import patchify
from workers.models import Encoder
from workers.transforms.crops import ResizeCenterCrop

log = logging.getLogger(__name__)

THUMBNAILS = 400  # patches that are drawn as they look in the t-SNE
Labels = NDArray[np.int64]


def check(numbers: list[int], grid: tuple[int, int]) -> None:
    """Raises SettingsError where a picture has fewer patches than groups are asked for."""
    if max(numbers) > (patches := grid[0] * grid[1]):
        raise SettingsError(f"n_clusters={numbers}: a picture has {patches} patches; choose at most that many")


@torch.no_grad()
def patch_features(encoder: Encoder, images: Tensor, block: int | None, final_norm: bool) -> Tensor:
    """Normalised images (B, 3, H, W) -> (B, N, D) of unit length."""
    tokens = encoder.tokens(images, block=block)
    tokens = (encoder.final(tokens) if final_norm else tokens)[:, 1:].float()
    return torch.nn.functional.normalize(tokens, dim=-1).cpu()


def cut(x: Tensor, numbers: list[int], linkage: str) -> dict[int, Labels]:
    """Features (n, D) in each of ``numbers`` of groups, cuts of one tree: labels (n,), the largest group first."""
    from scipy.cluster import hierarchy

    tree = hierarchy.linkage(x.double().numpy(), linkage)
    return {k: by_size(hierarchy.fcluster(tree, k, "maxclust")) for k in numbers}


def by_size(labels: NDArray[np.integer]) -> Labels:
    """The same groups, numbered from 0 by how many belong to them."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))  # equal ones as they come
    rank: Labels = np.argsort(order)[inverse]
    return rank


def silhouette(x: Tensor, labels: Labels) -> float:
    """(n, D), (n,) -> the mean over the points; 0 where there is one group, or as many as points."""
    from sklearn.metrics import silhouette_score

    if not 1 < labels.max() + 1 < len(labels):
        return 0.0
    return float(silhouette_score(x.numpy(), labels))


def palette(number: int) -> ListedColormap:
    """So many colours: the well known ten, the same in light, then others."""
    strong, pairs, many = (mpl.colormaps[name] for name in ("tab10", "tab20", "gist_ncar"))
    known = [*(strong(i) for i in range(10)), *(pairs(2 * i + 1) for i in range(10))]
    return ListedColormap([known[i] if i < 20 else many((i - 19) / (number - 19)) for i in range(number)])


def draw_clusters(images: Tensor, own: dict[int, Labels], shared: dict[int, Labels], grid: tuple[int, int]) -> Figure:
    """A line per picture (n, 3, h, w) uint8: itself, its own groups (n, N) and those of all pictures (n, N)."""
    n, k = len(images), len(own)
    figure = Figure(figsize=(1.25 * (1 + 2 * k) + 0.4, 1.25 * n + 0.8), layout="constrained")
    panels = figure.subplots(n, 2 + 2 * k, squeeze=False, width_ratios=[5, *[5] * k, 1, *[5] * k])
    titles = ["picture", *(f"{each} groups" for each in own), "", *(f"{each} groups" for each in shared)]
    for i, picture in enumerate(images):
        panels[i, 0].imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        for place, labels in [*enumerate(own.items(), 1), *enumerate(shared.items(), 2 + k)]:
            number, found = labels
            colours = palette(number)
            panels[i, place].imshow(found[i].reshape(grid), cmap=colours, vmin=-0.5, vmax=number - 0.5)
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    for axes in panels.flat:
        axes.set_axis_off()
    figure.suptitle(
        "Patches grouped by their features: each picture by itself (left), all together (right)", fontsize=10
    )
    return figure


def draw_tsne(x: Tensor, labels: Labels, looks: Tensor, seed: int) -> Figure:
    """Features (n, D) in the plane, coloured by their groups (n,), and as the patches (n, p, p, 3) uint8 look."""
    from sklearn.manifold import TSNE

    embed = TSNE(perplexity=min(30.0, (len(x) - 1) / 3), init="pca", random_state=seed)
    place = embed.fit_transform(x.numpy())
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    number = int(labels.max()) + 1
    left.scatter(*place.T, s=8, c=labels, cmap=palette(number), vmin=-0.5, vmax=number - 0.5)
    left.set_title(f"{number} groups of all pictures together", fontsize=9)
    right.scatter(*place.T, s=0)
    right.set_facecolor("0.8")  # so that white patches show
    shown = range(0, len(x), -(-len(x) // THUMBNAILS))
    for i in shown:
        zoom = 6 / looks.shape[1]  # points
        patch = OffsetImage(looks[i].numpy(), zoom=zoom, interpolation="nearest")
        right.add_artist(AnnotationBbox(patch, place[i], frameon=False))
    right.set_title(f"{len(shown)} of them as they look", fontsize=9)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(f"t-SNE of {len(x)} patches", fontsize=10)
    return figure


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        encoder = load_encoder(settings.encoder, image_size=settings.image_size)
        block = block_of(encoder, settings.block)
        check(settings.n_clusters, encoder.grid)
        transform = ResizeCenterCrop(encoder.image_size, settings.eval_crop)
        split = pictures.load(settings, settings.split)
        images = pictures.examples(split, transform, settings.number)
        prepare = pictures.normaliser(settings, encoder)
        x = patch_features(encoder, prepare(images), block, settings.final_norm == "encoder")
        log.info("block %d: %d patches of each of %d pictures, width %d", block, x.shape[1], *x.shape[::2])

        numbers = sorted(set(settings.n_clusters))
        each = [cut(one, numbers, settings.linkage) for one in x]
        own = {k: np.stack([found[k] for found in each]) for k in numbers}
        flat = x.flatten(0, 1)
        shared = cut(flat, numbers, settings.linkage)
        metrics = {
            f"clusters/silhouette_{k}": float(
                np.mean([silhouette(one, found) for one, found in zip(x, own[k], strict=True)])
            )
            for k in numbers
        }
        metrics |= {f"clusters/silhouette_all_{k}": silhouette(flat, shared[k]) for k in numbers}
        if distributed.rank() == 0:
            together = {k: found.reshape(len(x), -1) for k, found in shared.items()}
            figures = {"patch_clusters": draw_clusters(images, own, together, encoder.grid)}
            if settings.tsne:
                side = encoder.image_size // encoder.grid[0]
                looks = patchify(images, side).view(-1, side, side, 3)
                figures["patch_tsne"] = draw_tsne(flat, shared[numbers[-1]], looks, settings.seed)
            for folder in (rundir.FIGURES, rundir.TABLES):
                (run.folder / folder).mkdir(exist_ok=True)
            for name, figure in figures.items():
                figure.savefig(run.folder / rundir.FIGURES / f"{name}.png", dpi=150)
            data = io.BytesIO()
            tables: dict[str, Any] = {f"own_{k}": labels for k, labels in own.items()}
            tables |= {f"all_{k}": labels for k, labels in together.items()}
            np.savez(data, **tables)
            rundir.write_atomic(run.folder / rundir.TABLES / "patch_clusters.npz", data.getvalue())
        run.track(1, 1, metrics)
        run.finish(metrics, 1)


if __name__ == "__main__":
    main()
