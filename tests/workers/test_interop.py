"""Files of other programs -> encoders: what is read, what is said about it, and what is refused."""

from __future__ import annotations

import argparse
import logging
import sys
import types
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from workers import models
from workers.engine import weights
from workers.engine.encoder import EncoderError, described, save_encoder
from workers.engine.encoder import load_encoder as load
from workers.interop import lmim
from workers.models.timm_model import create

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 2}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def load_encoder(where, **options):
    return load(where, **options).cpu()  # where there is a GPU it is on that, and the pictures here are not


def network(**changes):
    """timm's own, whose names of tensors are those of all the programs here."""
    torch.manual_seed(0)
    found = (
        timm.create_model("vit_base_patch16_224", num_classes=0, **{**SIZES, **changes}).eval().requires_grad_(False)
    )
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return found


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def mae(state, other):
    extra = {"decoder_embed.weight": torch.ones(3, 2), "decoder_pos_embed": torch.ones(1), "mask_token": torch.ones(1)}
    return {"model": {**state, **extra}, "optimizer": {"state": {}}, "epoch": 1, "args": argparse.Namespace(lr=1.0)}


def dino(state, other):
    head = {"module.head.mlp.0.weight": torch.ones(2)}
    return {
        "student": {**under("module.backbone.", other), **head},
        "teacher": {**under("backbone.", state), **under("", {"head.mlp.0.weight": torch.ones(2)})},
        "epoch": 100,
    }


def moco(state, other):
    both = {**under("module.base_encoder.", state), **under("module.momentum_encoder.", other)}
    both |= {"module.base_encoder.head.0.weight": torch.ones(2), "module.predictor.0.weight": torch.ones(2)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": both, "best": np.float64(0.7)}


def ijepa(state, other):
    kinds = {"encoder": other, "target_encoder": state}
    return {
        **{name: under("module.", kind) for name, kind in kinds.items()},
        "predictor": {"module.mask_token": torch.ones(1)},
        "opt": {"state": {}},
        "epoch": 300,
    }


def latent_mim(state, other):
    """The published program embeds flattened patches and has one table without the batch axis."""

    def theirs(kind):
        kind = {
            k: v for k, v in kind.items() if k not in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed")
        }
        return kind

    def renamed(kind):
        embed = kind["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)
        own = {"embed.proj.weight": embed, "embed.proj.bias": kind["patch_embed.proj.bias"]}
        return {
            **theirs(kind),
            **own,
            "pos_embed.pos_embeds": kind["pos_embed"][0],
            "head.linear0.weight": torch.ones(2),
        }

    both = {**under("module.encoder.", renamed(state)), **under("module.target_encoder.", renamed(other))}
    return {"state_dict": {**both, "module.decoder.embed.weight": torch.ones(2)}, "epoch": 3}


def plain(state, other):
    return {**state, "head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (mae, "MAE: model; depth 3, width 128, 2 heads, patch 8, 32 x 32 pixels; dropped: decoder_embed"),
        (dino, "DINO: teacher, below backbone.;"),
        (moco, "MoCo-v3: state_dict, below module.base_encoder.;"),
        (ijepa, "I-JEPA: target_encoder, below module.; depth 3, width 128"),
        (latent_mim, "Latent MIM: state_dict, below module.encoder.;"),
        (plain, "plain ViT: all; depth 3, width 128, 2 heads, patch 8, 32 x 32 pixels; dropped: head"),
    ],
)
def test_a_published_file_gives_timms_features_and_says_what_it_was(program, words, tmp_path, caplog):
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False} if program is ijepa else {}
    theirs = network(**options)
    state = theirs.state_dict()
    torch.save(program(state, {k: v + 1 for k, v in state.items()}), tmp_path / "file.pth")
    with caplog.at_level(logging.INFO):
        encoder = load_encoder(str(tmp_path / "file.pth"))
    assert words in caplog.text
    wanted = theirs.forward_features(IMAGES)
    found = encoder.final(encoder.tokens(IMAGES))
    torch.testing.assert_close(found if encoder.has_cls else found[:, 1:], wanted, atol=1e-5, rtol=1e-5)
    assert encoder.mean == pytest.approx((0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("program", "key"), [(dino, "student"), (moco, "momentum_encoder"), (latent_mim, "target_encoder")]
)
def test_the_other_network_of_a_file_is_read_when_asked_for(program, key, tmp_path):
    state = network().state_dict()
    other = {k: v + 1 for k, v in state.items()}
    torch.save(program(state, other), tmp_path / "file.pth")
    encoder = load_encoder(str(tmp_path / "file.pth"), checkpoint_key=key)
    assert torch.equal(encoder.cls_token.cpu(), other["cls_token"])
    with pytest.raises(EncoderError, match=r"checkpoint_key=ema: neither an entry nor a network; it holds"):
        load_encoder(str(tmp_path / "file.pth"), checkpoint_key="ema")


@pytest.mark.parametrize("bias", ["shared", "per_block"])
def test_simmims_and_beits_files_are_read(bias, tmp_path, caplog):
    kwargs = {"dim": 48, "depth": 2, "heads": 3, "patch_size": 8, "grid_size": 4, "bias": bias}
    wanted = models.build("beit", kwargs).eval()
    config = types.ModuleType("yacs.config")
    config.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    sys.modules |= {"yacs": types.ModuleType("yacs"), "yacs.config": config}
    try:  # as SimMIM's program saves it, on a machine that has yacs
        content = {"model": {**under("encoder.", wanted.state_dict()), "decoder.0.weight": torch.ones(2)}}
        given = config.CfgNode(TRAIN=config.CfgNode(LR=1e-4))
        given.__dict__["__immutable__"] = True
        torch.save({**content, "max_accuracy": 0.0, "config": given}, tmp_path / "file.pth")
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]
    with caplog.at_level(logging.INFO):
        found = load_encoder(str(tmp_path / "file.pth"))
        larger = load_encoder(str(tmp_path / "file.pth"), image_size=48)
    assert "SimMIM: model, below encoder.; depth 2, width 48, 3 heads, patch 8, 32 x 32 pixels" in caplog.text
    assert torch.equal(found.tokens(IMAGES), wanted.tokens(IMAGES))
    assert larger.tokens(torch.randn(1, 3, 48, 48)).shape == (1, 37, 48)
    assert "positions stretched from 32 to 48 pixels" in caplog.text


