"""Fine-tuning of a residual network for detection, and the average precision of what it then finds.

``detection/AP``, ``AP50`` and ``AP75`` are measured after the last iteration, every picture once over all ranks; with
masks also ``detection/mask_AP`` and so on. ``figures/`` has a contact sheet and curves, ``tables/classes.csv`` each
class, ``detector.pt`` the detector, ``encoder.pt`` its encoder.
"""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import workers.data
from contract import rundir
from contract.settings.main_detection import Settings
from workers.boxes import drawing, measure
from workers.boxes.measure import Found, Measured, Truth
from workers.boxes.rcnn import Batch, Detector, padded, pasted
from workers.data import DataError, Split
from workers.data.scenes import RLE, Learnable, Scenes, one_by_one, streamed
from workers.engine import batchnorm, distributed, optim, pictures, pulse
from workers.engine.checkpoint import Checkpoint
from workers.engine.encoder import EncoderError, load_encoder, save_encoder
from workers.engine.fit import fit
from workers.engine.optim import stepped
from workers.engine.run import Run, open_run
from workers.models.resnet import ResNet
from workers.transforms.objects import Seen, Shorter

log = logging.getLogger(__name__)

DETECTOR = "detector.pt"
LOOK_EVERY = 16  # pictures of a rank between two questions whether to stop
SHEET = 12  # pictures on the contact sheet
SURE = 0.5  # the score from which a detection is drawn

Row = tuple[float, ...]  # picture, box, score, label


def scenes(settings: Settings, split: Split) -> Scenes:
    """The pictures of one split, checked."""
    found = workers.data.load(
        settings.data.name,
        split,
        Path(settings.data_path) if settings.data_path else None,
        sets=settings.train_sets if split == "train" else settings.val_sets,
        train_sets=settings.train_sets,
        classes=settings.data.classes,
        masks=settings.masks,
    )
    assert isinstance(found, Scenes)
    if settings.data.classes and len(found.classes) != settings.data.classes:
        raise DataError(
            f"data.classes={settings.data.classes}: {settings.data.name} {split} has {len(found.classes)} classes; "
            "data.classes=0 takes whatever there is"
        )
    log.info("%s %s: fingerprint %s", settings.data.name, split, workers.data.fingerprint(found))
    return found


def build(settings: Settings, classes: int) -> Detector:
    """The detector: its encoder is read, the rest drawn from torch's generator. Raises EncoderError where the encoder
    is not what was asked for."""
    encoder = load_encoder(settings.encoder)
    if not isinstance(encoder, ResNet):
        raise EncoderError(f"encoder={settings.encoder}: a {encoder.name}; detection takes residual networks")
    found = encoder.kwargs.get("arch", "resnet50")
    if settings.arch not in (None, found):
        raise EncoderError(f"encoder={settings.encoder}: a {found}, but arch={settings.arch}")
    return Detector(
        encoder.train().requires_grad_(),
        classes,
        head=settings.head,
        extra_norm=settings.extra_norm,
        masks=settings.masks,
        anchors=settings.anchor_sizes,
        rois=settings.rois,
        roi_size=settings.roi_size,
        proposals=settings.proposals,
    )


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay, and the norms', without."""
    norms = [p for each in model.modules() if isinstance(each, _BatchNorm) for p in each.parameters(recurse=False)]
    known = {id(p) for p in norms}
    others = [p for p in model.parameters() if id(p) not in known]
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def schedules(settings: Settings) -> dict[str, Callable[[float], float]]:
    s = settings
    return {
        "lr": lambda t: stepped(
            round(t * s.iterations),
            peak=s.peak_lr,
            warmup=s.warmup_iterations,
            start=s.warmup_factor,
            milestones=s.milestones,
        )
    }


class Prepare:
    """What a loader gives -> a batch on the device, normalised."""

    def __init__(self, settings: Settings, model: Detector):
        self.normalise = pictures.normaliser(settings, model.encoder)
        self.masks = settings.masks

    def __call__(self, samples: list[tuple[Seen, int, int]]) -> Batch:
        device = distributed.device()
        images, sizes = padded([self.normalise(seen.image[None])[0] for seen, _, _ in samples])
        targets = []
        for seen, _, _ in samples:
            target = {"boxes": seen.objects.boxes.to(device), "labels": seen.objects.labels.to(device) + 1}
            if self.masks:
                assert seen.objects.masks is not None
                target |= {"masks": seen.objects.masks.to(device), "scale": to_file(seen).to(device)}
            targets.append(target)
        return Batch(images, sizes, targets)


