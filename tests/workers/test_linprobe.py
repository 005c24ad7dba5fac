"""The probe worker: what its heads share, and that they share nothing else."""

from __future__ import annotations

import csv
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import contract.settings
import workers.data
from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.features import AbMILP, head
from contract.settings.main_linprobe import Settings
from workers import main_knn, main_linprobe, models
from workers.engine.encoder import save_encoder

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VIT = {"dim": 24, "depth": 3, "heads": 3, "patch_size": 4, "grid_size": 4}
COMMON = {
    "worker": "main_linprobe",
    "data": {"name": "fake", "size": 16, "length": 128, "classes": 4},
    "epochs": 4,
    "warmup_epochs": 1,
    "batch_size": 32,
    "eval_freq": 1,
    "log_every": 1,
}


@pytest.fixture
def encoder(tmp_path):
    return encoder_file(tmp_path / "encoder")


def encoder_file(folder: Path, **kwargs) -> str:
    torch.manual_seed(1)
    folder.mkdir()
    save_encoder(folder, models.build("vit", {**VIT, **kwargs}), "from-a-test")
    return str(folder / rundir.ENCODER)


@pytest.fixture
def probe(tmp_path, make_run, monkeypatch, encoder):
    """``probe("name", key=value)``: a run of the worker in this process. Returns its folder."""
    monkeypatch.setattr("workers.engine.run._start_log", lambda: None)

    def run(name: str, **values) -> Path:
        folder = tmp_path / "runs" / name
        make_run(folder, **{**COMMON, "encoder": encoder, **values})
        monkeypatch.setattr(sys, "argv", ["worker", str(folder)])
        main_linprobe.main()
        return folder

    return run


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / rundir.DONE).read_text())["metrics"]


def saved(folder: Path) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    return torch.load(folder / main_linprobe.HEADS, weights_only=True)["heads"]


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / rundir.METRICS).read_text().splitlines()]
    return [{key: value for key, value in each.items() if key != "time"} for each in found]


def assert_same(one, other, tolerance=2e-5):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def test_a_head_among_others_is_the_head_it_would_be_alone(probe):
    said = ["cls:0.1:lars", "gap:2.0", "abmilp:0.3:lars", "abmilp@1:0.3", "both@-2:0.5", "attn-mn:0.5:lars"]
    passes = {"augment": "mae", "cache_features": False}
    together = probe("together", heads=[*said, "gap:1e39"], **passes)
    for each in map(head, said):
        alone = probe(
            each.name,
            features=each.features,
            block=each.block,
            blr=each.blr,
            optimizer=each.optimizer or "sgd",
            **passes,
        )
        (own,) = saved(alone).values()
        assert_same(saved(together)[each.name]["last"], own["last"])
        assert metrics(together)[f"linprobe/top1_{each.name}"] == metrics(alone)["linprobe/top1"]
    each_one = [value for name, value in metrics(together).items() if name.startswith("linprobe/top1_")]
    assert len(each_one) == len(said) + 1
    assert metrics(together)["linprobe/top1"] == max(each_one)
    assert metrics(together)["linprobe/best_top1"] >= max(each_one)
    diverged = saved(together)["gap_lr1e39"]["last"]  # and took no other with it
    assert not all(value.isfinite().all() for value in diverged.values())


def test_the_table_and_the_file_have_every_head_last_and_best(probe):
    folder = probe("r", heads=["gap", "cls:0.1:lars"])
    with (folder / rundir.TABLES / main_linprobe.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["head"], row["optimizer"]) for row in rows] == [("gap", "sgd"), ("cls_lr0.1_lars", "lars")]
    evaluated = [line for line in lines(folder) if "linprobe/top1" in line]
    assert len(evaluated) == COMMON["epochs"]
    for row in rows:
        history = [line[f"linprobe/top1_{row['head']}"] for line in evaluated]
        assert float(row["best_top1"]) == max(history)
        assert float(row["top1"]) == history[-1]
        state = saved(folder)[row["head"]]
        assert state["last"].keys() == state["best"].keys()
        assert all(torch.equal(state["last"][key], state["best"][key]) for key in state["last"]) == (
            history.index(max(history)) == len(history) - 1
        )


