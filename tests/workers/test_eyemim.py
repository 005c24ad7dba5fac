"""MIM across eye movements without reference numbers, its worker, and the worker that makes masks for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from contract import rundir
from contract.settings import SettingsError
from contract.settings.main_eyemim import Readout, Settings
from contract.settings.segment_objects import Settings as SegmentSettings
from workers import main_eyemim, models
from workers.data import DataError, Unreadable
from workers.data.fake import load
from workers.data.segmenters import Contrast, Onnx, Ready, Rembg
from workers.data.segments import FOLDER, KEPT, MASKS, Segmented, Segments, enough
from workers.engine.encoder import load_encoder
from workers.engine.readout import EarlyStopping, measure, train_readout
from workers.losses.sparsity import covariance, hidden_error, unit_sparsity
from workers.models.conv_autoencoder import ConvDecoder

DATA = {"name": "fake", "size": 16, "length": 48}
WORK = {"worker": "main_eyemim", "data": DATA, "image_size": 16, "channels": 4, "batch_size": 8, "epochs": 4,
        "log_every": 3, "eval_freq": 2, "blr": 0.2, "readout": {"epochs": 20, "lr": 1e-2}}  # fmt: skip
CUT = {"worker": "segment_objects", "data": DATA, "image_size": 16, "min_pixels": 1}


def settings(**values: object) -> Settings:
    return Settings(worker="main_eyemim", **{"image_size": 16, "channels": 4, "lr": 1e-3, **values})


def glimpse(said: Settings, raw: Tensor) -> main_eyemim.Glimpse:
    eye = main_eyemim.movement(said)
    u = torch.rand(len(raw), 1, eye.numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return main_eyemim.finish(said, eye)(((raw, u), u, u))


def pixels(channels: int = 3, number: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (number, channels, 16, 16), dtype=torch.uint8, generator=generator)


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["random_patches", "periphery", "foveate", "none"])
def test_every_mode_trains_all_parameters(mode):
    said = settings(masking_mode=mode, clamp_weights=mode == "foveate", attention=mode == "periphery")
    model = main_eyemim.build(said)
    found = model(glimpse(said, pixels()))
    assert all(value.isfinite() for value in found.values())
    found["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_encoder_is_rebuilt_from_its_name_and_gives_tokens_of_every_stage():
    encoder = models.build("conv_autoencoder", {"first": 4, "image_size": 16})
    again = models.build(encoder.name, encoder.kwargs)
    again.load_state_dict(encoder.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.tokens(x), encoder.tokens(x))
    for block, side in ((0, 8), (1, 4), (2, 2), (-1, 2)):
        tokens = encoder.tokens(x, block=block)
        assert tokens.shape == (2, 1 + side**2, 4 * 8 // side)
        torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    assert encoder.width == tokens.shape[-1]
    assert encoder.mean == (0, 0, 0)
    with pytest.raises(ValueError, match="no attention"):
        encoder.look(x)
    with pytest.raises(ValueError, match="image_size=20: 3 halvings need a multiple of 8"):
        models.build("conv_autoencoder", {"image_size": 20})


def test_a_decoder_block_is_what_torch_makes_of_its_layers():
    block = ConvDecoder([4, 8]).blocks[2].to(memory_format=torch.contiguous_format)
    x = torch.rand(2, 8, 4, 4)
    plain = torch.relu(block.conv2(torch.relu(block.conv1(x))) + block.skip(x))
    torch.testing.assert_close(block(x), plain)


def test_the_loss_counts_weighted_pixels_of_the_whole_batch():
    predicted, target = torch.rand(2, 3, 2, 2), torch.rand(2, 3, 2, 2)
    weight = torch.tensor([1.0, 0, 0, 0, 0.5, 0.5, 0, 0]).view(2, 1, 2, 2)
    expected = ((predicted - target).square() * weight).sum() / (3 * weight.sum())
    torch.testing.assert_close(hidden_error(predicted, target, weight), expected)
    predicted.requires_grad_()
    nothing = hidden_error(predicted, target, torch.zeros_like(weight))
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(predicted.grad, torch.zeros_like(predicted))


def test_the_covariance_is_that_of_the_matrix_which_is_never_made():
    x = torch.rand(5, 3, 4)
    z = (x.flatten(1) - x.flatten(1).mean(0)) / (x.flatten(1).std(0) + 1e-5)
    matrix = z.T @ z / 4
    off = matrix - matrix.diag().diag()
    torch.testing.assert_close(covariance(x), off.square().sum() / 12)
    x[:, 0] = 0
    assert torch.equal(unit_sparsity(x)[0], torch.zeros(4))
    assert covariance(x).isfinite()


def test_the_crop_moves_picture_and_mask_alike():
    said = settings(masking_mode="none", segments_path="x")
    raw = pixels(3)
    raw = torch.cat([raw, raw[:, :1]], dim=1)  # the mask is the first colour
    found = glimpse(said, raw)
    torch.testing.assert_close(found.weight, found.target[:, :1])
    assert not torch.equal(found.target, raw[:, :3].float() / 255)
    said.background = True
    torch.testing.assert_close(glimpse(said, raw).weight, 1 - found.weight)


def test_bf16_computes_the_loss_and_the_statistics_in_float32():
    said = settings()
    model, given = main_eyemim.build(said), glimpse(said, pixels())
    full = model(given)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(given)
    assert {value.dtype for value in low.values()} == {torch.float32}
    torch.testing.assert_close(low["loss"], full["loss"], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 20}, "image_size=20: must be a multiple of 8"),
        ({"masking_ratio": 1.2}, r"masking_ratio=1.2: must lie in \[0, 1\]"),
        ({"masking_ratio": 0.01}, "hides 0 of 16 patches"),
        ({"masking_ratio": 1.0}, "hides 16 of 16 patches"),
        ({"masking_mode": "periphery", "masking_ratio": 1.0}, "a disc of radius 0"),
        ({"patch_size": 5}, "patch_size=5: must divide image_size=16"),
        ({"blur": "replace"}, "blur=replace: its 33 pixels need image_size above 16"),
        ({"attention": True}, "attention=true: of masking_mode=periphery only"),
        ({"antialias": True}, "antialias=true: of masking_mode=foveate only"),
        ({"remove_missing": True}, "remove_missing=true: needs masks"),
        ({"batch_size": 1}, "batch_size=1: covariances need at least 2 pictures"),
        ({"readout": Readout, "holdout": 1.0}, "readout.holdout=1.0: must be above 0 and below 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(values, message):
    with pytest.raises(SettingsError, match=message) as caught:
        if "readout" in values:
            Readout(holdout=values["holdout"])
        settings(**values)
    assert "\n" not in str(caught.value)


def test_masks_are_known_by_the_run_that_made_them(tmp_path, make_run, monkeypatch):
    make_run(tmp_path / "a" / "0123", **CUT)
    monkeypatch.chdir(tmp_path)
    said = settings(segments_path="a/0123")
    assert said.segments_path == str(tmp_path / "a" / "0123")
    assert said.science()["segments_path"] == "0123"
    assert settings(segments_path="elsewhere").science()["segments_path"] == str(tmp_path / "elsewhere")


# -- the read-out ------------------------------------------------------------------------------------------------------


def test_the_readout_stops_early_keeps_the_best_and_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=generator)
    x = torch.randn(90, 12, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 12)
    said = Readout(epochs=400, lr=0.05, batch_size=32, patience=3)
    found, again = (train_readout(x, labels, 3, said, seed=4, stop=lambda: False) for _ in range(2))
    assert found is not None
    assert again is not None
    assert found.best < found.epochs < said.epochs
    assert measure(found.layer, x, labels)["top1"] > 0.8
    assert torch.equal(found.layer.weight, again.layer.weight)
    assert train_readout(x, labels, 3, said, seed=4, stop=lambda: True) is None


def test_small_gains_move_the_best_but_not_the_patience():
    rule = EarlyStopping(patience=2, min_delta=0.1)
    assert rule.see(1.0)
    assert rule.see(0.95)
    assert not rule.stop
    assert rule.see(0.90)
    assert rule.stop
    assert rule.best == 0.90


# -- masks -------------------------------------------------------------------------------------------------------------


def published_masks(folder: Path, **masks: Tensor) -> Path:
    folder.mkdir()
    for name, mask in masks.items():
        torch.save(mask, folder / f"segmentation_{name[1:]}.pt")
    return folder


def test_masks_are_a_fourth_channel_and_pictures_without_one_can_go(tmp_path):
    of, mask = load("train", length=4, size=16), torch.rand(16, 16)
    folder = published_masks(tmp_path / "masks", _1=mask, _3=mask / 2)
    every = Segmented(of, Segments(folder, 4), 16)
    assert [every[i][0].shape for i in range(4)] == [(4, 16, 16)] * 4
    assert int(every[0][0][3].min()) == 255
    assert (every[1][0][3].float() / 255 - mask).abs().max() < 1 / 255
    assert torch.equal(every[1][0][:3], of[1][0])
    some = Segmented(of, Segments(folder, 4), 16, remove_missing=True)
    assert len(some) == 2
    assert torch.equal(some[1][0], every[3][0])


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({}, DataError, r"no masks in it; expected segments.npy with kept.npy, or segmentation_0.pt"),
        ({"_9": torch.rand(16, 16)}, DataError, r"has segmentation_9.pt, but there are 4 pictures"),
        ({"_0": torch.rand(8, 8)}, DataError, r"segmentation_0.pt: 8 x 8 pixels, but image_size=16"),
        ({"_0": torch.ones(16, 16)}, Unreadable, r"segmentation_0.pt: 1 everywhere, so it shows no object"),
        ({"_0": torch.rand(16, 16) * 3}, Unreadable, r"segmentation_0.pt: from .* expected certainties"),
        ({"_0": torch.rand(3, 16, 16)}, Unreadable, r"segmentation_0.pt: expected a float tensor"),
    ],
)
def test_masks_that_do_not_fit_are_refused_in_one_line(tmp_path, masks, error, message):
    folder = published_masks(tmp_path / "masks", **masks)
    with pytest.raises(error, match=message) as caught:
        Segmented(load("train", length=4, size=16), Segments(folder, 4), 16)[0]
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such folder"):
        Segments(tmp_path / "nowhere", 4)


def test_the_filter_wants_sure_pixels_and_an_object():
    mask = torch.zeros(3, 4, 4)
    mask[0, 0] = 0.8
    mask[1] = 1
    mask[2, 0, :3] = 1
    assert enough(mask, 4, 0.8).tolist() == [True, False, False]


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def field(number: int, value: bytes | int | str) -> bytes:
    """One of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tiny_onnx(path: Path, side: int) -> Path:
    """A network that gives the mean of the channels, (1, 3, side, side) -> (1, 1, side, side)."""

    def value(name: str, *shape: int) -> bytes:
        dims = b"".join(field(1, field(1, each)) for each in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    axes = field(1, "axes") + field(8, 1) + field(20, 7)
    node = field(1, "x") + field(2, "y") + field(4, "ReduceMean") + field(5, axes)
    graph = field(1, node) + field(2, "g") + field(11, value("x", 1, 3, side, side))
    graph += field(12, value("y", 1, 1, side, side))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))
    return path