def test_heads_that_no_tensor_tells_have_to_be_said(tmp_path):
    torch.save(network(embed_dim=24, num_heads=3).state_dict(), tmp_path / "small.pth")
    with pytest.raises(EncoderError, match="width 24: the file does not say how many heads; give heads="):
        load_encoder(str(tmp_path / "small.pth"))
    assert load_encoder(str(tmp_path / "small.pth"), heads=3).heads == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {**s, "blocks.0.ls1.gamma": torch.ones(128)}, r"unexpected blocks\.0\.ls1\.gamma"),
        (lambda s: {**s, "reg_token": torch.ones(1, 4, 128)}, "unexpected reg_token"),
        (lambda s: {k: v for k, v in s.items() if "norm1" not in k}, r"missing blocks\.0\.norm1\.bias.* and 1 more"),
        (
            lambda s: {**s, "blocks.1.attn.qkv.weight": torch.ones(3, 3)},
            r"blocks\.1\.attn\.qkv\.weight is \(3, 3\), not",
        ),
        (lambda s: {**s, "pos_embed": s["pos_embed"][:, :-1]}, "pos_embed has 16 rows: not a square grid"),
        (lambda s: {"layer1.0.conv1.weight": torch.ones(3)}, r"no vision transformer: no patch_embed.*layer1"),
        (lambda s: {}, "no weights: it is empty"),
        (lambda s: {"modl": {"a": 1}}, "no weights: it holds modl; expected a state dict, or one under"),
        (lambda s: [1, 2], "no weights in it, but list"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_that_names_it(change, said, tmp_path):
    torch.save(change(network().state_dict()), tmp_path / "file.pth")
    with pytest.raises(EncoderError, match=said) as caught:
        load_encoder(str(tmp_path / "file.pth"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_short_is_refused_by_its_name(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    state = network().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for length in (0, 7, 1000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(EncoderError, match=path.name) as caught:
            load_encoder(str(path))
        assert "\n" not in str(caught.value)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("through", ["{}", "timm:vit_tiny_patch16_224@{}"])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(through, legacy, tmp_path):
    trace, path = tmp_path / "it ran", tmp_path / "evil.pth"
    torch.save({"model": network().state_dict(), "args": Evil(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(EncoderError, match=r"evil\.pth: refused, .*it asks for (io|_io|builtins)\.open") as caught:
        load_encoder(through.format(path))
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_what_stands_in_for_harmless_classes_does_nothing(tmp_path):
    torch.save({"a": np.float32(1), "b": np.float64(2), "c": np.int64(3), "d": Path("/x")}, tmp_path / "file.pth")
    found, _ = weights.read(tmp_path / "file.pth")
    assert [type(v).__mro__[1] for v in found.values()] == [weights.Inert] * 4


def test_an_encoder_of_ours_comes_back_with_its_normalisation_from_either_kind_of_file(tmp_path):
    encoder = models.build("vit", {"dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "grid_size": 4}).eval()
    encoder.mean, encoder.std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    save_encoder(tmp_path, encoder, "abcd")
    save_file(encoder.state_dict(), tmp_path / "e.safetensors", metadata=weights.metadata(**described(encoder, "abcd")))
    for where in (tmp_path, tmp_path / "encoder.pt", tmp_path / "e.safetensors"):
        found = load_encoder(str(where))
        assert torch.equal(found.tokens(IMAGES), encoder.tokens(IMAGES))
        assert (found.mean, found.std, found.kwargs) == (encoder.mean, encoder.std, encoder.kwargs)
    (tmp_path / "encoder.pt").unlink()
    torch.save({"weights": {}}, tmp_path / "encoder.pt")
    with pytest.raises(EncoderError, match=r"not an encoder\.pt \(holds weights\)"):
        load_encoder(str(tmp_path))


# -- timm --------------------------------------------------------------------------------------------------------------


def test_a_timm_name_with_a_file_is_our_vit_where_it_is_the_same_network(tmp_path, caplog):
    theirs = timm.create_model("test_vit").eval().requires_grad_(False)  # with a classifier, which is dropped
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 160, 160)
    with caplog.at_level(logging.INFO):
        encoder = load_encoder(f"timm:test_vit@{tmp_path / 'model.safetensors'}")
    assert encoder.name == "vit"
    assert "as our vit" in caplog.text
    torch.testing.assert_close(encoder.final(encoder.tokens(images)), theirs.forward_features(images))
    assert encoder.mean == tuple(timm.get_pretrained_cfg("test_vit").mean)
    small = load_encoder(f"timm:test_vit@{tmp_path / 'model.safetensors'}", image_size=64)
    assert small.tokens(images[..., :64, :64]).shape == (1, 17, 64)


def test_other_timm_networks_keep_timms_module(tmp_path, caplog):
    theirs = create("test_vit2", 64).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter)  # layer scale starts so small that a loss of it would not show
    path = tmp_path / "file.pth"
    torch.save({"model": theirs.model.state_dict()}, path)
    with caplog.at_level(logging.INFO):
        found = load_encoder(f"timm:test_vit2@{path}", image_size=64)
    images = torch.randn(1, 3, 64, 64)
    assert "as timm's own module" in caplog.text
    assert torch.equal(found.tokens(images), theirs.tokens(images))
    save_encoder(tmp_path, found, "abcd")
    assert torch.equal(load_encoder(str(tmp_path)).tokens(images), theirs.tokens(images))
    with pytest.raises(EncoderError, match=r"does not fit timm's test_vit: .*unexpected model\.blocks") as caught:
        load_encoder(f"timm:test_vit@{path}")
    assert "\n" not in str(caught.value)


def test_timms_own_weights_come_from_its_cache_or_with_a_word_on_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(EncoderError, match=r"not in timm's cache; .* run python -c .*or give .*@FILE") as caught:
        load_encoder("timm:test_vit")
    assert "\n" not in str(caught.value)
    cfg = timm.get_pretrained_cfg("test_vit")
    place = tmp_path / f"models--timm--{cfg.architecture}.{cfg.tag}"
    (place / "snapshots" / "1234").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1234")
    theirs = timm.create_model("test_vit").eval()
    save_file(theirs.state_dict(), place / "snapshots" / "1234" / "model.safetensors")
    found = load_encoder("timm:test_vit")
    assert torch.equal(found.state_dict()["pos_embed"].cpu(), theirs.pos_embed)


def test_a_timm_name_that_is_none_is_refused_with_names_that_are(tmp_path):
    torch.save(network().state_dict(), tmp_path / "file.pth")
    with pytest.raises(EncoderError, match=r"has no network vit_tiny_patch16; it has .*vit_tiny_patch16_224"):
        load_encoder(f"timm:vit_tiny_patch16@{tmp_path / 'file.pth'}")
    with pytest.raises(EncoderError, match=r"has no weights of that name; it has vit_tiny_patch16_224\."):
        load_encoder("timm:vit_tiny_patch16_224.nonsense")
    with pytest.raises(EncoderError, match=r"no file .*nowhere"):
        load_encoder("timm:vit_tiny_patch16_224@nowhere")


def test_latent_mims_names_become_ours():
    assert lmim.our_name("encoder.embed.proj.weight") == "encoder.patch_embed.proj.weight"
    assert lmim.our_name("encoder.head.linear2.weight") == "projector.6.weight"
    assert lmim.our_name("decoder.embed.weight") == "decoder.embed.weight"