def to_file(seen: Seen) -> Tensor:
    """(4,) from the network's pixels to the file's."""
    (height, width), (h, w) = seen.size, seen.image.shape[-2:]
    return torch.tensor([width / w, height / h] * 2)


# -- what it finds -----------------------------------------------------------------------------------------------------


def detect(model: Detector, seen: Seen, prepare: Prepare) -> tuple[Tensor, Tensor, Tensor, list[RLE]]:
    """Boxes (n, 4) in the file's pixels, scores, labels, and the masks that there are, of one picture."""
    images, sizes = padded([prepare.normalise(seen.image[None])[0]])
    (found,) = model.detect(images, sizes)
    boxes = found["boxes"].cpu().double() * to_file(seen).double()
    masks: list[RLE] = []
    if "masks" in found:
        for mask, box in zip(found["masks"].cpu(), boxes.float(), strict=True):
            whole = pasted(mask, box, seen.size) >= 0.5
            masks.append(coco_mask.encode(np.asfortranarray(whole.numpy().astype(np.uint8))))
    return boxes, found["scores"].cpu().double(), found["labels"].cpu(), masks


def find(model: Detector, val: Scenes, settings: Settings, prepare: Prepare, stop: Callable[[], bool]) -> Found | None:
    """The detections in all pictures of all ranks, each picture once, on every rank; None when asked to stop."""
    model.eval()
    distributed.agree(model.buffers())  # a rank's own running estimates are a step ahead of those that are saved
    loader = one_by_one(
        val,
        Shorter([settings.test_size], settings.max_size),
        rank=distributed.rank(),
        world=distributed.world_size(),
        fold=distributed.fold,
        workers=settings.env.workers,
    )
    rows: list[Row] = []
    masks: list[bytes] = []
    most = len(val) if settings.smoke is None else settings.smoke
    rounds = min(most, len(val) // distributed.world_size()) // LOOK_EVERY  # of these every rank has one more
    for number, ((seen, _, index),) in enumerate(itertools.islice(loader, most), start=1):
        pulse.beat()
        boxes, scores, labels, shapes = detect(model, seen, prepare)
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
            rows.append((index, *box, score, label))
        masks += [each["counts"] for each in shapes]
        if number % LOOK_EVERY == 0 and number // LOOK_EVERY <= rounds:
            if any(asked for (asked,) in distributed.exchange([stop()])):
                return None
            if number // LOOK_EVERY % 10 == 0:
                log.info("evaluation: %d of %d pictures", number * distributed.world_size(), len(val))
    return together(rows, masks, val)


def together(rows: list[Row], masks: list[bytes], val: Scenes) -> Found:
    """What all ranks found, in the order of the pictures, so that their number changes nothing."""
    device = distributed.device()
    table = distributed.gather(torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 7)).cpu().numpy()
    order = table[:, 0].argsort(kind="stable")
    shapes: list[RLE] = []
    if val.has_masks:
        lengths = distributed.gather(torch.tensor([len(each) for each in masks], device=device)).cpu()
        letters = torch.frombuffer(bytearray(b"".join(masks) + b" "), dtype=torch.uint8)[:-1]
        content = distributed.gather(letters.to(device)).cpu().numpy().tobytes()
        if len(lengths) == len(table):
            ends = lengths.long().cumsum(0).tolist()
            parts = [content[end - n : end] for end, n in zip(ends, lengths.tolist(), strict=True)]
            shapes = [{"size": list(val.sizes[int(table[n, 0])]), "counts": parts[n]} for n in order]
    table = table[order]
    places, labels = (table[:, column].astype(np.int64) for column in (0, 6))
    return Found(places, table[:, 1:5], table[:, 5], labels, shapes)


def truths(val: Scenes, masks: bool) -> list[Truth]:
    found = []
    for index in range(len(val)):
        objects = val.objects(index, masks=False)
        boxes, labels, areas = (
            each.numpy() for each in (objects.boxes.double(), objects.labels, objects.areas.double())
        )
        ignored = (objects.difficult | objects.crowd).numpy()
        found.append(Truth(boxes, labels, ignored, areas, val.run_lengths(index) if masks else ()))
    return found


def measured(settings: Settings, val: Scenes, expected: list[Truth], found: Found) -> dict[str, Measured]:
    """By name: "" of boxes, ``mask_`` of masks."""
    rule, classes = val.metric if settings.metric == "own" else settings.metric, len(val.classes)
    log.info("%d detections in %d pictures, measured by the rule %s", len(found.scores), len(val), rule)
    if rule == "coco":
        results = {"": measure.coco(expected, found, classes)}
    else:
        results = {"": measure.voc(expected, found, classes, eleven_points=rule == "voc07")}
    if settings.masks:
        results["mask_"] = measure.coco(expected, found, classes, masks=True)
    return results


