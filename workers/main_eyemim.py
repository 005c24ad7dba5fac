"""MIM across eye movements (Weiler et al., arXiv 2404.08526).

A convolutional autoencoder sees a picture as one fixation shows it: the periphery hidden, or blurred as the retina
blurs it, or random patches hidden; and predicts the picture, as it is, where it was not seen. A random crop stands for
the eye movement between pictures. With masks of the main object (``segments_path``) it predicts that alone.

``readout/top1`` is of a linear layer on the whole last map. ``eyemim/covariance`` and the sparsities tell how unlike
each other the units of that map are, ``eyemim/mse`` how well clean pictures are rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.main_eyemim import STAGES, Settings
from workers import models
from workers.data import Pictures
from workers.data.few import same_classes
from workers.data.segments import Segmented, Segments
from workers.engine import distributed, pictures, pretrain, probe, readout
from workers.engine.checkpoint import Checkpoint
from workers.engine.encoder import save_encoder
from workers.engine.fit import fit
from workers.engine.run import Run, loop, open_run, steps
from workers.losses.sparsity import covariance, hidden_error, population_sparsity, unit_sparsity
from workers.models.conv_autoencoder import ConvDecoder, ConvEncoder, widths_of
from workers.transforms.crops import ResizeCenterCrop
from workers.transforms.hide import EyeMovement, Gaze
from workers.transforms.views import Numbered


class Glimpse(NamedTuple):
    """What the network is given."""

    seen: Tensor  # (B, 3, H, W) in [0, 1]
    target: Tensor  # (B, 3, H, W) in [0, 1], what is to be predicted
    weight: Tensor  # (B, 1, H, W) in [0, 1], where


class EyeMIM(pretrain.Method):
    """Predict what a fixation does not show."""

    encoder: ConvEncoder

    def __init__(self, encoder: ConvEncoder, decoder: ConvDecoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, glimpse: Glimpse) -> dict[str, Tensor]:
        latent = self.encoder(glimpse.seen)
        loss = hidden_error(self.decoder(latent), glimpse.target, glimpse.weight)
        return {"loss": loss, **statistics(latent.detach())}


def statistics(latent: Tensor) -> dict[str, Tensor]:
    """Of the last maps (B, D, h, w) of a batch."""
    with torch.autocast(latent.device.type, enabled=False):
        return {
            "covariance": covariance(latent),
            "sparsity_unit": unit_sparsity(latent).mean(),
            "sparsity_population": population_sparsity(latent).mean(),
        }


def build(settings: Settings) -> EyeMIM:
    s = settings
    shape: dict[str, models.Plain] = {"first": s.channels, "stages": STAGES, "image_size": s.image_size}
    encoder = models.build("conv_autoencoder", shape)
    assert isinstance(encoder, ConvEncoder)
    return EyeMIM(encoder, ConvDecoder(widths_of(s.channels, STAGES)))


def movement(settings: Settings) -> EyeMovement:
    s = settings
    return EyeMovement(
        s.image_size,
        s.masking_mode,
        s.masking_ratio,
        crop=s.random_crop,
        jitter=s.color_jitter,
        blur="off" if s.blur == "none" else s.blur,
        attention=s.attention,
        patch=s.patch_size,
        antialias=s.antialias,
        clamp_weights=s.clamp_weights,
    )


def finish(settings: Settings, eye: EyeMovement) -> Callable[[Any], Glimpse]:
    """What the loader gives, uint8 (B, 3 or 4, H, W) and uniform numbers -> what the network is given."""
    device, background = distributed.device(), settings.background

    def prepare(batch: tuple[tuple[Tensor, Tensor], Tensor, Tensor]) -> Glimpse:
        (raw, u), _, _ = batch
        sure = raw[:, 3:].float() / 255 if raw.shape[1] > 3 else None  # of where the main object is
        draws: Gaze = eye.draw(u[:, 0], (raw.shape[2], raw.shape[3]), sure)
        seen, target, hidden = eye.apply(raw[:, :3].to(device, non_blocking=True).float().div_(255), draws)
        weight = hidden.float()
        if sure is not None:
            sure = eye.follow(sure.to(device), draws)
            weight = weight * (1 - sure if background else sure)
        return Glimpse(seen, target, weight)

    return prepare


def training_pictures(settings: Settings) -> Pictures:
    """The split to pretrain on, each with a mask of its main object as a fourth channel if there are masks."""
    found = pictures.load(settings, "train", labelled=False)
    if settings.segments_path is None:
        return found
    segments = Segments(Path(settings.segments_path), len(found))
    return Segmented(found, segments, settings.image_size, remove_missing=settings.remove_missing)


def check_cache(settings: Settings, encoder: ConvEncoder, number: int) -> None:
    """Raises SettingsError where the features of the read-out would not fit."""
    width = encoder.width * encoder.grid[0] * encoder.grid[1]
    if settings.readout.epochs and (size := number * width * 4 / 1e9) > settings.cache_gb:
        raise SettingsError(
            f"readout.epochs={settings.readout.epochs}: {number} pictures of {width} features take {size:.3g} GB, "
            f"above cache_gb={settings.cache_gb:g}; raise it, or leave the read-out out with readout.epochs=0"
        )


@torch.no_grad()
def describe(method: EyeMIM, loader: DataLoader[Any], prepare: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Of clean pictures: how well they are rebuilt, every one counted once, and the statistics' means over batches."""
    method.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=distributed.device())
    for raw, _, _ in loader:
        images = prepare(raw)
        latent = method.encoder(images)
        error = (method.decoder(latent) - images).square().mean((1, 2, 3))
        found = torch.stack(list(statistics(latent).values())) if len(images) > 1 else error.new_zeros(3)
        sums += torch.cat([error.sum()[None], len(images) * found, error.new_tensor([len(images)])])
    sums = distributed.total(sums)
    names = ("mse", "covariance", "sparsity_unit", "sparsity_population")
    return {f"eyemim/{name}": float(value) for name, value in zip(names, sums[:-1] / sums[-1], strict=True)}


