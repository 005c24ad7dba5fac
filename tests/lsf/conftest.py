"""A stand-in for LSF that answers, and fails, as LSF does, and a house whose jobs go to it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.house import ROOT, House, build

COMMANDS = ("bsub", "bjobs", "bkill", "brequeue", "bstop", "bresume", "bhist")
CALL = """#!{python}
import sys
sys.path.insert(0, {root!r})
from tests.lsf.standin.commands import main
main({name!r}, sys.argv[1:])
"""


@dataclass
class Lsf:
    folder: Path
    daemon: subprocess.Popen | None = None

    @property
    def env(self) -> dict[str, str]:
        return {"FAKE_LSF_DIR": str(self.folder), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.lsf.standin.daemon"]
        self.daemon = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **self.env})

    def stop(self) -> None:
        (self.folder / "halt").touch()
        self.daemon.wait(20)
        (self.folder / "halt").unlink()

    def call(self, *words: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **self.env, **more}
        return subprocess.run(
            words, input=stdin, env=env, text=True, capture_output=True, timeout=60, check=False, cwd=self.folder
        )

    def fault(self, call: str, kind: str, times: int = 1, **more: object) -> None:
        path = self.folder / "faults.json"
        faults = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*faults, {"call": call, "kind": kind, "times": times, **more}]))

    def profile(self, **values: object) -> None:
        (self.folder / "profile.json").write_text(json.dumps(values))

    def state(self) -> dict:
        return json.loads((self.folder / "state.json").read_text())

    def change(self, stat: str, only: str | None = None) -> None:
        """What no command does: a host that cannot be reached (UNKWN), the system's own suspension (SSUSP)."""
        code = (
            "from tests.lsf.standin import state\n"
            "with state.opened() as now:\n"
            "    for job in now['jobs'].values():\n"
            "        for index, e in job['elements'].items():\n"
            f"            if e['stat'] not in ('DONE', 'EXIT', 'PEND') and {only!r} in (None, index):\n"
            f"                e['stat'] = {stat!r}\n"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **self.env}, check=True)

    def kill(self, number: str, index: str, reason: str) -> None:
        """As LSF itself does, with the reason in the job's report."""
        code = (
            "import os, signal\n"
            "from tests.lsf.standin import state\n"
            "with state.opened() as now:\n"
            f"    element = now['jobs'][{number!r}]['elements'][{index!r}]\n"
            f"    element['reason'] = {reason!r}\n"
            "    os.killpg(element['pid'], signal.SIGKILL)\n"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **self.env}, check=True)

    def stats(self) -> list[str]:
        path = self.folder / "state.json"
        jobs = self.state()["jobs"].values() if path.exists() else []
        return [element["stat"] for job in jobs for element in job["elements"].values()]

    def calls(self, name: str) -> int:
        path = self.folder / "calls.log"
        return sum(line.startswith(f"{name} ") for line in path.read_text().splitlines()) if path.exists() else 0

    def idle(self) -> bool:
        return all(stat in ("DONE", "EXIT") for stat in self.stats())


@pytest.fixture
def lsf():
    folder = Path(tempfile.mkdtemp(prefix="lsf"))
    (folder / "bin").mkdir()
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(CALL.format(python=sys.executable, root=str(ROOT), name=name))
        path.chmod(0o755)
    made = Lsf(folder)
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder, ignore_errors=True)


class QueueHouse(House):
    def run(self, *words: str, code: int | None = 0, **more: str) -> subprocess.CompletedProcess[str]:
        return super().run(*words, code=code, **more)


@pytest.fixture
def house(lsf, tmp_path, monkeypatch):
    for name, value in {**lsf.env, "SIGHTLINE_LSF_TIMEOUT_S": "3"}.items():
        monkeypatch.setenv(name, value)
    built = build(tmp_path / "house")
    return QueueHouse(built.root, built.out)
