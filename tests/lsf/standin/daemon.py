"""The daemon: starts what may start, sends the signals that LSF sends, and writes down how elements end."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Any

from tests.lsf.standin import state
from tests.lsf.standin.state import OVER

TICK_S = 0.05
ALIVE = ("RUN", "USUSP", "SSUSP", "UNKWN", "ZOMBI")


class Daemon:
    def __init__(self) -> None:
        self.running: dict[tuple[str, str], tuple[subprocess.Popen[bytes], IO[bytes]]] = {}

    def forever(self) -> None:
        while not (state.home() / "halt").exists():
            with state.opened() as now:
                scale = state.profile()["scale"]
                for number, job in now["jobs"].items():
                    for index, element in job["elements"].items():
                        self.reap(job, number, index, element)
                        self.signals(job, number, index, element, scale)
                self.start(now)
            time.sleep(TICK_S)
        for process, _ in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    # -- starting -----------------------------------------------------------------------------------------------------

    def start(self, now: dict[str, Any]) -> None:
        every = [e for job in now["jobs"].values() for e in job["elements"].values()]
        free = state.profile()["slots"] - sum(1 for e in every if e["stat"] in ALIVE)
        for number, job in now["jobs"].items():
            active = sum(1 for e in job["elements"].values() if e["stat"] in ALIVE)
            for index, element in job["elements"].items():
                if element["stat"] != "PEND":
                    continue
                ready, never = self.ready(now, job, index)
                element["why"] = (
                    "New job is waiting for scheduling" if ready else "Job dependency condition not satisfied"
                )
                if never:
                    element["why"] = "Dependency condition invalid or never satisfied"
                    if job["orphan"]:
                        element.update(stat="EXIT", end=time.time(), reason="TERM_ORPHAN_SYSTEM")
                if ready and free > 0 and (job["cap"] is None or active < job["cap"]):
                    self.launch(job, number, index, element)
                    free, active = free - 1, active + 1

    @staticmethod
    def ready(now: dict[str, Any], job: dict[str, Any], index: str) -> tuple[bool, bool]:
        """(may start, can never start)"""
        for kind, number, star in re.findall(r"(done|ended|exit)\((\d+)(\[\*\])?\)", job["after"] or ""):
            other = now["jobs"][number]["elements"]
            for each in [other.get(index)] if star else other.values():
                if each is None:
                    return False, True
                good = {"done": ("DONE",), "ended": OVER, "exit": ("EXIT",)}[kind]
                if each["stat"] not in good:
                    return False, each["stat"] in OVER
        return True, False

    def launch(self, job: dict[str, Any], number: str, index: str, element: dict[str, Any]) -> None:
        hosts = self.hosts(job)
        env = {
            **job["env"], "LSB_JOBID": number, "LSB_JOBINDEX": index, "LSB_JOBNAME": job["name"],
            "LSB_QUEUE": job["queue"], "LSB_HOSTS": " ".join(h for h, n in hosts for _ in range(n)),
            "LSB_MCPU_HOSTS": "".join(f"{h} {n} " for h, n in hosts), "LSB_DJOB_NUMPROC": str(job["slots"]),
            "LSB_EXIT_PRE_ABORT": "99", "LS_SUBCWD": job["cwd"], "LSB_TRAPSIGS": "trap # 15 10 12 2 1",
        }  # fmt: skip
        gpus = re.search(r"num=(\d+)", job["said"].get("gpu") or "")
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str(i) for i in range(int(gpus[1])))
        if job["docker"]:
            env = {k: v for k, v in env.items() if "\n" not in v}
            if env.get("LSF_DOCKER_PRESERVE_ENVIRONMENT") == "false":
                env = {k: v for k, v in env.items() if k in ("PATH", "HOME")}
        first = Path(job["script"]).read_text().partition("\n")[0]
        words = [*(first[2:].split() if first.startswith("#!") else ["/bin/sh"]), job["script"]]
        out = (state.home() / f"out.{number}.{index}").open("w+b")
        process = subprocess.Popen(
            words, cwd=job["cwd"], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        self.running[number, index] = process, out
        history = [*element["history"], f"Starting (Pid {process.pid})"]
        for key in ("kill", "again", "sent", "signals", "warned"):
            element.pop(key, None)
        element.update(stat="RUN", pid=process.pid, start=time.time(), host=hosts[0][0], history=history, why=None)

    @staticmethod
    def hosts(job: dict[str, Any]) -> list[tuple[str, int]]:
        tile = re.search(r"ptile=(\d+)", job["said"].get("R") or "")
        each = int(tile[1]) if tile else job["slots"]
        names = state.profile()["hosts"]
        return [(names[i % len(names)], each) for i in range(math.ceil(job["slots"] / each))]

    # -- signals ------------------------------------------------------------------------------------------------------

    def signals(self, job: dict[str, Any], number: str, index: str, element: dict[str, Any], scale: float) -> None:
        if (number, index) not in self.running or element["stat"] == "UNKWN":
            return  # an unreachable host hears nothing
        pid, now, sent = element["pid"], time.time(), element.setdefault("sent", [])

        def once(name: str, key: str) -> None:
            if key not in sent:
                sent.append(key)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, getattr(signal, f"SIG{name}"))

        for at, name in element.get("signals", []):
            once(name, f"{at}{name}")
        if element.pop("stop", None):
            once("STOP", f"stop{now}")
            element["stat"] = "USUSP"
        if element.pop("resume", None):
            once("CONT", f"cont{now}")
            element["stat"] = "RUN"
        if killed := element.get("kill"):
            parallel = job["slots"] > 1 and not state.profile()["sequential_signal"]
            for name, after in (("KILL", 0.0),) if parallel else (("INT", 0), ("TERM", 10), ("KILL", 20)):
                if now - killed >= after * scale:
                    once(name, f"{killed}{name}")
        ran = now - element["start"]
        if job["minutes"]:
            limit = job["minutes"] * 60 * scale
            if job["warn"] and ran > limit - float(job["warn"][1]) * 60 * scale:
                once(job["warn"][0], "warning")
            for name, after in (("USR2", 0), ("INT", 600), ("TERM", 610), ("KILL", 620)):
                if ran > limit + after * scale:
                    once(name, f"limit{name}")

    # -- the end ------------------------------------------------------------------------------------------------------

    def reap(self, job: dict[str, Any], number: str, index: str, element: dict[str, Any]) -> None:
        if (number, index) not in self.running or element["stat"] == "UNKWN":
            return
        process, out = self.running[number, index]
        code = process.poll()
        if code is None:
            return
        del self.running[number, index]
        out.seek(0)
        said = out.read()
        out.close()
        code = 128 - code if code < 0 else code
        if element.get("again") or code in job["requeue"]:
            text = f"Pending: Requeued job is waiting for rescheduling: (exit code {code})"
            element.update(stat="PEND", pid=None, history=[*element["history"], text])  # and its output is gone
            return
        how = "Done successfully. The CPU time used is 0.0 seconds" if code == 0 else f"Exited with exit code {code}"
        element.update(
            stat="DONE" if code == 0 else "EXIT",
            exit_code=code or None,
            end=time.time(),
            history=[*element["history"], how],
        )
        report = f"{reason}.\n{how}." if (reason := element.get("reason")) else f"{how}."
        place = (
            Path(job["cwd"], str(job["output"]).replace("%J", number).replace("%I", index)) if job["output"] else None
        )
        if place and place.parent.is_dir():
            with place.open("ab") as file:
                file.write(
                    said + b"\n------------------------------------------------------------\n" + report.encode() + b"\n"
                )


if __name__ == "__main__":
    Daemon().forever()
