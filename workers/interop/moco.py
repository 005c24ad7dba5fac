"""MoCo's, MixMask's, Un-Mix's and SimCLR's checkpoints, any state dict of a torchvision ResNet -> our ``resnet``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from workers import models
from workers.models import Encoder

MARKS = ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.conv1.weight")
TRAINED = ("module.encoder_q.", "encoder_q.")  # beside it: encoder_k, the average
DROPPED = ("fc.", "queue", "queue_ptr")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of the pixels in these programs
SIMCLR = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # but SimCLR's takes them as they are, from 0 to 1
BLOCKS: dict[tuple[int, tuple[int, ...]], str] = {  # convolutions of a block, blocks of the four stages
    (2, (1, 1, 1, 1)): "resnet10",
    (2, (2, 2, 2, 2)): "resnet18",
    (2, (3, 4, 6, 3)): "resnet34",
    (3, (3, 4, 6, 3)): "resnet50",
    (3, (3, 4, 23, 3)): "resnet101",
    (3, (3, 8, 36, 3)): "resnet152",
}
WIDER: dict[
    tuple[int, ...], dict[str, str]
] = {  # shape of the first block's middle convolution -> what kind of the above
    (64, 64, 3, 3): {"resnet50": "resnet50", "resnet101": "resnet101", "resnet152": "resnet152"},
    (128, 4, 3, 3): {"resnet50": "resnext50_32x4d"},
    (256, 8, 3, 3): {"resnet101": "resnext101_32x8d"},
    (256, 4, 3, 3): {"resnet101": "resnext101_64x4d"},
    (128, 128, 3, 3): {"resnet50": "wide_resnet50_2", "resnet101": "wide_resnet101_2"},
}
STEMS: dict[tuple[int, ...], str] = {(64, 3, 7, 7): "imagenet", (64, 3, 3, 3): "cifar"}


def prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Below which names of a state dict residual networks stand."""
    found = [k.removesuffix(MARKS[-1]) for k in state if k.endswith(MARKS[-1])]
    return [p for p in found if all(p + mark in state for mark in MARKS)]


def encoder(
    state: Mapping[str, Tensor], *, key: str | None = None, image_size: int | None = None
) -> tuple[Encoder, str]:
    """The residual network in a state dict, and one line that says what was made of it.

    Of MoCo's two networks it is the one that was trained; ``key=encoder_k`` takes the other. Raises ValueError in one
    line where there is none, where several fit, and where a name is neither the network's nor to be dropped.
    """
    there = prefixes(state)
    if key is not None and not any(key in p.split(".") for p in there):
        raise ValueError(f"checkpoint_key={key}: no such network; it holds {', '.join(there) or 'none'}")
    chosen = [p for p in there if key in p.split(".")] or [p for p in there if p in TRAINED] or there
    if len(chosen) != 1:
        raise ValueError(
            f"several residual networks: {', '.join(there)}; say which with checkpoint_key"
            if chosen
            else f"no residual network: no {MARKS[-1]} in it"
        )
    (prefix,) = chosen
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    kept = {k: v for k, v in own.items() if not k.startswith(DROPPED)}
    arch, stem = sizes(kept)
    size = image_size or (32 if stem == "cifar" else 224)
    built = models.build("resnet", {"arch": arch, "stem": stem, "image_size": size})
    wanted = built.state_dict()
    fresh = {k for k in wanted if k.endswith("num_batches_tracked")}  # older files have no such counts
    missing, unknown = sorted(wanted.keys() - kept.keys() - fresh), sorted(kept.keys() - wanted.keys())
    if missing or unknown:
        what = f"{len(missing)} tensors missing, {len(unknown)} unknown"
        raise ValueError(f"does not fit {arch}: {what}, first {(missing + unknown)[0]}")
    try:
        built.load_state_dict({**{k: wanted[k] for k in fresh}, **kept})
    except RuntimeError as error:
        raise ValueError(f"does not fit {arch}: {' '.join(str(error).split())}") from None
    # SimCLR's final file has the wrapper's names, those before it the network's, with the projector as its fc
    simclr = prefix.endswith("backbone.") or (not prefix and "fc.2.weight" in own)
    built.mean, built.std = SIMCLR if simclr else IMAGENET
    left = sorted({k.removeprefix("module.").split(".")[0] for k in state if not k.startswith(prefix)})
    dropped = sorted({k.split(".")[0] for k in own if k not in kept}) + left
    where = f"below {prefix}" if prefix else "all"
    return built, f"ResNet: {where}; {arch}, {stem} stem; dropped: {', '.join(dropped) or 'nothing'}"


def sizes(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """(arch, stem) that the shapes say."""
    stages = [
        len({m[1] for k in state if (m := re.match(rf"layer{stage}\.(\d+)\.conv1\.weight", k))})
        for stage in (1, 2, 3, 4)
    ]
    layers = 3 if "layer1.0.conv3.weight" in state else 2
    arch, middle = BLOCKS.get((layers, tuple(stages))), tuple(state["layer1.0.conv2.weight"].shape)
    if arch is not None and layers == 3:
        arch = WIDER.get(middle, {}).get(arch)
    first = tuple(state["conv1.weight"].shape)
    stem = STEMS.get(first)
    if arch is None or stem is None:
        raise ValueError(
            f"a residual network that torchvision does not have: stages of {stages} blocks, {layers} convolutions each "
            f"({middle} in the first), conv1 {first}"
        )
    return arch, stem
