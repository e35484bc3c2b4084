"""A problem, a model and an optimizer small enough to run whole experiments in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfopt.experiment.driver import HF


@dataclass(frozen=True)
class Batch:
    inputs: Tensor  # (T, B, V)
    targets: Tensor  # (T, B)
    mask: Tensor  # (T, B)


class Sums:
    """The sum of one sequence's numbers is above its mean or not; scored at the last step, training drawn again."""

    def __init__(self, *, T: int = 3, batch_size: int = 8, seed: int = 0) -> None:
        self.name, self.T, self.batch_size, self.seed = "sums", T, batch_size, seed
        self.train_batches, self.test_batches = range(3), range(-1, -3, -1)
        self.epoch = 0
        self.train_mem: dict[int, Batch] = {}
        self.test_mem: dict[int, Batch] = {}

    def __call__(self, index: int) -> Batch:
        memory = self.train_mem if index >= 0 else self.test_mem
        if index not in memory:
            epoch = self.epoch if index >= 0 else 0
            generator = torch.Generator().manual_seed(((self.seed * 1000 + epoch) * 100 + index) % 2**31)
            inputs = torch.rand(self.T, self.batch_size, 2, generator=generator)
            targets = (inputs.sum(dim=(0, 2)) > self.T).long().expand(self.T, -1)
            mask = torch.zeros(self.T, self.batch_size, dtype=torch.bool)
            mask[-1] = True
            memory[index] = Batch(inputs, targets, mask)
        return memory[index]

    def size(self, batch: Batch) -> int:
        return int(batch.mask.sum())

    def forget(self) -> None:
        self.epoch += 1
        self.train_mem.clear()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs[batch.mask], batch.targets[batch.mask])

    def zero_one_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs[-1].argmax(-1) != batch.targets[-1]).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.train_mem.clear()


class Running(nn.Module):
    """A small recurrent net; its dropout and its batch norm make random numbers and buffers part of the state."""

    def __init__(self, hidden: int = 5, dropout: float = 0.2) -> None:
        super().__init__()
        self.recurrence = nn.RNN(2, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.drop = nn.Dropout(dropout)
        self.readout = nn.Linear(hidden, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.recurrence(inputs)
        T, B, h = states.shape
        normed: Tensor = self.norm(states.reshape(T * B, h)).reshape(T, B, h)
        outputs: Tensor = self.readout(self.drop(normed))
        return outputs


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, max_iter=3, line_search_fn="strong_wolfe"),
}


def experiment(
    path: Path, *, optimizer: str = "adam", seed: int = 0, T: int = 3, hidden: int = 5, **options: Any
) -> HF:
    """A new experiment from a seed, as a run file would build it."""
    torch.manual_seed(seed)
    options = {"threshold": 0.0, "max_steps": 12, "quiet": True, **options}
    model = Running(hidden)
    return HF(path, model, Sums(T=T, seed=seed), optimizer=OPTIMIZERS[optimizer], seed=seed, **options)


def bits(hf: HF) -> dict[str, bytes]:
    """The model's state, to be compared."""
    return {name: value.numpy().tobytes() for name, value in hf.model.state_dict().items()}
