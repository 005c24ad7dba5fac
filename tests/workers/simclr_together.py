"""One of the processes that train together for ``test_simclr``; torchrun starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.workers.test_simclr import batch, build
from workers.engine import distributed


def main(path: Path) -> None:
    """The loss, the gradients and the accuracy, as data-parallel training has them."""
    model, images = build().double().eval(), batch()  # BatchNorm would tell the batches apart
    b, rank, world = len(images) // 2, distributed.rank(), distributed.world_size()
    mine = torch.cat([each[rank * b // world : (rank + 1) * b // world] for each in images.chunk(2)])
    wrapped = distributed.wrap(model)  # the gradients are those of all while it lives
    found = wrapped(mine)
    found["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    scalars = {name: distributed.mean(value.detach().clone()) for name, value in found.items()}
    if rank == 0:
        torch.save({"gradients": gradients, "scalars": scalars}, path)


if __name__ == "__main__":
    with distributed.process_group():
        main(Path(sys.argv[1]))
