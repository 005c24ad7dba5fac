"""Fine-tuning for detection by Detectron2 itself, where it is installed. Not run on hardware.

The head is its C4 with one more norm behind the fourth stage (He et al., CVPR 2020, appendix A.3), the configuration
that of MoCo's and MixMask's programs. ``detection/AP``, ``AP50``, ``AP75`` and for masks ``detection/mask_AP`` and so
on are its own evaluators', as fractions. A run that was stopped or killed goes on from the last of two checkpoints in
``detectron2/``; Detectron2 then draws other pictures, so that it does not end with the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from contract import rundir
from contract.settings.main_detectron import Settings
from workers.data import DataError, coco, voc
from workers.engine import detectron, distributed
from workers.engine.encoder import EncoderError, load_encoder
from workers.engine.fit import Pace
from workers.engine.run import Run, open_run

log = logging.getLogger(__name__)

FOLDER = "detectron2"  # of its checkpoints and results
HOW = (
    "worker=main_detectron: Detectron2 is not installed; python -m pip install --no-build-isolation "
    "'git+https://github.com/facebookresearch/detectron2.git' on a machine with a CUDA compiler, or "
    "worker=main_detection, which does not need it"
)
KINDS = {"bbox": "", "segm": "mask_"}  # its names of what it measures, and what stands before ours
HEADS = "Res5ROIHeadsExtraNorm"


class Stopped(Exception):
    """Asked to save and leave, which was done."""


def installed() -> None:
    """Raises EncoderError, saying how to get it, where there is no Detectron2."""
    try:
        import detectron2  # noqa: F401
    except ImportError:
        raise EncoderError(HOW) from None


def configuration(settings: Settings, model: dict[str, Any], weights: Path, folder: Path) -> dict[str, Any]:
    """Every key that differs from Detectron2's defaults, or that the published runs rely on. ``model`` is what the
    encoder needs."""
    s = settings
    train, val = names(s, "train"), names(s, "val")
    return {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.WEIGHTS": str(weights),
        "MODEL.MASK_ON": s.masks,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.NAME": HEADS,
        "MODEL.ROI_HEADS.NUM_CLASSES": s.data.classes,
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.NORM": s.norm,
        **{key: value for key, value in model.items() if key.startswith("MODEL.RESNETS.")},
        "MODEL.PIXEL_MEAN": model.get("MODEL.PIXEL_MEAN", [round(255 * v, 3) for v in s.data.mean]),
        "MODEL.PIXEL_STD": model.get("MODEL.PIXEL_STD", [round(255 * v, 3) for v in s.data.std]),
        "INPUT.FORMAT": "RGB",
        "INPUT.MIN_SIZE_TRAIN": tuple(s.min_sizes),
        "INPUT.MIN_SIZE_TEST": s.test_size,
        "INPUT.MAX_SIZE_TRAIN": s.max_size,
        "INPUT.MAX_SIZE_TEST": s.max_size,
        "DATASETS.TRAIN": tuple(train),
        "DATASETS.TEST": tuple(val),
        "DATALOADER.NUM_WORKERS": s.env.workers,
        "SOLVER.IMS_PER_BATCH": s.effective_batch_size,
        "SOLVER.BASE_LR": s.peak_lr,
        "SOLVER.MOMENTUM": s.momentum,
        "SOLVER.WEIGHT_DECAY": s.weight_decay,
        "SOLVER.WEIGHT_DECAY_NORM": 0.0,
        "SOLVER.STEPS": tuple(s.milestones),
        "SOLVER.MAX_ITER": min(s.iterations, s.smoke or s.iterations),
        "SOLVER.WARMUP_ITERS": s.warmup_iterations,
        "SOLVER.WARMUP_FACTOR": s.warmup_factor,
        "SOLVER.CHECKPOINT_PERIOD": s.iterations + 1,  # ours, by time; its own after the last iteration
        "SOLVER.AMP.ENABLED": s.amp == "fp16",
        "TEST.EVAL_PERIOD": 0,  # after the last iteration only
        "TEST.PRECISE_BN.ENABLED": s.precise_bn > 0,
        "TEST.PRECISE_BN.NUM_ITER": max(s.precise_bn, 1),
        "OUTPUT_DIR": str(folder),
        "SEED": s.seed,
    }


def names(settings: Settings, split: str) -> list[str]:
    """The sets as we register them with Detectron2, which has names like these of its own."""
    sets = settings.train_sets if split == "train" else settings.val_sets
    known: dict[str, list[str]] = dict(voc.SETS if settings.data.name == "voc" else coco.SETS)  # type: ignore[arg-type]
    return [f"sightline_{settings.data.name}_{each}" for each in sets or known[split]]


def register(settings: Settings) -> None:
    """Tell Detectron2 where the pictures and annotations are. Raises DataError where they are not."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances, register_pascal_voc

    if settings.data_path is None:
        raise DataError(
            f"data={settings.data.name}: needs data_path=ROOT, with {(voc, coco)[_is_coco(settings)].LAYOUT}"
        )
    root = Path(settings.data_path)
    root = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    for name in {*names(settings, "train"), *names(settings, "val")} - set(DatasetCatalog.list()):
        part = name.removeprefix(f"sightline_{settings.data.name}_")
        if _is_coco(settings):
            path = root / "annotations" / f"instances_{part}.json"
            _there(path)
            register_coco_instances(name, {}, str(path), str(root / part))
        else:
            year, _, part = part.partition("_")
            folder = root / f"VOC{year}"
            _there(folder / "ImageSets" / "Main" / f"{part}.txt")
            register_pascal_voc(name, str(folder), part, int(year))


def _is_coco(settings: Settings) -> bool:
    return settings.data.name == "coco"


