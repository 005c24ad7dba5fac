"""Attention statistics against the published ones: fixed maps, a ViT, a SimMIM encoder, a whole validation split."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.stored import arrays, cases, facts, part
from workers import models
from workers.main_attention_stats import Tally
from workers.models import Encoder
from workers.pooling import attention

TOLERANCE = 1e-5  # of |x - y| / (1 + |y|)
LOWEST = -1e4  # a logit whose weight is 0 beside one of 0
TOKEN_KINDS = ("diagonal", "adjusted", "cls_row", "cls_column", "pos_entropy")  # in the stored order


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    error = ((actual - expected).abs() / (1 + expected.abs())).max().item()
    assert error <= TOLERANCE, f"{what}: off by {error:.3g}"


def encoder_of(state: dict[str, Tensor], heads: int) -> Encoder:
    """The encoder that a stored state dict belongs to, its sizes read from the tensors."""
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key)))
    kwargs: dict[str, models.Plain] = {"dim": dim, "depth": depth, "heads": heads, "patch_size": patch}
    index = next((v for k, v in state.items() if k.endswith("relative_position_index")), None)
    tokens = state["pos_embed"].shape[1] if index is None else len(index)
    kwargs["grid_size"] = round((tokens - 1) ** 0.5)
    if index is None:
        encoder = models.build("vit", kwargs)
    else:
        shared = any(key.startswith("rel_pos_bias") for key in state)
        extra: dict[str, models.Plain] = {"bias": "shared" if shared else "per_block", "mask_token": False}
        encoder = models.build("beit", kwargs | extra)
    encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    return encoder.eval()


@torch.no_grad()
def looked(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token and block the five numbers (5, B, L, H, T) and the two norms (2, B, L, T)."""
    numbers, norms = [], []
    for look in encoder.look(images):
        found = attention.per_token(look.logits)
        numbers.append(torch.stack([found[kind] for kind in TOKEN_KINDS]))
        norms.append(torch.stack([look.input.norm(dim=-1), look.branch.norm(dim=-1)]))
    return torch.stack(numbers, 2), torch.stack(norms, 2)


@pytest.mark.parametrize("path", cases("beyond_cls/attention_maps.safetensors"))
def test_any_map_has_the_published_statistics(path: Path) -> None:
    stored = arrays(path)
    maps = [key.removesuffix(".attn") for key in stored if key.endswith(".attn")]
    assert maps
    for name in maps:
        logits = stored[f"{name}.attn"].log().clamp_min(LOWEST)
        found = attention.per_token(logits)
        numbers = torch.stack([found[kind] for kind in TOKEN_KINDS])
        assert_near(numbers, stored[f"{name}.stats"].squeeze(2), name)
        eight = attention.statistics(logits)[..., : len(attention.PUBLISHED)]
        assert_near(eight, stored[f"{name}.eight"], name)


@pytest.mark.parametrize("path", cases("beyond_cls/vit.safetensors"))
def test_every_token_of_a_vit_has_the_published_numbers(path: Path) -> None:
    stored, meta = arrays(path), facts(path.with_name("vit_meta.json"))
    numbers, norms = looked(encoder_of(part(stored, "sd."), meta["heads"]), stored["input"])
    assert_near(numbers, stored["stats"], "stats")
    assert_near(norms, stored["magnitudes"], "magnitudes")


@pytest.mark.parametrize("path", cases("beyond_cls/simmim_features.safetensors"))
def test_every_token_of_a_simmim_encoder_has_the_published_numbers(path: Path) -> None:
    stored = arrays(path)
    variants = [key.removesuffix(".stats") for key in stored if key.endswith(".stats")]
    assert variants
    for name in variants:
        heads = stored[f"{name}.stats"].shape[3]
        numbers, norms = looked(encoder_of(part(stored, f"{name}.sd."), heads), stored["imgs"])
        assert_near(numbers, stored[f"{name}.stats"], f"{name}.stats")
        assert_near(norms, stored[f"{name}.magnitudes"], f"{name}.magnitudes")


@pytest.mark.parametrize("path", cases("beyond_cls/attention_stats.safetensors"))
def test_a_split_has_the_published_averages(path: Path) -> None:
    stored, meta = arrays(path), facts(path.with_name("attention_stats_meta.json"))
    file, prefix = meta["model"].split()
    heads = stored["per_block_head"].shape[1]
    encoder = encoder_of(part(arrays(path.with_name(file)), prefix.rstrip("*")), heads)
    tally = Tally(encoder, torch.device("cpu"))
    features = [tally.look(encoder, batch)[:, 0] for batch in stored["images"].split(meta["batches"])]
    table, eight = tally.result(), len(attention.PUBLISHED)

    assert table.seen == len(stored["images"])
    assert_near(torch.cat(features), stored["features"], "features")
    assert_near(table.per_head[0, ..., :eight].float(), stored["per_block_head"], "per_block_head")
    assert_near(table.per_head[1, ..., :eight].float(), stored["per_image"].std(0, correction=0), "std")
    assert_near(table.per_block[0].float(), stored["per_block_magnitude"], "per_block_magnitude")
    assert_near(table.per_block[1].float(), stored["per_image_magnitude"].std(0, correction=0), "std of magnitudes")
    means = table.means()
    found = torch.stack([means[name] for name in attention.PUBLISHED], -1).float()
    assert_near(found, stored["per_block"], "per_block")
    logged = torch.tensor([[row[f"test_attn/{name}"] for name in meta["stat_names"]] for row in meta["logged"]])
    assert_near(found, logged, "what the published program logs")