@pytest.mark.parametrize("heads", [[], ["gap:0.5", "abmilp:0.2:lars", "ca2@0"]], ids=["one", "several"])
def test_a_probe_that_was_stopped_ends_as_one_that_was_not(probe, monkeypatch, heads):
    whole = probe("whole", heads=heads)
    monkeypatch.setattr("workers.engine.fit.LOOK_EVERY_S", 0.0)
    calls = []

    def stop(_):
        calls.append(1)
        return len(calls) in (2, 9)

    monkeypatch.setattr("workers.engine.run.Run.stop", stop)
    for _ in range(3):
        stopped = probe("stopped", heads=heads)
    assert lines(stopped) == lines(whole)
    assert metrics(stopped) == metrics(whole)
    for name, states in saved(whole).items():
        for when in ("last", "best"):
            assert_same(saved(stopped)[name][when], states[when], 0)


def test_cached_features_train_the_same_heads_as_the_encoder_does(probe):
    said = {"heads": ["gap", "both@0", "abmilp:0.3:lars", "attn-lcte"], "batch_size": 16}
    cached, live = probe("cached", **said), probe("live", **said, cache_features=False)
    for name, states in saved(live).items():
        assert_same(saved(cached)[name]["last"], states["last"], 1e-4)


def test_features_that_do_not_fit_are_refused_with_their_size(probe, caplog):
    says = refused(probe, caplog, features="abmilp", cache_gb=1e-4)
    assert "GB" in says and "cache_features=false" in says


def test_dino_weighs_by_the_oracle_and_not_by_itself(probe, tmp_path):
    torch.manual_seed(5)
    other = encoder_file(tmp_path / "oracle", depth=2)
    folder = probe("dino", heads=["dino:0.5", "gap:0.5"], oracle=other)
    assert 0 <= metrics(folder)["linprobe/top1_dino_lr0.5"] <= 1


def test_final_norm_is_the_encoders(probe):
    plain, normed = (probe(which, features="cls", final_norm=which) for which in ("none", "encoder"))
    assert metrics(plain)["linprobe/loss"] != metrics(normed)["linprobe/loss"]
    mean = next(iter(saved(normed).values()))["last"]["0.running_mean"]
    assert abs(mean.mean()) < 1e-5  # over the width, which the norm centred


def test_positions_are_stretched_for_bigger_pictures(probe):
    folder = probe("bigger", image_size=32, features="abmilp", abmilp={"cond": "pe"})
    assert 0 <= metrics(folder)["linprobe/top1"] <= 1


def test_a_network_without_attention_is_probed_at_any_stage(probe, tmp_path, caplog):
    folder = tmp_path / "resnet"
    folder.mkdir()
    kwargs = {"arch": "resnet10", "stem": "cifar", "image_size": 16}
    save_encoder(folder, models.build("resnet", kwargs), "from-a-test")
    found = metrics(probe("stages", encoder=str(folder), heads=["gap", "cls@1", "both@-2"]))
    assert {"linprobe/top1_gap", "linprobe/top1_cls_b1", "linprobe/top1_both_b-2"} < set(found)
    assert "no attention" in refused(probe, caplog, encoder=str(folder), features="attn-mn")


