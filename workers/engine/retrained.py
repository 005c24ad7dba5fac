"""A pretrained encoder that goes on learning: with drop path, learned positions, and perhaps at another size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contract.settings.checks import SettingsError
from workers import models
from workers.models import Encoder
from workers.models.vit import interpolated

from .encoder import load_encoder


def load_trainable(where: str, *, drop_path: float, input_size: int | None = None) -> Encoder:
    """The encoder of ``where``, its drop path rising from 0 to ``drop_path``, for square pictures of ``input_size``.

    A ``vit``'s table of positions is learned from here on; a ``beit``'s shared table of relative ones becomes one for
    every block (SimMIM's fine-tuning). Any other encoder is taken as it is, without drop path.
    """
    old = load_encoder(where)
    size = input_size or old.image_size
    changes: dict[str, models.Plain]
    if old.name == "vit":
        changes = {"learn_pos": True, "drop_path": drop_path, "drop_path_linear": True}
    elif old.name == "beit":
        changes = {"bias": "per_block", "drop_path": drop_path}
    elif drop_path or size != old.image_size:
        raise SettingsError(
            f"encoder={where}: a {old.name} is fine-tuned as it is; set drop_path=0 and input_size=null (it has "
            f"{old.image_size})"
        )
    else:
        return old.train().requires_grad_()

    patch = old.kwargs["patch_size"]
    assert isinstance(patch, int)
    if size % patch:
        raise SettingsError(f"input_size={size}: must be a multiple of the encoder's patches of {patch} pixels")
    if size != old.image_size:
        changes |= {"grid_size": size // patch}
        if old.kwargs.get("grid_columns") not in (None, old.kwargs["grid_size"]):
            raise SettingsError(f"input_size={size}: this encoder's grid is not square; leave input_size out")
    new = models.build(old.name, {**old.kwargs, **changes})
    new.mean, new.std = old.mean, old.std
    new.load_state_dict(_fitted(old.state_dict(), old, new))
    return new.train()


def _fitted(state: dict[str, Tensor], old: Encoder, new: Encoder) -> dict[str, Tensor]:
    """The state of ``old`` under the names and in the shapes of ``new``."""
    wanted = new.state_dict()
    prefix = "rel_pos_bias."
    shared = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    for number in range(new.depth):
        state |= {f"blocks.{number}.attn.{name}": value for name, value in shared.items()}
    for name, value in state.items():
        if name == "pos_embed":
            state[name] = interpolated(value, int(new.has_cls), new.grid)
        elif name.endswith("relative_position_index"):
            state[name] = wanted[name]
        elif name.endswith("relative_position_bias_table"):
            state[name] = stretched(value, old.grid, new.grid)
    return state


def stretched(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of relative positions ((2a - 1)(2b - 1) + 3, H) of an a x b grid for another grid, bicubic.

    The last three rows, which are the class token's, stay. SimMIM's own program samples it more densely near the
    centre; both leave it as it is where the grid is the same.
    """
    if old == new:
        return table
    before, after = ([2 * side - 1 for side in grid] for grid in (old, new))
    places, rest = table[:-3], table[-3:]
    square = places.T.reshape(1, -1, *before)
    moved = F.interpolate(square, after, mode="bicubic", align_corners=True)[0].flatten(1).T  # the ends stay the ends
    return torch.cat([moved, rest])
