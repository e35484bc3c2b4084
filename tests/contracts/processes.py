"""What the processes of a distributed test do; started by tests/contracts/test_distributed.py, which reads the results.

``python processes.py DIRECTORY RANK``: for world sizes 1, 2 and 4 in turn, the first so many processes form a group
over gloo and train every scenario on their shards of the same data. Each writes what it ended with to DIRECTORY.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hfopt
from hfopt.preconditioners import KFAC

WORLDS = (1, 2, 4)
STEPS = 3
ROLES = ("curvature", "evaluation")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(24, 3, seed=1), draw(24, 2, seed=2)
X2, Y2 = draw(16, 3, seed=3), draw(16, 2, seed=4)


class Partly(nn.Module):
    """A parameter is in no output: DistributedDataParallel must be told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(self.first(x).tanh())
        return z


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Partly().double()


def shard(t: Tensor, rank: int, world: int) -> Tensor:
    return t.chunk(world)[rank]


def train(net: nn.Module, rank: int, world: int, *, roles: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """A few steps on this process's share of the cases."""
    optimizer = hfopt.HessianFree(net.parameters(), **{"cg": hfopt.CG(max_iterations=5), "damping": 0.1, **options})
    x, y, x2, y2 = (shard(t, rank, world) for t in (X, Y, X2, Y2))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        return loss

    others: dict[str, Any] = {}
    for role in roles:
        others[role] = lambda: F.mse_loss(net(x2), y2)
    for _ in range(STEPS):
        optimizer.step(closure, **others)
    return results(net, optimizer)


def results(net: nn.Module, optimizer: hfopt.HessianFree) -> dict[str, Any]:
    """Where the steps of an optimizer led."""
    last = optimizer.stats[-1]
    return {
        "theta": torch.cat([p.detach().reshape(-1) for p in net.parameters()]),
        "grad": torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]),
        "losses": torch.tensor([s.loss for s in optimizer.stats], dtype=torch.float64),
        "last": torch.tensor([last.rho, last.damping, last.new_loss, last.quadratic], dtype=torch.float64),
        "iterations": [s.cg_iterations for s in optimizer.stats],
    }


class Unrolled(nn.Module):
    """A recurrence of linear layers over sequences (T, B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.read = nn.Linear(3 + 4, 4), nn.Linear(4, 2)

    def forward(self, xs: Tensor) -> Tensor:
        """Outputs (T, B, 2)."""
        h, found = xs.new_zeros(xs.shape[1], 4), []
        for x in xs:
            h = torch.tanh(self.own(torch.cat([x, h], 1)))
            found.append(self.read(h))
        return torch.stack(found)


def recurrent(rank: int, world: int, **options: Any) -> dict[str, Any]:
    """Two criteria of time-major sequences, cases along dimension 1."""
    torch.manual_seed(6)
    net = Unrolled().double()
    xs, ys = draw(4, 8, 3, seed=8), draw(4, 8, 2, seed=9)
    xs, ys = (shard(t.movedim(1, 0), rank, world).movedim(0, 1) for t in (xs, ys))

    def loss(z: Tensor) -> Tensor:
        return F.mse_loss(z, ys) + 0.1 * F.binary_cross_entropy_with_logits(z, (ys > 0).double())

    optimizer = hfopt.HessianFree(net.parameters(), batch_dim=1, cg=hfopt.CG(max_iterations=5), damping=0.1, **options)
    for _ in range(STEPS):
        optimizer.step(lambda: loss(net(xs)))
    return results(net, optimizer)


# One reduction after another among four processes on few cores takes its time.
OF_FOUR = ("plain", "wrapped roles")

SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": lambda rank, world: train(model(), rank, world, damping=None),
    "wrapped": lambda rank, world: train(DistributedDataParallel(model(seed=rank)), rank, world),
    "wrapped, unused": lambda rank, world: train(
        DistributedDataParallel(model(), find_unused_parameters=True), rank, world
    ),
    "roles": lambda rank, world: train(model(), rank, world, roles=ROLES),
    "debias": lambda rank, world: train(model(), rank, world, roles=["debias"]),
    "wrapped roles": lambda rank, world: train(DistributedDataParallel(model()), rank, world, roles=ROLES),
    "decay": lambda rank, world: train(model(), rank, world, weight_decay=0.1, damping=0.3),
    "hessian": lambda rank, world: train(model(), rank, world, curvature="hessian"),
    "empirical": lambda rank, world: train(model(), rank, world, curvature="empirical-fisher"),
    "recompute": lambda rank, world: train(DistributedDataParallel(model()), rank, world, linearisation="recompute"),
    "fisher": lambda rank, world: train(model(), rank, world, curvature="fisher"),
    "kfac": lambda rank, world: train(model(), rank, world, preconditioner=KFAC(samples=2)),
    "time-major fisher": lambda rank, world: recurrent(rank, world, curvature="fisher"),
    "time-major kfac": lambda rank, world: recurrent(rank, world, preconditioner="kfac"),
}
# Scenarios whose random draws differ from process to process: alike in all of them, but not that of one process.
DRAWN: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "preconditioned": lambda rank, world: train(model(), rank, world, preconditioner="empirical-fisher"),
}


def drifted(rank: int, world: int) -> str:
    """What a process says whose model is not that of the others."""
    try:
        train(model(seed=rank), rank, world)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def sharded() -> list[str]:
    """What a process says to models that are sharded over processes, in both of torch's ways."""
    said = []
    for shard_it in (fully_shard, FullyShardedDataParallel):
        whole = model()
        net = shard_it(whole, **({"device_id": torch.device("cpu")} if shard_it is FullyShardedDataParallel else {}))
        try:
            hfopt.HessianFree(net.parameters())
        except TypeError as error:
            said.append(str(error))
    return said


def alone(rank: int) -> Tensor:
    """Processes that have nothing to do with each other."""
    found: Tensor = train(model(seed=rank), 0, 1, process_group=None)["theta"]
    return found


def among_two(rank: int) -> Tensor:
    """Half of the processes each form a group of their own."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found: Tensor = train(model(), rank % 2, 2, damping=None, process_group=pairs[rank // 2])["theta"]
    return found


def work(directory: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            continue
        dist.init_process_group("gloo", f"file://{directory}/store{world}", rank=rank, world_size=world)
        names = OF_FOUR if world == 4 else (*SCENARIOS, *DRAWN)
        found: dict[str, Any] = {name: (SCENARIOS | DRAWN)[name](rank, world) for name in names}
        if world == 2:
            found["drifted"], found["sharded"] = drifted(rank, world), sharded()
        if world == 4:
            found["alone"], found["among two"] = alone(rank), among_two(rank)
        torch.save(found, directory / f"{world}-{rank}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    work(Path(sys.argv[1]), int(sys.argv[2]))