def test_few_shots_are_all_that_is_trained_on(probe):
    folder = probe("few", shots=8, batch_size=16, heads=["cls"])
    assert "linprobe/top1_cls" in metrics(folder)
    assert lines(folder)[-1]["of"] == COMMON["epochs"] * (8 * 4 // 16)


def test_neighbours_for_several_temperatures_and_any_pooling(probe, make_run, encoder, monkeypatch, tmp_path):
    def neighbours(name: str, **values) -> dict[str, float]:
        folder = make_run(tmp_path / name, worker="main_knn", encoder=encoder, data=COMMON["data"], k=[1, 5], **values)
        monkeypatch.setattr(sys, "argv", ["worker", str(folder)])
        main_knn.main()
        return metrics(folder)

    alone = neighbours("one", features="ca2", temperature=0.2)
    several = neighbours("two", features="ca2", temperatures=[0.2, 0.01])
    assert set(alone) == {"knn/loo1", "knn/top1_k1", "knn/top1_k5"}
    for k in (1, 5):
        assert several[f"knn/top1_k{k}_t0.2"] == alone[f"knn/top1_k{k}"]
    assert len(several) == 5
    few = neighbours("few", shots=1, block=0)
    assert set(few) == set(alone)


def test_classes_that_differ_between_the_splits_are_one_line(probe, caplog, monkeypatch):
    whole = workers.data.load

    def spoilt(name, split, root, **options):
        found = whole(name, split, root, **options)
        found.classes = found.classes[: 3 if split == "val" else 4]
        return found

    monkeypatch.setattr(workers.data, "load", spoilt)
    says = refused(probe, caplog, data={**COMMON["data"], "classes": 0, "name": "digits"})
    assert "train has 4 classes, val has 3" in says


def test_a_checkpoint_of_other_classes_is_one_line(probe, caplog):
    folder = probe("refused")
    (folder / rundir.DONE).unlink()
    says = refused(probe, caplog, data={**COMMON["data"], "classes": 7})
    assert "(4, 24)" in says and "(7, 24)" in says


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"block": 3}, "blocks -3 to 2"),
        ({"heads": ["gap", "cls@-4"]}, "blocks -3 to 2"),
        ({"features": "cp4", "without": {"grid_size": 3, "patch_size": 5}}, "central window"),
        ({"features": "cls", "without": {"cls": False}}, "no class token"),
        ({"features": "dino", "oracle": {"patch_size": 8, "grid_size": 2}}, "16 in (4, 4)"),
        ({"features": "dino", "oracle": {"cls": False}}, "class token: False"),
        ({"features": "attn-mn", "without": {"cls": False}}, "choose gap"),
        ({"features": "abmilp", "abmilp": {"content": "all"}, "without": {"cls": False}}, "content=patch"),
        ({"shots": 33}, "33"),
    ],
)
def test_what_the_encoder_or_the_data_cannot_give_is_one_line(probe, caplog, tmp_path, values, says):
    values = dict(values)
    if without := values.pop("without", None):
        values["encoder"] = encoder_file(tmp_path / "other", **without)
    if "oracle" in values:
        values["oracle"] = encoder_file(tmp_path / "oracle", **values["oracle"])
    assert says in refused(probe, caplog, **values)