def read_out(
    run: Run[Settings], encoder: ConvEncoder, loaders: tuple[DataLoader[Any], DataLoader[Any]], classes: int
) -> dict[str, float] | None:
    """``readout/...`` of the labelled training pictures and the validation split; None: asked to stop."""
    settings = run.settings
    if not settings.readout.epochs:
        return {}
    encoder.eval()
    prepare = pictures.normaliser(settings, encoder)
    train, val = (probe.encoded(lambda images: encoder(images).flatten(1), loader, prepare) for loader in loaders)
    found = readout.train_readout(*train, classes, settings.readout, seed=settings.seed, stop=run.stop)
    if found is None:
        return None
    metrics = {f"readout/{name}": value for name, value in readout.measure(found.layer, *val).items()}
    metrics["readout/train_top1"] = readout.measure(found.layer, *train)["top1"]
    return metrics | {"readout/epochs": float(found.epochs), "readout/best_epoch": float(found.best)}


@torch.no_grad()
def draw(method: EyeMIM, glimpse: Glimpse, folder: Path) -> None:
    """``glimpses.png``: pictures, what is seen of them, what is predicted, and where that counts."""
    from matplotlib.figure import Figure

    method.eval()
    rebuilt = method.decoder(method.encoder(glimpse.seen))
    weight = glimpse.weight.expand_as(rebuilt)
    rows = {"picture": glimpse.target, "seen": glimpse.seen, "rebuilt": rebuilt, "loss": weight}
    number = len(rebuilt)
    figure = Figure(figsize=(1.2 * number + 0.6, 1.2 * len(rows) + 0.2), layout="constrained")
    for panels, (name, row) in zip(figure.subplots(len(rows), number, squeeze=False), rows.items(), strict=True):
        for panel, picture in zip(panels, row.clamp(0, 1).permute(0, 2, 3, 1).cpu(), strict=True):
            panel.imshow(picture.numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
        panels[0].set_ylabel(name)
    figure.savefig(folder / "glimpses.png", dpi=150)


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        train, labelled = training_pictures(settings), pictures.load(settings, "train")
        val = pictures.load(settings, "val")
        same_classes(labelled, val)
        eye = movement(settings)
        centre = ResizeCenterCrop(settings.image_size, crop=settings.eval_crop)
        view = Numbered(settings.image_size, eye.numbers)
        loader = pictures.shuffled(settings, train, view, settings.batch_size)
        labelled_loader, val_loader = (pictures.in_order(settings, each, centre) for each in (labelled, val))

        torch.manual_seed(distributed.fold(settings.seed))  # the same weights on every rank
        method = build(settings).to(distributed.device())
        check_cache(settings, method.encoder, len(labelled) + len(val))
        updates = torch.optim.Adam(
            method.parameters(), settings.peak_lr, weight_decay=settings.weight_decay, fused=True
        )
        normalise, prepare = pictures.normaliser(settings, method.encoder), finish(settings, eye)
        warmup = settings.warmup_epochs / max(settings.epochs, 1)

        def evaluate() -> dict[str, float]:
            return {"knn/loo1": probe.leave_one_out(*probe.features(method.encoder, val_loader, normalise))}

        finished = fit(
            distributed.wrap(method),
            loader,
            updates,
            schedules={"lr": lambda t: settings.peak_lr * (min(1.0, t / warmup) if warmup else 1.0)},
            checkpoint=Checkpoint(run.folder / rundir.CHECKPOINT, run.journal, model=method, optimizer=updates),
            prepare=prepare,
            evaluate=evaluate,
            evaluate_epochs=settings.eval_freq,
            **loop(run),
        )
        found = read_out(run, method.encoder, (labelled_loader, val_loader), len(val.classes)) if finished else None
        if found is None:
            return
        done = steps(settings, len(loader))
        metrics = evaluate() | describe(method, val_loader, normalise) | found
        metrics |= pictures.skipped(settings, loader, labelled_loader, val_loader)
        run.track(done, done, metrics)
        if distributed.rank() == 0:
            (run.folder / rundir.FIGURES).mkdir(exist_ok=True)
            torch.manual_seed(distributed.fold(settings.seed))
            raw = pictures.examples(train, lambda image: view(image)[0])
            u = torch.rand(len(raw), 1, eye.numbers, dtype=torch.float64)
            draw(method, prepare(((raw, u), u, u)), run.folder / rundir.FIGURES)
        save_encoder(run.folder, method.encoder, run.identity)
        run.finish(metrics, done)


if __name__ == "__main__":
    main()
