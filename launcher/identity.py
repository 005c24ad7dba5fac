"""What makes two runs the same run: settings that are science, the data, the files read, the runs built upon."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import contract.settings
from contract import rundir
from contract.settings import Settings
from contract.settings.checks import SettingsError
from contract.settings.resnet import NEW, Arch

ENCODERS = (
    "a run directory, an identity (or its beginning) under output_dir, a file of weights, timm:NAME[@FILE], new:ARCH"
)


def digest(value: Any) -> str:
    """12 hex digits that depend on the content alone, not on the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Input:
    """The encoder that an evaluation reads."""

    path: str  # what the worker is told
    identity: str
    group: str  # the identity, less the seed where a run made it
    parents: tuple[str, ...] = ()


@functools.cache
def takes_encoder(worker: str) -> bool:
    """Whether this worker's ``encoder`` is an input, and not the name of an architecture."""
    return any(f.name == "encoder" and f.type in ("str", str) for f in fields(contract.settings.of(worker)))


def find_encoder(named: str, output_dir: Path, key: str = "encoder") -> Input:
    """What the setting ``key`` names. Raises SettingsError, naming what is accepted."""
    path = Path(named).expanduser()
    try:
        if (path / rundir.RUN).is_file():
            return _run_input(path.resolve(), key, output_dir)
        if path.is_file():
            content = _content(path.resolve(), path.stat().st_mtime_ns)
            return Input(path=str(path.resolve()), identity=f"file:{content}", group=f"file:{content}")
    except OSError as error:  # a name too long for a file, a folder that may not be entered
        raise SettingsError(f"{key}={named}: {error.strerror}; expected {ENCODERS}") from None
    if re.fullmatch("[0-9a-f]{4,12}", named):
        match sorted(output_dir.glob(f"*/{named}*/{rundir.RUN}")):
            case [found]:
                return _run_input(found.parent.resolve(), key, output_dir)
            case [_, _, *_] as several:
                raise SettingsError(f"{key}={named}: several runs: {', '.join(p.parent.name for p in several)}")
    if named.startswith("timm:"):
        return _timm_input(named, key)
    if named.startswith(NEW):
        if named.removeprefix(NEW) not in get_args(Arch):
            raise SettingsError(contract.settings.unknown(key, named, (NEW + arch for arch in get_args(Arch))))
        return Input(path=named, identity=named, group=named)
    raise SettingsError(f"{key}={named}: not found; expected {ENCODERS}")


def _timm_input(named: str, key: str) -> Input:
    """A network of timm's, with the weights of its name or with those of a file, which are known by their content."""
    name, at, file = named.partition("@")
    if name == "timm:":
        raise SettingsError(f"{key}={named}: no name; expected {ENCODERS}")
    if not at:
        return Input(path=named, identity=named, group=named)
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise SettingsError(f"{key}={named}: no file {path}; expected {ENCODERS}")
    known = f"{name}@file:{_content(path, path.stat().st_mtime_ns)}"
    return Input(path=f"{name}@{path}", identity=known, group=known)


def _run_input(folder: Path, key: str, output_dir: Path) -> Input:
    run = rundir.read_run(folder)
    if not (folder / rundir.DONE).exists():
        raise SettingsError(f"{key}={folder}: not finished; finish that run first, or launch both with then=[...]")
    here = folder.parent.parent == output_dir.resolve()  # elsewhere it is a file like any other: nobody waits for it
    parents = (run["identity"],) if here else ()
    return Input(path=str(folder), identity=run["identity"], group=run["group"], parents=parents)


@functools.cache
def _content(path: Path, _mtime: int) -> str:
    with path.open("rb") as file:
        hashed = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def fingerprint(settings: Settings) -> str | None:
    """Which pictures, without a walk over them: as declared, else the class folders, else the path."""
    if settings.data.fingerprint is not None or settings.data_path is None:
        return settings.data.fingerprint
    return _classes(settings.data_path)


@functools.cache
def _classes(data_path: str) -> str:
    try:
        names = sorted(e.name for e in os.scandir(Path(data_path) / "train") if e.is_dir())
    except OSError:
        return f"path:{data_path}"
    return f"classes:{digest(names)}"
