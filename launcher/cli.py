"""From a command line to a verb. Nothing is imported before it is known what for: ``--help`` costs what Python does."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

START = """\
sightline: from a config to a cell of a paper table.

  make demo                                       the whole way on this machine, in minutes
  python launcher.py plan quickstart              what that study has, and what is missing
  python launcher.py fill quickstart              run what is missing
  python launcher.py table quickstart             print the table
  python launcher.py worker=main_lmim --dry-run   one run: what would be done; without --dry-run, do it
  python launcher.py worker=main_lmim seed=0,1,2 tau=0.1,0.2 then=[main_knn]      a sweep, each run evaluated

  python launcher.py --help                       the verbs; VERB --help says more
  python launcher.py doctor                       is this installation complete?
"""

LAUNCH = """\
Start one run, or a sweep: KEY=VALUE as in Hydra, with commas and range() to sweep over and [a,b] for lists.
Groups (data=, env=, recipe=, worker=) choose a file below configs/.
"""

SELECTION = """\
SELECTION: names of studies, sweeps or workers, beginnings of identities; narrowed down by index ranges (0,4-7), by
:state (finished running queued waiting blocked held stopped failed cancelled) and by key=value (why='host OOM': of
those that failed so). output_dir=DIR: where.
"""

EXITS = """\
exit codes: 0 done; 1 internal error; 2 wrong usage or configuration, nothing was started; 3 scheduler unreachable;
4 refused; 100 some runs failed, or repro made other numbers, 101 not finished, 102 not found, 103 cancelled; 130 Ctrl-C
"""

VERBS = {
    "plan": "what a study or launch has, and what is missing: reuse, stale, queued, new, failed",
    "fill": "run what a study or launch is missing",
    "table": "print the table of a study, complete or not; other flags go to analysis.tables",
    "report": "a study as one HTML page: tables, curves, pictures, failures, cost, provenance",
    "diff": "what is not the same in two runs: config, code, data, environment, results",
    "repro": "a run again, from its own code and settings, in a folder of its own: the same numbers?",
    "import": "results from before (CSV, MLflow, checkpoints) as finished runs of a study",
    "status": "how the runs get on",
    "why": "failures grouped by cause, each with its evidence and the command that mends it",
    "logs": "the logs of some runs, line by line as they come",
    "retry": "start failed, stopped or cancelled runs again, where they left off, with more memory for instance",
    "cancel": "stop runs for good, those that wait too",
    "prune": "what may go: checkpoints of finished runs, code without runs, directories without a start",
    "ingest": "copy what the run directories hold into the MLflow store; other flags go to analysis.ingest",
    "ui": "MLflow's page on this machine, after an ingest",
    "drill": "preempt and kill a run at smoke scale here: does it end with the same bytes?",
    "doctor": "check the installation, the data paths, the disk, the store; says how to mend it",
}

SELECTING = ("status", "why", "logs", "retry", "cancel", "prune", "diff", "repro")


def parser(verb: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python launcher.py" + (f" {verb}" if verb else ""),
        usage=f"%(prog)s {_usage(verb)}",
        description=VERBS[verb] if verb else LAUNCH,
        epilog=_epilog(verb),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = made.add_argument
    flag("words", nargs="*", help=argparse.SUPPRESS)
    if verb in (None, "plan", "fill", "drill"):
        flag("--config-name", "-cn", default="config", metavar="NAME", help="start from configs/NAME.yaml")
        flag("-m", "--multirun", action="store_true", help="accepted: commas and range() sweep with or without it")
    if verb in (None, "fill", "retry"):
        flag("-n", "--dry-run", action="store_true", help="print what would be done; write nothing")
        flag("-q", "--quiet", action="store_true", help="errors only")
    if verb in (None, "fill", "retry"):
        flag("--prepare", type=Path, help=argparse.SUPPRESS)  # said by scripts that -n printed and a person sent
    if verb in (None, "plan", "fill", "status", "why", "prune"):
        each = {"why": "cause", "prune": "thing that may go"}.get(verb or "", "run")
        flag("--json", action="store_true", help=f"one JSON object per {each} and line")
    if verb in (None, "fill"):
        flag("--stale", action="store_true", help="run again what other code made")
    if verb == "fill":
        rule = "add seeds where a comparison is open: ci95<0.5, std<1, iqm<0.5 (the cell's units), p<0.01"
        flag("--until", metavar="RULE", help=rule)
        flag("--most", type=int, default=10, metavar="N", help="with --until: so many seeds a row at most (10)")
        flag("--budget", metavar="HOURS", help="hold what would use more hours of GPUs (of CPUs without): 40h, 90min")
        flag("--shard", metavar="I/N", help="of clusters that share no files, the I-th of N")
    if verb == "import":
        flag("-n", "--dry-run", action="store_true", help="check, and print what would be made; write nothing")
        flag("--csv", metavar="FILE", help="lines of row,column,seed,value[,source]")
        flag("--mlflow", metavar="URI", help="the store: sqlite:///FILE, http://...; with --experiment and --row")
        flag("--experiment", metavar="NAME")
        flag("--filter", metavar="TEXT", help="as in mlflow.search_runs: \"params.tau = '0.1'\"")
        flag("--seed-key", default="params.seed", metavar="KEY", help="where its runs say their seed (params.seed)")
        flag("--metric", action="append", metavar="COLUMN=METRIC", help="where they call a column's metric otherwise")
        flag("--checkpoint", metavar="FILE", help="an encoder, for --row and --seed; evaluations are run upon it")
        flag("--row", metavar="ROW")
        flag("--seed", type=int, metavar="N", help="of a checkpoint; the study's first")
        flag("--stage", metavar="STAGE", help="of a checkpoint; the first that is built upon none")
        flag("--percent", action="store_true", help="the figures are per cent, the metrics fractions")
    if verb == "status":
        flag(
            "-w",
            "--watch",
            type=float,
            nargs="?",
            const=10.0,
            metavar="SECONDS",
            help="again and again, until all is over",
        )
        flag("--fresh", action="store_true", help="ask the queue now, not at most every 30 seconds (SIGHTLINE_QUEUE_S)")
    if verb == "logs":
        flag("-f", "--follow", action="store_true", help="go on until all of them have ended")
        flag("--tail", type=int, metavar="N", help="the last N lines of each only")
        flag("--job", action="store_true", help="what the scheduler wrote, for jobs that died before anything else")
    if verb == "retry":
        what = "env.mem_gb=48: told anew, as far as no result depends on it; may be said several times"
        flag("--set", action="append", metavar="KEY=VALUE", help=what)
        flag("--halve-batch", action="store_true", help="half the batch, accumulated twice as often: the same run")
        flag("--force", action="store_true", help="also those that ended by a bug in code that is still the same")
    if verb == "drill":
        flag("--steps", type=_at_least_4, metavar="N", help="train so many (20, or as many as take long enough)")
        difference = "the largest relative difference of a metric that is no loss (0: byte-identical)"
        flag("--tolerance", type=float, default=0.0, metavar="X", help=difference)
        flag("--keep", action="store_true", help="the folders of the runs, which are removed where all is well")
    if verb == "repro":
        flag("--steps", type=int, default=50, metavar="N", help="compare the first N steps (50)")
        flag("--tolerance", type=float, default=0.0, metavar="X", help="relative difference that is accepted (0)")
        flag("--data-path", metavar="FOLDER", help="where the data is now")
        flag("--into", metavar="FOLDER", help="a new folder to run in; OUTPUT_DIR/repro/...")
        flag("--keep", action="store_true", help="keep that folder also where the numbers are the same")
        flag("-q", "--quiet", action="store_true", help="no progress")
    if verb == "diff":
        flag("--code", action="store_true", help="with the lines that differ, from the capsules")
    if verb in ("repro", "diff", "drill"):
        flag("--json", action="store_true", help="one JSON object")
    if verb == "ui":
        flag("--port", type=int, default=5000)
        flag("--store", metavar="URI", help="another store than OUTPUT_DIR/mlflow.db")
    if verb == "prune":
        flag("-n", "--dry-run", action="store_true", help="only show it")
        flag("--days", type=float, default=14, metavar="N", help="abandoned: never started, and so old (14)")
        flag("--replaced", action="store_true", help="also what fill --stale set aside, where it is so old")
    if verb in (None, "cancel", "retry", "prune"):
        flag("-y", "--yes", action="store_true", help="do not ask")
    flag("--no-color", action="store_true", help="no colours; so does the variable NO_COLOR")
    return made


def _at_least_4(said: str) -> int:
    if not said.isdigit() or int(said) < 4:
        raise argparse.ArgumentTypeError(f"{said}: must be at least 4, to be interrupted twice")
    return int(said)


def _usage(verb: str | None) -> str:
    match verb:
        case None:
            return "KEY=VALUE... [-n]   or   VERB ... [--help]"
        case "plan" | "fill" | "drill":
            return "STUDY [KEY=VALUE...] | KEY=VALUE... [options]"
        case "import":
            return "STUDY [KEY=VALUE...] --csv FILE | --mlflow URI ... | --checkpoint FILE ..."
        case "table":
            return "STUDY [KEY=VALUE...] [--format md|latex|csv|html|term ...]"
        case "report":
            return "STUDY [KEY=VALUE...] [--output FILE.html]"
        case "logs":
            return "SELECTION [-f] [--tail N] [--job]"
        case "diff":
            return "RUN RUN [--code] [--json]"
        case "repro":
            return "RUN [options]"
        case "ingest" | "ui" | "doctor":
            return "[output_dir=DIR] [options]"
        case _:
            return "[SELECTION] [options]"


def _epilog(verb: str | None) -> str:
    if verb is None:
        return "verbs:\n" + "".join(f"  {name:8} {what}\n" for name, what in VERBS.items()) + "\n" + EXITS
    return (SELECTION if verb in SELECTING else "") + EXITS


def main(argv: Sequence[str] | None = None) -> None:
    """Ends the process with the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(START, end="")
        sys.exit(0)
    if any(word.startswith(("hydra/", "hydra.")) for word in words):
        from launcher import through_hydra

        through_hydra.main(words)
        return
    bare = "=" not in words[0] and not words[0].startswith(("-", "~", "+"))
    verb = words.pop(0) if bare else None
    if verb is not None and verb not in VERBS:
        print(f"{verb}: no such verb; choose one of {', '.join(VERBS)}, or launch with key=value", file=sys.stderr)
        sys.exit(2)
    reader = parser(verb)
    if verb in ("table", "report", "ingest") and not {"-h", "--help"} & set(words):
        flags = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        args = reader.parse_args(words[:flags])
        args.rest = words[flags:]  # analysis reads these
    else:
        args = reader.parse_intermixed_args(words)
    args.verb = verb or "launch"
    sys.exit(_run(args.verb, args))


def _run(verb: str, args: argparse.Namespace) -> int:
    from contract.rundir import RunDirError
    from contract.settings.checks import SettingsError
    from launcher import NotFound, Refused, Unavailable, verbs

    try:
        code: int = getattr(verbs, {"import": "adopted"}.get(verb, verb))(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (SettingsError, RunDirError, NotFound, Unavailable, Refused) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        codes: dict[type[Exception], int] = {NotFound: 102, Unavailable: 3, Refused: 4}
        return next((code for kind, code in codes.items() if isinstance(error, kind)), 2)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or ''}: {error.strerror or error}".replace(": :", ":"), file=sys.stderr)
        return 1
    return code
