"""Poolings against slow versions written for the reader, and what reads them off an encoder."""

from __future__ import annotations

import math

import pytest
import torch

from workers import models
from workers.engine.frozen import Frozen, Reading, block_of
from workers.pooling import tokens as pooling
from workers.pooling.abmilp import AbMILP
from workers.pooling.tokens import pool

B, H, SIDE, D = 2, 3, 4, 6
N = SIDE * SIDE


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    return torch.randn(B, 1 + N, D), 2 * torch.randn(B, H, 1 + N, 1 + N)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_central_window_is_the_mean_over_rows_and_columns(drawn, k):
    tokens, _ = drawn
    grid = tokens[:, 1:].view(B, SIDE, SIDE, D)
    centre = SIDE // 2
    rows = range(centre - math.ceil(k / 2), centre + k // 2)
    expected = sum(grid[:, r, c] for r in rows for c in rows) / k**2
    torch.testing.assert_close(pool(tokens, f"cp{k}"), expected)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_central_queries_weigh_the_patches_they_look_at(drawn, k):
    tokens, logits = drawn
    attention = logits.softmax(-1)
    queries = [1 + q for q in pooling.window(N, k).tolist()]
    for b in range(B):
        m = sum(attention[b, h, q, 1:] for h in range(H) for q in queries) / (H * len(queries))
        m = m / (m.sum() + 1e-6)
        expected = sum(m[j] * tokens[b, 1 + j] for j in range(N)) / N
        torch.testing.assert_close(pool(tokens, f"ca{k}", logits)[b], expected)


def test_the_class_token_weighs_in_all_heads_or_in_the_most_selective(drawn):
    tokens, logits = drawn
    for b in range(B):
        rows = logits[b].softmax(-1)[:, 0, 1:]
        mean = rows.mean(0) / rows.mean(0).sum()
        torch.testing.assert_close(pool(tokens, "attn-mn", logits)[b], mean @ tokens[b, 1:])
        own = rows / rows.sum(1, keepdim=True)
        chosen = own[(-own * own.log()).sum(1).argmin()]
        torch.testing.assert_close(pool(tokens, "attn-lcte", logits)[b], chosen @ tokens[b, 1:])
        torch.testing.assert_close(pool(tokens, "dino", logits)[b], rows.mean(0) @ tokens[b, 1:] / N)


def test_both_is_one_after_the_other(drawn):
    tokens, _ = drawn
    assert torch.equal(pool(tokens, "both"), torch.cat([pool(tokens, "cls"), pool(tokens, "gap")], dim=1))


def test_a_class_token_that_looks_at_itself_alone_still_says_which_patches_it_prefers(drawn):
    """Published: what is left for the patches drowns in eps, and such a head passes for a selective one."""
    tokens, logits = drawn
    logits = logits.clone()
    logits[:, 0, 0] = 0.0  # even over the patches
    logits[:, 1, 0, 1:] = torch.linspace(0, 60, N)  # the selective head
    logits[:, 0, 0, 0] = 200.0
    found = pool(tokens, "attn-lcte", logits)
    torch.testing.assert_close(found, torch.linspace(0, 60, N).softmax(0) @ tokens[:, 1:])
    logits[:, :, 0, 0] = 200.0
    assert pool(tokens, "attn-mn", logits).isfinite().all()


def test_poolings_say_what_they_lack(drawn):
    tokens, _ = drawn
    with pytest.raises(ValueError, match="attention logits"):
        pool(tokens, "attn-mn")
    with pytest.raises(ValueError, match="choose one of cls, gap"):
        pool(tokens, "tcut-eig")
    with pytest.raises(ValueError, match="square grid of 15"):
        pool(tokens[:, :-1], "cp2")


def test_abmilp_of_even_scores_is_the_mean(drawn):
    tokens, _ = drawn
    for content, expected in (("patch", tokens[:, 1:].mean(1)), ("all", tokens.mean(1))):
        module = AbMILP(D, content=content)
        torch.nn.init.zeros_(module.attention_predictor[-1].weight)
        torch.testing.assert_close(module(tokens), expected)


def test_abmilps_table_is_not_trained():
    module = AbMILP(D, positions=torch.randn(1, 1 + N, D))
    assert "pos_embed" not in dict(module.named_parameters())
    assert module.pos_embed.shape == (1, N, D)


@pytest.mark.parametrize("cls", [True, False])
def test_one_pass_gives_what_one_by_one_would(cls):
    torch.manual_seed(0)
    kwargs = {"dim": 12, "depth": 3, "heads": 3, "patch_size": 4, "grid_size": 4, "cls": cls, "drop_path": 0.5}
    encoder = models.build("vit", kwargs).train()
    images = torch.randn(5, 3, 16, 16)
    kinds = [kind for kind in pooling.KINDS if kind != "dino" and (cls or kind not in pooling.NEED_CLS)]
    readings = [Reading(kind, block) for kind in [*kinds, "abmilp"] for block in (0, block_of(encoder, -1))]
    frozen = Frozen(encoder, readings)
    assert not encoder.training
    together = frozen(images)
    for reading in readings:
        alone = Frozen(encoder, [reading])(images)[reading]
        torch.testing.assert_close(together[reading], alone, rtol=1e-5, atol=1e-6)
        assert not alone.requires_grad
    unpacked = frozen.unpack(frozen.packed(images))
    assert all(torch.equal(unpacked[reading], together[reading]) for reading in readings)


def test_nothing_runs_after_the_last_block_that_is_read():
    encoder = models.build("vit", {"dim": 12, "depth": 4, "heads": 3, "patch_size": 4, "grid_size": 4})
    ran = []
    for i, block in enumerate(encoder.blocks):
        block.attn.proj.register_forward_hook(lambda *_, i=i: ran.append(i))
    images = torch.randn(2, 3, 16, 16)
    for kind in ("gap", "attn-mn"):
        frozen = Frozen(encoder, [Reading(kind, 1)])
        ran.clear()
        frozen(images)
        assert ran == [0, 1]
