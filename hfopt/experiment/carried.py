"""States of recurrent networks that are carried from one minibatch to the next, in windows of long sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Carried(NamedTuple):
    """What a `forward` returns if states are carried: ``Carried(*model.with_states(batch.inputs, batch.states))``.

    Attributes:
        outputs: what the problem's losses take.
        states: of the model after the last step of the minibatch, each (B, .).
    """

    outputs: Tensor
    states: Sequence[Tensor]


def outputs_of(found: Tensor | Carried) -> Tensor:
    """Return the outputs that a `forward` found."""
    return found.outputs if isinstance(found, Carried) else found


class Carrier:
    """What a data object needs to hand states on: those of this step's minibatches, and those for the next step's.

    The driver hands the states after minibatch i to the data object's ``carry(i, states)``, once a step, as the first
    evaluation found them. They are constants: derivatives end at the beginning of a window (truncated backpropagation
    through time). A minibatch that was not evaluated in a step hands nothing on, and starts afresh.
    """

    def __init__(self) -> None:
        self._now: dict[int, tuple[Tensor, ...]] = {}
        self._next: dict[int, tuple[Tensor, ...]] = {}

    def states(self, i: int) -> tuple[Tensor, ...] | None:
        """The states that minibatch i starts from; None for those that the model starts from."""
        return self._now.get(i)

    def carry(self, i: int, states: Sequence[Tensor]) -> None:
        """Keep the states after training minibatch i for the next step; those after test minibatch i for i - 1."""
        if i < 0:
            self._now[i - 1] = tuple(states)
        else:
            self._next[i] = tuple(states)

    def forget_tests(self) -> None:
        """Begin a test: its first minibatch starts afresh."""
        for i in [i for i in self._now if i < 0]:
            del self._now[i]

    def forget(self, *, everything: bool = False) -> None:
        """Begin the next step; or a new pass, in which all start afresh."""
        self._now, self._next = ({} if everything else self._next), {}

    def state_dict(self) -> dict[str, Any]:
        """The states for the next step."""
        return {str(i): list(states) for i, states in self._next.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._now, self._next = {}, {int(i): tuple(states) for i, states in state.items()}
