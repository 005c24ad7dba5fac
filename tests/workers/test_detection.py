"""Fine-tuning for detection: it learns, it survives, and what it is told is checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import contract.settings
from contract import rundir
from contract.settings.checks import SettingsError
from tests.workers.test_killed import curve, kill_tree, wait_for
from workers import main_detection, models
from workers.boxes import measure
from workers.boxes.rcnn import Batch, Detector, cut_out, padded, pasted
from workers.data import DataError, digits_on_photos
from workers.data.digits_on_photos import write_coco, write_voc
from workers.engine import batchnorm, optim
from workers.engine.encoder import EncoderError, load_encoder, save_encoder
from workers.main_detection import DETECTOR, Prepare, Settings
from workers.transforms.objects import Shorter


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """A few pictures in both layouts."""
    root = tmp_path_factory.mktemp("scenes")
    for split, number, part, name in (("train", 12, "trainval", "train2017"), ("val", 7, "test", "val2017")):
        made = digits_on_photos.load(split, number=number)
        write_voc(made, root, part)
        write_coco(made, root, name)
    return root


@pytest.fixture
def small(layouts):
    """A run of seconds: nothing is learned in it."""
    return {
        "worker": "main_detection",
        "data": {"name": "coco", "classes": 10},
        "data_path": str(layouts),
        "iterations": 6,
        "milestones": [4],
        "warmup_iterations": 2,
        "batch_size": 2,
        "min_sizes": [64, 80],
        "test_size": 64,
        "rois": 8,
        "roi_size": 4,
        "proposals": 20,
        "precise_bn": 2,
        "hflip": 0.5,
        "log_every": 2,
    }


@pytest.fixture
def run_here(tmp_path, make_run, monkeypatch):
    """``run_here("name", **settings)``: a run of the worker in this process. Returns its folder."""
    monkeypatch.setattr("workers.engine.run._start_log", lambda: None)

    def run(name: str, **values) -> Path:
        folder = tmp_path / "runs" / name
        if not folder.exists():
            make_run(folder, **values)
        monkeypatch.setattr(sys, "argv", ["worker", str(folder)])
        main_detection.main()
        return folder

    return run


def ended(folder: Path) -> dict[str, float]:
    return json.loads((folder / rundir.DONE).read_text())["metrics"]


def settings(**values) -> Settings:
    found = contract.settings.read({"worker": "main_detection", "data": {"name": "digits_on_photos"}, **values})
    assert isinstance(found, Settings)
    found.resolve_batch(1)
    return found


# -- it learns ---------------------------------------------------------------------------------------------------------


def test_a_small_backbone_overfits_a_few_pictures():
    """From nothing, in a few hundred iterations, boxes to an AP50 above 0.5."""
    said = settings(iterations=200, milestones=[160], batch_size=4, lr=0.03, warmup_iterations=20, rois=16,
                    min_sizes=[96], test_size=96, anchor_sizes=[16, 24, 32, 48], roi_size=8)  # fmt: skip
    scenes = digits_on_photos.load("train", number=8)
    torch.manual_seed(0)
    model, rate = main_detection.build(said, 10), main_detection.schedules(said)["lr"]
    prepare = Prepare(said, model)
    optimizer = optim.sgd(main_detection.groups(model, said.weight_decay), lr=0.03, momentum=0.9, weight_decay=0)
    for iteration, samples in enumerate(stream(said, scenes)):
        for group in optimizer.param_groups:
            group["lr"] = rate(iteration / said.iterations)
        model(prepare(samples))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    found = main_detection.find(model, scenes, said, prepare, lambda: False)
    assert found is not None
    expected = main_detection.truths(scenes, masks=False)
    assert measure.coco(expected, found, 10).figures["AP50"] > 0.5
    assert measure.voc(expected, found, 10, eleven_points=True).figures["AP50"] > 0.5


def stream(said: Settings, scenes):
    from workers.data.scenes import Learnable, streamed
    from workers.engine.distributed import fold

    transform = Shorter(said.min_sizes, said.max_size, said.hflip)
    return streamed(Learnable(scenes), transform, said.batch_size, said.iterations, seed=0, rank=0, world=1, fold=fold)


@pytest.mark.parametrize(("head", "masks", "amp"), [("c4", True, "none"), ("fpn", True, "bf16")])
def test_every_weight_learns_and_everything_is_measured_and_drawn(run_here, small, head, masks, amp):
    more = {"anchor_sizes": [8, 16, 24, 32, 48]}
    folder = run_here("r", **small, **more, head=head, masks=masks, amp=amp, encoder="new:resnet10_slim")
    metrics = ended(folder)
    assert set(metrics) == {f"detection/{kind}{name}" for kind in ("", "mask_") for name in ("AP", "AP50", "AP75")}
    assert all(0 <= value <= 1 for value in metrics.values())
    names = {"detections.png", "precision_recall.png", "mask_precision_recall.png"}
    assert {p.name for p in (folder / rundir.FIGURES).iterdir()} == names
    lines = (folder / rundir.TABLES / "classes.csv").read_text().splitlines()
    assert len(lines) == 11
    assert sum(int(line.split(",")[1]) for line in lines[1:]) == len(digits_on_photos.load("val", number=7).rows)
    losses = {name for line in curve(folder) for name in line if name.startswith("train/loss")}
    assert losses == {f"train/loss{n}" for n in ("", "_object", "_proposal", "_class", "_box", "_mask")}
    saved = torch.load(folder / DETECTOR, weights_only=True)["state"]
    torch.manual_seed(main_detection.distributed.fold(0))
    first = main_detection.build(settings(**{**small, **more}, head=head, masks=masks), 10).state_dict()
    same = [name for name, value in first.items() if value.is_floating_point() and torch.equal(value, saved[name])]
    assert not [name for name in same if not name.endswith("bias")]  # a ReLU that nothing passes has no gradient
    encoder = load_encoder(str(folder)).cpu().state_dict()
    assert torch.equal(encoder["layer4.0.conv1.weight"], saved["encoder.layer4.0.conv1.weight"])


def test_vocs_layout_is_measured_by_vocs_rule(run_here, small, caplog):
    said = {**small, "data": {"name": "voc", "classes": 0}, "train_sets": ["2007_trainval", "2007_test"]}
    with caplog.at_level("INFO"):
        run_here("r", **said, encoder="new:resnet10_slim")
    assert "measured by the rule voc07" in caplog.text


# -- what it is made of ------------------------------------------------------------------------------------------------


def detector(head: str = "c4", **more) -> Detector:
    encoder = models.build("resnet", {"arch": "resnet10_slim"})
    return Detector(encoder, 3, head=head, anchors=[16, 32, 64, 128, 256], rois=8, **more)


def test_the_extra_norm_stands_behind_the_fourth_stage_which_is_there_once():
    names = set(detector().state_dict())
    assert "heads.box_head.norm.weight" in names
    assert not [name for name in names if name.startswith("heads.") and "layer4" in name]
    assert "heads.box_head.norm.weight" not in detector(extra_norm=False).state_dict()
    model = detector()
    pooled = torch.randn(5, 64, 8, 8)
    expected = model.heads.box_head.norm(model.encoder.layer4(pooled))
    model = model.eval()
    torch.testing.assert_close(model.heads.box_head(pooled), model.heads.box_head.norm(model.encoder.layer4(pooled)))
    assert expected.shape == (5, 128, 4, 4)


def test_pictures_are_padded_with_zeros_at_the_right_and_the_bottom():
    batch, sizes = padded([torch.ones(3, 40, 70), torch.ones(3, 64, 33)])
    assert batch.shape == (2, 3, 64, 96)
    assert sizes == [(40, 70), (64, 33)]
    assert batch[0].sum() == 3 * 40 * 70
    assert batch[1, :, 64:].numel() == 0
    assert batch[1, :, :, 33:].sum() == 0


def test_a_picture_without_objects_teaches_that_there_is_nothing():
    model = detector(masks=True).train()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    nothing |= {"masks": torch.zeros(0, 64, 64, dtype=torch.uint8), "scale": torch.ones(4)}
    losses = model(Batch(torch.randn(1, 3, 64, 64), [(64, 64)], [nothing]))
    assert losses["loss"].isfinite()
    assert losses["loss_box"] == losses["loss_proposal"] == losses["loss_mask"] == 0
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_what_masks_are_to_be_learned_is_what_would_be_pasted_back(hflip):
    """From the file's pixels to a mask in its box and back, also where the picture is resized and mirrored."""
    scenes = digits_on_photos.load("val", number=4)
    said = settings(masks=True)
    prepare = Prepare(said, main_detection.build(said, 10))
    for index in range(len(scenes)):
        scene, _ = scenes[index]
        seen = Shorter([200], 300, hflip)(scene)
        (target,) = prepare([(seen, 0, index)]).targets
        boxes = target["boxes"] * target["scale"]
        inside = cut_out(target["masks"], boxes, torch.arange(len(boxes)), 56)
        back = torch.stack([pasted(*each, seen.size) >= 0.5 for each in zip(inside[:, None], boxes, strict=True)])
        truth = target["masks"] > 0
        shared = (back & truth).flatten(1).sum(1) / (back | truth).flatten(1).sum(1)
        assert (shared > 0.9).all()
        expected = scene[1].masks.flip(-1) if hflip else scene[1].masks
        assert torch.equal(target["masks"], expected)


