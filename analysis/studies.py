"""Which tables a run has a part in: its studies, rows and columns, from the manifests in ``OUTPUT_DIR/studies``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.runs import Tell, to_stderr
from contract import rundir


@dataclass
class Part:
    """Of one run: by study, the rows and columns whose cells it is in; the rows too that are built upon it."""

    rows: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)

    @property
    def studies(self) -> str:
        return ", ".join(sorted(self.rows))

    def named(self, which: Mapping[str, Sequence[str]]) -> str:
        """``row, row``; with the study in front where there are several."""
        several = len(self.rows) > 1
        return "; ".join((f"{s}: " if several else "") + ", ".join(which[s]) for s in sorted(which) if which[s])


def parts(output_dir: Path, tell: Tell = to_stderr) -> dict[str, Part]:
    """By identity. A manifest that cannot be read is told and left out."""
    found: dict[str, Part] = {}
    for path in sorted(output_dir.glob("studies/*.json")):
        try:
            said = rundir.read_json(path)
            _add(found, str(said["name"]), said)
        except (rundir.RunDirError, KeyError, TypeError, AttributeError) as error:
            tell(f"{path}: not a study's manifest ({error}); left out")
    return found


def _add(found: dict[str, Part], name: str, said: Mapping[str, Any]) -> None:
    parents: Mapping[str, Sequence[str]] = said.get("parents") or {}
    for identity in said["identities"]:
        found.setdefault(str(identity), Part()).rows.setdefault(name, [])
    for cell in said["cells"]:
        todo = [str(run["identity"]) for run in cell["runs"]]
        for identity in todo:
            _once(found.setdefault(identity, Part()).columns.setdefault(name, []), [str(cell["column"])])
        while todo:
            identity = todo.pop()
            _once(found.setdefault(identity, Part()).rows.setdefault(name, []), [str(cell["row"])])
            todo += parents.get(identity, ())


def _once(names: list[str], more: Iterable[str]) -> None:
    names += [each for each in more if each not in names]