def test_any_onnx_network_segments(tmp_path):
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, 4:12, 4:12] = 200
    found = Onnx(tiny_onnx(tmp_path / "net.onnx", 8))(image, 0)
    assert found.shape == (16, 16)
    assert found[8, 8] > 0.9
    assert found[0].max() < 0.1
    (tmp_path / "no.onnx").write_text("no network")
    with pytest.raises(DataError, match=r"no.onnx: no ONNX network \(") as caught:
        Onnx(tmp_path / "no.onnx")
    assert "\n" not in str(caught.value)


def test_a_segmenter_that_is_not_there_says_what_to_install_or_to_give(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"model_path=.*nowhere.onnx: no such file"):
        Onnx(tmp_path / "nowhere.onnx")
    with pytest.raises(DataError, match=r"no masks in it; expected segmentation_0.pt or .png"):
        Ready(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"rembg is missing; pip install 'sightline\[rembg\]'"):
        Rembg("u2net", download=False)
    with pytest.raises(DataError, match=r"onnxruntime is missing; pip install 'sightline\[segment\]'"):
        Onnx(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"rembg_model=u2net: no file .*u2net.onnx.*data.download=true"):
        Rembg("u2net", download=False)


def test_contrast_finds_what_differs_from_the_border():
    image = torch.full((3, 16, 16), 30, dtype=torch.uint8)
    image[0, 5:11, 5:11] = 220
    found = Contrast()(image, 0)
    assert found[8, 8] > 0.9
    assert found[0].max() == 0
    assert Contrast()(torch.zeros_like(image), 0).max() == 0


