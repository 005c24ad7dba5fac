"""What the model sees: ``figures/views.png``, a row of each picture and some of its views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.preview import Settings
from workers.engine import distributed, pictures
from workers.engine.run import open_run
from workers.transforms import saliency, spectral, views
from workers.transforms.crops import ResizeCenterCrop
from workers.transforms.hide import EyeMovement

COMPUTED = {"contrast": saliency.contrast, "spectral_residual": spectral.residual}  # no results of a paper were made so
PAPER = (0.55, 0.70, 0.90)  # what need not be predicted


def numbers(settings: Settings, picture: int, amount: int) -> Tensor:
    """(n_views, amount) uniform for the picture, as a loader would give it in epochs 0, 1, ..."""
    generator = torch.Generator()
    rows = []
    for epoch in range(settings.n_views):
        generator.manual_seed(distributed.fold(settings.seed, epoch, picture))
        rows.append(torch.rand(amount, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


def look(settings: Settings, images: Tensor) -> tuple[list[str], list[Tensor]]:
    """Pictures (n, 3, H, W) in [0, 1] -> captions and columns of pictures, each (n, C, h, w)."""
    if settings.masking_mode != "none":
        return look_masked(settings, images)
    view = views.build(settings.image_size, **settings.view_options())
    u = torch.stack([numbers(settings, i, view.numbers) for i in range(len(images))])
    titles, columns = ["picture"], [images]
    maps = None
    if view.needs_maps:
        maps = COMPUTED[settings.saliency](images)
        titles.append(f"saliency:\n{settings.saliency}")
        columns.append(maps)
    for i, each in enumerate(u.unbind(1)):
        titles.append(f"view {i + 1}")
        columns.append(view(images, each, maps))
    return titles, columns


def look_masked(settings: Settings, images: Tensor) -> tuple[list[str], list[Tensor]]:
    eye = EyeMovement(
        settings.image_size,
        settings.masking_mode,
        settings.masking_ratio,
        crop=settings.random_crop,
        blur=settings.masking_blur,
        patch=settings.mask_patch_size,
    )
    u = torch.stack([numbers(settings, i, eye.numbers) for i in range(len(images))])
    titles, columns = ["picture"], [images]
    paper = torch.tensor(PAPER, device=images.device).view(3, 1, 1)
    for i, each in enumerate(u.unbind(1)):
        height, width = images.shape[-2:]
        masked = eye.apply(images, eye.draw(each, (height, width)))
        titles += [f"seen {i + 1}", f"to predict {i + 1}"]
        columns += [masked.sample, torch.where(masked.mask, masked.target, paper)]
    return titles, columns


def draw_sheet(titles: Sequence[str], columns: Sequence[Tensor], caption: str, path: Path) -> None:
    """Columns of pictures (n, C, h, w) in [0, 1], or of maps with C = 1, side by side."""
    from matplotlib.figure import Figure

    n = len(columns[0])
    figure = Figure(figsize=(1.15 * len(columns) + 0.2, 1.15 * n + 0.9), layout="constrained")
    panels = figure.subplots(n, len(columns), squeeze=False)
    for place, (title, column) in enumerate(zip(titles, columns, strict=True)):
        panels[0, place].set_title(title, fontsize=8)
        for i, picture in enumerate(column.permute(0, 2, 3, 1).cpu()):
            axes = panels[i, place]
            axes.imshow(picture.numpy().squeeze(), interpolation="nearest", cmap="viridis")
            axes.set_axis_off()
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        if distributed.rank() == 0:
            split = pictures.load(settings, settings.split, labelled=False)
            some = pictures.examples(split, ResizeCenterCrop(settings.image_size, crop=1.0), settings.number)
            try:
                titles, columns = look(settings, views.to_unit(some.to(distributed.device())))
            except ValueError as error:
                raise SettingsError(str(error)) from error
            (run.folder / rundir.FIGURES).mkdir(exist_ok=True)
            what = settings.augment if settings.masking_mode == "none" else settings.masking_mode
            caption = f"{settings.data.name}, {what}, {settings.image_size} pixels, seed {settings.seed}"
            draw_sheet(titles, columns, caption, run.folder / rundir.FIGURES / "views.png")
            seen = torch.stack([each.mean() for each in columns[-settings.n_views :]])
            metrics = {"preview/brightness": float(seen.mean()), "preview/pictures": float(len(some))}
        else:
            metrics = {}
        run.track(1, 1, metrics)
        run.finish(metrics, 1)


if __name__ == "__main__":
    main()
