"""``fill`` with a purpose: seeds until a comparison is decided, hours not to be overspent, one of several clusters."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from contract import rundir, study
from contract.settings.checks import SettingsError
from launcher import mirror, prices, queues, rounds, rundirs, show
from launcher.plan import Plan, Run

HELD = 4  # exit codes: refused by the budget; not finished
UNFINISHED = 101


def wanted(args: argparse.Namespace) -> bool:
    return bool(args.until or args.budget or args.shard)


def fill(args: argparse.Namespace, plan: Callable[[], Plan], start: Callable[[Plan, argparse.Namespace], int]) -> int:
    """Plan, start what may start, look at what came out of it, until nothing is open. On a scheduler one round: the
    same command goes on when the jobs are done."""
    budget = prices.hours(args.budget) if args.budget else None
    _check(args, found := plan())
    while True:
        found = queues.told(found, queues.glance(found.output_dir).runs)
        todo, held = _allowed(args, found, budget)
        status = start(dataclasses.replace(found, only=frozenset(run.identity for run in todo)), args)
        if status or args.dry_run:
            return status
        if any(run.settings.env.scheduler != "local" for run in todo):
            _say(args, f"{show.runs(len(todo))} queued; the same command goes on when they are done")
            return 0
        if held and todo:  # prices are known better now
            found = plan()
            continue
        if held:
            return HELD
        if not args.until:
            return 0
        match _next_round(args, found):
            case "wait":
                return UNFINISHED
            case "decided":
                return 0
        found = plan()


def _check(args: argparse.Namespace, found: Plan) -> None:
    if not args.until:
        return
    study.rule(args.until)
    if found.study is None:
        raise SettingsError(f"--until {args.until}: decides over the rows of a study; say which study")
    if args.shard:
        raise SettingsError("--until and --shard: a cluster that has one half cannot decide; fill the shards first")
    if any(word.startswith("seed=") for word in args.words):
        raise SettingsError("--until chooses the seeds; leave seed= away")


def _allowed(args: argparse.Namespace, found: Plan, budget: float | None) -> tuple[Sequence[Run], Sequence[Run]]:
    """What may start now, and what the budget holds back."""
    todo: Sequence[Run] = found.todo(args.stale)
    if args.shard:
        todo = prices.shard(found, todo, args.shard)
    if budget is None:
        return todo, ()
    split = prices.within(found, todo, budget)
    if split.unknown:
        _say(args, f"price not known yet: one run of {', '.join(split.unknown)} starts, to find out")
    if split.held:
        used, asked = f"{split.used:.3g} of {budget:g} h are used", f"{split.asked:.3g} h start now"
        _say(args, f"held: {show.runs(len(split.held))}; {used}, {asked}; a larger --budget lets them go")
    return split.go, split.held


def _next_round(args: argparse.Namespace, found: Plan) -> Literal["more", "wait", "decided"]:
    """``more``: a comparison is open and has got another seed."""
    assert found.study is not None
    answer = _ask(rundirs.write_study(found), args.until)
    said = f"{answer['decided']} of {answer['comparisons']} comparisons are decided ({args.until})"
    if answer["pending"]:
        _say(args, f"{said}; {answer['pending']} cell runs are not in; the same command goes on when they are")
        return "wait"
    if not answer["open"]:
        _say(args, said)
        return "decided"
    added = rounds.add(found.output_dir, found.name, found.study, list(answer["open"]), args.most)
    if not added:
        _say(args, f"{said}; open at {args.most} seeds: {_spell(answer['open'])}; --most N allows more")
        return "decided"
    _say(args, f"{said}; one more seed for {', '.join(f'{row} ({seed})' for row, seed in added)}")
    return "more"


def _spell(open_ones: dict[str, list[str]]) -> str:
    return "; ".join(list(dict.fromkeys(what for each in open_ones.values() for what in each))[:6])


def _ask(manifest: Path, rule: str) -> dict[str, Any]:
    """Statistics are the analysis's."""
    command = [sys.executable, "-m", "analysis.tables", "--manifest", str(manifest), "--open", rule]
    done = subprocess.run(command, env=mirror.environment(), check=False, stdout=subprocess.PIPE, text=True)
    try:
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise rundir.RunDirError(f"{manifest}: analysis could not decide {rule}; python launcher.py table says why")
    return answer


def _say(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)
