"""Why an attempt ended: from its records and logs to a cause. Text in, a ``Cause`` out; standard library only.

The supervisor asks when an attempt ends badly, and keeps the answer in the attempt's end record. ``of_run`` asks again
later, when the scheduler has had its say too: what it writes into the job's own log after the supervisor is dead.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from contract import rundir
from launcher import job_logs

HOST_OOM, CUDA_OOM, NCCL, NODE, DISK = "host OOM", "CUDA OOM", "NCCL time-out", "node failure", "disk full"
DATA, PREEMPTED, TIME, STALLED = "data missing", "preempted", "time limit", "stalled"
BUG, KILLED, GAVE_UP, UNKNOWN = "user bug", "killed", "gave up", "unknown"
KINDS = (
    HOST_OOM, CUDA_OOM, NCCL, NODE, DISK, DATA, PREEMPTED, TIME, STALLED, BUG, KILLED, GAVE_UP, UNKNOWN,
)  # fmt: skip


@dataclass(frozen=True)
class Cause:
    kind: str  # one of KINDS
    mark: str  # equal for equal failures: of the kind and, for bugs, of the traceback without what differs by run
    said: str  # the evidence, in one printable line
    where: Mapping[str, Any] = field(default_factory=dict)  # rank, node, path, place (FILE:LINE), peak_mb, shm

    def record(self) -> dict[str, Any]:
        """As it stands in an end record."""
        return {"why": self.kind, "mark": self.mark, "said": self.said, **({"where": self.where} if self.where else {})}


# -- what is written where ---------------------------------------------------------------------------------------------

# By the scheduler and the kernel.
SCHEDULER = {
    HOST_OOM: r"oom[-_ ]?kill(er)?\b.*|\bOut Of Memory\b|OUT_OF_MEMORY|[Ee]xceeded (job|step|\w*) ?memory limit|"
    r"TERM_MEMLIMIT|TERM_SWAP|[Mm]emory cgroup out of memory|Out of memory: Kill",
    TIME: r"DUE TO TIME LIMIT|TERM_RUNLIMIT|TERM_CPULIMIT|TERM_DEADLINE",
    PREEMPTED: r"DUE TO PREEMPTION|TERM_PREEMPT|TERM_LOAD|TERM_WINDOW",
    NODE: r"DUE TO NODE FAIL|NODE_FAIL\b|[Nn]ode failure on|DUE TO JOB NOT ENDING WITH SIGNALS",
    KILLED: r"TERM_(FORCE_)?(OWNER|ADMIN)|TERM_EXTERNAL_SIGNAL",
}
# By the worker, torch and the C libraries, the surest first.
WORKER = {
    CUDA_OOM: r"(CUDA|HIP) out of memory|CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED|Failed to CUDA [mc]alloc",
    NODE: r"[Uu]ncorrectable (NVLink |ECC |.*ECC )?error|ECC_UNCORRECTABLE|fall(en|ing) off the bus|NVRM: Xid|"
    r"no CUDA-capable device is detected|CUDA-capable device\(s\) is/are busy or unavailable|"
    r"CUDA error: (system not yet initialized|hardware stack error|device kernel image is corrupted)",
    HOST_OOM: r"(?<!CUDA )(?<!Python )oom[-_]kill|Out of memory: Kill|\bMemoryError\b|_ArrayMemoryError|"
    r"DataLoader worker .*killed by signal: Killed|[Cc]an'?(not|t) allocate memory|not enough memory: you tried|"
    r"std::bad_alloc|insufficient shared memory|killed by signal: Bus error|out of shared memory|"
    r"</torch_\w+>.*No space left|unable to open shared memory|No space left on device: '/(psm_|pym-|torch_|dev/shm)",
    DISK: r"No space left on device|[Dd]isk quota exceeded|\[Errno (28|122)\]|PytorchStreamWriter failed writing|"
    r"inline_container\.cc.*unexpected pos",
}
SHM = re.compile(r"shared memory|Bus error|</torch_\w+>|\(shm\)|No space left")
MISSING = re.compile(
    r"no such folder|needs data_path|has no folder|folders? (are missing|without pictures)|no pictures in|"
    r"cannot be read|: no file |model_path=.*no such file|"
    r"\[Errno (2|5|13|107|116)\]|No such file or directory|Input/output error|Stale file handle|not connected"
)
TIMED_OUT = re.compile(
    r"Watchdog caught collective operation timeout|failed to pass monitoredBarrier|Timed out waiting \d+ ?ms for|"
    r"wait timeout after \d+ ?ms|Timed out after \d+ seconds waiting for|client socket has timed out|"
    r"[Hh]eartbeat monitor timed out|ncclRemoteError|ncclSystemError|ncclInternalError|Timeout at NCCL work"
)
TALK = re.compile(  # what the others say when one rank is gone
    r"NCCL|ProcessGroup|[Gg]loo|c10d|TCPStore|Dist(Backend|Network|Store)Error|Connection (closed|reset) by peer|"
    r"Broken pipe|Rendezvous|Socket Timeout|monitoredBarrier"
)
BYSTANDERS = ("ChildFailedError", "SignalException", "KeyboardInterrupt")  # torchrun's own words
DIED = re.compile(
    r"srun: error: .*: (Killed|Terminated|Bus error|Segmentation fault|Aborted)|Exited by signal \d+|"
    r"Exited with exit code 1(3\d|4[0-3])\b"  # 128 + the signal
)


# -- text to cause -----------------------------------------------------------------------------------------------------


def of_text(
    log: str,
    record: Mapping[str, Any] | None,
    job_log: str = "",
    *,
    data_path: str | None = None,
    processes: int | None = None,
) -> Cause:
    """The cause of one attempt's end, from the tail of its log, its end record and the scheduler's log of its job.

    ``record`` may be the start record, or None, where no end was written. ``processes``: of all nodes.
    """
    log, job_log, record = _plain(log), _plain(job_log), record or {"event": "start"}
    cause = str(record.get("cause", ""))
    if cause in (STALLED, GAVE_UP):
        return _cause(cause, str(record.get("said") or _error(log) or cause))
    found = of_scheduler(job_log)
    if found and (found.kind == HOST_OOM or cause in ("", "killed", "stopped")):
        return found
    if cause == "stopped":
        kind = TIME if record.get("why") == TIME else PREEMPTED
        return _cause(kind, "saved and left when it was asked to, and was not started again")
    for kind, pattern in WORKER.items():
        if line := _line(log, pattern):
            return _cause(kind, line, **_details(kind, line, log, record))
    errors, talk = _tracebacks(log)
    bug = errors[-1] if errors else None
    said = _error(log)
    for text in [*([said] if said else []), *([bug.text] if bug else [])]:
        if MISSING.search(text) and (path := _missing(text, data_path, bug)):
            return _cause(DATA, text, path=path)
    if bug:
        where = {"place": bug.place, "rank": bug.rank}
        return _cause(BUG, bug.text, of=bug.normal, **{k: v for k, v in where.items() if v is not None})
    if said:
        return _cause(BUG, said, of=normal(said))
    if TIMED_OUT.search(log):
        return _time_out(log, processes)
    if record.get("asked"):
        return _cause(KILLED, f"did not save and leave within env.grace_s={record['asked']} s of a warning")
    if number := int(record.get("signal") or 0) or _torchruns_signal(log):
        return _cause(KILLED, f"killed by {_name(number)}", **_root(log))
    if talk:
        return _cause(NCCL, talk[-1].text, **_root(log))
    if record.get("event") == "start":
        return _vanished(record, job_log)
    lines = [line for line in log.splitlines() if line.strip()]
    telling = [
        line for line in lines if re.search(r"error|denied|not found|No such|rror:", line) and "srun: " not in line
    ]
    return _cause(UNKNOWN, (telling or lines or ["it left no word"])[-1])


def of_scheduler(job_log: str) -> Cause | None:
    """What the scheduler says of the job, if it says anything of a cause."""
    for kind, pattern in SCHEDULER.items():
        if line := _line(job_log, pattern):
            on = re.search(r"(?:\bON |[Nn]ode failure on )([\w.-]+)", line)
            where: dict[str, Any] = {"node": on[1]} if on and kind == NODE else {}
            if peak := re.search(r"Max Memory :\s+([\d.]+) ([KMGT])", job_log):
                where["peak_mb"] = round(float(peak[1]) * 1024.0 ** ("KMGT".index(peak[2]) - 1))
            return _cause(kind, line, **where)
    return None


def _vanished(record: Mapping[str, Any], job_log: str) -> Cause:
    """An attempt without an end: the supervisor was killed, or its node went down."""
    if died := DIED.search(job_log):
        return _cause(KILLED, f"the supervisor was killed ({died[0]})")
    if record.get("job"):
        node = str(record.get("host") or "").partition("/")[0]
        return _cause(NODE, f"no end was written{f' on {node}' if node else ''}: the node went down", node=node)
    return _cause(KILLED, "killed without a warning, or its machine went down")


def _details(kind: str, line: str, log: str, record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if rank := re.search(r"\[rank(\d+)\]|\[rank (\d+)\]", line):
        found["rank"] = int(rank[1] or rank[2])
    if kind == HOST_OOM and SHM.search(line):
        found["shm"] = True
    if kind == DISK and (path := re.search(r"device: '([^']+)'|exceeded: '([^']+)'", log)):
        found["path"] = path[1] or path[2]
    if kind == NODE and record.get("host"):
        found["node"] = str(record["host"]).partition("/")[0]
    return found


def _missing(text: str, data_path: str | None, bug: Traceback | None) -> str | None:
    """The path of data that is not there; None where what is missing is no data."""
    quoted = re.search(r"(?:data|saliency|model)_path=(\S+?):|'(/[^']+)'|(?:^|\s)(/[^\s:]+):|(data=\S+):", text)
    path = next((each for each in (quoted.groups() if quoted else ()) if each), None)
    if re.search(r"\b(data|saliency|model)_path\b|data=", text) or (bug and bug.file.startswith("workers/data/")):
        return path or data_path or "?"
    below = data_path and path and (path + "/").startswith(data_path.rstrip("/") + "/")
    return path if below or (path and not re.search(r"Errno|No such file or dir", text)) else None


def _time_out(log: str, processes: int | None) -> Cause:
    """A collective that not all ranks took part in. The one that is missing did not report, or is behind the others."""
    line = FRONT.sub("", _line(log, TIMED_OUT.pattern), count=1)
    said: dict[int, int] = {}  # rank -> the last work that it is known to have begun
    for m in re.finditer(r"Rank (\d+)\] .*?SeqNum=(\d+)", log):
        said[int(m[1])] = max(said.get(int(m[1]), 0), int(m[2]))
    for m in re.finditer(r"Rank (\d+)\].*?last enqueued (?:NCCL )?work: (-?\d+)", log):
        said[int(m[1])] = int(m[2])
    named = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", log)
    missing = [int(n) for n in re.findall(r"\d+", named[1])] if named else []
    if not missing and said:
        missing = sorted(set(range(processes or max(said) + 1)) - said.keys())
        if not missing and len(set(said.values())) > 1:
            missing = [rank for rank, work in said.items() if work == min(said.values())]
    if not missing and processes and (alive := {int(n) for n in re.findall(r"\[rank(\d+)\]", log)}):
        missing = sorted(set(range(processes)) - alive)  # who speaks was waiting
    what = re.search(r"OpType=(\w+)", log)
    if missing:
        ranks = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        line = f"rank {ranks} did not take part in {what[1] if what else 'a collective'}: {line}"
    where: dict[str, Any] = {"rank": missing[0], "ranks": missing} if missing else {}
    return _cause(NCCL, line, **where)


def _torchruns_signal(log: str) -> int:
    """The signal that the first of torchrun's processes to die died of."""
    root = log.rpartition("Root Cause (first observed failure)")
    found = re.search(r"exitcode\s*:\s*-(\d+)", root[2] if root[0] else log)
    return int(found[1]) if found else 0


