"""torchrun: the script that a user starts takes the steps of one process, and no process is left waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.contracts.torchrun_script import BAD, STEPS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("torchrun_script.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]


def torchrun(directory: Path, backend: str, world: int, what: str = "train") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, str(SCRIPT), str(directory), backend, what],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def results(directory: Path, backend: str, world: int) -> list[dict[str, Any]]:
    done = torchrun(directory, backend, world)
    assert done.returncode == 0, done.stderr
    return [torch.load(directory / f"{backend}-{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("one"), "gloo", 1)[0]


def check(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert float(one["losses"][-1]) < 0.9 * float(one["losses"][0])
    for process in found:
        assert torch.equal(process["theta"], found[0]["theta"])
        assert torch.allclose(process["theta"], one["theta"], rtol=1e-6, atol=1e-9)
        assert torch.allclose(process["losses"], one["losses"], rtol=1e-6, equal_nan=True)


def test_two_processes_end_where_one_does(one: dict[str, Any], tmp_path: Path) -> None:
    """Also after a batch that is bad in one of the two alone: both pass it over, with the same words."""
    found = results(tmp_path, "gloo", 2)
    check(found, one)
    for process in (*found, one):
        assert process["accepted"] == [step != BAD for step in range(STEPS)]
        assert ["not finite before the step" in "".join(words) for words in process["told"]] == [
            step == BAD for step in range(STEPS)
        ]


def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    """The one that raises tells why; torchrun ends the one that waits for it."""
    done = torchrun(tmp_path, "gloo", 2, "raise")
    assert done.returncode != 0
    assert "this process has run out of data" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (torch.cuda.is_available() and dist.is_nccl_available()), reason="NCCL needs a CUDA device")
def test_nccl(one: dict[str, Any], tmp_path: Path) -> None:
    check(results(tmp_path, "nccl", min(2, torch.cuda.device_count())), one)
