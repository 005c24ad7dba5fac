"""State dicts of published programs -> our encoders: MAE, SimMIM, BEiT, Latent MIM, DINO, MoCo-v3, I-JEPA, plain timm.

Sizes are read from the tensors. Nothing is dropped in silence: a key that is neither the encoder's nor on the list of
``EXPECTED`` is an error, because a network without, say, its layer scale loads well and gives garbage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workers import models
from workers.interop import lmim, moco
from workers.models import Encoder, Plain
from workers.models.vit import interpolated

ENTRIES = ("target_encoder", "teacher", "model", "state_dict", "encoder", "student")
"""Where files keep their weights: I-JEPA, DINO, MAE and SimMIM, MoCo and Latent MIM. The first found is read."""
AVERAGED = ("momentum_encoder.", "target_encoder.")
"""Prefixes of the slow copy beside the network that was trained; read only if asked for."""
EXPECTED = ("head.", "decoder", "mask_token", "masked_embed", "lm_head.", "cls_pt_layers.", "predictor")
"""Beginnings of the keys beside an encoder's own that may be dropped: heads, decoders, tokens that hide."""
HEADS = {1280: 16, 1408: 16}
"""Where a head has not 64 of the D dimensions: ViT-H and ViT-g. The tensors do not say how many heads there are."""
MOCO_HEADS = {384: 12}  # MoCo-v3's own ViT-S
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of the pixels in all these programs
FIRST = "patch_embed.proj.weight"


def encoder(saved: Mapping[str, Any], *, key: str | None = None, heads: int | None = None) -> tuple[Encoder, str]:
    """The encoder in a published file's content, and one line that says what was made of it.

    ``key`` names the entry that holds the weights, or the network among several there; ``heads`` is needed where the
    file does not say. Raises ValueError in one line, naming the keys.
    """
    state, entry = weights(saved, key)
    if moco.prefixes(state):
        return moco.encoder(state, key=None if key == entry else key)
    state, prefix, left = network(state, key)
    if key not in (None, entry, *prefix.split(".")):
        raise ValueError(f"checkpoint_key={key}: neither an entry nor a network; it holds {_few(saved)}")
    state, dropped = split(state)
    kind, name, kwargs = sizes(state, entry, prefix, dropped, heads)
    state = {re.sub(r"^fc_norm\.", "norm.", k): v for k, v in state.items()}
    built = models.build(name, kwargs)
    fill(built, state, f"our {name} ({kind}; for other networks there is timm:NAME@FILE)")
    built.mean, built.std = IMAGENET
    also = sorted({k.split(".")[0] for k in (*left, *dropped)})
    side = f"{built.image_size} x {built.image_size} pixels"
    words = (
        f"{kind}: {entry or 'all'}{f', below {prefix}' if prefix else ''}; depth {built.depth}, width {built.width}, "
        f"{built.heads} heads, patch {kwargs['patch_size']}, {side}"
        f"{'' if built.has_cls else ', no class token'}; dropped: {', '.join(also) or 'nothing'}"
    )
    return built, words