def _root(log: str) -> dict[str, Any]:
    root = log.rpartition("Root Cause (first observed failure)")
    rank, host = re.search(r"rank\s+: (\d+)", root[2]), re.search(r"host\s+: (\S+)", root[2])
    node = host[1] if host and host[1] != "localhost" else None
    return ({"rank": int(rank[1])} if root[0] and rank else {}) | ({"node": node} if root[0] and node else {})


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# -- tracebacks --------------------------------------------------------------------------------------------------------


@dataclass
class Traceback:
    rank: int | None
    frames: list[tuple[str, int, str]] = field(default_factory=list)  # file, line, function
    name: str = ""
    message: str = ""
    ignored: bool = False

    @property
    def file(self) -> str:
        return self.frames[-1][0] if self.frames else ""

    @property
    def place(self) -> str | None:
        """FILE:LINE of the last frame in our workers, if there is one."""
        ours = [f"{file}:{line}" for file, line, _ in self.frames if file.startswith(("workers/", "contract/"))]
        return ours[-1] if ours else None

    @property
    def text(self) -> str:
        return f"{self.name}: {self.message}" if self.message else self.name

    @property
    def normal(self) -> str:
        frames = dict.fromkeys(f"{file} {function}" for file, _, function in self.frames)
        return "\n".join([*frames, normal(self.text)])