def test_norms_do_not_decay():
    model = detector()
    decayed, free = main_detection.groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    norms = sum(2 for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d))
    assert len(free["params"]) == norms
    assert len(decayed["params"]) + norms == len(list(model.parameters()))


def test_the_published_schedule():
    rate = {
        n: optim.stepped(n, peak=0.02, warmup=100, start=1e-3, milestones=[18000, 22000])
        for n in (0, 50, 100, 17999, 18000, 21999, 22000, 23999)
    }
    assert rate == pytest.approx(
        {0: 2e-5, 50: 0.01001, 100: 0.02, 17999: 0.02, 18000: 2e-3, 21999: 2e-3, 22000: 2e-4, 23999: 2e-4}
    )


def test_precise_statistics_are_those_of_all_batches():
    torch.manual_seed(0)
    layer, batches = torch.nn.BatchNorm2d(3), [2 + 3 * torch.randn(8, 3, 4, 4) for _ in range(5)]
    assert batchnorm.precise(layer, batches, lambda _, x: layer(x), lambda: False)
    whole = torch.cat(batches)
    torch.testing.assert_close(layer.running_mean, whole.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, whole.var((0, 2, 3)), rtol=1e-2, atol=1e-2)
    assert layer.momentum == 0.1
    assert not batchnorm.precise(layer, batches * 4, lambda _, x: layer(x), lambda: True)


