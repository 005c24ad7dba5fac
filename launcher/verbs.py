"""What the verbs do. Each takes the parsed arguments and gives the exit code."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from contract import rundir
from contract.settings.checks import SettingsError
from launcher import (
    CONFIGS,
    NotFound,
    Refused,
    backends,
    canary,
    capsule,
    filling,
    mending,
    mirror,
    queues,
    rundirs,
    show,
)
from launcher.plan import Plan, Queued, Run, absolute, check_data
from launcher.rundirs import Found, Submission

ASK_ABOVE = 10


# -- launching --------------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace) -> int:
    return _start(_plan(args), args)


def plan(args: argparse.Namespace) -> int:
    found = _plan(args)
    found = queues.told(found, queues.glance(found.output_dir).runs)
    if args.json:
        _json_lines(run.line() for run in found.runs)
        return 0
    out = show.console(args.no_color)
    show.plan(out, found)
    todo = found.todo()
    if found.study:
        show.study(out, found, todo)
    elif todo:
        out.print(f"to do: {show.price(found, todo)}")
    if said := show.resources(found, todo):
        out.print(said)
    words = shlex.join(args.words)
    verb = "fill" if found.todo() else "table" if found.study else "status"
    out.print(f"next: python launcher.py {verb} {words}")
    return 0


def fill(args: argparse.Namespace) -> int:
    if filling.wanted(args):
        return filling.fill(args, lambda: _plan(args), _start)
    return _start(_plan(args), args)


def adopted(args: argparse.Namespace) -> int:
    from launcher import adopt

    found = _plan(args)
    made = adopt.adopt(found, args)
    if not args.dry_run:
        adopt.write(found, made)
    for each in made:
        what = ", ".join(f"{key}={value:g}" for key, value in each.metrics.items()) or "encoder.pt"
        print(f"{each.run.stage} seed={each.run.settings.seed} {each.run.identity}  {what}  from {each.sources[0]}")
    print(f"{len(made)} runs {'would be ' if args.dry_run else ''}imported", file=sys.stderr)
    return 0


def retry(args: argparse.Namespace) -> int:
    words, output_dir = _place(args.words)
    if not words:
        raise SettingsError("retry: say which, for instance :failed or a run's identity")
    change, said = mending.change(args.set or (), args.halve_batch)
    queue = queues.asked(output_dir, clean=not args.dry_run)
    found = rundirs.select(words, output_dir, queue)
    chosen = [f for f in found if f.state not in ("finished", "running", "queued")]
    runs = rundirs.again(chosen, output_dir, change, said)
    if not args.force and (bugs := mending.bugs(chosen, output_dir, {r.identity: r.code.hash for r in runs})):
        chosen, runs = [f for f in chosen if f.identity not in bugs], [r for r in runs if r.identity not in bugs]
        why = f"{show.runs(len(bugs))} ended by a bug in code that is still the same ({next(iter(bugs.values())).said})"
        if not chosen:
            raise Refused(f"{why}; mend it, or add --force")
        print(f"left out: {why}; add --force to start them all the same", file=sys.stderr)
    if not chosen:
        print("nothing to retry", file=sys.stderr)
        return 0
    if not args.dry_run and not show.agreed(f"retry {show.runs(len(chosen))}", args.yes, ASK_ABOVE, len(chosen)):
        return 4
    ready = {f.identity for f in chosen}
    waiting = [f for f in rundirs.select([":waiting", ":blocked"], output_dir, queue) if f.identity not in ready]
    behind: list[Found] = []
    while more := [f for f in waiting if f not in behind and ready.intersection(f.info.get("parents", ()))]:
        behind += more  # what waited for them, and what waited for that
        ready |= {f.identity for f in more}
    runs += rundirs.again(behind, output_dir)
    if "env.max_parallel" in said and runs:  # of the launch, not of a run
        for run in runs:
            run.settings.env.max_parallel = runs[0].settings.env.max_parallel
    if not args.dry_run:
        for run in runs:
            rundirs.allow(run.folder)
    runs = [dataclasses.replace(r, state="new") for r in sorted(runs, key=lambda r: len(r.parents))]
    return _start(Plan(name="retry", output_dir=output_dir, runs=tuple(runs)), args)


def _plan(args: argparse.Namespace) -> Plan:
    from launcher import launches, sweep  # hydra: 0.2 s that the other verbs need not wait for

    words: list[str] = args.words
    if words and "=" not in words[0]:
        return launches.of_study(words[0], sweep.points(words[1:]))
    return launches.of_launch(sweep.points(words), getattr(args, "config_name", "config"))


def _start(found: Plan, args: argparse.Namespace) -> int:
    """Run what is missing of a plan, or say what that would be."""
    with contextlib.ExitStack() as turn:
        schedulers = {r.settings.env.scheduler for r in found.todo(getattr(args, "stale", False))} - {"local"}
        if schedulers and not args.dry_run:
            for each in schedulers if not _prepared(args) else ():
                backends.load(each).ready()  # before anything is written
            turn.enter_context(queues.turn(found.output_dir))
            found = queues.looked_again(found)
        return _start_in_turn(found, args)


def _prepared(args: argparse.Namespace) -> Path | None:
    """The folder of a script that ``-n`` printed and a person sent: its jobs make the run directories themselves."""
    folder: Path | None = getattr(args, "prepare", None)
    return folder


def _start_in_turn(found: Plan, args: argparse.Namespace) -> int:
    dry, out = args.dry_run, show.console(args.no_color, stderr=True)
    prepared = _prepared(args)
    if prepared and (prepared / "0.json").exists():
        return 0
    queue = {} if prepared else queues.asked(found.output_dir, clean=not dry)
    found = queues.told(found, queue)
    todo = found.todo(getattr(args, "stale", False))
    if getattr(args, "json", False):
        _json_lines(run.line() for run in found.runs)
    elif not args.quiet:
        show.plan(out, found)
    if not dry:
        check_data(todo)
        if found.study:
            rundirs.write_study(found)
    if not todo:
        if not args.quiet:
            out.print("nothing to do")
        return 0
    gate: tuple[str, ...] = ()
    if args.verb != "retry" and canary.wanted(todo):
        small = queues.told(dataclasses.replace(found, runs=tuple(canary.of(found, todo))), queue).runs
        gate = tuple(run.identity for run in small if run.state != "reuse" or run in canary.to_run(small))
        first = canary.to_run(small)
        if gate and not args.quiet:
            show.canary(out, first or small, len(todo))
        found, todo = dataclasses.replace(found, runs=(*found.runs, *small)), [*first, *todo]
    submission, backend, code = _submission(found, todo, queue, gate)
    if prepared:
        shutil.rmtree(prepared, ignore_errors=True)  # of a job that was killed over it
        submission = dataclasses.replace(submission, folder=prepared)
    if dry:
        if not getattr(args, "json", False):
            print(backend.render(submission), end="")
        return 0
    submission.capsule.parent.mkdir(parents=True, exist_ok=True)
    code.store(found.output_dir)
    rundirs.write(submission, found, code.commit())
    if prepared:
        backend.prepare(submission)
        return 0
    if todo[0].settings.env.scheduler != "local":
        return queues.send(submission, backend, show.Watch(len(todo), args.no_color, args.quiet))
    with mirror.following(found.output_dir, args.quiet), show.Watch(len(todo), args.no_color, args.quiet) as watch:
        status = backend.submit(submission, watch)
    if status == 130:
        print("stopped; the same command goes on where it left off", file=sys.stderr)
    return status


def _submission(
    found: Plan, todo: Sequence[Run], queue: Mapping[str, Queued], gate: tuple[str, ...]
) -> tuple[Submission, backends.Backend, capsule.Capsule]:
    schedulers = {r.settings.env.scheduler for r in todo}
    if len(schedulers) > 1:
        raise SettingsError(f"env.scheduler={','.join(sorted(schedulers))}: one launch goes to one scheduler")
    scheduler = schedulers.pop()
    backend = backends.load(scheduler)
    slots = 1
    if scheduler == "local":
        from launcher.backends import local

        if any(r.settings.env.nodes > 1 for r in todo):
            raise SettingsError("env.nodes: this is one machine; env.slurm=True or env.lsf=True asks for more")
        slots = local.slots(todo)
        for run in todo:
            run.settings.env.max_parallel = slots  # the supervisor shares the cores out by it
    apart: list[str | Path] = [found.output_dir, *(r.settings.data_path for r in todo if r.settings.data_path)]
    code = capsule.collect(apart)
    where = code.path(found.output_dir)
    submission = Submission(
        name=found.name,
        output_dir=found.output_dir,
        capsule=where,
        runs=tuple(todo),
        folder=rundirs.new_folder(found.output_dir, found.name),
        slots=slots,
        fresh=frozenset(r.identity for r in todo if not r.folder.exists()),
        queue=queue,
        canary=gate,
    )
    return submission, backend, code


# -- looking ----------------------------------------------------------------------------------------------------------


def status(args: argparse.Namespace) -> int:
    from launcher import status

    words, output_dir = _place(args.words)
    return status.main(args, words, output_dir)


def why(args: argparse.Namespace) -> int:
    words, output_dir = _place(args.words)
    queue = queues.glance(output_dir).runs
    found = _select(words, output_dir, queue)
    groups = mending.groups(found, rundirs.select([], output_dir, queue) if words else found, output_dir)
    if args.json:
        _json_lines(mending.described(group, args.words) for group in groups)
    elif groups:
        show.causes(show.console(args.no_color), groups, args.words)
    else:
        print("nothing failed", file=sys.stderr)
    states = {f.state for group in groups for f in group.runs}
    return 100 if states - {"stopped"} else 101 if states else 0


def logs(args: argparse.Namespace) -> int:
    from launcher import logs

    words, output_dir = _place(args.words)
    if not words:
        raise SettingsError("logs: say which runs; python launcher.py status --json lists them")
    return logs.follow(
        _select(words, output_dir, queues.glance(output_dir).runs),
        output_dir,
        lambda: set(queues.glance(output_dir).runs),
        on=args.follow,
        tail=args.tail,
        job=args.job,
        colour=sys.stdout.isatty() and not args.no_color and "NO_COLOR" not in os.environ,
    )


def prune(args: argparse.Namespace) -> int:
    from launcher import prune

    words, output_dir = _place(args.words)

    def look() -> list[prune.Item]:
        queued = set(queues.asked(output_dir, clean=False))  # where that is not known, nothing goes
        found = _select(words, output_dir) if words else rundirs.select([], output_dir)
        return prune.items(found, output_dir, queued, days=args.days, everything=not words, replaced=args.replaced)

    items = look()
    if args.json:
        _json_lines(item.line() for item in items)
    else:
        show.prunable(show.console(args.no_color), items)
    if not items or args.dry_run:
        return 0
    if not show.agreed(f"remove these {len(items)}, {show.size(sum(item.size for item in items))}", args.yes):
        return 4
    with queues.turn(output_dir):  # nothing is sent to a queue in between
        again = {item.path for item in look()}
        gone = [item for item in items if item.path in again and prune.remove(item, output_dir)]
    print(f"removed {len(gone)}, {show.size(sum(item.size for item in gone))}", file=sys.stderr)
    return 0


def cancel(args: argparse.Namespace) -> int:
    words, output_dir = _place(args.words)
    if not words:
        raise SettingsError("cancel: say which, for instance :waiting or a run's identity")
    queue = queues.asked(output_dir)
    chosen = [f for f in _select(words, output_dir, queue) if f.state not in ("finished", "cancelled")]
    if not show.agreed(f"cancel {show.runs(len(chosen))}", args.yes, ASK_ABOVE, len(chosen)):
        return 4
    for each in chosen:
        (each.folder / rundir.CANCELLED).touch()
    gone = {f.identity for f in chosen}
    out = {f.identity: queue[f.identity] for f in chosen if f.state == "queued" and f.identity in queue}
    queues.take_out(out, others=[job for identity, job in queue.items() if identity not in gone])
    print(f"{len(chosen)} cancelled; python launcher.py retry takes it back")
    return 0


# -- where a number comes from ----------------------------------------------------------------------------------------


def repro(args: argparse.Namespace) -> int:
    from launcher import repro

    words, output_dir = _place(args.words)
    return repro.repro(_only("repro", words, output_dir), output_dir, args)


def diff(args: argparse.Namespace) -> int:
    from launcher import difference

    words, output_dir = _place(args.words)
    if len(words) != 2:
        raise SettingsError("diff: say two runs, for instance by the beginnings of their identities")
    one, two = (_only("diff", [word], output_dir) for word in words)
    return difference.difference(one, two, args)


# -- analysis, which runs in a process of its own ---------------------------------------------------------------------


def table(args: argparse.Namespace) -> int:
    if not args.words:
        raise SettingsError("table: say which study")
    path = rundirs.write_study(_plan(args))
    return mirror.analysis("tables", "--manifest", str(path), *args.rest)


def report(args: argparse.Namespace) -> int:
    if not args.words:
        raise SettingsError("report: say which study")
    path = rundirs.write_study(_plan(args))
    return mirror.analysis("report", "--manifest", str(path), *args.rest)


def ingest(args: argparse.Namespace) -> int:
    _, output_dir = _place(args.words)
    return mirror.analysis("ingest", "--output-dir", str(output_dir), *args.rest)


def ui(args: argparse.Namespace) -> int:  # noqa: RET503  # ends in exec
    _, output_dir = _place(args.words)
    store = args.store or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output_dir / 'mlflow.db'}"
    if code := mirror.analysis(
        "ingest", "--output-dir", str(output_dir), *(["--store", args.store] if args.store else [])
    ):
        return code
    if store.startswith("http"):
        print(f"the store is a server: open {store}")
        return 0
    # By the environment: a database's address may hold a password, and every user can read the words of a process.
    env = {**os.environ, "MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    words = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(args.port), "--workers", "1"]
    os.execve(sys.executable, words, env)  # becomes the server, which ends its own processes on Ctrl-C


def drill(args: argparse.Namespace) -> int:
    from launcher import drill

    study = args.words and "=" not in args.words[0]
    if not study and args.config_name == "config" and not any(word.startswith("worker=") for word in args.words):
        args.words.insert(0, "worker=main_lmim")
    return drill.drill(_plan(args), args)


def doctor(args: argparse.Namespace) -> int:
    from launcher import doctor

    return doctor.main(_place(args.words)[1])


# -- shared -----------------------------------------------------------------------------------------------------------


def _place(words: Sequence[str]) -> tuple[list[str], Path]:
    """The words without ``output_dir=DIR``, and that folder."""
    said = [w.partition("=")[2] for w in words if w.startswith("output_dir=")]
    default = yaml.safe_load((CONFIGS / "config.yaml").read_text())["output_dir"]
    return [w for w in words if not w.startswith("output_dir=")], Path(absolute(said[-1] if said else default))


def _select(words: Sequence[str], output_dir: Path, queue: Mapping[str, Queued] | None = None) -> list[Found]:
    found = rundirs.select(words, output_dir, queue)
    if not found:
        raise NotFound(f"no such run in {output_dir}; output_dir=DIR looks elsewhere")
    return found


def _only(verb: str, words: Sequence[str], output_dir: Path) -> Found:
    match _select(words, output_dir) if words else []:
        case [one]:
            return one
        case []:
            raise SettingsError(f"{verb}: say which run; python launcher.py status --json lists them")
        case many:
            raise SettingsError(f"{verb}: {len(many)} runs match: {', '.join(f.identity for f in many[:12])}")


def _json_lines(lines: object) -> None:
    for line in lines:  # type: ignore[attr-defined]
        print(json.dumps(line, ensure_ascii=False))
