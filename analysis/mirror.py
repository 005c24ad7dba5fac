"""One run directory as the MLflow store should show it: what is missing there is sent, once.

Before metrics are sent the run's tag ``sightline.sent`` says so; after them it holds how far the journal is in.
Where it does not fit the journal (killed on the way, or the journal was cut back when the run resumed) the store is
asked what it has. Hence a run can be mirrored at any time, again, by a process that may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from analysis import runs as rd
from analysis.runs import Tell
from analysis.studies import Part
from contract import cost, rundir

if TYPE_CHECKING:
    from mlflow.entities import Run as Stored
    from mlflow.tracking import MlflowClient

CHUNK = 800  # metrics in a call: MLflow takes 1,000 metrics, params and tags together
PARAMS = 100
LOOKBACK = 256  # bytes before the offset that say whether the journal is still the same
SENDING = "sending"
IDENTITY, CODE, SENT, ARTIFACTS = (f"sightline.{name}" for name in ("identity", "code", "sent", "artifacts"))
PARENT = "mlflow.parentRunId"  # MLflow's own: its pages fold an evaluation below its pretraining
STATUS = {"finished": "FINISHED", "running": "RUNNING", "cancelled": "KILLED", "stopped": "SCHEDULED"}


Outcome = Literal["new", "grown", "unchanged"]
Sent = Literal["open", "all", "costed"]
"""Of what comes at the end: nothing; all results; these and what they cost, which the supervisor writes down last."""


class Mirror:
    """One run directory as the store should show it. ``part``: in which tables; ``parent``: the stored run that it is
    built upon."""

    def __init__(self, run: rd.Run, tell: Tell, part: Part | None = None, parent: str | None = None):
        self.run, self.tell, self.parent = run, tell, parent
        self.part = part or Part({run.study: []} if run.study else {})
        self.journal = run.folder / rundir.METRICS
        self.state = rundir.state(run.folder)
        self.final = rd.read_final(run.folder)
        self.sent: Sent = "open" if self.final is None else "all" if rundir.owner_alive(run.folder) else "costed"
        self.attempts = rundir.attempts(run.folder)  # read after its owner was seen to be gone: now they are complete
        nodes = len(list(run.folder.glob("attempts.*.jsonl")))
        self.cost = cost.of_records(self.attempts, run.processes, nodes)
        self.files = artifacts(run.folder)

    def send(self, client: MlflowClient, experiment: str, stored: Stored | None) -> tuple[Outcome, int, str]:
        """Bring the stored run up to date. Returns what that was, the number of metrics sent, and MLflow's run id."""
        outcome: Outcome = "grown" if stored else "new"
        mark = stored.data.tags.get(SENT, "") if stored else _mark(self.journal, 0, "open")
        offset, sent = _resume(self.journal, mark)
        if stored and stored.data.tags.get(CODE, "") != self.run.code and (sent != "open" or offset is None):
            client.delete_run(stored.info.run_id)  # made again with other code; MLflow keeps the old one in its trash
            stored, offset, sent, outcome = None, 0, "open", "new"
        points, end = self._points(offset, sent, _history(client, stored) if offset is None and stored else {})
        tags = self._tags()
        status = self._status()
        wanted = tags | {SENT: _mark(self.journal, end, self.sent)}
        if stored and not points and stored.info.status == status and wanted.items() <= stored.data.tags.items():
            return "unchanged", 0, stored.info.run_id
        params = {} if stored and mark != SENDING else self._params()
        if stored:
            if points:
                client.set_tag(stored.info.run_id, SENT, SENDING)
            params = {key: value for key, value in params.items() if key not in stored.data.params}
        else:
            name = f"{self.run.name} seed={self.run.seed}"
            first = tags | self._note() | {SENT: SENDING}
            first.pop(ARTIFACTS, None)  # said when they are there
            stored = client.create_run(experiment, self._start(), first, name)
        run_id = stored.info.run_id
        if tags.get(ARTIFACTS, "") != stored.data.tags.get(ARTIFACTS, ""):
            for path in self.files:
                client.log_artifact(run_id, str(path), path.parent.name)
        changed = {key: value for key, value in wanted.items() if key == SENT or stored.data.tags.get(key) != value}
        _log(client, run_id, points, params, changed)
        if status in ("RUNNING", "SCHEDULED"):
            if stored.info.status != status:
                client.update_run(run_id, status)
        elif stored.info.status != status or points:
            client.set_terminated(run_id, status, self._end(points))
        return outcome, len(points), run_id

    def _points(self, offset: int | None, sent: Sent, seen: dict[tuple[str, int], float]) -> tuple[list[rd.Point], int]:
        """What the store lacks, and the journal's length with it. ``seen``: what it has, as far as that was asked."""
        records, end = rundir.read_journal(self.journal, offset or 0)
        found = []
        for point in map(_clean, rd.points(records)):
            if (point.key, point.step) not in seen:
                seen[point.key, point.step] = point.value
                found.append(point)
        if self.final and sent == "open":
            if offset:
                seen = {(p.key, p.step): p.value for p in map(_clean, rd.points(rundir.read_journal(self.journal)[0]))}
            last = map(_clean, self.final.points())
            found += [p for p in last if not _same(seen.get((p.key, p.step)), p.value)]
        if self.sent == "costed" != sent:
            found += [p for p in self._costs() if (p.key, p.step) not in seen]
        return found, end

    def _costs(self) -> list[rd.Point]:
        """What a finished run has used, as metrics at its last step: pages can sort and plot by these."""
        assert self.final is not None
        used = {"cost/gpu_hours": self.cost.gpu_hours, "cost/cpu_hours": self.cost.cpu_hours}
        used["cost/peak_gpu_mb"] = self.final.peak_gpu_mb or 0.0
        used["cost/peak_rss_mb"] = max((rd.number(a.get("peak_rss_mb")) or 0.0 for a in self.attempts), default=0.0)
        return [rd.Point(key, self.final.steps, self.final.time, value) for key, value in used.items() if value]

    def _tags(self) -> dict[str, str]:
        run, part = self.run, self.part
        listing = [(p.parent.name, p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        encoder = run.folder / rundir.ENCODER
        around = [a["environment"] for a in self.attempts if a.get("environment")]
        found = {
            IDENTITY: run.identity,
            CODE: run.code,
            ARTIFACTS: hashlib.blake2b(repr(listing).encode()).hexdigest()[:16] if listing else "",
            "sightline.group": run.group,
            "sightline.seed": str(run.seed),
            "sightline.stage": run.stage,
            "sightline.worker": run.worker,
            "sightline.state": self.state,
            "sightline.study": part.studies,
            "sightline.row": part.named(part.rows),
            "sightline.column": part.named(part.columns),
            **({"sightline.imported": run.imported} if run.imported else {}),
            "sightline.parents": ",".join(run.parents),
            "sightline.encoder": encoder.resolve().as_uri() if self.final and encoder.exists() else "",
            "sightline.environment": str(around[-1]) if around else "",
            "sightline.hours": str(self.cost) if self.cost.hours else "",
            "sightline.capsule": run.capsule,
            "mlflow.source.git.commit": run.commit,
            "mlflow.source.name": f"workers/{run.worker}.py",
            PARENT: self.parent or "",
        }
        return {key: value[:5000] for key, value in found.items() if value}

    def _note(self) -> dict[str, str]:
        """What MLflow's page says on top, in Markdown. Written once: people may go on writing there."""
        run = self.run
        lines = [f"{run.stage}, seed {run.seed}, run `{run.identity}` in `{run.folder}`"]
        lines += [f"built upon `{parent}`" for parent in run.parents]
        lines.append(f"again: `python launcher.py repro {run.identity}`")
        return {"mlflow.note.content": "  \n".join(lines)}

    def _params(self) -> dict[str, str]:
        path = self.run.folder / rundir.CONFIG
        try:
            config = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            if not isinstance(config, dict):
                raise ValueError("expected a mapping")
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.tell(f"{path}: unreadable ({str(error).splitlines()[0]}); the run has no parameters in the store")
            return {}
        return {_name(key): _harmless(key, value)[:6000] for key, value in _flat(config)}

    def _status(self) -> str:
        """MLflow's word for the state; KILLED for what ended without a word or by a signal."""
        if self.state in STATUS:
            return STATUS[self.state]
        if self.state == "waiting":
            return "SCHEDULED"
        last = self.attempts[-1] if self.attempts else {}
        own = last.get("event") == "end" and last.get("cause") != "killed" and not last.get("signal")
        return "FAILED" if own else "KILLED"

    def _start(self) -> int:
        times = [rd.number(a.get("time")) for a in self.attempts[:1]] or [self.run.submitted]
        return _ms(times[0] or self.run.submitted)

    def _end(self, points: Sequence[rd.Point]) -> int:
        if self.final:
            return _ms(self.final.time)
        times = [rd.number(a.get("time")) or 0.0 for a in self.attempts[-1:]] + [p.time for p in points[-1:]]
        return _ms(max(times, default=self.run.submitted))


def _log(
    client: MlflowClient, run_id: str, points: Sequence[rd.Point], params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """Everything in as few calls as MLflow allows; the tags, which say that it is done, come last."""
    from mlflow.entities import Metric, Param, RunTag

    # The newest first: MLflow then writes the newest value of a metric down once, and not once for every point.
    newest_first = sorted(points, key=lambda p: -p.step)
    metrics = [Metric(p.key, p.value, _ms(p.time), p.step) for p in newest_first]
    leaves = [Param(key, value) for key, value in params.items()]
    metric_chunks = [metrics[i : i + CHUNK] for i in range(0, len(metrics), CHUNK)]
    param_chunks = [leaves[i : i + PARAMS] for i in range(0, len(leaves), PARAMS)]
    calls = max(len(metric_chunks), len(param_chunks), 1)
    for i in range(calls):
        client.log_batch(
            run_id,
            metric_chunks[i] if i < len(metric_chunks) else (),
            param_chunks[i] if i < len(param_chunks) else (),
            [RunTag(key, value) for key, value in tags.items()] if i == calls - 1 else (),
        )


# -- where we are in a journal ----------------------------------------------------------------------------------------


def _mark(journal: Path, offset: int, sent: Sent) -> str:
    return f"{offset}:{_digest(journal, offset)}:{sent}"


def _resume(journal: Path, mark: str) -> tuple[int | None, Sent]:
    """The offset to go on from and what of the end is sent; None where the mark does not fit the journal."""
    match = re.fullmatch(r"(\d+):(\w+):(open|all|costed)", mark)
    if match is None or _digest(journal, int(match[1])) != match[2]:
        return None, "open"
    sent: dict[str, Sent] = {"open": "open", "all": "all", "costed": "costed"}
    return int(match[1]), sent[match[3]]


def _digest(journal: Path, offset: int) -> str:
    try:
        with journal.open("rb") as file:
            file.seek(max(0, offset - LOOKBACK))
            data = file.read(min(offset, LOOKBACK))
    except FileNotFoundError:
        data = b""
    return hashlib.blake2b(data).hexdigest()[:16] if len(data) == min(offset, LOOKBACK) else "short"


def _history(client: MlflowClient, stored: Stored) -> dict[tuple[str, int], float]:
    """All that the store has of a run."""
    return {
        (metric.key, metric.step): metric.value
        for key in stored.data.metrics
        for metric in client.get_metric_history(stored.info.run_id, key)
    }


def _same(one: float | None, other: float) -> bool:
    return one is not None and (one == other or (math.isnan(one) and math.isnan(other)))


# -- what MLflow allows -----------------------------------------------------------------------------------------------


def _clean(point: rd.Point) -> rd.Point:
    """SQL has no infinities."""
    value = math.copysign(sys.float_info.max, point.value) if math.isinf(point.value) else point.value
    return point._replace(key=_name(point.key), value=value)


def _name(key: str) -> str:
    """A name as MLflow takes it: no odd characters, and no path that means another."""
    parts = [part for part in re.sub(r"[^\w.\- /:]", "_", key).split("/") if part.strip(".")]
    return "/".join(parts)[:250].rstrip("/") or "_"


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000)) if math.isfinite(seconds) else 0


def _flat(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _harmless(key: str, value: object) -> str:
    """The value as text; no password gets into the store."""
    if value is not None and re.search(r"passw|secret|credential|(api|access|auth)_?(key|token)", key, re.IGNORECASE):
        return "***"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = re.sub(r"(://[^/@:\s]*):[^@\s]*@", r"\1:***@", text)
    return re.sub(
        r"((?:password|passwd|secret|api_?key|token)\w*\s*[=:]\s*)[^\s\"']+", r"\1***", text, flags=re.IGNORECASE
    )


def artifacts(folder: Path) -> list[Path]:
    """The files of a run that are worth ingesting."""
    folders = [folder / name for name in (rundir.FIGURES, rundir.TABLES) if (folder / name).is_dir()]
    found = [path for each in folders for path in sorted(each.iterdir())]
    return [p for p in found if p.is_file() and not p.is_symlink() and not p.name.startswith(".")]
