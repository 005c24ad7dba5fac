"""Which code a worker runs, without importing it: the files that it imports among our own, and a hash of what they say.

Comments, docstrings and layout do not count. The hash decides *stale*; it never enters an identity.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import ROOT

PACKAGES = ("workers", "contract")


@dataclass(frozen=True)
class Code:
    hash: str
    files: Mapping[str, str]  # path below the root -> hash of what it says

    def changed(self, files: Mapping[str, str]) -> list[str]:
        """The paths whose content is not what ``files`` remembers."""
        return sorted(p for p in {*files, *self.files} if files.get(p) != self.files.get(p))


def code(worker: str, values: Iterable[str] = ()) -> Code:
    """``values`` are the settings' texts: where a name picks a module (``workers/data/NAME.py``), only it counts."""
    return _code(worker, frozenset(values) & _stems() | {worker})


@functools.cache
def _stems() -> frozenset[str]:
    return frozenset(p.stem for p in (ROOT / "workers").glob("*/*.py"))


@functools.cache
def _code(worker: str, named: frozenset[str]) -> Code:
    found: dict[Path, str] = {}
    todo = [f"workers.{worker}", f"contract.settings.{worker}"]
    while todo:
        for path in _files(todo.pop()):
            if path not in found:
                said = _read(path)
                found[path] = said.hash
                todo += said.imports
                for package in said.picks:
                    modules = {p.stem for p in (ROOT / package.replace(".", "/")).glob("*.py")} - {"__init__"}
                    todo += [f"{package}.{m}" for m in modules & named or modules]
    files = {p.relative_to(ROOT).as_posix(): h for p, h in sorted(found.items())}
    return Code(_hash("".join(f"{p} {h}\n" for p, h in files.items())), files)


def _files(module: str) -> Iterator[Path]:
    """The files that importing ``module`` runs: its packages and itself; nothing if it is not ours or no module."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return
    for n in range(1, len(parts) + 1):
        place = ROOT.joinpath(*parts[:n])
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                yield path


@dataclass(frozen=True)
class _Said:
    hash: str
    imports: tuple[str, ...]
    picks: tuple[str, ...]  # packages of which a module is chosen by name: import_module(f"workers.data.{name}")


@functools.cache
def _read(path: Path) -> _Said:
    tree = ast.parse(path.read_bytes(), filename=str(path))
    package = path.parent.relative_to(ROOT).parts
    imports: list[str] = []
    picks: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                imports += [a.name for a in node.names]
            case ast.ImportFrom():
                base = list(package[: len(package) + 1 - node.level]) if node.level else []
                base += node.module.split(".") if node.module else []
                imports += [".".join([*base, a.name]) for a in node.names]  # a module or a name in one: both are tried
            case ast.Call(
                func=ast.Attribute(attr="import_module"),
                args=[ast.JoinedStr(values=[ast.Constant(value=str(start)), *_])],
            ):
                picks.append(start.rstrip("."))
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                match node.body:
                    case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                        node.body = rest or [ast.Pass()]
    return _Said(_hash(ast.unparse(tree)), tuple(imports), tuple(picks))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
