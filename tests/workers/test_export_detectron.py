"""Encoders as files for Detectron2."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch

from contract import rundir
from workers import models
from workers.engine import detectron
from workers.engine.encoder import EncoderError, save_encoder
from workers.interop import detectron_names, detectron_pickle

VIT = {"dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "grid_size": 4}


def encoder(name: str, **kwargs) -> models.Encoder:
    torch.manual_seed(0)
    return models.build(name, kwargs)


@pytest.mark.parametrize(
    ("arch", "depth", "groups", "width", "channels"),
    [
        ("resnet18", 18, 1, 64, 64),
        ("resnext50_32x4d", 50, 32, 4, 256),
        ("wide_resnet50_2", 50, 1, 128, 256),
    ],
)
def test_a_residual_network_comes_back_bit_for_bit(tmp_path, arch, depth, groups, width, channels):
    network = encoder("resnet", arch=arch, image_size=32)
    network.mean, network.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = detectron.write(tmp_path, network)
    assert found.left_out == {}
    prefix = "MODEL.RESNETS."
    said = {k.removeprefix(prefix): v for k, v in found.model.items() if k.startswith(prefix)}
    assert said["DEPTH"] == depth
    assert (said["NUM_GROUPS"], said["WIDTH_PER_GROUP"], said["RES2_OUT_CHANNELS"]) == (groups, width, channels)
    assert said["STRIDE_IN_1X1"] is False
    assert found.model["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert found.model["MODEL.PIXEL_STD"] == [58.395, 57.12, 57.375]
    stored = detectron_pickle.read((tmp_path / detectron.FILE).read_bytes())
    assert list(stored) == ["model", "__author__", "matching_heuristics"]
    back = {detectron_names.torchvisions(name): value for name, value in stored["model"].items()}
    assert back.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert np.array_equal(back[name], value.numpy())


@pytest.mark.parametrize("cls", [True, False])
def test_a_vision_transformer_has_vitdets_names(tmp_path, cls):
    network = encoder("vit", **VIT, cls=cls)
    found = detectron.write(tmp_path, network)
    stored = detectron_pickle.read((tmp_path / detectron.FILE).read_bytes())["model"]
    assert set(found.left_out) == {"norm.weight", "norm.bias", *(["cls_token"] if cls else [])}
    assert stored["backbone.net.pos_embed"].shape == (1, 16 + cls, 24)
    assert found.model["pretrain_use_cls_token"] is cls
    assert (found.model["pretrain_img_size"], found.model["patch_size"]) == (32, 8)
    block = {f"blocks.1.{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")}  # fmt: skip
    assert {f"backbone.net.{name}" for name in block} <= set(stored)
    assert all(name.startswith("backbone.net.") for name in stored)
    assert len(stored) == len(network.state_dict()) - len(found.left_out)


@pytest.mark.parametrize(
    ("name", "kwargs", "line"),
    [
        ("resnet", {"arch": "resnet10"}, "Detectron2 cannot hold a resnet10: it builds resnet18, "),
        ("resnet", {"stem": "cifar", "image_size": 32}, "Detectron2 cannot hold a stem=cifar: its own is 7 x 7"),
        ("vit", {**VIT, "grid_columns": 5}, "Detectron2 cannot hold a grid of 4 x 5 patches"),
        ("beit", VIT, "Detectron2 cannot hold a beit: its table of relative positions"),
        ("timm_model", {"model": "test_vit2", "image_size": 64}, "Detectron2 cannot hold a timm_model: give the file"),
        ("conv_autoencoder", {}, "Detectron2 cannot hold a conv_autoencoder: it takes residual"),
    ],
)
def test_what_detectron2_cannot_hold_is_refused_in_one_line(tmp_path, name, kwargs, line):
    with pytest.raises(EncoderError, match=line) as caught:
        detectron.write(tmp_path, encoder(name, **kwargs))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_lost_a_tensor_or_changed_one_is_noticed(tmp_path, monkeypatch):
    network = encoder("resnet", arch="resnet18", image_size=32)
    found = detectron_names.named(network)
    changed = dict(found.arrays)
    changed["res3.0.shortcut.weight"] = changed["res3.0.shortcut.weight"] + 1e-7
    assert detectron_names.differences(network, changed, found.own) == ["layer2.0.downsample.0.weight"]
    del changed["stem.conv1.weight"]
    monkeypatch.setattr(detectron_names, "content", lambda _: {"model": changed})
    with pytest.raises(EncoderError, match=r"2 tensors do not come back as they were, first conv1\.weight"):
        detectron.write(tmp_path, network)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("caught",)


@pytest.mark.parametrize(
    "content", [pickle.dumps({"model": {"a": Trap()}}), pickle.dumps([1]), b"", pickle.dumps({"model": {"a": 1}})]
)
def test_reading_a_file_runs_nothing_in_it(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not a file of arrays for Detectron2"):
        detectron_pickle.read(content)
    assert not (tmp_path / "caught").exists()


def test_an_export_is_a_run(make_run, work, tmp_path):
    save_encoder(tmp_path, encoder("vit", **VIT), "abcd")
    run = make_run(tmp_path / "bbbb", worker="export_detectron", encoder=str(tmp_path))
    process = work(run)
    assert process.returncode == 0, process.stdout
    assert "left out: cls_token (Detectron2's ViT has no class token)" in process.stdout
    done = json.loads((run / rundir.DONE).read_text())
    assert done["metrics"] == {"export/tensors": 27.0, "export/left_out": 3.0}
    assert done["left_out"].keys() == {"cls_token", "norm.weight", "norm.bias"}
    assert (run / done["file"]).is_file()
    assert done["model"]["embed_dim"] == 24
