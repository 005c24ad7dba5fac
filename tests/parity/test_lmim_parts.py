"""Latent MIM's parts against the published ones: patches, positions, losses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.parity.stored import arrays, assert_close, cases
from workers.losses.patch import infonce_patches, norm_l2, pairwise_similarity
from workers.masking.patches import patchify, unpatchify
from workers.models.vit import sincos


@pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*patchify.npz"))
def test_patches_are_the_published_ones(path: Path) -> None:
    stored = arrays(path)
    sizes = next(v for k, v in stored.items() if k.startswith("meta"))
    for i, (_, patch, rows, _, gap) in enumerate(sizes.tolist()):
        jitter = (stored[f"c{i}_jitter_row"], stored[f"c{i}_jitter_col"]) if gap else None
        patches = patchify(stored[f"c{i}_images"], patch, gap, jitter)
        assert torch.equal(patches, stored[f"c{i}_patches"])
        assert torch.equal(unpatchify(patches, patch, rows), stored[f"c{i}_unpatchified"])


@pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*posembed.npz"))
def test_position_tables_are_the_published_ones_on_square_grids(path: Path) -> None:
    tables = {re.fullmatch(r"grid(\d+)x(\d+)_dim(\d+)", key): table for key, table in arrays(path).items()}
    sizes = {tuple(map(int, match.groups())): table for match, table in tables.items() if match}
    assert any(rows == columns for rows, columns, _ in sizes)
    for (rows, columns, dim), table in sizes.items():
        if rows == columns:  # theirs mixes up rows and columns on others
            assert_close(sincos(rows, columns, dim)[0], table, 1e-6)


@pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*losses.npz"))
def test_losses_and_their_gradients_are_the_published_ones(path: Path) -> None:
    stored = arrays(path, torch.float64)
    target, tau = stored["target"], stored["tau"].item()
    for name, loss in {
        "norm_l2": lambda y: norm_l2(y, target),
        "infonce_patches_unit": lambda y: infonce_patches(y, target, tau),
        "infonce_patches_raw": lambda y: infonce_patches(y, target, tau, standardise=False),
    }.items():
        prediction = stored["pred"].clone().requires_grad_()
        value = loss(prediction)
        value.backward()
        assert prediction.grad is not None
        assert_close(value, stored[f"loss_{name}"], 1e-9, name)
        assert_close(prediction.grad, stored[f"dpred_{name}"], 1e-9, name)


@pytest.mark.parametrize("path", cases("lmim_mixmask/lmim_*losses.npz"))
def test_similarities_are_the_published_ones(path: Path) -> None:
    stored = arrays(path, torch.float64)
    prediction, target = stored["pred"], stored["target"]
    assert_close(pairwise_similarity(prediction), stored["avg_pairwise_sim_pred"], 1e-9)
    assert_close(pairwise_similarity(prediction, target), stored["avg_pairwise_sim_cross"], 1e-9)
    for heads in range(1, prediction.shape[1] + 1):  # (B, heads, N, D); the file does not say how many
        if prediction.shape[1] % heads == 0:
            split = [x.unflatten(1, (heads, -1)) for x in (prediction, target)]
            if torch.allclose(pairwise_similarity(*split), stored["avg_pairwise_sim_4d"], rtol=1e-9):
                return
    raise AssertionError("no number of heads gives avg_pairwise_sim_4d")
