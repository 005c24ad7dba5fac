"""What ``bsub`` makes of its words and of a script's #BSUB lines, and what it refuses, in LSF's own texts."""

from __future__ import annotations

import re
import shlex
from typing import Any

VALUED = {
    "q", "G", "g", "n", "R", "M", "W", "We", "gpu", "J", "Jd", "o", "oo", "e", "eo", "a", "app", "w", "Q", "wa", "wt",
    "m", "P", "u", "cwd", "env", "sp", "sla", "b", "t", "L", "i", "U",
}  # fmt: skip
FLAGS = {"r", "rn", "H", "x", "N", "Ne", "B", "K", "ti", "Is", "I"}
USAGE = "Usage: bsub [options] command [arguments]"
UNIT = r"\d+(\.\d+)?[KMGTPEZ]B?"
MODELS = {"TeslaV100_SXM2_32GB", "NVIDIAA100_SXM4_40GB", "NVIDIAA40", "A100"}


class Refused(Exception):
    """The text on stderr; the exit code is 255."""


def lines(script: str) -> list[str]:
    """The #BSUB lines wherever they stand, up to the first that has a stray word: after it none counts."""
    matches = (re.match(r"\s*#\s*BSUB\s+(.*)", line) for line in re.sub(r"\\\n", "", script).splitlines())
    return [match[1] for match in matches if match]


def options(words: list[str], script: str | None) -> tuple[dict[str, Any], list[str]]:
    """The options, those of the command line first, and the command. Raises Refused."""
    said, command = _read(words, strict=True)
    if script is not None:
        for line in lines(script):
            try:
                split = shlex.split(line, comments=True)
            except ValueError:  # a quote that nothing closes
                split = line.split()
            if not split:
                continue
            if not split[0].startswith("-"):
                continue  # no option at all: ignored
            mine, rest = _read(split, strict=True)
            for name, value in mine.items():
                if name == "R" and name in said:
                    raise Refused("Bad resource requirement syntax. Job not submitted.")
                said.setdefault(name, value)
            if rest:
                break
    return said, command


def _read(words: list[str], strict: bool) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    left = list(words)
    while left and left[0].startswith("-") and len(left[0]) > 1:
        name = left.pop(0)[1:]
        if name in FLAGS:
            found[name] = True
        elif name in VALUED:
            if not left:
                raise Refused(f"bsub: option requires an argument -- {name}\n{USAGE}")
            found[name] = left.pop(0)
        elif strict:
            raise Refused(f"bsub: illegal option -- {name}\n{USAGE}")
    return found, left


def check(said: dict[str, Any], profile: dict[str, Any]) -> dict[str, Any]:
    """A job's description. Raises Refused."""
    queue = said.get("q", profile["default_queue"])
    if queue not in profile["queues"]:
        raise Refused(f"{queue}: No such queue. Job not submitted.")
    if said.get("G") not in (None, *profile["groups"]):
        raise Refused(
            "You must select an LSF User group that matches the condo type.\n"
            "Request aborted by esub. Job not submitted."
        )
    if not ("o" in said or "oo" in said) and profile["wants_output"]:
        raise Refused(
            "Returning output by mail is not supported on this cluster. Please use the -o option.\n"
            "Request aborted by esub. Job not submitted."
        )
    slots = said.get("n", "1")
    if not re.fullmatch(r"\d+", slots):
        raise Refused("Bad argument for option -n. Job not submitted.")
    if int(slots) < 1:
        raise Refused("The number of processors must be a positive integer. Job not submitted.")
    if int(slots) > profile["slots"]:
        raise Refused("Too many processors requested. Job not submitted.")
    minutes = _run_limit(said.get("W"), profile)
    if "M" in said and not re.fullmatch(UNIT, said["M"]):
        raise Refused(f"{said['M']}: MEMLIMT value should be a positive integer. Job not submitted.")
    _resources(said.get("R", ""))
    _gpu(said.get("gpu"))
    if "r" in said and "rn" in said:
        raise Refused("The -r and -rn options cannot be used together. Job not submitted.")
    if "app" in said:
        raise Refused(f"{said['app']}: No such application profile. Job not submitted.")
    if not re.fullmatch(r"(\d+:)?\d+", said.get("wt", "0")) or said.get("wa", "USR2") not in (
        "USR1",
        "USR2",
        "TERM",
        "INT",
    ):
        raise Refused("Bad job warning action or time. Job not submitted.")
    if "Q" in said and not re.fullmatch(r"(EXCLUDE\(\d+\)|all|~?\d+)( (EXCLUDE\(\d+\)|~?\d+))*", said["Q"]):
        raise Refused(f"{said['Q']}: Bad requeue exit values. Job not submitted.")
    if "m" in said and said["m"] not in profile["hosts"]:
        raise Refused(f"{said['m']}: Bad host name, host group name or cluster name. Job not submitted.")
    name, indexes, cap = _array(said.get("J", ""), profile)
    return {
        "queue": queue, "default": "q" not in said, "slots": int(slots), "minutes": minutes, "name": name,
        "indexes": indexes, "cap": cap, "output": said.get("o") or said.get("oo"), "after": said.get("w"),
        "orphan": bool(said.get("ti")), "requeue": [int(c) for c in re.findall(r"\d+", said.get("Q", ""))],
        "docker": said.get("a"), "held": bool(said.get("H")), "said": said,
        "warn": (said.get("wa"), said.get("wt")) if "wa" in said and "wt" in said else None,
    }  # fmt: skip


