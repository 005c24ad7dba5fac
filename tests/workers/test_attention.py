"""Attention statistics and patch clusters: formulas against slow versions, and the workers on small runs."""

from __future__ import annotations

import csv
import json
import math
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.main_attention_stats import Settings
from contract.settings.main_patch_clusters import Settings as ClusterSettings
from workers import main_attention_stats, models
from workers.engine.encoder import EncoderError, save_encoder
from workers.main_attention_stats import Chosen, Tally
from workers.main_patch_clusters import by_size, check, cut
from workers.pooling import attention

TINY = {"dim": 12, "depth": 3, "heads": 2, "patch_size": 4, "grid_size": 4}
DATA = {"name": "fake", "size": 16, "length": 96}


def encoder_with(**changes):
    torch.manual_seed(0)
    encoder = models.build("vit", {**TINY, **changes}).eval()
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight.mul_(3)  # else all attention is about even
    return encoder


def slow(logits, cls):
    """The published eight and our three, token by token, in double precision."""
    a = logits.double().softmax(-1)
    first, eps, t = int(cls), 1e-6, a.shape[-1]
    out = torch.zeros(*a.shape[:2], len(attention.names(cls)), dtype=torch.float64)
    for b in range(a.shape[0]):
        for h in range(a.shape[1]):
            m = a[b, h].tolist()
            s = [sum(row[first:]) for row in m]
            q = [[x / (z + eps) for x in row[first:]] for row, z in zip(m, s, strict=True)]
            p = [[x / z for x in row[first:]] for row, z in zip(m, s, strict=True)]
            published = [-sum(x * math.log(x + eps) for x in row) for row in q]
            exact = [-sum(x * math.log(x) for x in row) for row in p]
            over = range(first, t)

            def mean(values, over=over):
                return sum(values[i] for i in over) / len(over)

            patches = {
                "patch_self": mean([m[i][i] for i in range(t)]),
                "patch_self_adj": mean([m[i][i] / (s[i] + eps) for i in range(t)]),
                "pos_pos_entropy": mean(published),
                "patch_entropy": mean(exact),
            }
            own = {
                "cls_cls": m[0][0],
                "cls_cls_adj": m[0][0] / (s[0] + eps),
                "cls_patch": mean(m[0]),
                "patch_cls": mean([row[0] for row in m]),
                "cls_pos_entropy": published[0],
                "entropy": exact[0],
                "cls_to_patches": s[0],
            }
            out[b, h] = torch.tensor([(patches | own)[name] for name in attention.names(cls)])
    return out


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_statistics_are_the_formulas(cls, scale):
    logits = scale * torch.randn(3, 2, 7, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention.statistics(logits, cls).double(), slow(logits, cls), rtol=2e-5, atol=2e-6)


def test_entropy_survives_a_class_token_that_takes_everything():
    """The published one goes to zero, which reads as selective; its adjusted attention has no bound."""
    logits = torch.zeros(1, 1, 5, 5)
    logits[..., 0] = 60.0
    logits[..., 1:, 4] = 30.0
    found = dict(zip(attention.names(True), attention.statistics(logits)[0, 0].tolist(), strict=True))
    assert found["cls_pos_entropy"] < 1e-5
    assert found["cls_cls_adj"] > 9e5
    assert found["entropy"] == pytest.approx(math.log(4))
    assert found["patch_entropy"] < 1e-5
    assert math.log(found["cls_to_patches"]) == pytest.approx(math.log(4) - 60)


