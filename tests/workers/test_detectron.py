"""What is told to Detectron2, which is not installed here: every published override, and the way in and out."""

from __future__ import annotations

import importlib.util

import pytest

import contract.settings
from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.main_detectron import Settings
from workers import main_detectron, models
from workers.engine.encoder import save_encoder
from workers.interop import detectron_names

COMMON = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 200,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.WARMUP_FACTOR": 1e-3,
    "TEST.EVAL_PERIOD": 0,
}
VOC = {
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
    "DATASETS.TRAIN": ("sightline_voc_2007_trainval", "sightline_voc_2012_trainval"),
    "DATASETS.TEST": ("sightline_voc_2007_test",),
    "SOLVER.STEPS": (18000, 22000),
    "SOLVER.MAX_ITER": 24000,
    "SOLVER.WARMUP_ITERS": 100,
}
COCO = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "INPUT.MIN_SIZE_TRAIN": tuple(range(640, 801, 32)),
    "DATASETS.TRAIN": ("sightline_coco_train2017",),
    "DATASETS.TEST": ("sightline_coco_val2017",),
    "SOLVER.STEPS": (60000, 80000),
    "SOLVER.MAX_ITER": 90000,
    "SOLVER.WARMUP_ITERS": 1000,
}


@pytest.mark.parametrize(("recipe", "expected"), [("voc", VOC), ("coco", COCO)])
def test_every_published_override_is_told(recipe, expected, tmp_path):
    from tests.workers.test_moco_configs import settings

    said = settings("worker=main_detectron", f"recipe=detectron_{recipe}", "encoder=e")
    network = models.build("resnet", {"arch": "resnet50"})
    network.mean, network.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    named = detectron_names.named(network).model
    told = main_detectron.configuration(said, named, tmp_path / "detectron2.pkl", tmp_path)
    for key, value in {**COMMON, **expected}.items():
        assert told[key] == value, key
    assert told["MODEL.WEIGHTS"] == str(tmp_path / "detectron2.pkl")


@pytest.mark.parametrize("worker", ["detection", "detectron"])
def test_both_workers_have_the_same_recipes(worker):
    from tests.workers.test_moco_configs import settings

    for recipe, steps in (("voc", [18000, 22000]), ("coco", [60000, 80000])):
        said = settings(f"worker=main_{worker}", f"recipe={worker}_{recipe}", "encoder=e")
        assert (said.milestones, said.peak_lr, said.effective_batch_size) == (steps, 0.02, 16)
        assert (said.data.name, said.masks, said.precise_bn) == (recipe, recipe == "coco", 200)
        if worker == "detection":
            assert (said.arch, said.head, said.extra_norm, said.rois, said.roi_size) == (
                "resnet50",
                "c4",
                True,
                512,
                14,
            )
            assert (said.anchor_sizes, said.proposals, said.hflip) == ([32, 64, 128, 256, 512], 1000, 0.5)


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is not None, reason="Detectron2 is installed")
def test_without_detectron2_one_line_says_how_to_get_it(tmp_path, make_run, work):
    save_encoder(tmp_path, models.build("resnet", {"arch": "resnet50"}), "abcd")
    run = make_run(
        tmp_path / "r",
        worker="main_detectron",
        encoder=str(tmp_path),
        data={"name": "voc", "classes": 20},
        batch_size=16,
    )
    done = work(run)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert "error: worker=main_detectron: Detectron2 is not installed; python -m pip install" in last
    assert "worker=main_detection, which does not need it" in last


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"data": {"name": "digits_on_photos"}},
            "Detectron2 reads data=voc and data=coco; worker=main_det",
        ),
        ({"amp": "bf16"}, "amp=bf16: Detectron2's own is fp16; choose none"),
        ({"clip_grad": 1.0}, "clip_grad=1.0: the published runs clip nothing"),
        ({"norm": "GN"}, "norm=GN: unknown"),
    ],
)
def test_what_detectron2_is_not_asked_for_is_refused_in_one_line(values, line):
    with pytest.raises(SettingsError, match=line) as caught:
        contract.settings.read({"worker": "main_detectron", "encoder": "e", **values})
    assert "\n" not in str(caught.value)


def test_pictures_that_do_not_make_the_published_batch_are_refused():
    with pytest.raises(SettingsError, match="effective_batch_size=16: Detectron2 does not accumulate; with 4"):
        Settings(worker="main_detectron", encoder="e").resolve_batch(4)
    said = Settings(worker="main_detectron", encoder="e", batch_size=4)
    said.resolve_batch(4)
    assert said.effective_batch_size == 16


def test_results_become_metrics():
    found = main_detectron.figures(
        {"bbox": {"AP": 57.0, "AP50": 82.4, "AP75": 63.6, "APs": 1.0}, "segm": {"AP": 34.0, "AP50": 55.2, "AP75": 36.2}}
    )
    assert found == pytest.approx(
        {
            "detection/AP": 0.57, "detection/AP50": 0.824, "detection/AP75": 0.636,
            "detection/mask_AP": 0.34, "detection/mask_AP50": 0.552, "detection/mask_AP75": 0.362,
        }
    )  # fmt: skip
    latest = {"total_loss": (2.0, 5), "loss_cls": (1.5, 5), "lr": (0.01, 5), "data_time": (0.1, 5)}
    assert main_detectron.scalars(latest) == {"train/loss": 2.0, "train/loss_cls": 1.5, "train/lr": 0.01}
    assert main_detectron.figures({}) == {}


def test_lines_beyond_the_checkpoint_are_forgotten(tmp_path):
    journal = rundir.Journal(tmp_path / rundir.METRICS)
    for step in (20, 40, 60):
        journal.append({"step": step, "train/loss": 1 / step})
    main_detectron.rewind(journal, 45)
    assert [line["step"] for line in rundir.read_journal(journal.path)[0]] == [20, 40]
    main_detectron.rewind(journal, 45)
    assert [line["step"] for line in rundir.read_journal(journal.path)[0]] == [20, 40]
    main_detectron.rewind(journal, 0)
    assert rundir.read_journal(journal.path)[0] == []
    main_detectron.rewind(None, 0)
