"""Runs that are killed: what was acknowledged is there, and the continued run has the bits of the uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from hfopt.experiment.driver import HF
from hfopt.experiment.recorders import GradientByLag, HiddenStates
from hfopt.experiment.store.format import RUN
from hfopt.experiment.store.reader import read_run
from hfopt.linalg.cg import CG
from hfopt.optimizer import HessianFree
from tests.hfopt.tiny import OPTIMIZERS, experiment

ROOT = Path(__file__).parents[3]
KILLS = 100 if os.environ.get("HFOPT_LONG") == "1" else 5  # of each optimizer's run
STEPS = {"adam": 12 * KILLS, "hf": 5 * KILLS}
pytestmark = pytest.mark.slow


def build(folder: Path, optimizer: str) -> HF:
    OPTIMIZERS["hf"] = lambda parameters: HessianFree(parameters, cg=CG(max_iterations=12))
    record = [HiddenStates(2), GradientByLag(3)]
    return experiment(folder, optimizer=optimizer, save_freq=3, max_steps=STEPS[optimizer], record=record)


def child(folder: Path, optimizer: str, acknowledged: Any) -> None:
    """A process that trains until it is killed; it says which rows it has acknowledged."""
    torch.set_num_threads(1)
    hf = build(folder, optimizer)
    if (folder / RUN).exists():
        hf.load()
    record = hf._record

    def record_and_say(row: dict[str, Any], *rest: Any) -> None:
        record(row, *rest)
        acknowledged.value = max(acknowledged.value, row["step"])

    hf._record = record_and_say  # type: ignore[method-assign]
    hf.optimize()


@pytest.fixture(scope="module")
def spawn() -> Callable[..., BaseProcess]:
    """Starts processes from one that has imported torch already, so that each takes milliseconds to begin."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "h5py"])
    return lambda *arguments: context.Process(target=child, args=arguments)


@pytest.mark.parametrize("optimizer", ["adam", "hf"])
def test_kill_at_random_moments(tmp_path: Path, spawn: Callable[..., BaseProcess], optimizer: str) -> None:
    folder = tmp_path / "killed"
    acknowledged = multiprocessing.get_context("forkserver").Value("q", -1)
    chance = random.Random(optimizer)
    for kill in range(KILLS):
        process = spawn(folder, optimizer, acknowledged)
        before = acknowledged.value
        process.start()
        while acknowledged.value == before and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.12))
        assert process.is_alive(), "the run ended before it was killed; give it more steps"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        run = read_run(folder)
        rows = run.steps["step"].tolist()
        assert rows == list(range(len(rows)))
        assert rows[-1] >= acknowledged.value, f"kill {kill} lost a row"
        assert run.checkpoint()["step"] >= acknowledged.value - 3, f"kill {kill} lost a checkpoint"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = build(tmp_path / "whole", optimizer)
        whole.optimize()
        killed = build(folder, optimizer)
        killed.load()
        killed.optimize()
    finally:
        torch.set_num_threads(threads)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(killed.model.state_dict()[name], value), name
    one, other = read_run(folder), read_run(tmp_path / "whole")
    for column in ("step", "train_loss", "test_loss", "error_rate", "rho", "damping", "cg_iterations"):
        assert one.steps[column].tobytes() == other.steps[column].tobytes(), column
    assert one.checks.tobytes() == other.checks.tobytes()
    for name in ("hidden_states", "gradient_by_lag"):
        frames, expected = dict(one.recorded[name].frames()), dict(other.recorded[name].frames())
        assert list(frames) == list(expected)
        assert all(frames[step][k].tobytes() == a.tobytes() for step in frames for k, a in expected[step].items())
    assert (folder / "results").read_text().count("resumed at step") == KILLS


def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    run_folder = str(tmp_path / "run")
    program = (
        "import pathlib, tests.hfopt.tiny as tiny; "
        f"hf = tiny.experiment(pathlib.Path({run_folder!r}), max_steps=10**6, quiet=False); "
        "print(hf.optimize())"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    printed = ""
    while not re.search(r"^ +4 ", printed, re.MULTILINE):
        line = process.stdout.readline()
        assert line, process.communicate()
        printed += line
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    printed += rest
    assert process.returncode == 0
    assert errors.strip() == "stopping after this step; once more to stop at once"
    assert printed.rstrip().endswith("interrupted")
    found = re.search(r"interrupted and saved after (\d+) steps", printed)
    assert found is not None
    run = read_run(tmp_path / "run")
    assert run.find().step == int(found.group(1)) == len(run.steps)
    shown = re.findall(r"^ +(\d+) +\d\.\d+e", printed, re.MULTILINE)
    assert [int(step) for step in shown] == run.steps["step"].tolist()