def test_settings_of_masks_are_checked():
    for values, message in (
        ({"model": "onnx"}, "model=onnx: give model_path, the .onnx file"),
        ({"model_path": "x"}, "model_path=x: of model=onnx and model=folder only, not contrast"),
        ({"image_size": 8}, "min_pixels=100: a picture has 64"),
    ):
        with pytest.raises(SettingsError, match=message):
            SegmentSettings(worker="segment_objects", **values)


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_run_with_masks_leaves_an_encoder_a_readout_and_a_figure(tmp_path, make_run, work):
    cut = make_run(tmp_path / "cut", **CUT)
    made = work(cut)
    assert made.returncode == 0, made.stdout + made.stderr
    assert json.loads((cut / rundir.DONE).read_text())["metrics"]["segments/masks"] == DATA["length"]
    assert (cut / rundir.FIGURES / "segments.png").stat().st_size > 1000
    folder = make_run(tmp_path / "mim", **WORK, segments_path=str(cut), remove_missing=True)
    done = work(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((folder / rundir.DONE).read_text())["metrics"]
    assert {"knn/loo1", "readout/top1", "readout/epochs", "eyemim/mse", "eyemim/covariance"} <= set(metrics)
    lines = [json.loads(line) for line in (folder / rundir.METRICS).read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]
    assert (folder / rundir.FIGURES / "glimpses.png").stat().st_size > 1000
    encoder = load_encoder(str(folder))
    assert encoder.tokens(torch.rand(2, 3, 16, 16)).shape == (2, 5, 16)
    assert encoder.std == (1, 1, 1)


def test_an_interrupted_segmentation_goes_on_where_it_was(tmp_path, make_run, work):
    ready = tmp_path / "ready"
    ready.mkdir()
    length = 100
    for index in range(length):
        torch.save(torch.rand(16, 16), ready / f"segmentation_{index}.pt")
    said = {**CUT, "data": {**DATA, "length": length}, "model": "folder", "model_path": str(ready)}
    folder = make_run(tmp_path / "cut", **said)
    stop = folder / rundir.STOP
    stop.touch()
    first = work(folder)
    assert first.returncode == 0, first.stdout
    assert not (folder / rundir.DONE).exists()
    parts = list((folder / FOLDER / "parts").iterdir())
    assert len(parts) == 1
    stop.unlink()
    with np.load(parts[0]) as part:
        done = part["places"].tolist()
        before = part["masks"].copy()
    for index in done:  # had it looked at these again, it would see nothing there
        (ready / f"segmentation_{index}.pt").unlink()
    assert work(folder).returncode == 0
    assert np.array_equal(np.load(folder / FOLDER / MASKS)[done], before)
    assert np.load(folder / FOLDER / KEPT).all()
    assert not parts[0].exists()