def _tracebacks(log: str) -> tuple[list[Traceback], list[Traceback]]:
    """Those of errors, and those of ranks that only lost the others. Lines of several ranks may be mixed."""
    open_ones: dict[str, Traceback] = {}
    ended: list[Traceback] = []
    ignored = False
    for line in log.splitlines():
        if not open_ones and "Traceback" not in line and not line.startswith("Exception ignored in"):
            continue  # nearly all
        prefix = re.match(r"\[(?:rank|default)(\d+)\]:\s?", line)
        stream, text = (prefix[1], line[prefix.end() :]) if prefix else ("", line)
        if "Traceback (most recent call last)" in text:
            found = open_ones.setdefault(stream, Traceback(int(prefix[1]) if prefix else None))
            found.ignored, ignored = ignored, False
        elif text.startswith("Exception ignored in"):
            ignored = True
        elif found := open_ones.get(stream):  # type: ignore[assignment]
            if frame := re.match(r'\s*File "(.+?)", line (\d+)(?:, in (.+))?', text):
                found.frames.append((_file(frame[1]), int(frame[2]), frame[3] or ""))
            elif raised := re.match(r"((?:\w+\.)*[A-Z]\w*)(?:: ?(.*))?$", text):
                found.name, found.message = raised[1], raised[2] or ""
                ended.append(open_ones.pop(stream))
    known = [t for t in ended if not t.ignored and not t.name.endswith(BYSTANDERS)
             and not re.match(r"Caught \w+ in DataLoader worker", t.message)]  # fmt: skip
    errors = [t for t in known if not TALK.search(t.text)]
    return errors, [t for t in known if TALK.search(t.text)]


