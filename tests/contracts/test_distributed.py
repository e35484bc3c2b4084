"""Several processes: one step in all of them, and that of a single process on all the data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hfopt
from tests.hfopt.tools import mlp

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("processes.py")
Results = dict[tuple[int, int], dict[str, Any]]
NAMES = [
    *("plain", "wrapped", "wrapped, unused", "roles", "debias", "wrapped roles", "decay", "hessian", "empirical"),
    *("recompute", "fisher", "kfac", "time-major fisher", "time-major kfac"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every process found, by (world size, rank)."""
    directory = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(directory), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    try:
        told = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * 4, "\n".join(told)
    return {(w, r): torch.load(directory / f"{w}-{r}.pt", weights_only=True) for w in (1, 2, 4) for r in range(w)}


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_that_of_one_process(results: Results, name: str) -> None:
    one = results[1, 0][name]
    for (world, rank), found in results.items():
        if name in found:
            assert found[name]["iterations"] == one["iterations"], (world, rank)
            for key in ("theta", "grad", "losses", "last"):
                assert torch.allclose(found[name][key], one[key], rtol=1e-6, atol=1e-9), (world, rank, key)
    assert float(one["losses"][-1]) < 0.9 * float(one["losses"][0])


def test_all_processes_hold_the_same_bits(results: Results) -> None:
    for world in (2, 4):
        first = results[world, 0]
        for name, found in first.items():
            if isinstance(found, dict):
                for rank in range(1, world):
                    assert torch.equal(results[world, rank][name]["theta"], found["theta"]), (world, rank, name)
                    assert results[world, rank][name]["iterations"] == found["iterations"]


def test_models_that_differ_are_refused_in_every_process(results: Results) -> None:
    for rank in range(2):
        message = results[2, rank]["drifted"]
        assert "do not hold the same model" in message
        assert "norms of the parameters" in message
        assert "process_group=None" in message


def test_models_that_are_sharded_are_refused(results: Results) -> None:
    for rank in range(2):
        messages = results[2, rank]["sharded"]
        assert len(messages) == 2
        assert all("sharded over processes" in m and "DistributedDataParallel" in m for m in messages)


def test_processes_may_train_apart_or_in_groups(results: Results) -> None:
    ends = [results[4, rank]["alone"] for rank in range(4)]
    assert not torch.equal(ends[0], ends[1])
    for rank in range(4):
        assert torch.allclose(results[4, rank]["among two"], results[2, 0]["plain"]["theta"], rtol=1e-9, atol=1e-12)


def test_wrong_groups_are_refused() -> None:
    model = mlp(3, 2)
    x = torch.ones(4, 3, dtype=torch.float64)
    for group in ("all", 3):
        optimizer = hfopt.HessianFree(model.parameters(), process_group=group)
        with pytest.raises(ValueError, match="process_group"):
            optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), x[:, :2]))
