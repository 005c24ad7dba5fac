from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from analysis import attention
from contract import rundir

MakeRun = Callable[..., Path]
STATISTICS = ("cls_cls", "entropy", "patch_self", "patch_magnitude")


@pytest.fixture
def looked_at(make_run: MakeRun) -> MakeRun:
    """A finished run of main_attention_stats on the encoder of a run."""

    def make(identity: str, encoder: Path, blocks: int = 4, level: float = 1.0, seed: int = 0, **made: object) -> Path:
        parents = (encoder.name,)
        folder = make_run(identity, worker=attention.WORKER, stage="attention", seed=seed, parents=parents, **made)
        (folder / rundir.CONFIG).write_text(yaml.safe_dump({"worker": attention.WORKER, "encoder": str(encoder)}))
        journal = rundir.Journal(folder / rundir.METRICS)
        for block in range(blocks):
            values = {f"attention/{name}": level * (1 + block + 0.1 * seed + i) for i, name in enumerate(STATISTICS)}
            journal.append({"step": block, "of": blocks - 1, "time": 1.0, **values})
        journal.close()
        return folder

    return make


@pytest.fixture
def encoders(make_run: MakeRun) -> list[Path]:
    return [make_run(f"aaa{i}", worker="main_lmim", stage="pretrain", metrics={}) for i in range(2)]


def is_drawn(path: Path) -> bool:
    with Image.open(path) as picture:
        return min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 20


def test_encoders_are_compared_block_by_block(
    output_dir: Path, looked_at: MakeRun, encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [looked_at(f"bb{s}", encoders[0], seed=s, metrics={}) for s in range(3)]  # one group
    other = looked_at("cc0", encoders[1], blocks=6, level=0.1, metrics={})
    said = [*map(str, ours), f"a deeper one={other}"]
    assert attention.main([*said, "--output", str(tmp_path / "made")]) == 0
    out, _ = capsys.readouterr()
    assert max(map(len, out.partition(str(tmp_path))[0].splitlines())) <= 80
    assert "main_lmim/aaa0" in out
    assert "a deeper one" in out
    line = next(line for line in out.splitlines() if line.split()[:1] == ["cls_cls"])
    assert line.split() == ["cls_cls", "4.1", "±", "0.1", "0.6"]  # the last block of each
    assert is_drawn(tmp_path / "made" / "attention.png")
    assert (tmp_path / "made" / "attention.pdf").read_bytes().startswith(b"%PDF")
    with (tmp_path / "made" / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (4 + 6) * len(STATISTICS)
    first = rows[0]
    assert (first["encoder"], first["block"], first["statistic"]) == ("main_lmim/aaa0", "0", "cls_cls")
    assert float(first["mean"]) == pytest.approx(1.1)
    assert float(first["std"]) == pytest.approx(0.1)
    assert first["runs"] == "3"


def test_a_block_can_be_chosen_and_is_checked(
    looked_at: MakeRun, encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(looked_at("bb0", encoders[0], metrics={}))
    assert attention.main([run, "--output", str(tmp_path), "--block", "1"]) == 0
    assert "block 1" in capsys.readouterr().out
    assert attention.main([run, "--output", str(tmp_path), "--block", "4"]) == 2
    assert "choose -4 to 3" in capsys.readouterr().err


def test_a_study_gives_its_rows(
    output_dir: Path, make_study: Callable[..., Path], looked_at: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_study(rows=("random", "trained"), seeds=2)
    said = rundir.read_json(manifest)
    for r, row in enumerate(said["rows"]):
        made = [{"seed": s, "identity": f"dd{r}{s}", "worker": attention.WORKER, "state": "finished"} for s in range(2)]
        for each in made:
            encoder = output_dir / "main_lmim" / f"aaa{r}{each['seed']}"
            looked_at(each["identity"], encoder, seed=each["seed"], metrics={"attention/cls_cls": 0.1})
        said["cells"].append({"row": row, "column": "attention", "metric": "attention/cls_cls", "runs": made})
    said["columns"].append({"name": "attention", "stage": "attention", "metric": "attention/cls_cls"})
    rundir.write_json(manifest, said)
    assert attention.main(["--study", "demo", "--output-dir", str(output_dir)]) == 0
    out, err = capsys.readouterr()
    assert "random" in out
    assert "trained" in out
    assert not err
    assert is_drawn(output_dir / "figures" / "demo" / "attention.png")


def test_what_cannot_be_drawn_is_said_in_one_line(
    output_dir: Path, make_run: MakeRun, looked_at: MakeRun, encoders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = looked_at("bb0", encoders[0], blocks=0)
    assert attention.main([str(unfinished)]) == 0
    assert "nothing to draw yet" in capsys.readouterr().err
    assert attention.main([str(output_dir / "none")]) == 2
    assert attention.main(["--study", "none", "--output-dir", str(output_dir)]) == 2
    foreign = make_run("ee0", worker="main_lmim", stage="pretrain")
    assert attention.main([str(foreign)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3
    assert "names no encoder" in err[-1]
    with pytest.raises(SystemExit):
        attention.main([])
