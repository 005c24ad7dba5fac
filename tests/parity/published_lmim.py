"""The published Latent MIM's configurations and state dicts, read into our module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from contract.settings.main_lmim import Settings
from workers import models
from workers.main_lmim import Draws, LatentMIM
from workers.models.cross_decoder import CrossDecoder
from workers.models.vit import ViT


def module(config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype, **changes: Any) -> LatentMIM:
    """The method with the sizes of ``config`` and the weights of ``state``, in training mode."""
    c = {**config, **changes}
    kwargs = {
        "dim": c["embed_dim"],
        "depth": c["depth"],
        "heads": c["num_heads"],
        "mlp_ratio": c["mlp_ratio"],
        "patch_size": c["patch_size"],
        "grid_size": c["grid_size"],
        "learn_pos": not c["freeze_pe"],
    }
    encoder = models.build("vit", kwargs)
    assert isinstance(encoder, ViT)
    decoder = CrossDecoder(
        encoder.width,
        encoder.grid,
        dim=c["decoder_embed_dim"],
        depth=c["decoder_depth"],
        heads=c["decoder_num_heads"],
        mlp_ratio=c["mlp_ratio"],
        cues=c["avg_vis_mask_token"],
        learn_pos=not c["freeze_pe"],
    )
    names = ("num_vis", "patch_gap", "mlp_dim", "mlp_depth", "mask_target", "loss", "tau", "avg_sim_coeff")
    method = LatentMIM(encoder, decoder, **{name: c[name] for name in names}).to(dtype)
    method.load_state_dict(ours(state, c["patch_size"]))
    return method


def ours(state: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    """Their state dict under our names and shapes."""
    out = {}
    for name, value in state.items():
        if name.endswith("embed.proj.weight"):
            value = value.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
        if name.endswith("pos_embeds"):
            value = value[None]
        out[our_name(name)] = value
    return out


def our_name(name: str) -> str:
    name = re.sub(r"encoder\.embed\.", "encoder.patch_embed.", name).replace("pos_embed.pos_embeds", "pos_embed")
    layer = re.search(r"encoder\.head\.(linear|norm)(\d+)", name)
    if layer:  # a projector's layers are numbered linear 0, norm 1, GELU 2, linear 3, ...
        number = 3 * int(layer[2]) + (layer[1] == "norm")
        name = name.replace(layer[0], f"projector.{number}")
    return name


def named(method: LatentMIM, names: Iterable[str]) -> list[torch.nn.Parameter]:
    """Our parameters in the order of their names."""
    parameters = dict(method.named_parameters())
    return [parameters[our_name(name)] for name in names]


def draws(stored: dict[str, Tensor], index: int | None = None) -> Draws:
    """The stored random numbers, of one forward pass or of the micro-batch ``index``."""
    found = {k: v if index is None else v[index] for k, v in stored.items() if k.startswith(("jitter", "view_noise"))}
    jitter = (found["jitter_row"], found["jitter_col"]) if "jitter_row" in found else None
    return Draws(jitter, found["view_noise"])


def settings(**values: Any) -> Settings:
    return Settings(worker="main_lmim", **values)
