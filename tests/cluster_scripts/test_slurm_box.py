"""The one-machine Slurm: what it promises, seen from outside."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "cluster_scripts"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def processes(folder: Path) -> dict[int, str]:
    """All that lives and was started for a box."""
    mark, found = f"SLURM_BOX_DIR={folder}".encode(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):  # of a zombie it is empty
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def listeners(pids: dict[int, str]) -> list[tuple[str, int]]:
    """Addresses, as the kernel writes them, and ports on which these processes listen."""
    sockets = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(str(handle.readlink()))
            except OSError:
                continue
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                address, port = words[1].split(":")
                found.append((address, int(port, 16)))
    return found


def test_every_port_is_on_loopback(box):
    found = listeners(processes(box.folder))
    assert {address for address, _ in found} <= LOOPBACK
    base = json.loads((box.folder / "slurm_box.json").read_text())["base_port"]
    assert {base, base + 1, base + 3, base + 4} <= {port for _, port in found}  # slurmctld, slurmdbd, two nodes


def test_status_and_a_second_start(box):
    said = box.do("status").stdout
    assert "is UP" in said
    assert " down" not in said
    before = processes(box.folder)
    assert "already up" in box.do("start").stderr
    assert processes(box.folder).keys() == before.keys()


def test_env_is_for_a_shell_to_eval(box):
    said = box.do("env").stdout
    assert said == f"export SLURM_CONF={box.folder}/etc/slurm.conf\n"
    script = f'eval "$({shlex.quote(str(SCRIPTS / "slurm_box"))} env {box.folder})"; sinfo -h -o %D -p main'
    done = subprocess.run(["sh", "-c", script], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "2"
    assert box.do("run", "sinfo", "-h", "-o", "%D", "-p", "main").stdout.strip() == "2"


def test_a_job_gets_a_node_and_gpus_and_leaves_a_record(box, tmp_path):
    wrap = "--wrap=hostname; echo $CUDA_VISIBLE_DEVICES"
    job = box.ask("sbatch", "--parsable", "--gpus=2", "-w", "node2", "-o", f"{tmp_path}/out", wrap)
    box.wait_for(lambda: "COMPLETED" in box.ask("sacct", "-XnP", "-o", "State", "-j", job))
    assert (tmp_path / "out").read_text().split() == ["node2", "0,1"]


def test_a_crashed_node_takes_its_job_along_and_comes_back(box, tmp_path):
    wrap = '--wrap=echo $SLURMD_NODENAME; [ -n "$SLURM_RESTART_COUNT" ] || exec sleep 300'
    out = tmp_path / "out"
    job = box.ask("sbatch", "--parsable", "--open-mode=append", "-o", str(out), wrap)
    box.wait_for(lambda: out.exists() and out.read_text())
    node = out.read_text().split()[0]
    box.do("crash", node, "--down")
    assert not [words for words in processes(box.folder).values() if f"slurmd -D -N {node}" in words]
    assert box.do("status", check=False).returncode == 1
    box.do("revive", node)
    assert box.do("status").returncode == 0
    box.wait_for(lambda: box.ask("sacct", "-XnPD", "-o", "State", "-j", job).split() == ["NODE_FAIL", "COMPLETED"])
    assert len(out.read_text().split()) == 2


def test_stop_leaves_nothing_and_the_next_start_goes_on(box):
    job = box.ask("sbatch", "--parsable", "--wrap=sleep 300")
    box.wait_for(lambda: box.ask("squeue", "-h", "-o", "%T", "-j", job) == "RUNNING")
    assert processes(box.folder)
    box.do("stop")
    assert not processes(box.folder)
    gone = box.do("status", check=False)
    assert (gone.returncode, gone.stdout.count(" down")) == (3, 6)
    box.do("start", "--nodes", "2", "--cpus", "4", "--mem", "8000", "--gpus", "2")
    assert box.ask("sacct", "-XnP", "-o", "State", "-j", job).startswith("CANCELLED")
    assert int(box.ask("sbatch", "--parsable", "--wrap=true")) > int(job)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["start", "{tmp}/a b"], "cannot quote"),
        (["start", "/tmp/" + "x" * 64], "too long"),
        (["start", "{tmp}", "--requeue-delay", "2"], "less than 5"),
        (["start", "{tmp}"], "not empty"),
        (["crash", "{box}", "node9"], "choose one of node1, node2"),
        (["wipe", "{tmp}"], "no slurm_box here"),
    ],
)
def test_refusals_say_why_and_touch_nothing(box, words, reason):
    foreign = box.folder / "other"
    foreign.mkdir(exist_ok=True)
    (foreign / "thesis.tex").touch()
    words = [word.format(tmp=foreign, box=box.folder) for word in words]
    done = subprocess.run([SCRIPTS / "slurm_box", *words], text=True, capture_output=True, check=False)
    assert done.returncode == (0 if words[0] == "wipe" else 1)
    assert reason in done.stderr
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_where_there_is_no_box(tmp_path):
    for command, code in (("status", 3), ("stop", 0), ("env", 1)):
        done = subprocess.run([SCRIPTS / "slurm_box", command, tmp_path / "none"], capture_output=True, check=False)
        assert done.returncode == code
    assert not (tmp_path / "none").exists()
