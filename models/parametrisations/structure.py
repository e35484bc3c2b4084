"""What the parametrisations of weights share: their start, and which of their parameters are of which kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

PARTS = ("orthogonal", "triangular", "gamma", "angle")
"""Kinds of free parameters: of a skew-symmetric matrix, of T, gamma - 1 of the moduli, and angles of rotations."""


class Structure(nn.Module, ABC):
    """A parametrisation whose free parameters are other tensors than the weight.

    Args:
        start: the free parameters that the weight starts from.

    Attributes:
        parts: the kinds of the free parameters, among `PARTS`, in the order in which `forward` takes them.
    """

    parts: ClassVar[tuple[str, ...]]

    def __init__(self, start: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._start: tuple[Tensor, ...] | None = start

    @abstractmethod
    def forward(self, *free: Tensor) -> Tensor:
        """Form the weight (n, n)."""

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Give the free parameters of a weight: the start at registration, afterwards those of what is assigned."""
        if self._start is not None:
            start, self._start = self._start, None
            free = tuple(s.to(weight) for s in start)
        else:
            free = self.inverted(weight)
        return free[0] if len(free) == 1 else free

    def inverted(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Find the free parameters of a weight.

        Raises:
            ValueError: there are none, or they cannot be found.
        """
        raise ValueError(
            f"a weight that is a {type(self).__name__} cannot be assigned; change its free parameters, which are in "
            "module.parametrizations"
        )


def impose(module: nn.Module, name: str, structure: Structure) -> nn.Module:
    """Let a weight be formed by a structure from now on; returns the module.

    Raises:
        ValueError: the weight has a parametrisation already.
    """
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{name} has a parametrisation already; torch.nn.utils.parametrize.remove_parametrizations takes it away"
        )
    return parametrize.register_parametrization(module, name, structure)


def square(module: nn.Module, name: str) -> Tensor:
    """The weight of this name, which has to be a square matrix.

    Raises:
        ValueError: it is none, or there is no such parameter.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        found = f"of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "missing"
        raise ValueError(f"{name} of {type(module).__name__} is {found}; it has to be a square matrix")
    return weight


def parts_of(model: nn.Module) -> Mapping[str, list[nn.Parameter]]:
    """All parameters of a model by kind: those of `PARTS`, and "rest".

    A weight under `torch.nn.utils.parametrizations.orthogonal` counts as "orthogonal" as well.
    """
    found: dict[str, list[nn.Parameter]] = {kind: [] for kind in (*PARTS, "rest")}
    known: set[int] = set()
    for module in model.modules():
        if not isinstance(module, parametrize.ParametrizationList):
            continue
        (first, *others) = module
        # What torch registers has no public name.
        if others or not (isinstance(first, Structure) or type(first).__name__ == "_Orthogonal"):
            continue
        kinds = first.parts if isinstance(first, Structure) else ("orthogonal",)
        for kind, parameter in zip(kinds, module.parameters(recurse=False), strict=True):
            if id(parameter) not in known:
                found[kind].append(parameter)
                known.add(id(parameter))
    found["rest"] = [p for p in model.parameters() if id(p) not in known]
    return found
