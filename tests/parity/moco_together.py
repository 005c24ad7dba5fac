"""One of the processes that train together for ``test_moco_mixmask``; torchrun starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.parity import published_moco as published
from tests.parity.stored import arrays, assert_close, facts, part
from workers.engine import distributed


def main(path: Path) -> None:
    said, stored = facts(path), arrays(path.with_suffix(".npz"))
    rank = distributed.rank()
    mine = part(stored, f"rank{rank}_")
    start = arrays(path.with_name(f"{path.stem}_state_init.npz"), torch.float64)
    method = published.module(said, part(start, f"rank{rank}.") or start, torch.float64)
    recorded = published.Recorded(said["draws"][f"rank{rank}"], unused_first=said["method"] == "mixmask")
    optimizer, model = published.optimizer(method, said), distributed.wrap(method)
    shares = 1e-7  # of masks, in float32
    for i in range(len(mine["loss_total"])):
        recorded.begin()
        method.before_step(said["m"])
        loss = model(torch.stack([mine["images_q"][i], mine["images_k"][i]], dim=1).double(), recorded)["loss"]
        assert_close(loss, mine["loss_total"][i], shares, f"loss of step {i}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    final = path.with_name(f"{path.stem}_state_final.npz")
    if final.exists():  # a shorter file of the same layout has none
        published.assert_state(method, part(arrays(final), f"rank{rank}."), 1e-7)
    print(f"rank {rank} agrees", flush=True)


if __name__ == "__main__":
    with distributed.process_group():
        main(Path(sys.argv[1]))