def test_the_saliency_of_a_picture_adds_up_to_one():
    logits = torch.randn(2, 3, 5, 5)
    by_cls, by_all = attention.saliency(logits), attention.saliency(logits, cls=False)
    assert by_cls.shape == (2, 3, 4)
    assert by_all.shape == (2, 3, 5)
    row = logits.softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(by_cls, row / row.sum(-1, keepdim=True))
    torch.testing.assert_close(by_all.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("cls", [True, False])
def test_a_tally_is_the_mean_over_pictures_in_any_batches(cls):
    encoder, images = encoder_with(cls=cls), torch.randn(7, 3, 16, 16)
    whole, parts = (Tally(encoder, torch.device("cpu")) for _ in range(2))
    tokens = whole.look(encoder, images)
    for batch in images.split([3, 3, 1]):
        parts.look(encoder, batch)
    one, other = whole.result(), parts.result()
    torch.testing.assert_close(one.per_head, other.per_head, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one.per_block, other.per_block, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tokens, encoder.tokens(images)[:, 0 if cls else 1 :], rtol=1e-4, atol=1e-4)
    for block, look in enumerate(encoder.look(images)):
        values = attention.statistics(look.logits, cls).double()
        torch.testing.assert_close(one.per_head[0, block], values.mean(0))
        torch.testing.assert_close(one.per_head[1, block], values.std(0, correction=0), rtol=1e-4, atol=1e-6)


def test_only_one_blocks_maps_are_held(monkeypatch):
    encoder = encoder_with(depth=6)
    alive, most = [], 0
    real = attention.statistics

    def counted(logits, cls):
        nonlocal most
        alive.append(weakref.ref(logits))
        most = max(most, sum(each() is not None for each in alive))
        return real(logits, cls)

    monkeypatch.setattr(main_attention_stats.attention, "statistics", counted)
    Tally(encoder, torch.device("cpu")).look(encoder, torch.randn(2, 3, 16, 16))
    assert len(alive) == 6
    assert most == 1


def test_the_first_pictures_of_each_class_are_chosen():
    chosen = Chosen(2, classes=3)
    labels = torch.tensor([0, 0, 1, 0, 3, 2, 1, 1, -1])
    index = torch.arange(9)
    for part in (slice(0, 4), slice(4, 9)):
        chosen.add(index[part, None].float(), labels[part], index[part])
    x, found = chosen.gathered(1)
    assert sorted(x[:, 0].int().tolist()) == [0, 1, 2, 5, 6]
    assert sorted(zip(found.tolist(), x[:, 0].int().tolist(), strict=True)) == [(0, 0), (0, 1), (1, 2), (1, 6), (2, 5)]


def test_groups_are_cuts_of_one_tree_and_the_largest_comes_first():
    torch.manual_seed(0)
    centres = torch.tensor([[5.0, 0], [0, 5], [-5, 0]])
    sizes = (4, 9, 6)
    x = torch.cat([c + 0.1 * torch.randn(n, 2) for c, n in zip(centres, sizes, strict=True)])
    found = cut(x, [2, 3], "ward")
    assert found[3].tolist() == [2] * 4 + [0] * 9 + [1] * 6
    assert all(len(set(found[2][found[3] == k])) == 1 for k in range(3))  # finer groups lie within coarser ones
    assert by_size(np.array([7, 3, 3, 7, 5])).tolist() == [0, 1, 1, 0, 2]


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        (Settings, "eval_crop", 0.0),
        (Settings, "tsne", -1),
        (Settings, "batch_size", 0),
        (ClusterSettings, "n_clusters", [1, 4]),
        (ClusterSettings, "n_clusters", []),
        (ClusterSettings, "number", 0),
    ],
)
def test_what_cannot_run_is_refused_at_launch(settings, key, value):
    with pytest.raises(SettingsError, match=key) as error:
        settings(worker="main_attention_stats", encoder="x", **{key: value})
    assert "\n" not in str(error.value)


def test_the_batch_size_is_no_part_of_the_identity():
    few, many = (Settings(worker="main_attention_stats", encoder="x", batch_size=n) for n in (4, 64))
    assert few.science() == many.science()


def pictures_in(folder):
    found = {}
    for path in sorted((folder / rundir.FIGURES).glob("*.png")):
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("L").getcolors()) > 10  # something is drawn
        found[path.stem] = path
    return set(found)