def _run_limit(text: str | None, profile: dict[str, Any]) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if not match:
        raise Refused(f"{text}: Bad RUNLIMIT specification. Job not submitted.")
    minutes = int(match[1] or 0) * 60 + int(match[2])
    if minutes > profile["longest_minutes"]:
        raise Refused("RUNLIMIT: Cannot exceed queue's hard limit(s). Job not submitted.")
    return float(minutes)


def _resources(text: str) -> None:
    bad = Refused("Bad resource requirement syntax. Job not submitted.")
    rest, seen = text.strip(), []
    while rest:
        match = re.match(r"(select|rusage|span|order|affinity)\[([^\[\]]+)\]\s*", rest)
        if not match:
            raise bad
        seen.append(match[1])
        if match[1] == "rusage" and not all(
            re.fullmatch(rf"mem={UNIT}|ngpus=\d+", p) for p in re.split("[:,]", match[2])
        ):
            raise bad
        if match[1] == "span" and not re.fullmatch(r"hosts=1|ptile=[1-9]\d*", match[2]):
            raise bad
        if match[1] == "select":
            for part in match[2].split(" && "):
                if not re.fullmatch(rf"gpuhost|mem>{UNIT}|hname!='[\w.-]+'|ngpus>\d+", part):
                    raise bad
        rest = rest[match.end() :]
    if len(seen) != len(set(seen)) or "select" in seen[1:]:
        raise bad


def _gpu(text: str | None) -> None:
    if text is None:
        return
    parts = dict(part.partition("=")[::2] for part in text.split(":"))
    wrong = set(parts) - {"num", "gmodel", "j_exclusive", "mode", "gmem"} or parts.get("gmodel", "A100") not in MODELS
    if wrong or not re.fullmatch(r"[1-9]\d*", parts.get("num", "")):
        raise Refused(f"{text}: Bad GPU requirement syntax. Job not submitted.")


def _array(text: str, profile: dict[str, Any]) -> tuple[str, list[int], int | None]:
    if len(text) > 255:
        raise Refused("Job name too long. Job not submitted.")
    match = re.fullmatch(r"([^\[\]%]*)(?:\[([^\[\]]*)\](?:%(\d+))?)?", text)
    if not match:
        raise Refused("Bad job array index list. Job not submitted.")
    name, spec, cap = match.groups()
    if spec is None:
        return name, [], None
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise Refused("Bad job array name. Job not submitted.")
    indexes: list[int] = []
    for part in spec.split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if not numbers:
            raise Refused("Bad job array index list. Job not submitted.")
        low, high = int(numbers[1]), int(numbers[2] or numbers[1])
        if low < 1 or high < low:
            raise Refused("Job array index error. Job not submitted.")
        indexes += range(low, high + 1, int(numbers[3] or 1))
    indexes = sorted(set(indexes))
    if len(indexes) > profile["longest_array"]:
        raise Refused("Job array index too large. Job not submitted.")
    return name, indexes, int(cap) if cap else None
