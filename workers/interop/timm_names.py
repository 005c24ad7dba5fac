"""timm's names -> encoders: ours where a network is a plain vision transformer, else timm's own behind our face."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from workers.interop import published
from workers.models import Encoder
from workers.models.timm_model import TimmModel, create
from workers.models.vit import EPS, PRESETS, interpolated


def filled(name: str, saved: Mapping[str, Any], image_size: int | None, key: str | None = None) -> tuple[Encoder, str]:
    """The network ``name`` with a file's weights. Raises ValueError in one line."""
    state, entry = published.weights(saved, key)
    for prefix in ("module.", "_orig_mod.", "backbone."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    made = create(name, image_size)
    _fill(made, _at_size(state, made))
    return ours(made, f"from {entry or 'the file'}")


def _fill(made: TimmModel, state: dict[str, Tensor]) -> None:
    """Load all of ``state`` but a classifier. timm's own loading passes over surplus tensors; this does not."""
    network, name = made.model, made.kwargs["model"]
    convert = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
    try:
        state = dict(convert(state, network)) if convert is not None else state
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"does not fit timm's {name}: {' '.join(str(error).split())}") from None
    classifier = network.pretrained_cfg.get("classifier") or ()
    ends = tuple(f"{each}." for each in ([classifier] if isinstance(classifier, str) else classifier))
    state = {
        k: v for k, v in state.items() if not k.startswith((*ends, *published.EXPECTED)) or k in network.state_dict()
    }
    published.fill(made, {f"model.{k}": v for k, v in state.items()}, f"timm's {name}")


def cached(name: str) -> Path:
    """The file of ``name``'s own weights in the caches that timm uses. Raises ValueError, saying how to get it.

    It is not fetched here: nodes often have no network, and a job's processes would fetch it all at once.
    """
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that is none
        cfg = None
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        known = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}*")[:5])
        raise ValueError(f"timm {timm.__version__} has no weights of that name{known and '; it has '}{known}")
    places: list[Any] = []
    if cfg.hf_hub_id:
        hub = cfg.hf_hub_id if not cfg.hf_hub_id.endswith("/") else f"{cfg.hf_hub_id}{cfg.architecture}.{cfg.tag}"
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        places += [try_to_load_from_cache(hub, each) for each in names]
    if cfg.url:
        places.append(Path(torch.hub.get_dir()) / "checkpoints" / str(cfg.url).rpartition("/")[2])
    for place in places:
        if isinstance(place, str | Path) and Path(place).is_file():
            return Path(place)
    raise ValueError(
        "its weights are not in timm's cache; on a machine with a network and the same HF_HOME and TORCH_HOME run "
        f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\", or give encoder=timm:{name}@FILE"
    )


def ours(loaded: TimmModel, words: str) -> tuple[Encoder, str]:
    """Our ViT with the same weights where that is the same network, else ``loaded`` itself; and what was made."""
    network, name = loaded.model, loaded.kwargs["model"]
    said = f"timm's {name}, {words}; depth {loaded.depth}, width {loaded.width}, {loaded.image_size} pixels"
    if not is_plain(network):
        return loaded, f"{said}; as timm's own module"
    try:
        found, _ = published.encoder(network.state_dict(), heads=loaded.heads)
    except ValueError:
        return loaded, f"{said}; as timm's own module"
    found.mean, found.std = loaded.mean, loaded.std
    return found, f"{said}; as our vit"


def is_plain(network: Any) -> bool:
    """Whether a timm network computes what our ViT does, if its state dict has the same keys."""
    if type(network) is not VisionTransformer or not isinstance(network.norm_pre, nn.Identity):
        return False
    block: Any = network.blocks[0]
    act = block.mlp.act
    norms = [m for m in network.modules() if isinstance(m, nn.LayerNorm)]
    exact = (isinstance(act, nn.GELU) and act.approximate == "none") or type(act).__name__ == "GELU"
    return exact and type(block).__name__ == "Block" and all(n.eps == EPS for n in norms) and not network.no_embed_class


def _at_size(state: dict[str, Tensor], model: TimmModel) -> dict[str, Tensor]:
    """The position table stretched as MAE's and DINOv2's programs do it; timm would antialias."""
    table, wanted = state.get("pos_embed"), model.model.state_dict().get("pos_embed")
    if table is None or wanted is None or table.ndim != 3 or wanted.ndim != 3 or table.shape == wanted.shape:
        return state
    prefix = wanted.shape[1] - model.grid[0] * model.grid[1]
    return {**state, "pos_embed": interpolated(table, prefix, model.grid)}


def named(encoder: Encoder) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """What ``timm.create_model(NAME, checkpoint_path=FILE, **KWARGS)`` needs for the same features: NAME, KWARGS and
    the state dict to put into FILE. Raises ValueError for a network that timm does not have."""
    state, given = encoder.state_dict(), encoder.kwargs
    if isinstance(encoder, TimmModel):
        own = timm.get_pretrained_cfg(str(given["model"]))
        usual = encoder.any_size or (own and own.input_size[-1] == encoder.image_size)
        sized = {} if usual else {"img_size": encoder.image_size}
        return str(given["model"]), {"num_classes": 0, **sized}, {k.removeprefix("model."): v for k, v in state.items()}
    if encoder.name not in ("vit", "beit"):
        raise ValueError(f"encoder {encoder.name}: timm has no such network; choose format=safetensors or encoder")
    if encoder.grid[0] != encoder.grid[1]:
        raise ValueError(f"grid {encoder.grid[0]} x {encoder.grid[1]}: timm's tables of positions are square")
    sizes = {"embed_dim": encoder.width, "depth": encoder.depth, "num_heads": encoder.heads}
    patch, side, ratio = encoder.image_size // encoder.grid[0], encoder.image_size, given.get("mlp_ratio", 4.0)
    known = [k for k, v in PRESETS.items() if list(v.values()) == list(sizes.values())] if ratio == 4 else []
    kwargs: dict[str, Any] = {"num_classes": 0}
    name = f"{known[0] if known else 'vit_?'}_patch{patch}_{side}".replace("vit_", f"{encoder.name}_")
    if not timm.is_model(name):
        name = f"{encoder.name}_base_patch16_224"
        kwargs |= {"img_size": side, "patch_size": patch, "mlp_ratio": ratio, **sizes}
    if encoder.name == "beit":
        shared = given.get("bias", "shared") == "shared"
        kwargs |= {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared, "global_pool": "token"}
        kwargs |= {"use_abs_pos_emb": bool(given.get("absolute")), "init_values": 0.1}  # any scale: the file has it
        state = {k: v for k, v in state.items() if k != "mask_token" and not k.endswith("relative_position_index")}
    elif not encoder.has_cls:
        kwargs |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return name, kwargs, state
