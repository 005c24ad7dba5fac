"""Analysis, which runs in processes of its own: the launcher never imports it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launcher import ROOT


@contextlib.contextmanager
def following(output_dir: Path, quiet: bool) -> Iterator[None]:
    """The store follows the runs as they go and has all of them at the end. A view: if it fails, the runs are done."""
    if importlib.util.find_spec("mlflow") is None:
        yield
        say = "not ingested: mlflow is not installed; pip install 'sightline[analysis]', then python launcher.py ingest"
    else:

        def behind_the_runs() -> None:
            os.nice(10)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it can hear it
            ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: leave when the launcher is killed

        follower = subprocess.Popen(
            [sys.executable, "-m", "analysis.ingest", "--output-dir", str(output_dir), "--watch"],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=behind_the_runs,  # noqa: PLW1509  # this process has one thread
        )
        try:
            yield
        finally:
            follower.terminate()  # one last pass, then it leaves
            failed = follower.wait()
        say = "not ingested; python launcher.py ingest says why" if failed else ""
    if say and not quiet:
        print(say, file=sys.stderr)


def analysis(module: str, *words: str) -> int:
    command = [sys.executable, "-m", f"analysis.{module}", *words]
    return subprocess.run(command, env=environment(), check=False).returncode


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
