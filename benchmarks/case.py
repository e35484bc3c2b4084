"""What a case of the benchmarks is: a model, data, a loss, and how many operations its products need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Tensors = list[Tensor]
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the forward pass's matrix products.

    ``both``: of those whose two operands depend on the parameters; ``data``: of those where one operand is data. The
    floor of a product is the time that torch.mm would take for all of them. ``counted`` is the part that GFLOP/s and
    the share of torch.mm's rate are stated by, where that is not all: of recurrences, the product with the recurrent
    weights alone.
    """

    both: float
    data: float = 0.0
    counted: float | None = None

    @property
    def gradient(self) -> float:
        """Stated count of a forward and a backward pass."""
        return 3 * self.both + 2 * self.data if self.counted is None else 3 * self.counted

    @property
    def product(self) -> float:
        """Stated count of a tangent and an adjoint on cached activations."""
        return self.floor if self.counted is None else 4 * self.counted

    @property
    def floor(self) -> float:
        """All operations of a tangent and an adjoint on cached activations."""
        return 4 * self.both + 2 * self.data


@dataclass(frozen=True)
class Form:
    """Another module that computes the same function of the same weights.

    ``from_plain`` is the linear map from a vector shaped like the plain module's parameters to one shaped like this
    module's; ``to_plain``, its transpose, takes this module's gradients and products to the plain one's.
    """

    model: nn.Module
    to_plain: Callable[[Sequence[Tensor]], Tensors] = list
    from_plain: Callable[[Sequence[Tensor]], Tensors] = list

    @classmethod
    def of(cls, model: nn.Module, plain: nn.Module, weights: Callable[[Named], Named]) -> Form:
        """``model`` with the weights of ``plain``, of which its own are a linear function, ``weights``, by name."""
        own, theirs = [n for n, _ in model.named_parameters()], [n for n, _ in plain.named_parameters()]

        def from_plain(tensors: Sequence[Tensor]) -> Tensors:
            found = weights(dict(zip(theirs, tensors, strict=True)))
            return [found[name].contiguous() for name in own]

        def to_plain(tensors: Sequence[Tensor]) -> Tensors:
            zeros = [torch.zeros_like(p) for p in plain.parameters()]
            transposed = torch.func.vjp(lambda *t: tuple(from_plain(t)), *zeros)[1]
            return list(transposed(tuple(tensors)))

        with torch.no_grad():
            for p, value in zip(model.parameters(), from_plain(list(plain.parameters())), strict=True):
                p.copy_(value)
        return cls(model, to_plain, from_plain)


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: for the command line.
        about: one line for the table.
        plain: the model whose gradient is the unit: torch's own modules, a Python loop where there are none.
        inputs, targets: one batch.
        criterion: a module of torch.nn, with a mean over the outputs.
        work: of the plain model's forward pass, by the stated count.
        mm: (m, k, n) of the matrix product whose rate is the yardstick.
        ours: the same network on hfopt's recurrence; None: hfopt works on the plain model.
        others: further forms whose gradient, and product by the general path, are of interest.
    """

    name: str
    about: str
    plain: nn.Module
    inputs: Tensor
    targets: Tensor
    criterion: nn.Module
    work: Work
    mm: tuple[int, int, int]
    ours: Form | None = None
    others: dict[str, Form] = field(default_factory=dict)

    def to(self, device: torch.device) -> Case:
        """Move models and data, in place."""
        for model in (self.plain, *([self.ours.model] if self.ours else []), *(f.model for f in self.others.values())):
            model.to(device)
        self.inputs.data, self.targets.data = self.inputs.to(device), self.targets.to(device)
        return self
