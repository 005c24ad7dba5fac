"""What the training loop costs beyond forward, backward and the optimizer's step; what a line of metrics costs.

Both loops train the same Latent MIM (the demo's size) on the same preloaded batches, in turns. One thread, CPU time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import contract.settings
from contract.rundir import Journal
from workers.data.loader import Cached, train_loader
from workers.engine import optim
from workers.engine.checkpoint import Checkpoint
from workers.engine.distributed import fold
from workers.engine.fit import fit
from workers.main_lmim import build, groups, schedules

STEPS, ROUNDS, LINES = 20, 8, 20_000


def main() -> None:
    torch.set_num_threads(1)
    settings = contract.settings.read({"worker": "main_lmim", "epochs": 1})
    settings.resolve_batch(1)
    images = torch.randn(STEPS * settings.batch_size, 3, 28, 28)
    batches = list(images.split(settings.batch_size))

    def bare(_: Path) -> None:
        torch.manual_seed(0)
        model = build(settings)
        optimizer = optim.adamw(groups(model, settings), lr=1e-3)
        begun = time.process_time()
        for batch in batches:
            model.before_step(momentum=0.99, sim_target=0.5)
            model(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        taken["bare"].append(time.process_time() - begun)

    def ours(folder: Path) -> None:
        torch.manual_seed(0)
        model = build(settings)
        optimizer = optim.adamw(groups(model, settings), lr=1e-3)
        data = Cached(images, torch.zeros(len(images), dtype=torch.long), ["one"])
        loader = train_loader(data, lambda x: x, settings.batch_size, seed=0, rank=0, world=1, fold=fold)
        journal = Journal(folder / "metrics.jsonl")
        checkpoint = Checkpoint(folder / "checkpoint.pt", journal, model=model, optimizer=optimizer)
        checkpoint.save = lambda step: None  # type: ignore[method-assign]  # saving is not the loop's own cost
        begun = time.process_time()
        fit(
            model,
            loader,
            optimizer,
            epochs=1,
            schedules=schedules(settings),
            checkpoint=checkpoint,
            prepare=lambda batch: batch[0],
            track=lambda step, of, scalars: journal.append({"step": step, "of": of, **scalars}),
            stop=(folder / "stop").exists,
            log_every=settings.log_every,
        )
        taken["loop"].append(time.process_time() - begun)

    taken: dict[str, list[float]] = {"bare": [], "loop": []}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(ROUNDS + 1):  # in turns, since the second finds other caches
            for side in (bare, ours) if turn % 2 else (ours, bare):
                side(Path(temporary))
            (Path(temporary) / "metrics.jsonl").unlink()
        ratios = [b / a for a, b in list(zip(taken["bare"], taken["loop"], strict=True))[1:]]
        per_step = 1000 * statistics.median(taken["bare"][1:]) / STEPS
        print(
            f"bare step {per_step:.1f} ms; loop / bare: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f} in {ROUNDS} pairs)"
        )

        journal = Journal(Path(temporary) / "metrics.jsonl")
        record = {"step": 1, "of": 1000, "time": 1.7e9} | {f"train/m{i}": 0.123456789 * i for i in range(6)}
        begun = time.perf_counter()
        for step in range(LINES):
            journal.append(record | {"step": step})
        print(f"appending a line of {len(record)} values: {1e6 * (time.perf_counter() - begun) / LINES:.1f} µs")


if __name__ == "__main__":
    main()
