"""A training script as a user starts it under torchrun; tests/contracts/test_torchrun.py reads what it saves.

``torchrun --nproc-per-node N torchrun_script.py DIRECTORY BACKEND WHAT``. WHAT is "train", or "raise": then the last
process fails in the middle of a step.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hfopt

STEPS, BAD = 5, 2  # in step 2, one process has a bad batch


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(directory: Path, backend: str, what: str) -> None:
    dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    torch.manual_seed(rank)  # DistributedDataParallel broadcasts the first one's
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double().to(device)
    model = DistributedDataParallel(net)
    x, y = (draw(24, n, seed=n).chunk(world)[rank].to(device) for n in (3, 2))
    optimizer = hfopt.HessianFree(model.parameters(), cg=hfopt.CG(max_iterations=5), damping=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    last, calls, told = rank == world - 1, 0, []

    for step in range(STEPS):

        def closure(bad: bool = last and step == BAD) -> Tensor:
            nonlocal calls
            calls += 1
            if what == "raise" and last and calls > 4:
                raise ValueError("this process has run out of data")
            optimizer.zero_grad()
            loss = F.mse_loss(model(x * torch.inf if bad else x), y)
            loss.backward()
            return loss

        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step(closure)
        told.append([str(w.message) for w in seen])
        scheduler.step()
    found = {
        "theta": torch.cat([p.detach().cpu().reshape(-1) for p in net.parameters()]),
        "losses": torch.tensor([s.loss for s in optimizer.stats], dtype=torch.float64),
        "accepted": [s.accepted for s in optimizer.stats],
        "told": told,
    }
    torch.save(found, directory / f"{backend}-{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
