"""The states of torch's global generators: saved with a run, and put back after a look that must not change it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def generators() -> dict[str, Any]:
    """The states of torch's generators: the CPU's, and those of all CUDA devices once CUDA is in use."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if in_use else []}


def set_generators(states: Mapping[str, Any]) -> None:
    """Restore what `generators` returned; states of CUDA devices that are not here are left out."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Whatever is drawn inside, the generators go on as if nothing had been."""
    states = generators()
    try:
        yield
    finally:
        set_generators(states)
