"""The published Latent MIM's configurations and state dicts, read into our module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from contract.settings.main_lmim import Settings
from workers import models
from workers.interop.lmim import our_name, ours
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
    method.load_state_dict(ours(state))
    return method


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
