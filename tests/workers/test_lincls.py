"""Linear classification and fine-tuning of ResNets, and MoCo's checkpoints."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

import contract.settings
from contract import rundir
from contract.settings.checks import SettingsError
from workers import main_lincls, models
from workers.engine.encoder import EncoderError, load_encoder, save_encoder
from workers.main_lincls import CLASSIFIER, Classifier, check_frozen, copied

COMMON = {
    "worker": "main_lincls",
    "data": {"name": "fake", "size": 16, "length": 96, "classes": 4},
    "epochs": 2,
    "batch_size": 16,
    "blr": 1.0,
    "milestones": [1],
    "log_every": 1,
}
TUNED = {"freeze": False, "backbone_blr": 0.1, "schedule": "cosine"}


def resnet(seed: int = 1, arch: str = "resnet10") -> models.Encoder:
    torch.manual_seed(seed)
    return models.build("resnet", {"arch": arch, "stem": "imagenet", "image_size": 16})


@pytest.fixture
def encoder(tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    save_encoder(folder, resnet(), "from-a-test")
    return str(folder)


@pytest.fixture
def classify(tmp_path, make_run, monkeypatch, encoder):
    """``classify("name", key=value)``: a run of the worker in this process. Returns its folder."""
    monkeypatch.setattr("workers.engine.run._start_log", lambda: None)

    def run(name: str, **values) -> Path:
        folder = tmp_path / "runs" / name
        if not folder.exists():
            make_run(folder, **{**COMMON, "encoder": encoder, **values})
        monkeypatch.setattr(sys, "argv", ["worker", str(folder)])
        main_lincls.main()
        return folder

    return run


def ended(folder: Path) -> dict[str, float]:
    return json.loads((folder / rundir.DONE).read_text())["metrics"]


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / rundir.METRICS).read_text().splitlines()]
    return [{key: value for key, value in each.items() if key != "time"} for each in found]


def test_only_the_classifier_learns_and_only_it_is_saved(classify):
    folder = classify("r")
    metrics = ended(folder)
    assert metrics["lincls/best_top1"] >= metrics["lincls/top1"]
    assert metrics["lincls/best_top1"] == max(line.get("lincls/top1", 0) for line in lines(folder))
    assert not (folder / rundir.ENCODER).exists()
    assert set(torch.load(folder / rundir.CHECKPOINT, weights_only=True)["model"]) == {"fc.weight", "fc.bias"}
    saved = torch.load(folder / CLASSIFIER, weights_only=True)
    assert saved["state"]["weight"].shape == (4, 512)
    assert len(saved["classes"]) == 4
    rates = [line["train/lr"] for line in lines(folder) if "train/lr" in line]
    assert {round(rate, 9) for rate in rates} == {1 / 16, 0.1 / 16}


def test_a_frozen_encoder_that_changed_is_noticed(classify, monkeypatch):
    encoder = resnet()
    before = copied(encoder)
    check_frozen(encoder, before)
    encoder.bn1.running_mean[0] += 1e-3
    with pytest.raises(EncoderError, match=r"freeze=true, but 1 of \d+ tensors of the encoder changed, first bn1.run"):
        check_frozen(encoder, before)

    features = Classifier.features

    def drifting(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        self._frozen[0].train()  # what a call of train() on the whole would do
        return features(self, images)

    monkeypatch.setattr(Classifier, "features", drifting)
    with pytest.raises(SystemExit):
        classify("drift")


def test_training_mode_does_not_reach_the_frozen_encoder():
    model = Classifier(resnet().eval(), 4)
    model.train()
    (encoder,) = model._frozen
    assert not encoder.training
    model((torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64)))["loss"].backward()
    assert all(p.grad is None for p in encoder.parameters())


def test_the_whole_network_learns_at_a_rate_of_its_own_from_few_labels(classify, encoder):
    folder = classify("r", **TUNED, shots=8)
    tuned, first = (load_encoder(str(f)).state_dict() for f in (folder, encoder))
    assert not torch.equal(tuned["conv1.weight"], first["conv1.weight"])
    assert not torch.equal(tuned["bn1.running_mean"], first["bn1.running_mean"])
    groups = torch.load(folder / rundir.CHECKPOINT, weights_only=True)["optimizer"]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(groups[0]["lr"] * 0.1)
    assert json.loads((folder / rundir.DONE).read_text())["steps"] == 2 * (8 * 4 // 16)


@pytest.mark.parametrize("values", [{}, TUNED], ids=["frozen", "tuned"])
def test_a_stopped_run_ends_as_the_whole_one(classify, make_run, tmp_path, encoder, values):
    whole = classify("whole", **values)
    stopped = make_run(tmp_path / "runs" / "stopped", **{**COMMON, "encoder": encoder, **values})
    (stopped / rundir.STOP).touch()
    classify("stopped")
    assert not (stopped / rundir.DONE).exists()
    (stopped / rundir.STOP).unlink()
    classify("stopped")
    assert lines(stopped) == lines(whole)
    assert ended(stopped) == ended(whole)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"backbone_blr": 0.1}, "backbone_blr=0.1: with freeze=true nothing but the classifier learns"),
        ({"freeze": False}, "backbone_blr=null: with freeze=false say how fast"),
        ({"freeze": False, "backbone_blr": 0.1, "blr": 0}, "blr=0: the classifier must learn"),
        ({"milestones": [8, 6]}, r"milestones=\[8, 6\]: expected epochs from 1 in rising order"),
        ({"shots": 1, "fraction": 0.1}, "shots=1, fraction=0.1: give one of the two"),
        ({"fraction": 1.5}, "fraction=1.5: must lie in"),
        ({"min_crop": 0}, "min_crop=0.0: must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(values, line):
    with pytest.raises(SettingsError, match=line) as caught:
        contract.settings.read({**COMMON, "encoder": "e", **values})
    assert "\n" not in str(caught.value)


# -- MoCo's files ------------------------------------------------------------------------------------------------------


def published(network: models.Encoder, average: models.Encoder) -> dict:
    """A checkpoint as MoCo's program writes it."""
    state = {f"module.encoder_q.{k}": v for k, v in network.state_dict().items()}
    state |= {f"module.encoder_k.{k}": v for k, v in average.state_dict().items()}
    for layer in (0, 2):
        state |= {f"module.encoder_{n}.fc.{layer}.weight": torch.zeros(4, 4) for n in "qk"}
    state |= {"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize("arch", ["resnet10", "resnet50"])
def test_mocos_checkpoint_becomes_an_encoder(tmp_path, caplog, arch):
    network, average = resnet(1, arch), resnet(2, arch)
    path = tmp_path / "checkpoint_0199.pth.tar"
    torch.save(published(network, average), path)
    images = torch.randn(2, 3, 32, 32)
    for key, expected in ((None, network), ("encoder_k", average)):
        with caplog.at_level(logging.INFO):
            found = load_encoder(str(path), checkpoint_key=key)
        torch.testing.assert_close(found(images), expected.eval()(images))
        assert f"{arch}, imagenet stem; dropped: fc" in caplog.text
        assert found.mean == (0.485, 0.456, 0.406)
        assert found.image_size == 224
    assert load_encoder(str(path), image_size=64).grid == (2, 2)
    with pytest.raises(
        EncoderError, match=r"checkpoint_key=teacher: no such network; it holds module\.encoder_q\., mod"
    ):
        load_encoder(str(path), checkpoint_key="teacher")


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path):
    saved = published(resnet(), resnet())
    del saved["state_dict"]["module.encoder_q.layer2.0.conv1.weight"]
    path = tmp_path / "short.pth"
    torch.save(saved, path)
    with pytest.raises(
        EncoderError, match=r"a residual network that torchvision does not have: stages of \[1, 0, 1, 1\]"
    ):
        load_encoder(str(path))
    saved = published(resnet(), resnet())
    saved["state_dict"]["module.encoder_q.layer2.0.gamma"] = torch.zeros(3)
    torch.save(saved, path)
    with pytest.raises(
        EncoderError, match=r"does not fit resnet10: 0 tensors missing, 1 unknown, first layer2\.0\.gamma"
    ):
        load_encoder(str(path))


def test_torchvisions_own_weights_are_read_too(tmp_path):
    import torchvision

    theirs = torchvision.models.resnext50_32x4d(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "resnext.pth")
    found = load_encoder(str(tmp_path / "resnext.pth"))
    assert found.kwargs["arch"] == "resnext50_32x4d"
    theirs.fc = torch.nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(found(images), theirs.eval()(images))