@pytest.mark.parametrize("features", ["gap", "abmilp", "cp2", "ca1", "ca2"])
def test_an_encoder_without_class_token_is_probed_on_its_patches(probe, tmp_path, features):
    folder = probe("nocls", encoder=encoder_file(tmp_path / "nocls", cls=False), features=features)
    assert 0 <= metrics(folder)["linprobe/top1"] <= 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"features": "tcut-eig"}, "valid: cls, gap"),
        ({"heads": ["gapp"]}, "no pooling 'gapp'"),
        ({"heads": ["gap:fast"]}, "neither a rate"),
        ({"heads": ["gap:0.1:0.2"]}, "two of blr"),
        ({"heads": ["gap@x"]}, "no block 'x'"),
        ({"heads": ["gap:0.1", "gap:0.10"]}, "twice the same: gap_lr0.1"),
        ({"heads": ["gap:0.1"], "lr": 1.0}, "leave lr out"),
        ({"heads": ["gap:0.1", "cls:0.2"], "min_lr": 0.1}, "one floor"),
        ({"heads": ["gap", "cls"], "clip_grad": 1.0}, "clip_grad"),
        ({"features": "dino"}, "oracle"),
        ({"oracle": "x"}, "features=dino only"),
        ({"shots": 2, "fraction": 0.1}, "one of the two"),
        ({"shots": 0}, "at least 1"),
        ({"fraction": 1.5}, "(0, 1]"),
        ({"abmilp": {"depth": 0}}, "at least 1"),
        ({"abmilp": {"act": "gelu"}}, "valid: relu, tanh"),
        ({"augment": "mae"}, "cache_features=false"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_launch(values, says):
    with pytest.raises(SettingsError) as error:
        contract.settings.read({"worker": "main_linprobe", "encoder": "x", **values})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_identities_of_runs_from_before_the_heads_stay_what_they_were():
    settings = contract.settings.read({"worker": "main_linprobe", "encoder": "x"})
    settings.resolve_batch(1)
    assert set(settings.science()) == {
        *("worker", "seed", "data", "epochs", "warmup_epochs", "batch_size", "effective_batch_size", "blr", "lr"),
        *("weight_decay", "clip_grad", "amp", "encoder", "features", "optimizer", "min_lr", "augment"),
        *("cache_features", "eval_crop"),
    }


def test_two_processes_with_synchronised_norm_are_one_with_a_batch_of_both(make_run, work, probe, tmp_path, encoder):
    """Also: every picture is evaluated once, whatever the number of processes."""
    heads = ["gap:0.5", "abmilp:0.5:lars"]
    data = {**COMMON["data"], "length": 136}  # 34 to evaluate: 17 each, in batches of 256
    said = {**COMMON, "heads": heads, "data": data, "sync_bn": True, "epochs": 2}
    two = make_run(tmp_path / "two", **{**said, "encoder": encoder, "batch_size": 16, "env": {"nproc": 2}})
    done = work(two, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    one = probe("one", **said)
    for name, states in saved(one).items():
        assert_same(saved(two)[name]["last"], states["last"], 1e-4)
    assert metrics(two)["linprobe/loss"] == pytest.approx(metrics(one)["linprobe/loss"], rel=1e-4)
    assert (metrics(two)["linprobe/top1"] * 34) % 1 == pytest.approx(0, abs=1e-6)


def refused(probe, caplog, **values) -> str:
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as stop:
        probe("refused", **values)
    assert stop.value.code == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert "\n" not in said[0]
    return said[0]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_evaluates_in_the_same(probe, amp):
    plain, mixed = (probe(each, heads=["gap", "abmilp:0.5"], amp=each, cache_features=False) for each in ("none", amp))
    assert metrics(mixed)["linprobe/loss"] == pytest.approx(metrics(plain)["linprobe/loss"], rel=0.05)
    assert metrics(mixed)["linprobe/loss"] != metrics(plain)["linprobe/loss"]


def composed(*overrides: str) -> Settings:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("config", ["worker=main_linprobe", *overrides]), resolve=True)
    return contract.settings.read(values)


def test_the_published_headline_is_a_recipe():
    settings = composed("encoder=timm:vit_base_patch16_224.mae", "recipe=abmilp_imagenet")
    settings.resolve_batch(4)
    assert (settings.accum_iter, settings.batch_size, settings.peak_lr) == (2, 2048, pytest.approx(6.4))
    (only,) = settings.all_heads
    assert (only.features, settings.abmilp) == ("abmilp", AbMILP())


def test_heads_can_be_said_on_a_command_line_without_quotes_inside():
    settings = composed("encoder=x", "heads=[cls:0.1,gap@-2:1e-3:lars,attn-mn@1,abmilp]", "lr=null")
    names = [each.name for each in settings.all_heads]
    assert names == ["cls_lr0.1", "gap_b-2_lr0.001_lars", "attn-mn_b1", "abmilp"]
