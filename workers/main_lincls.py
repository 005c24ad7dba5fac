"""Linear classification of a frozen network as MoCo measures it (He et al., CVPR 2020, section 4.1); or, with
``freeze=false``, semi-supervised and full fine-tuning of the network.

``lincls/top1``, ``top5`` and ``loss`` are measured on the validation split after the last epoch, every picture once;
``lincls/best_top1`` is the best of all evaluations, the figure that MoCo's program prints. ``classifier.pt`` has the
classifier, and with ``freeze=false`` ``encoder.pt`` the network.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contract import rundir
from contract.settings.main_lincls import Settings
from workers.data.few import few, same_classes
from workers.engine import distributed, optim, pictures
from workers.engine.checkpoint import Checkpoint
from workers.engine.encoder import EncoderError, load_encoder, save_encoder
from workers.engine.fit import DTYPES, fit
from workers.engine.run import Run, loop, open_run, steps
from workers.models import Encoder
from workers.transforms.crops import BilinearCenterCrop, BilinearCrop

CLASSIFIER = "classifier.pt"


class Classifier(nn.Module):
    """A linear layer on the token for the whole picture, or, where there is none, on the mean of the others.

    A frozen encoder is no part of the module: it is neither trained nor saved, and its BatchNorms stay as they are.
    """

    def __init__(self, encoder: Encoder, classes: int, *, freeze: bool = True):
        super().__init__()
        self.classes, self._frozen = classes, (encoder,) if freeze else ()
        self.encoder = None if freeze else encoder.requires_grad_()
        self.fc = nn.Linear(encoder.width, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)"""
        for encoder in self._frozen:
            with torch.no_grad():
                return vector(encoder, images)
        assert self.encoder is not None
        return vector(self.encoder, images)

    def logits(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(images))
        return out

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and labels (B,)."""
        images, labels = batch
        logits = self.logits(images).float()
        return {"loss": F.cross_entropy(logits, labels), "top1": (logits.argmax(1) == labels).float().mean()}


def vector(encoder: Encoder, images: Tensor) -> Tensor:
    tokens = encoder.final(encoder.tokens(images))
    return tokens[:, 0] if encoder.has_cls else tokens[:, 1:].mean(1)


class Best:
    """The best top-1 so far. Part of the checkpoint."""

    top1 = -1.0

    def state_dict(self) -> dict[str, Any]:
        return {"top1": self.top1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.top1 = state_dict["top1"]


def groups(model: Classifier, settings: Settings) -> list[dict[str, Any]]:
    """The classifier, and the network at a rate of its own."""
    found: list[dict[str, Any]] = [{"params": list(model.fc.parameters())}]
    if model.encoder is not None:
        found.append({"params": list(model.encoder.parameters()), "lr_scale": settings.backbone_scale})
    return found


def schedules(settings: Settings) -> dict[str, Callable[[float], float]]:
    s = settings
    return {
        "lr": lambda t: optim.falling(
            t,
            epochs=s.epochs,
            peak=s.peak_lr,
            warmup_epochs=s.warmup_epochs,
            milestones=s.milestones if s.schedule == "steps" else None,
            whole_epochs=s.lr_every == "epoch",
        )
    }


def copied(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in encoder.state_dict().items()}


def check_frozen(encoder: Encoder, before: dict[str, Tensor]) -> None:
    """Raises EncoderError unless every weight and every running estimate is, bit for bit, what was read."""
    changed = [name for name, value in encoder.state_dict().items() if not torch.equal(value.cpu(), before[name])]
    if changed:
        raise EncoderError(
            f"freeze=true, but {len(changed)} of {len(before)} tensors of the encoder changed, first {changed[0]}"
        )


@torch.no_grad()
def evaluate(model: Classifier, loader: DataLoader[Any], prepare: Any, amp: str = "none") -> dict[str, float]:
    """Top-1, top-5 and loss over all ranks, every picture counted once."""
    model.eval()
    distributed.agree(model.buffers())  # a rank's own running estimates are a step ahead of those that are saved
    device = distributed.device()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in loader:
        images, labels = prepare(batch)
        with torch.autocast(device.type, DTYPES[amp], enabled=amp != "none"):
            logits = model.logits(images)
        hit = logits.topk(min(5, model.classes), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        sums += torch.stack([hit[:, 0].sum(), hit.sum(), loss, loss.new_tensor(len(hit))]).to(sums)
    top1, top5, loss, number = distributed.total(sums).tolist()
    return {"lincls/top1": top1 / number, "lincls/top5": top5 / number, "lincls/loss": loss / number}


def save(run: Run[Settings], model: Classifier, classes: list[str]) -> None:
    if distributed.rank() == 0:
        buffer = io.BytesIO()
        state = {name: value.cpu() for name, value in model.fc.state_dict().items()}
        torch.save({"classes": classes, "state": state, "from": run.identity}, buffer)
        rundir.write_atomic(run.folder / CLASSIFIER, buffer.getvalue())
    if model.encoder is not None:
        save_encoder(run.folder, model.encoder, run.identity)


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        encoder = load_encoder(settings.encoder)
        before = copied(encoder) if settings.freeze else {}
        train, val = pictures.load(settings, "train"), pictures.load(settings, "val")
        same_classes(train, val)
        train = few(train, shots=settings.shots, fraction=settings.fraction, seed=settings.split_seed)
        normalise, size = pictures.normaliser(settings, encoder), encoder.image_size
        crop = BilinearCrop(size, scale=(settings.min_crop, 1.0), hflip=settings.hflip)
        loader = pictures.shuffled(settings, train, crop, settings.batch_size)
        val_loader = pictures.in_order(settings, val, BilinearCenterCrop(size, settings.eval_crop))

        torch.manual_seed(distributed.fold(settings.seed))  # the same classifier on every rank
        model = Classifier(encoder, len(train.classes), freeze=settings.freeze).to(distributed.device())
        optimizer = optim.sgd(
            groups(model, settings),
            lr=settings.peak_lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        best = Best()

        def prepare(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return normalise(batch[0]), batch[1].to(distributed.device(), non_blocking=True)

        def measure() -> dict[str, float]:
            found = evaluate(model, val_loader, prepare, settings.amp)
            best.top1 = max(best.top1, found["lincls/top1"])
            if settings.freeze:
                check_frozen(encoder, before)
            return {**found, "lincls/best_top1": best.top1}

        finished = fit(
            distributed.wrap(model),
            loader,
            optimizer,
            schedules=schedules(settings),
            checkpoint=Checkpoint(
                run.folder / rundir.CHECKPOINT, run.journal, model=model, optimizer=optimizer, best=best
            ),
            prepare=prepare,
            evaluate=measure,
            evaluate_epochs=settings.eval_freq,
            **loop(run),
        )
        if finished:
            done = steps(settings, len(loader))
            metrics = measure() | pictures.skipped(settings, loader, val_loader)
            run.track(done, done, metrics)
            save(run, model, val.classes)
            run.finish(metrics, done)


if __name__ == "__main__":
    main()
