"""``python -m analysis.adopt --store URI --experiment NAME``: finished runs of any MLflow store, a JSON line each, for
``launcher.py import``. Nothing is written."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.store import Store, StoreError, choose


def runs(store: Store, experiment: str, where: str = "", seed: str = "params.seed") -> Iterator[dict[str, Any]]:
    """``{"seed", "metrics", "source"}``, the last value of every metric. Raises StoreError for what is not there."""
    if store.file is not None and not store.file.exists():
        raise StoreError(f"{store.shown}: no such file")  # opening it would make one
    client = store.open()
    with store.explained():
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = sorted(e.name for e in client.search_experiments(max_results=50))
            raise StoreError(f"{store.shown}: no experiment {experiment}; there are: {', '.join(names)}")
        token: str | None = None
        while True:
            page = client.search_runs([found.experiment_id], where, max_results=1000, page_token=token)
            for run in page:
                if run.info.status == "FINISHED":
                    yield {
                        "seed": _seed(run, seed),
                        "metrics": {k: v if math.isfinite(v) else repr(v) for k, v in run.data.metrics.items()},
                        "source": f"MLflow {store.shown}, experiment {experiment}, run {run.info.run_id}",
                    }
            if not (token := page.token):
                return


def _seed(run: Any, key: str) -> int:
    kind, _, name = key.partition(".")
    values = {"params": run.data.params, "tags": run.data.tags, "metrics": run.data.metrics}.get(kind, {})
    try:
        return int(float(values[name]))
    except (KeyError, ValueError):
        have = ", ".join(f"params.{each}" for each in sorted(run.data.params)[:12]) or "none"
        raise StoreError(f"run {run.info.run_id}: no seed in {key}; --seed-key names it; it has: {have}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.adopt", description="Finished runs of an MLflow store.")
    parser.add_argument("--store", required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--filter", default="", help="as in mlflow.search_runs: params.tau = '0.1'")
    parser.add_argument("--seed", default="params.seed", metavar="KEY", help="where a run says its seed")
    args = parser.parse_args(argv)
    try:
        found = list(runs(choose(Path.cwd(), args.store), args.experiment, args.filter, args.seed))
    except (StoreError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for each in found:
        print(json.dumps(each))
    return 0


if __name__ == "__main__":
    sys.exit(main())
