"""These tests work on tiny tensors: a second thread only costs, unless rounding with several is what is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU, Triton interprets its kernels. It must know before anything imports it, as torch's compiler does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The environment variable that asks for another number of torch's threads than one.
THREADS = "HFOPT_TEST_THREADS"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark ``slow`` every case of a parametrised test that the test's mark ``quick`` does not choose."""
    for item in items:
        chosen = item.get_closest_marker("quick")
        if chosen is not None and not chosen.kwargs["where"](**item.callspec.params):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get(THREADS, "1")))
    yield
    torch.set_num_threads(before)
