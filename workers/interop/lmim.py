"""The names and shapes of the published Latent MIM (Wei, Gupta, Morgado; ECCV 2024)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def our_name(name: str) -> str:
    """Their name of a tensor -> ours."""
    name = re.sub(r"(^|encoder\.)embed\.", r"\1patch_embed.", name).replace("pos_embed.pos_embeds", "pos_embed")
    layer = re.search(r"encoder\.head\.(linear|norm)(\d+)", name)
    if layer:  # a projector's layers are numbered linear 0, norm 1, GELU 2, linear 3, ...
        number = 3 * int(layer[2]) + (layer[1] == "norm")
        name = name.replace(layer[0], f"projector.{number}")
    return name


def ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our names and in our shapes: a patch is embedded from (row, column, channel)."""
    out = {}
    for name, value in state.items():
        if name.endswith("embed.proj.weight"):
            patch = round((value.shape[1] / 3) ** 0.5)
            value = value.reshape(len(value), patch, patch, 3).permute(0, 3, 1, 2)
        if name.endswith("pos_embeds"):
            value = value[None]
        out[our_name(name)] = value
    return out
