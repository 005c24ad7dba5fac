"""bsub, bjobs, bkill, brequeue, bstop, bresume and bhist: texts, streams and exit codes as LSF has them."""

from __future__ import annotations

import os
import random
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NoReturn

from tests.lsf.standin import parse, state
from tests.lsf.standin.state import OVER

LOST = "Failed in an LSF library call: Failed in sending/receiving a message: Connection reset by peer"


def fail(text: str, code: int = 255) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(code)


def main(call: str, words: list[str]) -> None:
    with (state.home() / "calls.log").open("a") as log:
        log.write(f"{call} {' '.join(words)}\n")
    fault = state.fault(call) or {}
    if fault.get("kind") == "hang":
        print("LSF is down. Please wait ...", file=sys.stderr, flush=True)
        time.sleep(fault.get("seconds", 3600))
    if fault.get("kind") == "error":
        fail(fault.get("text", LOST))
    globals()[call](words, fault)


def bsub(words: list[str], fault: dict[str, Any]) -> None:
    profile = state.profile()
    script = None if sys.stdin.isatty() else sys.stdin.read()
    try:
        said, command = parse.options(words, script if script and script.strip() else None)
        if not command:
            if not script or not any(
                line.strip() and not line.lstrip().startswith("#") for line in script.splitlines()
            ):
                raise parse.Refused("No command is specified. Job not submitted.")
        else:
            script = "#!/bin/sh\n" + " ".join(command) + "\n"  # its #BSUB lines count for nothing
        job = parse.check(said, profile)
        _docker(job)
        with state.opened() as now:
            _dependencies(job, now)
            for _ in range(2 if fault.get("kind") == "duplicate" else 1):
                number = _accept(job, script, now)
    except parse.Refused as refused:
        fail(str(refused))
    kind = fault.get("kind")
    if kind == "late":
        time.sleep(fault["seconds"])
    if kind == "killed":
        os.kill(os.getpid(), 9)
    if kind == "noise":
        print("Job is submitted to <cpp> project.")
    if kind == "mute" or "BSUB_QUIET" in os.environ:
        return
    default = "default " if job["default"] else ""
    print(f"Job <{number}> is submitted to {default}queue <{job['queue']}>.")


def _docker(job: dict[str, Any]) -> None:
    if not str(job["docker"] or "").startswith("docker("):
        return
    for volume in os.environ.get("LSF_DOCKER_VOLUMES", "").split():
        if not Path(volume.split(":")[0]).is_dir():
            raise parse.Refused(f"{volume}: not a directory.\nRequest aborted by esub. Job not submitted.")


def _dependencies(job: dict[str, Any], now: dict[str, Any]) -> None:
    if not job["after"]:
        return
    terms = re.findall(r"(done|ended|exit)\((\d+)(\[\*\])?\)", job["after"])
    if "&&".join(f"{kind}({number}{star})" for kind, number, star in terms) != job["after"].replace(" ", ""):
        raise parse.Refused(f"{job['after']}: Dependency condition syntax error. Job not submitted.")
    for _, number, star in terms:
        rows = state.elements(now, [number])[0]
        if not rows or (star and not rows[0][0]["indexes"]):
            raise parse.Refused(f"{number}: No matching job found. Job not submitted.")


def _accept(job: dict[str, Any], script: str, now: dict[str, Any]) -> int:
    number = now["next"]
    now["next"] += random.choice([1, 1, 2])  # ids have gaps
    spool = state.home() / "home" / ".lsbatch"
    spool.mkdir(parents=True, exist_ok=True)
    path = spool / f"{int(time.time())}.{number}.shell"
    path.write_text(script)
    path.chmod(0o700)
    fresh = {"stat": "PSUSP" if job["held"] else "PEND", "exit_code": None, "pid": None, "start": None, "end": None}
    now["jobs"][str(number)] = {
        **job, "id": number, "script": str(path), "cwd": str(Path.cwd()), "env": dict(os.environ),
        "submitted": time.time(), "elements": {str(i): dict(fresh, history=[]) for i in job["indexes"] or [0]},
    }  # fmt: skip
    now["last"] = number
    return int(number)


FIELDS = ("jobid", "jobindex", "stat", "exit_code", "exit_reason", "exec_host", "job_name", "queue", "pend_reason")


def bjobs(words: list[str], fault: dict[str, Any]) -> None:
    if fault.get("kind") == "empty":
        return
    every = header = False
    fields, delimiter, name, ids = "jobid stat", " ", None, []
    left, header = list(words), True
    while left:
        word = left.pop(0)
        if word == "-a":
            every = True
        elif word == "-noheader":
            header = False
        elif word == "-o":
            fields = left.pop(0)
        elif word == "-J":
            name = left.pop(0)
        elif word.startswith("-"):
            fail(f"bjobs: illegal option -- {word[1:]}")
        else:
            ids.append(word)
    if match := re.search(r"delimiter='(.)'", fields):
        delimiter, fields = match[1], fields.replace(match[0], "")
    if unknown := [f for f in fields.split() if f not in FIELDS]:
        fail(f"<{unknown[0].upper()}> in the format string is not a valid field name.")
    if bad := [i for i in ids if not re.fullmatch(r"\d+(\[[\d,-]+\])?", i)]:
        fail(f"{bad[0]}: Illegal job ID.")
    with state.opened() as now:
        rows, missing = state.elements(now, ids or None, name)
        if not ids:
            rows = [row for row in rows if every or row[2]["stat"] not in OVER]
        lines = [delimiter.join(_field(f, *row) for f in fields.split()) for row in rows]
    if fault.get("kind") == "drop":
        lines = [line for line in lines if random.random() > 0.5]
    if lines and header:
        print(delimiter.join(f.upper() for f in fields.split()))
    for line in lines:
        print(line)
    for each in missing:
        print(f"Job <{each}> is not found", file=sys.stderr)
    if missing:
        sys.exit(255)
    if not rows:
        fail("No job found" if every else "No unfinished job found", state.profile()["rc_no_jobs"])


