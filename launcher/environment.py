"""What a run ran in: packages, interpreter, kernel, CPU, GPUs, container, thread counts. Standard library only.

The supervisor, which is started by the interpreter that starts the worker, writes ``environment.HASH.json`` into the
run directory, once for each environment that the run was in; the start record of every attempt names its hash. The
host is in that record and not in the hash, so that two equal nodes are one environment.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from contract import rundir

MATTER = ("torch", "torchvision", "timm", "numpy")  # a cell should not mix these
VARIABLES = (  # what libraries take from the shell, and compute otherwise by
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "KMP_AFFINITY", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
IMAGES = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")  # what a container's runtime says of itself
ASK_S = 5.0  # how long the driver's tool may take
SAID = re.compile(r"(?P<name>[A-Za-z0-9][\w.]*)-(?P<version>[^-]+?)(-py[\d.]+)?\.(dist-info|egg-info)")


def here(
    threads: int, processes: int = 1, loaders: int = 0, gpus: bool = True, image: str | None = None
) -> Environment:
    """This machine, for a run of ``processes`` of so many threads (and loader processes) each. Some milliseconds; with
    ``gpus``, and where there are any, as long as the driver's tool takes."""
    driver, names = _gpus() if gpus else (None, ())
    system = os.uname()
    return {
        "python": platform.python_version(),
        "packages": dict(_packages()),
        "kernel": f"{system.sysname} {system.release} {system.machine}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "cpu": _cpu(),
        "gpus": list(names),
        "driver": driver,
        "container": image or next((os.environ[name] for name in IMAGES if name in os.environ), None),
        "threads": threads,
        "processes": processes,
        "loader_processes": loaders,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


Environment = dict[str, Any]
"""As in ``environment.HASH.json``: texts and numbers by name, ``packages`` and ``variables`` by name again."""


def digest(environment: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(environment, sort_keys=True).encode(), digest_size=4).hexdigest()


def keep(folder: Path, environment: Mapping[str, Any]) -> str:
    """Written down in a run directory, unless it is there. Gives the hash; a full disk does not stop a run."""
    name = digest(environment)
    path = rundir.environment_file(folder, name)
    if not path.exists():
        with contextlib.suppress(OSError):
            rundir.write_json(path, environment, sync=False)
    return name


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, old, new), what changes results first."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = sorted({*before, *after}, key=lambda key: (not _matters(key), key))
    found = ((key, before.get(key, "none"), after.get(key, "none")) for key in keys)
    return [each for each in found if each[1] != each[2]]


def matters(environment: Mapping[str, Any]) -> dict[str, str]:
    """What a cell should not mix. On GPUs the threads do not change a result."""
    left_out = {"threads"} if environment.get("gpus") else set()
    found = {key: value for key, value in _flat(environment) if _matters(key) and key not in left_out}
    return dict.fromkeys(MATTER, "none") | found


def _matters(key: str) -> bool:
    return key in MATTER or key in ("gpus", "threads", "processes")


def _flat(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names of packages and variables stand for themselves."""
    for key, value in environment.items():
        if isinstance(value, Mapping):
            yield from ((str(name), str(each)) for name, each in value.items())
        elif isinstance(value, list):
            yield key, ", ".join(map(str, value)) or "none"
        elif value is not None:
            yield key, str(value)


# -- this machine -----------------------------------------------------------------------------------------------------


@functools.cache
def _packages() -> tuple[tuple[str, str], ...]:
    """Name and version of what is installed, from the names of folders: reading the metadata takes a hundred times as
    long. As for ``import``, the first on the path counts."""
    found: dict[str, str] = {}
    for place in sys.path:
        with contextlib.suppress(OSError), os.scandir(place or ".") as entries:
            for entry in entries:
                if match := SAID.fullmatch(entry.name):
                    found.setdefault(re.sub(r"[-_.]+", "-", match["name"]).lower(), match["version"])
    return tuple(sorted(found.items()))


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model", "cpu\t")):
                return line.partition(":")[2].strip()
    return platform.machine()


@functools.cache
def _gpus() -> tuple[str | None, tuple[str, ...]]:
    """The driver's version and the names of the GPUs that CUDA_VISIBLE_DEVICES leaves."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None, ()
    ask = ["nvidia-smi", "--query-gpu=index,uuid,driver_version,name", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, ()
    rows = [[each.strip() for each in line.split(",", 3)] for line in said.splitlines() if line.count(",") >= 3]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [each.strip() for each in visible.split(",")]
    used = [
        r for r in rows if wanted is None or r[0] in wanted or any(r[1].startswith(w) for w in wanted if len(w) > 4)
    ]
    return (rows[0][2] if rows else None), tuple(r[3] for r in used)