def tell(run: Run[Settings], val: Scenes, expected: list[Truth], found: Found, results: dict[str, Measured]) -> None:
    """Figures and tables."""
    folders = [run.folder / name for name in (rundir.FIGURES, rundir.TABLES)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    figures, tables = folders
    shown = range(0, len(val), max(1, len(val) // SHEET))[:SHEET]
    drawn = []
    for index in shown:
        here = (found.pictures == index) & (found.scores >= SURE)
        drawn.append((found.boxes[here], found.scores[here], found.labels[here]))
    what = f"{run.settings.data.name}, seed {run.settings.seed}"
    drawing.contact_sheet(
        [val.picture(index) for index in shown],
        [expected[index] for index in shown],
        drawn,
        val.classes,
        f"{what}, scores of at least {SURE}",
        figures / "detections.png",
    )
    for name, each in results.items():
        kind = "masks" if name else "boxes"
        drawing.curves(each, val.classes, f"{what}, {kind}", figures / f"{name}precision_recall.png")
        number = np.bincount(np.concatenate([t.labels[~t.ignored] for t in expected]), minlength=len(val.classes))
        lines = ["class,objects,AP,AP50,AP75"]
        for label, title in enumerate(val.classes):
            by = each.by_class[:, label]
            lines.append(f"{title},{number[label]},{by.mean():.4f},{by[0]:.4f},{by[5]:.4f}")
        rundir.write_atomic(tables / f"{name}classes.csv", "\n".join(lines) + "\n")


def save(run: Run[Settings], model: Detector, classes: list[str]) -> None:
    if distributed.rank() == 0:
        buffer = io.BytesIO()
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        torch.save({"classes": classes, "state": state, "from": run.identity}, buffer)
        rundir.write_atomic(run.folder / DETECTOR, buffer.getvalue())
    save_encoder(run.folder, model.encoder, run.identity)


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        torch.manual_seed(distributed.fold(settings.seed))  # the same detector on every rank
        train, val = scenes(settings, "train"), scenes(settings, "val")
        if train.classes != val.classes:
            raise DataError(f"data={settings.data.name}: the classes of the two splits differ")
        model = build(settings, len(train.classes)).to(distributed.device())
        batchnorm.synced(model)
        optimizer = optim.sgd(
            groups(model, settings.weight_decay),
            lr=settings.peak_lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        accumulate, prepare, learnable = settings.accum_iter or 1, Prepare(settings, model), Learnable(train)

        def batches(number: int, seed: int) -> Any:
            return streamed(
                learnable,
                Shorter(settings.min_sizes, settings.max_size, settings.hflip),
                settings.batch_size,
                number,
                seed=seed,
                rank=distributed.rank(),
                world=distributed.world_size(),
                fold=distributed.fold,
                workers=settings.env.workers,
            )

        finished = fit(
            distributed.wrap(model),
            batches(settings.iterations * accumulate, settings.seed),
            optimizer,
            epochs=1 if settings.iterations else 0,
            most=settings.smoke,
            schedules=schedules(settings),
            checkpoint=Checkpoint(run.folder / rundir.CHECKPOINT, run.journal, model=model, optimizer=optimizer),
            prepare=prepare,
            track=run.track,
            stop=run.stop,
            seed=settings.seed,
            accumulate=accumulate,
            amp=settings.amp,
            clip=settings.clip_grad,
            log_every=settings.log_every,
            checkpoint_minutes=settings.checkpoint_minutes,
        )
        if not finished:
            return
        if settings.precise_bn:
            model.train()

            def see(number: int, samples: Any) -> None:
                distributed.seed(settings.seed, settings.iterations + number)
                model(prepare(samples))

            number = min(settings.precise_bn, settings.smoke or settings.precise_bn)
            more = batches(number, distributed.fold(settings.seed, settings.iterations))
            if not batchnorm.precise(model, more, see, run.stop):
                return
        found = find(model, val, settings, prepare, run.stop)
        if found is None:
            return
        metrics: dict[str, float] = {}
        if distributed.rank() == 0:
            expected = truths(val, settings.masks)
            results = measured(settings, val, expected, found)
            for name, each in results.items():
                metrics |= {f"detection/{name}{key}": value for key, value in each.figures.items()}
            tell(run, val, expected, found, results)
        metrics = distributed.from_first(metrics)
        done = min(settings.iterations, settings.smoke or settings.iterations)
        run.track(done, done, metrics)
        save(run, model, train.classes)
        run.finish(metrics, done)


if __name__ == "__main__":
    main()