def _field(name: str, job: dict[str, Any], index: int, element: dict[str, Any]) -> str:
    value: object = {
        "jobid": job["id"], "jobindex": index, "stat": element["stat"], "exit_code": element["exit_code"],
        "exec_host": element.get("host"), "queue": job["queue"], "pend_reason": element.get("why"),
        "job_name": f"{job['name']}[{index}]" if job["indexes"] else job["name"], "exit_reason": element.get("reason"),
    }[name]  # fmt: skip
    return "-" if value is None else str(value)


def _chosen(words: list[str], now: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """What a command that acts on jobs is to act on. Without an id: on the newest job, whatever that is."""
    if not words and now["last"] is not None:
        words = [str(now["last"])]
    if words == ["0"]:
        words = list(now["jobs"])
    return [(word, state.elements(now, [word])[0]) for word in words]


def bkill(words: list[str], fault: dict[str, Any]) -> None:
    signal, left, bad = None, list(words), False
    if left[:1] == ["-s"]:
        signal, left = left[1].removeprefix("SIG"), left[2:]
        if signal not in ("TERM", "INT", "USR1", "USR2", "KILL", "CONT", "STOP"):
            fail(f"{signal}: Illegal signal value")
    if left[:1] == ["-J"]:
        with state.opened() as now:
            left = sorted({str(job["id"]) for job, _, _ in state.elements(now, name=left[1])[0]})
    with state.opened() as now:
        for word, rows in _chosen(left, now):
            alive = [row for row in rows if row[2]["stat"] not in OVER]
            if not rows:
                text = "No matching job found" if re.fullmatch(r"\d+(\[.*\])?", word) else None
                print(f"Job <{word}>: {text}" if text else f"{word}: Illegal job ID.", file=sys.stderr)
                bad = True
            elif not alive:
                print(f"Job <{word}>: Job has already finished", file=sys.stderr)
                bad = True
            else:
                print(f"Job <{word}> is being {'signaled' if signal else 'terminated'}")
            for _, _, element in alive if fault.get("kind") != "lost" else ():
                if signal:
                    element.setdefault("signals", []).append([time.time(), signal])
                elif element["stat"] in ("PEND", "PSUSP"):
                    element.update(stat="EXIT", end=time.time(), history=[*element["history"], "Exited"])
                else:
                    element["kill"] = time.time()
    sys.exit(255 if bad else 0)


def brequeue(words: list[str], _fault: dict[str, Any]) -> None:
    with state.opened() as now:
        for word, rows in _chosen(words, now):
            for _, _, element in rows:
                if element["stat"] not in ("RUN", "USUSP", "SSUSP"):
                    fail(f"Job <{word}> : Job has not started yet")
                element.update(kill=time.time(), again=True)
            print(f"Job <{word}> is being requeued ")


def bstop(words: list[str], _fault: dict[str, Any]) -> None:
    with state.opened() as now:
        for word, rows in _chosen(words, now):
            if not rows:
                fail(f"Job <{word}>: No matching job found")
            for _, _, element in rows:
                if element["stat"] == "PEND":
                    element["stat"] = "PSUSP"
                elif element["stat"] not in OVER:
                    element["stop"] = True
            print(f"Job <{word}> is being stopped")


def bresume(words: list[str], _fault: dict[str, Any]) -> None:
    with state.opened() as now:
        for word, rows in _chosen(words, now):
            if not rows:
                fail(f"Job <{word}>: No matching job found")
            for _, _, element in rows:
                if element["stat"] == "PSUSP":
                    element["stat"] = "PEND"
                else:
                    element["resume"] = True
            print(f"Job <{word}> is being resumed")


def bhist(words: list[str], _fault: dict[str, Any]) -> None:
    ids = [word for i, word in enumerate(words) if re.match(r"\d", word) and words[i - 1 : i] != ["-n"]]
    with state.opened() as now:
        for each in ids:
            match = re.fullmatch(r"(\d+)(?:\[(\d+)\])?", each)
            job = now["jobs"].get(match[1]) if match else None
            if not match or not job:
                print("No matching job found")
                sys.exit(255)
            for index, element in job["elements"].items():
                if match[2] in (None, index):
                    said = (
                        f"Job <{job['id']}[{index}]>, Job Name <{job['name']}>; " + "; ".join(element["history"]) + ";"
                    )
                    print("\n".join(textwrap.wrap(said, 80, break_on_hyphens=False, drop_whitespace=False)))
