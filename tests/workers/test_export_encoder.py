"""An encoder as a file that timm reads."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from contract import rundir
from workers import models
from workers.engine.encoder import EncoderError, load_encoder, save_encoder
from workers.export_encoder import write_timm
from workers.interop import timm_names
from workers.models.timm_model import create

SIZES = {"dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "grid_size": 4}
ENCODERS = {
    "vit": ("vit", SIZES),
    "vit without class token": ("vit", {**SIZES, "cls": False, "mlp_ratio": 2.0}),
    "beit": ("beit", SIZES),
    "beit with own tables": ("beit", {**SIZES, "bias": "per_block", "absolute": True, "mask_token": False}),
    "timm": ("timm_model", {"model": "test_vit2", "image_size": 64}),
    "timm without blocks": ("timm_model", {"model": "test_resnet", "image_size": 64}),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_timm_reads_the_file_and_gives_the_same_features(kind, tmp_path):
    torch.manual_seed(0)
    encoder = models.build(*ENCODERS[kind]).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if name.endswith("table") or parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5)  # zeros and ones would hide that they are lost
    how, off = write_timm(tmp_path, encoder)
    assert how["file"] == "timm.safetensors"
    assert off < 1e-4


def test_sizes_that_timm_has_a_name_for_are_called_by_it():
    tiny = {"dim": 192, "depth": 12, "heads": 3, "patch_size": 16}
    name, kwargs, _ = timm_names.named(models.build("vit", {**tiny, "grid_size": 14}))
    assert (name, kwargs) == ("vit_tiny_patch16_224", {"num_classes": 0})
    name, kwargs, _ = timm_names.named(models.build("vit", {**tiny, "grid_size": 3}))
    assert (name, kwargs["img_size"], kwargs["depth"]) == ("vit_base_patch16_224", 48, 12)


def test_what_timm_does_not_have_is_refused(tmp_path):
    encoder = models.build("vit", {**SIZES, "grid_columns": 5})
    with pytest.raises(EncoderError, match="format=timm: grid 4 x 5: timm's tables of positions are square"):
        write_timm(tmp_path, encoder)


def test_an_export_is_a_run_whose_files_others_read(make_run, work, tmp_path):
    theirs = create("test_vit", 64).eval().requires_grad_(False)
    torch.save({"teacher": theirs.model.state_dict()}, tmp_path / "dino.pth")
    said = {"worker": "export_encoder", "encoder": str(tmp_path / "dino.pth"), "image_size": 48, "heads": 2}
    run = make_run(tmp_path / "aaaa", **said)
    process = work(run)
    assert process.returncode == 0, process.stdout
    assert "DINO: teacher" in process.stdout
    done = json.loads((run / rundir.DONE).read_text())
    ours, how = load_encoder(str(run)).cpu(), done["timm"]
    assert done["metrics"]["export/parameters"] == sum(p.numel() for p in ours.parameters())
    network = timm.create_model(how["model"], checkpoint_path=str(run / how["file"]), **how["kwargs"]).eval()
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(network.forward_features(images), ours.final(ours.tokens(images)))


def test_a_safetensors_file_is_an_encoder_too(make_run, work, tmp_path):
    encoder = models.build("vit", SIZES)
    encoder.mean, encoder.std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    save_encoder(tmp_path, encoder, "abcd")
    run = make_run(tmp_path / "bbbb", worker="export_encoder", encoder=str(tmp_path), format="safetensors")
    process = work(run)
    assert process.returncode == 0, process.stdout
    done = json.loads((run / rundir.DONE).read_text())
    found = load_encoder(str(run / done["file"]))
    assert (found.kwargs, found.mean) == (SIZES, (0.1, 0.2, 0.3))
    for name, value in encoder.state_dict().items():
        assert torch.equal(found.state_dict()[name].cpu(), value)