def weights(saved: Mapping[str, Any], key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file's content, and the entry's name ("" where the file is one)."""
    inside = {
        k: v for k, v in saved.items() if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())
    }
    if key in inside:
        return _tensors(inside[key]), key
    for entry in ENTRIES:
        if entry in inside:
            return _tensors(inside[entry]), entry
    if not inside and any(isinstance(t, Tensor) for t in saved.values()):
        return _tensors(saved), ""
    found = f"holds {_few(saved)}" if saved else "is empty"
    raise ValueError(f"no weights: it {found}; expected a state dict, or one under {', '.join(ENTRIES)}")


def network(state: dict[str, Tensor], key: str | None = None) -> tuple[dict[str, Tensor], str, list[str]]:
    """Of several networks in a state dict the encoder, without its prefix; that prefix; and the keys of the others."""
    if any(k.endswith("pos_embed.pos_embeds") for k in state):
        state = lmim.ours(state)
    prefixes = [k.removesuffix(FIRST) for k in state if k.endswith(FIRST) and (k == FIRST or k[-len(FIRST) - 1] == ".")]
    if not prefixes:
        raise ValueError(f"no vision transformer: no {FIRST} among {_few(state)}")
    trained = [p for p in prefixes if not p.endswith(AVERAGED)] or prefixes
    asked = [p for p in prefixes if key in p.split(".")]
    if len(asked or trained) > 1:
        raise ValueError(f"several encoders: {', '.join(prefixes)}; say which with checkpoint_key")
    prefix = (asked or trained)[0]
    left = [k.removeprefix("module.") for k in state if not k.startswith(prefix)]
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, prefix, left


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's own tensors, and those that may be dropped."""
    dropped = {k: v for k, v in state.items() if k.startswith(EXPECTED)}
    return {k: v for k, v in state.items() if k not in dropped}, dropped


def sizes(
    state: Mapping[str, Tensor], entry: str, prefix: str, dropped: Mapping[str, Tensor], heads: int | None
) -> tuple[str, str, dict[str, Plain]]:
    """What the file is called, and the name and arguments of our encoder that fits it."""
    first = state[FIRST]
    if first.ndim != 4 or first.shape[1] != 3 or first.shape[2] != first.shape[3]:
        raise ValueError(f"{FIRST} has the shape {tuple(first.shape)}: expected (width, 3, patch, patch)")
    width, patch = first.shape[0], first.shape[2]
    depth = 1 + max((int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)), default=-1)
    if not depth or "blocks.0.mlp.fc1.weight" not in state:
        raise ValueError(f"no vision transformer: no blocks.0.mlp.fc1.weight among {_few(state)}")
    cls = "cls_token" in state
    kwargs: dict[str, Plain] = {"dim": width, "depth": depth, "patch_size": patch}
    kwargs["mlp_ratio"] = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    table = next((v for k, v in state.items() if k.endswith("relative_position_bias_table")), None)
    if table is not None:  # SimMIM, BEiT
        kwargs |= {"heads": table.shape[1], "grid_size": (math.isqrt(len(table) - 3) + 1) // 2}
        kwargs["bias"] = "shared" if "rel_pos_bias.relative_position_bias_table" in state else "per_block"
        kwargs |= {"absolute": "pos_embed" in state, "mask_token": False}
        return ("SimMIM" if prefix.endswith("encoder.") else "BEiT"), "beit", kwargs
    if "pos_embed" not in state:
        raise ValueError(f"no table of positions, pos_embed, among {_few(state)}; not a plain vision transformer")
    rows = state["pos_embed"].shape[1]
    grid = kwargs["grid_size"] = math.isqrt(rows - cls)
    if grid**2 + cls != rows:
        raise ValueError(f"pos_embed has {rows} rows: not a square grid of patches")
    kind = kind_of(entry, prefix, dropped, cls)
    known = (
        (MOCO_HEADS if kind == "MoCo-v3" else {}).get(width) or HEADS.get(width) or (width % 64 == 0 and width // 64)
    )
    if not (heads or known):
        raise ValueError(f"width {width}: the file does not say how many heads; give heads=")
    return kind, "vit", {**kwargs, "heads": heads or known, "pos": "mae", "cls": cls}


def kind_of(entry: str, prefix: str, dropped: Mapping[str, Tensor], cls: bool) -> str:
    """Which program's file this looks like."""
    if "base_encoder." in prefix or "momentum_encoder." in prefix:
        return "MoCo-v3"
    if "backbone." in prefix or entry in ("teacher", "student"):
        return "DINO"
    if prefix.endswith("encoder."):
        return "Latent MIM"
    if any(k.startswith("decoder_") for k in dropped):
        return "MAE"
    return "plain ViT" if cls else "I-JEPA"


def fill(built: Encoder, state: Mapping[str, Tensor], what: str) -> None:
    """Load ``state``, all of it and nothing but; the names of what does not fit are the error."""
    wanted = built.state_dict()
    index = {k for k in (*wanted, *state) if k.endswith("relative_position_index")}  # follows from the grid
    missing, extra = set(wanted) - set(state) - index, set(state) - set(wanted) - index
    wrong = {k for k in set(wanted) & set(state) - index if wanted[k].shape != state[k].shape}
    problems = [f"{what} {_few(sorted(keys))}" for what, keys in (("missing", missing), ("unexpected", extra)) if keys]
    problems += [f"{k} is {tuple(state[k].shape)}, not {tuple(wanted[k].shape)}" for k in sorted(wrong)[:3]]
    if problems:
        raise ValueError(f"does not fit {what}: {'; '.join(problems)}")
    built.load_state_dict({k: state[k] if k not in index else wanted[k] for k in wanted})


def resized(encoder: Encoder, image_size: int) -> Encoder:
    """The same weights for square pictures of another side: position tables are stretched. Raises ValueError."""
    if image_size == encoder.image_size:
        return encoder
    state, kwargs = encoder.state_dict(), dict(encoder.kwargs)
    if encoder.name in ("timm_model", "resnet"):
        kwargs["image_size"] = image_size
    else:
        patch = encoder.image_size // encoder.grid[0]
        if image_size % patch or image_size < patch:
            raise ValueError(f"image_size={image_size}: must be a multiple of the patch size, {patch}")
        kwargs["grid_size"] = image_size // patch
        if kwargs.get("grid_columns"):
            raise ValueError(f"image_size={image_size}: the encoder is for pictures that are not square")
    built = models.build(encoder.name, kwargs)
    for name, value in built.state_dict().items():
        if name.endswith("relative_position_index"):
            state[name] = value
        elif name.endswith("relative_position_bias_table"):
            state[name] = stretched(state[name], built.grid)
        elif name.endswith("pos_embed") and value.shape != state[name].shape:
            state[name] = interpolated(state[name], value.shape[1] - built.grid[0] * built.grid[1], built.grid)
    try:
        built.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"image_size={image_size}: {' '.join(str(error).split())}") from None
    built.mean, built.std = encoder.mean, encoder.std
    return built


def stretched(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A table of relative positions (offsets + 3, H) for another grid: bicubic, the last three rows as they are."""
    side = math.isqrt(len(table) - 3)
    offsets = table[:-3].T.reshape(1, -1, side, side)
    offsets = F.interpolate(offsets, (2 * grid[0] - 1, 2 * grid[1] - 1), mode="bicubic", align_corners=False)
    return torch.cat([offsets[0].flatten(1).T, table[-3:]])


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items() if isinstance(v, Tensor)}


def _few(names: Any) -> str:
    names = [str(n) for n in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
