"""Linear probe on a frozen encoder (He et al., CVPR 2022, appendix A.1): BatchNorm without affine, then a linear layer.

``linprobe/top1`` and ``linprobe/top5`` are measured on the validation split after the last epoch, every picture once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contract import rundir
from contract.settings.main_linprobe import Settings
from workers.data import Pictures
from workers.data.loader import Cached, Transform
from workers.engine import distributed, pictures, probe
from workers.engine.checkpoint import Checkpoint
from workers.engine.encoder import load_encoder
from workers.engine.fit import fit
from workers.engine.optim import LARS, warmup_cosine
from workers.engine.run import open_run
from workers.models import Encoder
from workers.transforms.crops import RandomResizedCrop, ResizeCenterCrop


class Probe(nn.Module):
    """The head, on features (B, D) or on pictures (B, 3, H, W) that a frozen encoder turns into features."""

    def __init__(self, width: int, classes: int, encoder: Encoder | None, features: str):
        super().__init__()
        linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)
        self.frozen = (encoder,)  # in a tuple: no child, so neither trained nor saved nor switched to training mode
        self.features = features

    def logits(self, x: Tensor) -> Tensor:
        """(B, D) or (B, 3, H, W) -> (B, classes)."""
        (encoder,) = self.frozen
        if encoder is not None:
            with torch.no_grad():
                x = probe.pool(encoder.tokens(x), self.features)
        out: Tensor = self.head(x.float())
        return out

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, labels = batch
        logits = self.logits(x)
        return {"loss": F.cross_entropy(logits, labels), "top1": (logits.argmax(1) == labels).float().mean()}


@torch.no_grad()
def evaluate(model: Probe, loader: DataLoader[Any], prepare: Any) -> dict[str, float]:
    """Top-1 and top-5 over all ranks, every picture counted once."""
    model.eval()
    right = torch.zeros(3, dtype=torch.float64, device=distributed.device())
    for batch in loader:
        x, labels = prepare(batch)
        logits = model.logits(x)
        hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        right += torch.stack([hit[:, 0].sum(), hit.sum(), hit.new_tensor(len(hit), dtype=torch.long)])
    top1, top5, n = distributed.total(right).tolist()
    return {"linprobe/top1": top1 / n, "linprobe/top5": top5 / n}


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        encoder = load_encoder(settings.encoder)
        normalise = pictures.normaliser(settings)
        train, val = pictures.load(settings, "train"), pictures.load(settings, "val")
        centre: Transform = ResizeCenterCrop(encoder.image_size, settings.eval_crop)
        crop: Transform = RandomResizedCrop(encoder.image_size) if settings.augment == "crop" else centre

        read: list[DataLoader[Any]] = []  # the loaders that met the files

        def encode(each: Pictures) -> Cached:
            read.append(pictures.in_order(settings, each, centre))
            return Cached(*probe.features(encoder, read[-1], normalise, settings.features), each.classes)

        if settings.cache_features:  # without augmentation every epoch sees the same pictures: encode them once
            train, val = encode(train), encode(val)
            normalise = nn.Identity()
        loader = pictures.shuffled(settings, train, crop, settings.batch_size)
        val_loader = pictures.in_order(settings, val, centre)
        read = read or [loader, val_loader]

        def prepare(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return normalise(batch[0]), batch[1].to(distributed.device(), non_blocking=True)

        torch.manual_seed(distributed.fold(settings.seed))
        model = Probe(
            encoder.width, len(train.classes), None if settings.cache_features else encoder, settings.features
        ).to(distributed.device())
        build = {"lars": LARS, "sgd": torch.optim.SGD}[settings.optimizer]
        optimizer = build(model.parameters(), lr=settings.peak_lr, weight_decay=settings.weight_decay, momentum=0.9)
        warmup = settings.warmup_epochs / max(settings.epochs, 1)
        finished = fit(
            distributed.wrap(model),
            loader,
            optimizer,
            epochs=settings.epochs,
            schedules={"lr": lambda t: warmup_cosine(t, peak=settings.peak_lr, warmup=warmup, floor=settings.min_lr)},
            checkpoint=Checkpoint(run.folder / rundir.CHECKPOINT, run.journal, model=model, optimizer=optimizer),
            prepare=prepare,
            track=run.track,
            stop=run.stop,
            seed=settings.seed,
            accumulate=settings.accum_iter or 1,
            amp=settings.amp,
            clip=settings.clip_grad,
            log_every=settings.log_every,
            checkpoint_minutes=settings.checkpoint_minutes,
            checkpoint_epochs=settings.checkpoint_epochs,
            evaluate=lambda: evaluate(model, val_loader, prepare),
            evaluate_epochs=max(1, settings.epochs // 10),
        )
        if finished:
            steps = settings.epochs * (len(loader) // (settings.accum_iter or 1))
            metrics = evaluate(model, val_loader, prepare) | pictures.skipped(settings, *read)
            run.track(steps, steps, metrics)
            run.finish(metrics, steps)


if __name__ == "__main__":
    main()