# -- killed, stopped, several processes --------------------------------------------------------------------------------


def test_a_run_on_two_processes_that_was_killed_ends_with_the_same_bytes(tmp_path, make_run, work, start, small):
    small |= {"checkpoint_minutes": 0.0, "masks": True, "env": {"nproc": 2}}
    whole = make_run(tmp_path / "whole" / "r", **small)
    done = work(whole, 2)
    assert done.returncode == 0, done.stdout + done.stderr

    killed = make_run(tmp_path / "killed" / "r", **small)
    process = start(killed, 2)
    wait_for(lambda: len(curve(killed)) >= 2 or process.poll() is not None)
    if process.poll() is None:
        kill_tree(process.pid)
    process.wait()
    done = work(killed, 2)
    assert done.returncode == 0, done.stdout + done.stderr

    for name in (rundir.ENCODER, DETECTOR):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert curve(killed) == curve(whole)
    assert ended(killed) == ended(whole)


def test_a_run_that_is_stopped_while_it_trains_or_measures_ends_as_the_whole_one(
    run_here, make_run, tmp_path, small, monkeypatch
):
    monkeypatch.setattr(main_detection, "LOOK_EVERY", 2)
    whole = run_here("whole/r", **small)
    stopped = make_run(tmp_path / "runs" / "stopped" / "r", **small)
    (stopped / rundir.STOP).touch()
    run_here("stopped/r")
    assert (stopped / rundir.CHECKPOINT).exists()
    assert not (stopped / rundir.DONE).exists()
    (stopped / rundir.STOP).unlink()

    detect, seen = main_detection.detect, []

    def noticed(*said):
        seen.append(said)
        if len(seen) == 3:  # a few pictures are measured
            (stopped / rundir.STOP).touch()
        return detect(*said)

    monkeypatch.setattr(main_detection, "detect", noticed)
    run_here("stopped/r")
    assert len(seen) == 4
    assert not (stopped / rundir.DONE).exists()
    (stopped / rundir.STOP).unlink()
    monkeypatch.setattr(main_detection, "detect", detect)
    run_here("stopped/r")
    assert curve(stopped) == curve(whole)
    assert ended(stopped) == ended(whole)
    assert (stopped / DETECTOR).read_bytes() == (whole / DETECTOR).read_bytes()


TOGETHER = """
import sys, torch
from workers.engine import batchnorm, distributed
with distributed.process_group():
    torch.manual_seed(0)
    alone = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    torch.nn.init.normal_(alone.weight), torch.nn.init.normal_(alone.bias)
    both = torch.nn.Sequential(torch.nn.BatchNorm2d(3, dtype=torch.float64))
    both[0].load_state_dict(alone.state_dict())
    both = batchnorm.synced(both).double()
    assert type(both[0]).__name__ == "SyncedBatchNorm2d"
    x = torch.randn(7, 3, 4, 5, dtype=torch.float64)
    mine = x[:5] if distributed.rank() == 0 else x[5:]
    a, b = x.clone().requires_grad_(), mine.clone().requires_grad_()
    alone(a).square().mul(torch.arange(5)).sum().backward()
    both(b).square().mul(torch.arange(5)).sum().backward()
    part = a.grad[:5] if distributed.rank() == 0 else a.grad[5:]
    torch.testing.assert_close(b.grad, part)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(both[0].state_dict()[name], value)
    torch.testing.assert_close(distributed.total(both[0].weight.grad), alone.weight.grad)
    print("same")
"""


