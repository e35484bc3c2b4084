"""Hyperparameters by their published names: which ones a network has, what they mean, and where they are searched.

The 22 names of the LSTM are published. What ends in a gate's letter there does so for the other cells too, with the
letters in :mod:`runs.capacity.cells`; "nonlinearity", and those of Hessian-free, are names of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runs.capacity.cells import architecture

Hyperparameters = dict[str, "str | int | float"]
FIRST_ORDER = ("SGD", "Momentum", "RMSProp", "Adam")
"""The published optimizers. Only the spelling of RMSProp is published; capitals make no difference."""
HF = "HF"


@dataclass(frozen=True)
class Range:
    """Where a number is searched: uniformly, or uniformly in its logarithm.

    Attributes:
        low, high: both included.
        log: whether it is the logarithm that is uniform.
        whole: whether it is an integer.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False


Choice = tuple[str, ...]


def space(name: str, optimizers: Choice, train_steps: int) -> dict[str, Range | Choice]:
    """The search space of an architecture with any of some optimizers.

    Args:
        name: of the architecture.
        optimizers: to choose from: those in `FIRST_ORDER`, or `HF`.
        train_steps: which is not searched.

    Raises:
        ValueError: an unknown architecture or optimizer, or Hessian-free among first-order ones.

    Source of the ranges: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, appendix A; those of Hessian-free are ours.
    """
    arch = architecture(name)
    found: dict[str, Range | Choice] = {}
    if name != "irnn":
        kinds = ("orthogonal", "normal") if name == "rnn" else ("identity", "orthogonal", "normal")
        found["recurrent_matrix_init_type"] = kinds
        found |= {f"recurrent_matrix_scale_{g}": Range(0.01, 2, log=True) for g in arch.gates}
    found |= {f"input_scale_{g}": Range(0.001, 2, log=True) for g in arch.gates}
    if name != "irnn":
        found["recurrent_bias_init_type"] = ("delta", "normal")
        found |= {f"recurrent_bias_scale_{g}": Range(-2, 2) for g in arch.gates}
    found |= {f"forget_gate_bias_hack{end}": Range(0, 6) for end in arch.forget.values()}
    if len(arch.nonlinearities) > 1:
        found["nonlinearity"] = arch.nonlinearities
    names = tuple(optimizer_name(o) for o in optimizers)
    found["optimizer"] = names
    if HF in names:
        if len(optimizers) > 1:
            raise ValueError("HF has hyperparameters of its own: tune it by itself, in a study of its own")
        found |= {
            "hf_damping_rule": ("ratio", "loss"),
            "hf_damping": Range(1e-4, 10, log=True),
            "hf_cg_iterations": Range(10, 250, log=True, whole=True),
            "hf_structural_damping": Range(1e-3, 1, log=True),
        }
    else:
        found |= {
            "lr_init": Range(1e-4, 1e-1, log=True),
            "lr_decay_rate": Range(1e-3, 1, log=True),
            "optimizer_logit_momentum": Range(1, 7),
            "gradient_clip_val": Range(1, 100, log=True),
        }
    found["l2_decay"] = Range(1e-8, 1e-3, log=True)
    found["train_steps"] = Range(train_steps, train_steps, whole=True)
    return found


def optimizer_name(name: object) -> str:
    """The spelling used here of an optimizer's name.

    Raises:
        ValueError: there is none of this name.
    """
    for known in (*FIRST_ORDER, HF):
        if str(name).lower() == known.lower():
            return known
    raise ValueError(f"there is no optimizer {name!r}; choose from {', '.join((*FIRST_ORDER, HF))}")


def checked(name: str, hparams: Mapping[str, Any]) -> Hyperparameters:
    """Hyperparameters of an architecture, all there, of the right kind, and none that has no meaning.

    Numbers may lie outside the ranges of the search. "nonlinearity" is tanh where it is missing, as in published ones.

    Raises:
        ValueError: some are missing, unknown or no numbers; all of these are named.
    """
    optimizer = optimizer_name(hparams.get("optimizer", "RMSProp"))
    wanted = space(name, (optimizer,), 1)
    given = {"nonlinearity": "tanh", **hparams} if "nonlinearity" in wanted else dict(hparams)
    given["optimizer"] = optimizer
    scales = {key for key in wanted if key.startswith("recurrent_matrix_scale_")}
    if given.get("recurrent_matrix_init_type") == "identity":
        wanted = {key: what for key, what in wanted.items() if key not in scales or key in given}
    missing, unknown = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    if missing or unknown:
        parts = [f"{what} {', '.join(sorted(keys))}" for what, keys in (("lack", missing), ("have", unknown)) if keys]
        raise ValueError(f"the hyperparameters of {name} with {optimizer} {' and wrongly '.join(parts)}")
    for key, what in wanted.items():
        if isinstance(what, Range):
            try:
                number = float(given[key])
            except (TypeError, ValueError):
                raise ValueError(f"the hyperparameter {key} is {given[key]!r}; it is a number") from None
            if not abs(number) < float("inf") or ((what.log or what.whole) and number < 0):
                raise ValueError(f"the hyperparameter {key} is {given[key]!r}; it is finite and not below 0")
            given[key] = int(number) if what.whole else number
        elif str(given[key]) not in what:
            raise ValueError(f"the hyperparameter {key} is {given[key]!r}; choose {' or '.join(what)}")
        else:
            given[key] = str(given[key])
    return given
