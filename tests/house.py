"""A house of its own for a test: our launcher, contract and configs, with workers that take no time and no torch."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from contract import rundir

ROOT = Path(__file__).resolve().parents[1]

# What a worker is to the launcher. The variables of a launch that begin with FAKE_ reach it.
WORKER = """
import json, os, sys, time
from pathlib import Path
import yaml
from contract import rundir

folder = Path(sys.argv[1])
config = yaml.safe_load((folder / "config.yaml").read_text())
assert rundir.read_json(folder / rundir.OWNER)["attempt"] == os.environ["SIGHTLINE_ATTEMPT"]
steps, rank = min(config.get("epochs", 1), config.get("smoke") or 10**9), os.environ.get("RANK", "0")
checkpoint, every = folder / "checkpoint.pt", int(os.environ.get("FAKE_SAVE", "1"))
step, total = checkpoint.read_text().split() if checkpoint.exists() else (0, 0)
step, total = int(step), 0.0 if os.environ.get("FAKE_FORGETS") else float(total)  # the sum is the state of training
metrics = folder / "metrics.jsonl"
if rank == "0" and metrics.exists():  # what came after the checkpoint is done again
    kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step]
    rundir.Journal(metrics).cut(sum(len(line) + 1 for line in kept))
print("threads", os.environ["OMP_NUM_THREADS"], "rank", rank, flush=True)
print("devices", os.environ.get("CUDA_VISIBLE_DEVICES"), "VERSION 1", flush=True)
if os.environ.get("FAKE_FAIL") == str(config["seed"]) and not (folder / "mended").exists():
    raise ValueError(f"seed {config['seed']} is unlucky")
faults = json.loads(os.environ.get("FAKE_FAULTS", "{}"))  # {"bug": [seed, ...]}, each until it is mended
fault = next((name for name, seeds in faults.items() if config["seed"] in seeds), None)
mended = (folder.parent.parent / "mended").exists()
if fault == "bug" and not mended:
    raise KeyError(f"mask {config['seed']}")
if fault == "oom" and not config["env"]["mem_gb"] and config["env"]["max_parallel"] != 1:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
    bytearray(2**30)
if fault == "disk" and not mended:
    with open("/dev/full", "w") as file:
        file.write("x")
if fault == "data" and not mended:
    print("2026-01-01 00:00:00 error: data_path=/no/pictures: no such folder; expected train/CLASS/*.jpg")
    sys.exit(1)
if fault == "kill" and not mended:
    os.kill(os.getpid(), 9)
while step < steps:
    time.sleep(float(os.environ.get("FAKE_STEP_S", "0")))
    if not os.environ.get("FAKE_STUCK"):
        step, total = step + 1, total + 1 / (step + 1)
        if rank == "0":
            with metrics.open("a") as file:
                line = {"step": step, "of": config.get("epochs", 1), "time": time.time()}
                line |= {"train/loss": 1 / step, "train/sum": total}
                file.write(json.dumps(line) + "\\n")
    asked = (folder / f"stop.{os.environ['SIGHTLINE_ATTEMPT']}").exists()
    if rank == "0" and step and (asked or step % every == 0):
        rundir.write_atomic(checkpoint, f"{step} {total!r}", sync=False)
    if asked and not os.environ.get("FAKE_DEAF"):
        sys.exit(0)
if rank == "0":
    (folder / "encoder.pt").write_text(str(config["seed"]))
    rundir.write_json(folder / "done.json", {"metrics": {"knn/top1": 0.5}})