def _there(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file; data_path is the folder with {voc.LAYOUT}, or {coco.LAYOUT}")


def rewind(journal: rundir.Journal | None, step: int) -> None:
    """Forget the lines of metrics.jsonl beyond ``step``, where the checkpoint goes on."""
    if journal is None:
        return
    offset = 0
    for line in journal.path.read_bytes().splitlines(keepends=True):
        if int(json.loads(line)["step"]) > step:
            break
        offset += len(line)
    journal.cut(offset)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Detectron2's results, in per cent by kind -> our metrics."""
    return {
        f"detection/{before}{key}": float(results[kind][key]) / 100
        for kind, before in KINDS.items()
        if kind in results
        for key in ("AP", "AP50", "AP75")
    }


def scalars(latest: dict[str, tuple[float, int]]) -> dict[str, float]:
    """What Detectron2's storage holds of the last step -> our metrics."""
    found = {name: value for name, (value, _) in latest.items() if name.startswith("loss") or name == "lr"}
    if "total_loss" in latest:
        found = {"loss": latest["total_loss"][0], **found}
    return {f"train/{name}": float(value) for name, value in found.items()}


def trainer(run: Run[Settings], cfg: Any) -> Any:
    """Detectron2's own, with the evaluators and the head of the published program, and one hook of ours."""
    from detectron2.engine import DefaultTrainer, HookBase
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
    from detectron2.layers import get_norm
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

    settings = run.settings

    if HEADS not in ROI_HEADS_REGISTRY:

        class ExtraNorm(Res5ROIHeads):  # type: ignore[misc]
            def __init__(self, cfg: Any, input_shape: Any):
                super().__init__(cfg, input_shape)
                self.res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, self.res5[-1].out_channels))

        ExtraNorm.__name__ = HEADS  # by which it is registered
        ROI_HEADS_REGISTRY.register(ExtraNorm)

    class Trainer(DefaultTrainer):  # type: ignore[misc]
        @classmethod
        def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> Any:
            if _is_coco(settings):
                return COCOEvaluator(dataset_name, output_dir=output_folder or f"{cfg.OUTPUT_DIR}/inference")
            return PascalVOCDetectionEvaluator(dataset_name)

    class Watch(HookBase):  # type: ignore[misc]
        """Lines of metrics.jsonl, a checkpoint from time to time, and an ear for the supervisor."""

        def before_train(self) -> None:
            self.pace, self.turn = Pace(self.trainer.iter, settings.checkpoint_minutes), 0

        def after_step(self) -> None:
            done, of = self.trainer.iter + 1, self.trainer.max_iter
            if done % settings.log_every == 0 and run.journal is not None:
                run.track(done, of, scalars(self.trainer.storage.latest()))
            if self.pace.due(done) and done < of:  # after the last one Detectron2 saves by itself
                stopping, saving = self.pace.look(done, run.stop(), -1)
                if stopping or saving:
                    self.save()
                if stopping:
                    raise Stopped

        def save(self) -> None:
            """By turns under two names: the file that ``last_checkpoint`` names is whole at any time."""
            began = time.monotonic()
            self.turn = 1 - self.turn
            last = self.trainer.checkpointer.get_checkpoint_file() if self.trainer.checkpointer.has_checkpoint() else ""
            name = f"model_{self.turn}"
            if Path(last).stem == name:
                self.turn = 1 - self.turn
                name = f"model_{self.turn}"
            self.trainer.checkpointer.save(name, iteration=self.trainer.iter)
            self.pace.saved()
            if distributed.rank() == 0:
                seconds = {"seconds": round(time.monotonic() - began, 3)}
                rundir.write_json(run.folder / rundir.SAVED, seconds, sync=False)

    found = Trainer(cfg)
    found.register_hooks([Watch()])
    return found


def configured(settings: Settings, model: dict[str, Any], weights: Path, folder: Path) -> Any:
    """Detectron2's configuration, frozen."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_list([part for pair in configuration(settings, model, weights, folder).items() for part in pair])
    if distributed.device().type == "cpu":
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def join_group() -> None:
    """Detectron2 wants to know which processes share a machine; torchrun says how many."""
    from detectron2.utils import comm

    if "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ:
        if not hasattr(comm, "create_local_process_group"):
            raise EncoderError("worker=main_detectron: this Detectron2 is from before 2022; install a later one")
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def main() -> None:
    with open_run(Settings) as run:
        installed()
        from detectron2.utils.env import seed_all_rng

        settings = run.settings
        torch.manual_seed(distributed.fold(settings.seed))  # for an encoder that was never trained
        encoder = load_encoder(settings.encoder)
        model = detectron.write(run.folder, encoder) if distributed.rank() == 0 else detectron.named(encoder)
        if int(model.model.get("MODEL.RESNETS.DEPTH", 0)) < 50:
            raise EncoderError(
                f"encoder={settings.encoder}: Detectron2's C4 takes ResNets of bottlenecks: resnet50, ..."
            )
        distributed.barrier()  # nobody reads the file before it is there
        join_group()
        register(settings)
        folder = run.folder / FOLDER
        folder.mkdir(exist_ok=True)
        cfg = configured(settings, model.model, run.folder / detectron.FILE, folder)
        seed_all_rng(distributed.fold(settings.seed, distributed.rank()) & 0x7FFFFFFF)
        training = trainer(run, cfg)
        training.resume_or_load(resume=settings.resume)
        rewind(run.journal, training.start_iter)
        try:
            training.train()
        except Stopped:
            return
        results = figures(distributed.from_first(getattr(training, "_last_eval_results", None)) or {})
        if not results:
            raise EncoderError("worker=main_detectron: Detectron2 gave no results; its own log says why")
        run.track(settings.iterations, settings.iterations, results)
        run.finish(results, settings.iterations)


if __name__ == "__main__":
    main()
