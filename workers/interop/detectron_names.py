"""Our encoders under the names that Detectron2 gives them: its ResNets, and the ViT of ViTDet (Li et al., ECCV 2022).

Detectron2 takes a file with ``model`` and ``__author__`` as it is, and with ``matching_heuristics`` gives each of its
parameters the longest of the file's names that is a whole dotted ending of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.models import RGB, Encoder

AUTHOR = "MOCO"  # any but Caffe2, whose names would be translated
DEPTHS = {
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
}
"""MODEL.RESNETS.DEPTH, NUM_GROUPS and WIDTH_PER_GROUP of the networks that it can build."""
VIT = "backbone.net."  # where ViTDet's models keep the network below its pyramid
NO_PLACE = {
    "cls_token": "Detectron2's ViT has no class token",
    "norm.weight": "its pyramid reads the last block, before any norm",
    "norm.bias": "its pyramid reads the last block, before any norm",
}
"""Tensors of our ViT that are left out, and why."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Named:
    arrays: Arrays  # under Detectron2's names, in the order of the encoder's own
    own: dict[str, str]  # Detectron2's name -> ours
    left_out: dict[str, str]  # our name -> why
    model: dict[str, Any]  # what Detectron2 has to be told for them to fit


def residual(name: str) -> str:
    """torchvision's name of a ResNet's tensor -> Detectron2's. Any name without ``layer`` is taken for the stem's."""
    if "layer" not in name:
        name = f"stem.{name}"
    for stage in (1, 2, 3, 4):
        name = name.replace(f"layer{stage}", f"res{stage + 1}")
    for place in (1, 2, 3):
        name = name.replace(f"bn{place}", f"conv{place}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def torchvisions(name: str) -> str:
    """The way back, from Detectron2's name."""
    name = name.removeprefix("stem.").replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    name = re.sub(r"conv(\d)\.norm", r"bn\1", name)
    return re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", name)


def content(arrays: Arrays) -> dict[str, Any]:
    """The whole of the file."""
    return {"model": arrays, "__author__": AUTHOR, "matching_heuristics": True}


def named(encoder: Encoder) -> Named:
    """Raises ValueError, in one line, for an encoder that Detectron2 has no network for."""
    if encoder.name == "resnet":
        return _resnet(encoder)
    if encoder.name == "vit":
        return _vit(encoder)
    why = {
        "beit": "its table of relative positions is one of pairs of patches, Detectron2's ViT has one for each axis",
        "timm_model": "give the file of its weights itself, so that it becomes one of ours",
    }.get(encoder.name, "it takes residual networks and plain vision transformers")
    raise ValueError(f"Detectron2 cannot hold a {encoder.name}: {why}")


def _resnet(encoder: Encoder) -> Named:
    arch, stem = encoder.kwargs.get("arch", "resnet50"), encoder.kwargs.get("stem", "imagenet")
    if arch not in DEPTHS:
        raise ValueError(f"Detectron2 cannot hold a {arch}: it builds {', '.join(DEPTHS)}")
    if stem != "imagenet":
        raise ValueError(f"Detectron2 cannot hold a stem={stem}: its own is 7 x 7 with stride 2 and a max pooling")
    depth, groups, width = DEPTHS[str(arch)]
    own = {residual(name): name for name in encoder.state_dict()}
    said = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,  # torchvision strides in the 3 x 3
        **pixels(encoder.mean, encoder.std),
    }
    return Named(_arrays(encoder, own.values(), own.keys()), own, {}, said)


def _vit(encoder: Encoder) -> Named:
    rows, columns = encoder.grid
    if rows != columns:
        raise ValueError(
            f"Detectron2 cannot hold a grid of {rows} x {columns} patches: its table of positions is square"
        )
    left_out = {name: why for name, why in NO_PLACE.items() if name in encoder.state_dict()}
    own = {VIT + name: name for name in encoder.state_dict() if name not in left_out}
    patch = encoder.image_size // rows
    said = {
        "patch_size": patch,
        "embed_dim": encoder.width,
        "depth": encoder.depth,
        "num_heads": encoder.heads,
        "mlp_ratio": encoder.kwargs.get("mlp_ratio", 4.0),
        "use_rel_pos": False,
        "pretrain_img_size": encoder.image_size,
        "pretrain_use_cls_token": encoder.has_cls,
    }
    return Named(_arrays(encoder, own.values(), own.keys()), own, left_out, said)


def pixels(mean: RGB | None, std: RGB | None) -> dict[str, Any]:
    """How pixels from 0 to 255 are normalised; nothing where the encoder does not say."""
    if mean is None or std is None:
        return {}
    scaled = {"MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
    return {"INPUT.FORMAT": "RGB", **{key: [round(255 * v, 3) for v in three] for key, three in scaled.items()}}


def _arrays(encoder: Encoder, ours: Iterable[str], theirs: Iterable[str]) -> Arrays:
    state = encoder.state_dict()
    return {there: state[here].cpu().contiguous().numpy() for here, there in zip(ours, theirs, strict=True)}


def differences(encoder: Encoder, arrays: Arrays, own: dict[str, str]) -> list[str]:
    """Which of the encoder's tensors a file does not have, bit for bit, once its names are mapped back."""
    state = encoder.state_dict()
    back = torchvisions if encoder.name == "resnet" else lambda name: name.removeprefix(VIT)
    found = {back(name): array for name, array in arrays.items()}
    wrong = sorted(found.keys() ^ set(own.values()))
    for name in found.keys() & state.keys():
        mine = state[name].cpu().numpy()
        if found[name].dtype != mine.dtype or not np.array_equal(found[name], mine):
            wrong.append(name)
    return wrong