"""
INGEST = "import sys\nfrom pathlib import Path\nPath(sys.argv[2], 'ingested').write_text(' '.join(sys.argv))\n"


@dataclass
class House:
    root: Path
    out: Path

    def environ(self, **more: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
        return {**clean, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "SIGHTLINE_QUEUE_S": "0", **more}

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(self.root / "launcher.py"), *words],
            cwd=self.root,
            env=self.environ(**more),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: str, code: int | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """``code``: the exit code that it must have."""
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=180)
        assert code in (None, process.returncode), err
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def runs(self) -> list[Path]:
        return sorted(p.parent for p in self.out.glob("*/*/run.json"))

    def all(self, state: str) -> bool:
        """All runs, with all that is written about them."""
        over = state == "running" or not any(self.out.glob(f"*/*/{rundir.OWNER}"))
        return bool(self.runs()) and over and all(rundir.state(folder) == state for folder in self.runs())

    def attempts(self, folder: Path) -> list[dict[str, object]]:
        return [json.loads(line) for line in (folder / "attempts.0.jsonl").read_text().splitlines()]

    @staticmethod
    def steps(folder: Path) -> list[int]:
        return [line["step"] for line in rundir.read_journal(folder / rundir.METRICS)[0]]

    @staticmethod
    def causes(folder: Path) -> list[str]:
        return [r["cause"] for r in rundir.attempts(folder) if r["event"] == "end"]

    def states(self, **more: str) -> list[tuple[str, int, str]]:
        """(stage, seed, state) of every run, as the launcher says it."""
        lines = [json.loads(line) for line in self.run("status", "--json", **more).stdout.splitlines()]
        return sorted((line["stage"], line["seed"], line["state"]) for line in lines)

    def tried(self) -> list[str]:
        """The runs that were started, by their stage and seed."""
        runs = [rundir.read_run(folder) for folder in self.runs() if rundir.attempts_file(folder, 0).exists()]
        return sorted(f"{run['stage']} {run['seed']}" for run in runs)

    def causes_told(self, *words: str, code: int = 100) -> dict[str, dict[str, object]]:
        """What ``why`` says, by the kind of failure."""
        lines = self.run("why", *words, "--json", code=code).stdout.splitlines()
        return {group["kind"]: group for group in map(json.loads, lines)}

    def say(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command as it was printed."""
        return self.run(*shlex.split(command)[2:], **more)

    def said(self) -> str:
        """Everything there is to read when a test failed."""
        files = [*self.out.glob("submissions/*/logs/*"), *self.out.glob("*/*/log.txt"), *self.out.glob("*/*/attempts*")]
        return "\n".join(f"-- {path.relative_to(self.out)}\n{path.read_text()}" for path in files)

    def wait_for(self, condition: Callable[[], object], timeout: float = 40) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"waited in vain\n{self.said()}"
            time.sleep(0.05)

    def processes(self) -> list[str]:
        """Command lines of all that still runs for this house."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if str(self.out) in words:
                found.append(words)
        return found


def build(root: Path) -> House:
    root.mkdir()
    for name in ("launcher", "contract", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launcher.py", "setup.cfg"):
        shutil.copy(ROOT / name, root)
    for package in ("workers", "analysis"):
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    for name in ("main_lmim", "main_knn", "main_linprobe"):
        (root / "workers" / f"{name}.py").write_text(WORKER)
    (root / "analysis" / "ingest.py").write_text(INGEST)
    (root / "analysis" / "tables.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit(7)\n")
    return House(root, root / "runs")


def with_real_workers(house: House) -> None:
    shutil.rmtree(house.root / "workers")
    shutil.copytree(ROOT / "workers", house.root / "workers", ignore=shutil.ignore_patterns("__pycache__"))


def edit(path: Path, old: str, new: str) -> None:
    """A change that somebody makes to a file of the house; ``old`` stands in it once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))


STEPS = """
import atexit, os, sys
at, steps = int(os.environ.get("DIE_AT", "-1")), 0
done = ("os.rename", "os.mkdir", "os.symlink", "os.link", "os.remove", "os.rmdir", "os.utime", "subprocess.Popen")

def step(event, words):
    global steps
    if event in done or (event == "open" and isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR)):
        if at == steps:
            os.kill(os.getpid(), 9)
        steps += 1

def tell():
    with open(os.environ["COUNT"], "w") as file:
        file.write(str(steps))

if os.environ.pop("HERE", None):  # the launcher, not what it calls
    sys.addaudithook(step)
    atexit.register(tell)
"""


def killed_at_any_step(house: House, words: list[str], tmp_path: Path, times: int) -> Iterator[str]:
    """Say ``words``, kill the launcher with -9 at one of the things it does to files and processes, say them again; at
    ``times`` places, the last few among them. The caller looks at what is queued, and clears it away."""
    (tmp_path / "sitecustomize.py").write_text(STEPS)

    def launch(**more: str) -> int:
        env = {**house.environ(), "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "HERE": "1"}
        env |= {"COUNT": str(tmp_path / "steps"), **more}
        return subprocess.run([sys.executable, "launcher.py", *words], cwd=house.root, env=env, check=False).returncode

    assert launch() == 0
    steps = int((tmp_path / "steps").read_text())
    yield "not killed at all"
    for at in sorted({*range(0, steps, max(1, steps // times)), *range(steps - 4, steps)}):
        launch(DIE_AT=str(at))
        assert launch() == 0
        yield f"killed at step {at} of {steps}"
