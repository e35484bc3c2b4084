"""The benchmark of recording runs, and finds equal parameters."""

from __future__ import annotations

import torch

from benchmarks import recording


def test_both_runs_take_turns() -> None:
    threads = torch.get_num_threads()
    try:
        found = recording.measure(3, T=10, B=20, h=5)
    finally:
        torch.set_num_threads(threads)
    assert len(found["plain"]) == len(found["recording"]) == 3
    assert found["same"]
    assert 0 < found["recorders"] < sum(found["recording"])
    assert 0 < found["log"] < sum(found["recording"])