def test_batchnorm_over_two_processes_of_unequal_batches_is_that_of_one(tmp_path):
    import subprocess

    from tests.workers.conftest import environment

    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=120, check=False)
    assert done.stdout.count("same") == 2, done.stdout + done.stderr


VIT = {"dim": 24, "depth": 1, "heads": 2, "patch_size": 8, "grid_size": 4}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"data": {"name": "digits"}}, "data=digits: main_detection takes pictures with boxes: coco, digits_on_photos"),
        (
            {"worker": "main_knn", "encoder": "e"},
            "data=digits_on_photos: main_knn takes pictures with labels",
        ),
        (
            {"worker": "main_knn", "data": {}, "encoder": "new:resnet18"},
            "encoder=new:resnet18: for detection only; else",
        ),
        ({"data": {"name": "voc"}, "masks": True}, "masks=true: data=voc has boxes only; choose data=coco"),
        ({"data": {"name": "voc"}, "val_sets": ["test"]}, "val_sets=test: VOC's sets are named YEAR_SET, such as"),
        ({"train_sets": ["../x"]}, r"train_sets=\.\./x: no name of a set"),
        ({"milestones": [5, 4]}, r"milestones=\[5, 4\]: expected iterations from 1 in rising order"),
        ({"min_sizes": []}, r"min_sizes=\[\]: expected sizes in pixels"),
        ({"head": "fpn", "anchor_sizes": [32]}, r"anchor_sizes=\[32\]: head=fpn has five maps, and one size for each"),
        ({"arch": "resnet50"}, "encoder=new:resnet10_slim: but arch=resnet50; give a run or a file, or new:resnet50"),
        ({"anchor_sizes": [0]}, r"anchor_sizes=\[0\]: expected sizes in pixels"),
        (
            {"data": {"name": "coco", "on_error": "skip"}},
            "data.on_error=skip: detections are measured on every",
        ),
        ({"warmup_factor": 0}, "warmup_factor=0.0: must be above 0"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(values, line):
    with pytest.raises(SettingsError, match=line) as caught:
        contract.settings.read({"worker": "main_detection", "data": {"name": "digits_on_photos"}, **values})
    assert "\n" not in str(caught.value)


def test_an_encoder_of_another_depth_or_kind_is_one_line(tmp_path):
    save_encoder(tmp_path, models.build("resnet", {"arch": "resnet10"}), "abcd")
    with pytest.raises(EncoderError, match="a resnet10, but arch=resnet50"):
        main_detection.build(settings(encoder=str(tmp_path), arch="resnet50"), 10)
    save_encoder(tmp_path, models.build("vit", VIT), "a")
    with pytest.raises(EncoderError, match="a vit; detection takes residual networks"):
        main_detection.build(settings(encoder=str(tmp_path)), 10)


def test_classes_that_are_not_as_many_as_said_are_one_line(layouts):
    with pytest.raises(DataError, match=r"data.classes=80: coco train has 10 classes; data.classes=0 takes"):
        main_detection.scenes(settings(data={"name": "coco", "classes": 80}, data_path=str(layouts)), "train")


def test_missing_pictures_end_a_run_with_one_line_before_it_trains(run_here, tmp_path, small, caplog):
    with pytest.raises(SystemExit):
        run_here("r", **{**small, "data_path": str(tmp_path)})
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "instances_train2017.json: No such file or directory; expected COCO's annotations" in error
    assert "\n" not in error
    assert not (tmp_path / "runs" / "r" / rundir.CHECKPOINT).exists()


def test_several_ranks_find_what_one_finds(small):
    """Every rank has its own pictures; put together they are in the order of one."""
    said = settings(**small, masks=True)
    val = main_detection.scenes(said, "val")
    rows = [(2.0, 0, 0, 4, 4, 0.9, 1), (0.0, 1, 1, 5, 5, 0.8, 2), (2.0, 1, 1, 6, 6, 0.7, 0)]
    found = main_detection.together(rows, [b"a", b"bc", b"d"], val)
    assert found.pictures.tolist() == [0, 2, 2]
    assert found.labels.tolist() == [2, 1, 0]
    assert [each["counts"] for each in found.masks] == [b"bc", b"a", b"d"]
    none = main_detection.together([], [], val)
    assert len(none.pictures) == len(none.masks) == 0
    assert none.boxes.shape == (0, 4)
    assert np.isfinite(none.boxes).all()