def test_two_processes_find_what_one_finds(tmp_path, make_run, work):
    save_encoder(tmp_path, encoder_with(), "test")
    finals, tables = [], []
    for name, processes, batch, drawn in (
        ("one", 1, 7, set()),
        ("two", 2, 5, {"attention_maps", "attention_heads", "tsne"}),
    ):
        folder = make_run(
            tmp_path / "main_attention_stats" / name,
            worker="main_attention_stats",
            encoder=str(tmp_path),
            data={**DATA, "length": 60},
            batch_size=batch,
            maps=2 if drawn else 0,
            tsne=3 if drawn else 0,
            env={"nproc": processes},
        )
        done = work(folder, processes)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "batch " in done.stdout
        assert pictures_in(folder) == {"attention"} | drawn
        finals.append(json.loads((folder / rundir.DONE).read_text())["metrics"])
        with np.load(folder / rundir.TABLES / "attention.npz") as stored:
            tables.append({key: stored[key] for key in stored.files})
    assert finals[0] == pytest.approx(finals[1], rel=1e-4, abs=1e-6)

    depth, heads = TINY["depth"], TINY["heads"]
    names = tables[0]["statistics"].tolist()
    assert names == list(attention.names(True))
    assert tables[0]["mean"].shape == tables[0]["std"].shape == (depth, heads, len(names))
    assert tables[0]["pictures"] == tables[1]["pictures"]
    with (tmp_path / "main_attention_stats" / "one" / rundir.TABLES / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == depth * (heads * len(names) + 2)
    last = [float(r["mean"]) for r in rows if r["block"] == str(depth - 1) and r["statistic"] == "entropy"]
    assert finals[0]["attention/entropy"] == finals[0][f"attention/entropy_b{depth - 1}"]
    assert finals[0]["attention/entropy"] == pytest.approx(sum(last) / heads)
    journal, _ = rundir.read_journal(tmp_path / "main_attention_stats" / "one" / rundir.METRICS)
    assert [line["step"] for line in journal] == list(range(depth))
    assert [line["attention/cls_cls"] for line in journal] == [
        finals[0][f"attention/cls_cls_b{b}"] for b in range(depth)
    ]


def test_an_encoder_without_a_class_token_has_the_statistics_of_its_patches(tmp_path, make_run, work):
    save_encoder(tmp_path, encoder_with(cls=False), "test")
    stats = make_run(tmp_path / "s", worker="main_attention_stats", encoder=str(tmp_path), data=DATA, tsne=0, maps=1)
    done = work(stats)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((stats / rundir.DONE).read_text())["metrics"]
    assert {key for key in metrics if "_b" not in key} == {
        f"attention/{name}" for name in (*attention.names(False), "patch_magnitude")
    }


def test_patch_clusters_are_drawn_beside_the_pictures(tmp_path, make_run, work):
    save_encoder(tmp_path, encoder_with(), "test")
    common = {"worker": "main_patch_clusters", "encoder": str(tmp_path), "data": DATA, "number": 3}
    folder = make_run(tmp_path / "c", **common, n_clusters=[3, 2], block=-2, final_norm="encoder")
    done = work(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pictures_in(folder) == {"patch_clusters", "patch_tsne"}
    metrics = json.loads((folder / rundir.DONE).read_text())["metrics"]
    assert set(metrics) == {f"clusters/silhouette_{k}" for k in ("2", "3", "all_2", "all_3")}
    with np.load(folder / rundir.TABLES / "patch_clusters.npz") as stored:
        assert stored["own_3"].shape == stored["all_2"].shape == (3, 16)
        assert set(stored["own_3"].flat) == {0, 1, 2}


def test_more_groups_than_patches_are_refused_in_one_line():
    check([2, 16], (4, 4))
    with pytest.raises(SettingsError, match=r"n_clusters=\[17\]: a picture has 16 patches") as error:
        check([17], (4, 4))
    assert "\n" not in str(error.value)


def test_an_encoder_without_attention_is_refused_in_one_line(monkeypatch):
    encoder = encoder_with()

    def none(_):
        raise ValueError("its attention is not that of a plain vision transformer")
        yield

    monkeypatch.setattr(encoder, "look", none)
    with pytest.raises(EncoderError, match="encoder=timm:x: its attention"):
        main_attention_stats.check(encoder, "timm:x")