def _file(path: str) -> str:
    """As it is called in every capsule and installation."""
    for folder in ("site-packages", "dist-packages", r"lib/python3\.\d+", r"capsules/\w+"):
        path = re.sub(rf"^.*/{folder}/", "", path)
    ours = re.search(r"(?:^|/)((?:workers|contract|launcher|analysis)/.+)$", path)
    return ours[1] if ours else "/".join(path.split("/")[-2:])


def normal(text: str) -> str:
    """Without what differs between two runs that fail alike: folders, numbers, addresses, identities."""
    text = re.sub(r"(?:[\w.~-]*/)+(?=[^\s/])", "", text)
    text = re.sub(r"0x[0-9a-fA-F]+|\b(?=[a-z]*\d)[0-9a-f]{6,}\b", "#", text)
    return re.sub(r"[-+]?\d[\d.,:_]*(?:e[-+]?\d+)?", "#", text)


# -- lines -------------------------------------------------------------------------------------------------------------


# Times, ranks and where in torch's sources: no evidence.
FRONT = re.compile(r"\s*(\[rank ?\d+\]:?\s?|\[[EWI]\d{3,4} [\d:.]+ \S+\] |[\d-]{10} [\d:]{8} |error: )*")


def _cause(kind: str, said: str, of: str = "", **where: Any) -> Cause:
    mark = hashlib.blake2b(f"{kind}\n{of}".encode("utf-8", "replace"), digest_size=4).hexdigest()
    line = "".join(c if c.isprintable() else "?" for c in " ".join(FRONT.sub("", said, count=1).split()))
    return Cause(kind, mark, line[:300], where)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n")


