"""Is this installation complete? Each line that is not ok says how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from contract.rundir import find_runs
from launcher import CONFIGS, plan

PACKAGES = {
    "launching": (("hydra", "omegaconf", "yaml", "rich", "submitit"), "pip install sightline"),
    "training": (("torch", "torchvision", "timm", "safetensors", "PIL", "mlxtend"), "pip install 'sightline[train]'"),
    "analysis": (
        ("mlflow", "pandas", "pyarrow", "scipy", "statsmodels", "matplotlib"),
        "pip install 'sightline[analysis]'",
    ),
}
FREE_GB = 5

Line = tuple[bool, str, str]
"""Is it all right, what was looked at, how to mend it."""


def main(output_dir: Path) -> int:
    bad = 0
    for good, what, cure in checks(output_dir):
        bad += not good
        print(f"{'ok  ' if good else 'MEND'}  {what}" + ("" if good else f": {cure}"))
    return 2 if bad else 0


def checks(output_dir: Path) -> Iterator[Line]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield sys.version_info >= (3, 10), f"python {version}", "3.10 or newer is needed"
    for use, (names, cure) in PACKAGES.items():
        missing = [n for n in names if importlib.util.find_spec(n) is None]
        yield not missing, f"{use}: {', '.join(missing) + ' missing' if missing else 'all packages'}", cure
    yield from _configs()
    gpus = plan.visible_gpus()
    yield True, f"{len(os.sched_getaffinity(0))} cores, {len(gpus)} GPUs", ""
    yield from _output(output_dir)
    for name, command in (("slurm", "sbatch"), ("lsf", "bsub")):
        found = shutil.which(command)
        yield True, f"{name}: {found or 'not on this machine'}", ""


def _configs() -> Iterator[Line]:
    for path in sorted(CONFIGS.glob("**/*.yaml")):
        try:
            values = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            yield False, f"{path}", " ".join(str(error).split())
            continue
        data_path = values.get("data_path") if isinstance(values, dict) else None
        if data_path and "${" not in str(data_path) and not Path(str(data_path)).is_dir():
            yield False, f"{path}: data_path {data_path} is not there", "put the data there, or say data_path=FOLDER"
    yield True, f"configs in {CONFIGS}", ""


def _output(output_dir: Path) -> Iterator[Line]:
    near = next(p for p in (output_dir, *output_dir.parents) if p.exists())
    free = shutil.disk_usage(near).free / 2**30
    yield os.access(near, os.W_OK), f"{output_dir} can be written", f"make {near} writable, or say output_dir=DIR"
    yield (
        free >= FREE_GB,
        f"{free:.0f} GB free for {output_dir}",
        "free some, or say output_dir=DIR",
    )
    runs = sum(1 for _ in find_runs(output_dir))
    store = output_dir / "mlflow.db"
    there = store.exists() or not runs
    yield (
        there,
        f"store: {store}" if store.exists() else f"store: none yet for {runs} runs",
        "python launcher.py ingest",
    )
