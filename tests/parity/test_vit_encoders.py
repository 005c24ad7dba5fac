"""The vision transformers, their tables of positions and SimMIM's encoder, against the published programs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.stored import arrays, assert_close, cases, facts, part
from workers.interop import published
from workers.models import Encoder
from workers.models.beit import position_index
from workers.models.vit import interpolated, sincos

CLOSE, TABLE = 1e-4, 1e-6


def read(state: dict[str, Tensor], heads: int | None = None) -> Encoder:
    encoder, _ = published.encoder(state, heads=heads)
    return encoder.eval().requires_grad_(False)


def heads_beside(path: Path) -> int:
    (said,) = path.parent.glob("vit_meta.json")
    return int(facts(said)["heads"])


@pytest.mark.parametrize("path", cases("beyond_cls/vit.safetensors"))
def test_a_vit_gives_the_stored_tokens_after_every_block(path):
    stored = arrays(path)
    encoder, images = read(part(stored, "sd."), heads_beside(path)), stored["input"]
    said = facts(path.with_name(f"{path.stem}_meta.json"))
    assert [encoder.width, encoder.depth, encoder.image_size] == [said["D"], said["depth"], said["img"]]
    assert_close(encoder.embed(images), stored["tokens.embed"], CLOSE, "embedding")  # type: ignore[operator]
    wanted = part(stored, "tokens.block")
    assert len(wanted) == encoder.depth
    for name, tokens in wanted.items():
        assert_close(encoder.tokens(images, block=int(name)), tokens, CLOSE, f"block {name}")
        assert_close(
            encoder.tokens(images, block=int(name) - encoder.depth), tokens, CLOSE, f"block {name} from the end"
        )
    assert_close(encoder.tokens(images), stored["pool.raw"], CLOSE)


@pytest.mark.parametrize("path", cases("beyond_cls/vit.safetensors"))
def test_a_look_shows_the_stored_attention(path):
    stored = arrays(path)
    encoder = read(part(stored, "sd."), heads_beside(path))
    into, branch = stored["magnitudes"].unbind(0)
    for block, look in enumerate(encoder.look(stored["input"])):
        assert_close(look.logits.softmax(-1), stored[f"attn.block{block}"], CLOSE, f"attention {block}")
        assert_close(look.output, stored[f"tokens.block{block}"], CLOSE, f"output {block}")
        assert_close(look.input.norm(dim=-1), into[:, block], CLOSE, f"input {block}")
        assert_close(look.branch.norm(dim=-1), branch[:, block], CLOSE, f"branch {block}")


@pytest.mark.parametrize("path", cases("beyond_cls/vit_nocls.safetensors"))
def test_a_vit_without_class_token_puts_zeros_in_its_place(path):
    stored = arrays(path)
    encoder = read(part(stored, "sd."), heads_beside(path))
    tokens = encoder.tokens(stored["input"])
    assert not encoder.has_cls
    assert_close(tokens, stored["pool.raw"], CLOSE)
    assert torch.equal(tokens[:, 0], stored["pool.cls"])
    assert not encoder.final(tokens)[:, 0].any()


@pytest.mark.parametrize("path", cases("beyond_cls/simmim_features.safetensors"))
def test_simmims_encoder_gives_the_stored_tokens_and_attention(path):
    stored = arrays(path)
    images = stored["imgs"]
    kinds = {name.partition(".")[0] for name in stored if ".sd." in name}
    assert kinds
    for kind in kinds:
        wanted = part(stored, f"{kind}.")
        encoder = read(part(wanted, "sd."))
        assert_close(encoder.tokens(images), wanted["pool.raw"], CLOSE, kind)
        assert_close(encoder.tokens(images, block=0), wanted["pool_rb0.raw"], CLOSE, f"{kind}, first block")
        into, branch = wanted["magnitudes"].unbind(0)
        for block, look in enumerate(encoder.look(images)):
            assert_close(look.input.norm(dim=-1), into[:, block], CLOSE, f"{kind} input {block}")
            assert_close(look.branch.norm(dim=-1), branch[:, block], CLOSE, f"{kind} branch {block}")
            if f"attn.block{block}" in wanted:
                assert_close(look.logits.softmax(-1), wanted[f"attn.block{block}"], CLOSE, f"{kind} attention {block}")


@pytest.mark.parametrize("path", cases("beyond_cls/relative_position_index.safetensors"))
def test_relative_positions_have_the_stored_rows(path):
    for name, index in arrays(path).items():
        size = re.search(r"(\d+)x(\d+)", name)
        assert size is not None
        assert torch.equal(position_index(int(size[1]), int(size[2])), index), name


@pytest.mark.parametrize("path", cases("beyond_cls/pos_embed.safetensors"))
def test_tables_of_positions_are_the_stored_ones(path):
    stored = arrays(path)
    for name, table in part(stored, "sincos.").items():
        dim, grid, cls = map(int, re.findall(r"\d+", name))
        step = -(-dim // table.shape[-1])  # wide tables are stored with every so many columns
        found = sincos(grid, grid, dim, "mae")[0, 0 if cls else 1 :, ::step]
        assert_close(found, table, TABLE, name)
    for case in facts(path.with_name(f"{path.stem}_meta.json"))["interp"]:
        given, wanted = stored[f"{case['id']}.in"], stored[f"{case['id']}.out"]
        found = interpolated(given, case["extra_tokens"], (case["dst_grid"], case["dst_grid"]))
        assert_close(found, wanted, 1e-5, case["id"])