def _line(text: str, pattern: str) -> str:
    """The first line that has it."""
    found = re.search(pattern, text)
    if not found:
        return ""
    start, end = text.rfind("\n", 0, found.start()) + 1, text.find("\n", found.start())
    return text[start : end if end >= 0 else None]


def _error(log: str) -> str | None:
    """Our own last word: workers, supervisors and launchers end a refusal with ``error: ...``."""
    said = [m[1] for m in re.finditer(r"^(?:[\d-]{10} [\d:]{8} )?(?:\[rank \d+\] )?error: (.+)$", log, re.MULTILINE)]
    return said[-1].strip() if said else None


# -- a run -------------------------------------------------------------------------------------------------------------


def of_run(folder: Path, output_dir: Path) -> Cause | None:
    """Why the last attempt of a run ended; None for one that is finished, or whose first is still to come. What the
    supervisor wrote down is believed, unless the scheduler knows better."""
    if (folder / rundir.DONE).exists():
        return None
    records, _ = rundir.read_journal(rundir.attempts_file(folder, 0))
    start = next((r for r in reversed(records) if r.get("event") == "start"), None)
    if start is None:
        return _stillborn(folder, output_dir)
    ends = (r for r in reversed(records) if r.get("event") == "end" and r.get("attempt") == start.get("attempt"))
    record = next(ends, start)
    if record.get("cause") == "finished":
        return None
    said = job_logs.of_attempt(folder, output_dir, start)
    if record.get("mark"):
        found = Cause(str(record["why"]), str(record["mark"]), str(record.get("said")), record.get("where") or {})
        knows = of_scheduler(said)
        if knows and (knows.kind == HOST_OOM or found.kind in (KILLED, UNKNOWN)):
            found = knows
    else:
        processes = None
        with contextlib.suppress(rundir.RunDirError):
            processes = rundir.read_run(folder).get("processes")
        log = job_logs.tail(folder / rundir.LOG, int(start.get("log") or 0))
        found = of_text(log, record, said, data_path=_data_path(folder), processes=processes)
    return _on(found, folder, start)


def _on(found: Cause, folder: Path, start: Mapping[str, Any]) -> Cause:
    """With the node that the rank in question ran on; of several nodes and no rank, none."""
    if "node" in found.where:
        return found
    last = [rundir.last_record(path) or {} for path in sorted(folder.glob("attempts.*.jsonl"))]
    hosts = [str(record.get("host") or "").partition("/")[0] for record in last]
    host: str | None = str(start.get("host") or "").partition("/")[0]
    if len(hosts) > 1:
        host = None
        with contextlib.suppress(rundir.RunDirError, LookupError, ArithmeticError):
            host = hosts[int(found.where["rank"]) * len(hosts) // int(rundir.read_run(folder)["processes"])]
    return replace(found, where={**found.where, "node": host}) if host else found


def _data_path(folder: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if found := re.search(r"^data_path: (.+)$", (folder / rundir.CONFIG).read_text(), re.MULTILINE):
            path = found[1].strip("'\" ")
            return None if path == "null" else path
    return None


def _stillborn(folder: Path, output_dir: Path) -> Cause | None:
    """A run that was queued, and whose job ended before it was started: the job's own log is all there is."""
    text = "\n".join(job_logs.tail(path) for path in job_logs.of_run(folder, output_dir)[-2:])
    if not text.strip():
        return None
    return of_scheduler(text) or of_text(text, {"cause": "failed"})
