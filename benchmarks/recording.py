"""What logging and recording cost the demo: ``python -m benchmarks.recording [STEPS]``.

Two copies of the demo's experiment, one with its recorders and one without, take their steps by turns in one process.
Their processor times are compared, since other processes disturb those less than the clock. Beside that stands what the
calls of the log and of the recorders took themselves.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import hfopt
from benchmarks import machine
from hfopt.experiment.hooks import Callback
from models import RNN
from pathological import multiplication
from runs.recording import recorders

STEPS = 17  # after which the demo has solved its problem


class Turns(Callback):
    """Lets one run go on from update to update, then the other one."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self._mine, self._other = mine, other
        self._began = 0.0
        self.spent: list[float] = []

    def before_update(self, hf: Any) -> None:
        """Hand over to the other run, and wait for the next turn."""
        self.hand_over()
        self._mine.acquire()
        self._began = time.process_time()

    def hand_over(self) -> None:
        """Note the processor time of this turn."""
        if self._began:
            self.spent.append(time.process_time() - self._began)
        self._other.release()


def experiment(folder: Path, recorded: list[hfopt.Recorder], turns: Turns, size: Mapping[str, int]) -> hfopt.HF:
    """The demo, as `runs/demo.py` has it."""
    torch.manual_seed(0)
    problem = multiplication(size["T"], batch_size=size["B"], train_batches=1, test_batches=10, seed=0)
    model = RNN(problem.V, size["h"], problem.O).sparse_init(0)
    optimizer = hfopt.HessianFree(
        model.parameters(),
        damping=hfopt.LevenbergMarquardt(),
        weight_decay=2e-5,
        structural_damping=1 / 30,
        cg=hfopt.CG(max_iterations=30, tolerance=5e-4, decay=0.95),
    )
    options: dict[str, Any] = {"threshold": 0.0, "seed": 0, "quiet": True, "callbacks": [turns]}
    return hfopt.HF(folder, model, problem, optimizer=optimizer, record=recorded, **options)


class Stopwatch:
    """Adds up the processor's seconds of some methods."""

    def __init__(self, owner: Any, *names: str) -> None:
        self.seconds = 0.0
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began

        return timed


def measure(steps: int = STEPS, *, T: int = 30, B: int = 1000, h: int = 100) -> dict[str, Any]:
    """Processor seconds of both runs, of the recorders and of the log, from the first update to the end.

    Returns `plain` and `recording` (lists of seconds, a step each), `recorders` and `log` (seconds of the recording
    run), and whether the parameters have the `same` bits.
    """
    torch.set_num_threads(1)
    gates = threading.Semaphore(0), threading.Semaphore(0)
    turns = Turns(gates[0], gates[1]), Turns(gates[1], gates[0])
    size = {"T": T, "B": B, "h": h}
    with tempfile.TemporaryDirectory() as folder:
        plain = experiment(Path(folder, "plain"), [], turns[0], size)
        recording = experiment(Path(folder, "recording"), recorders(1, "hf"), turns[1], size)
        kept = Stopwatch(recording.recorders, "keep")
        logged = Stopwatch(recording, "_record", "_save", "_finish")

        def run(hf: hfopt.HF, own: Turns, first: bool) -> None:
            if not first:
                gates[1].acquire()
            hf.optimize(max_steps=steps)
            own.hand_over()

        threads = [
            threading.Thread(target=run, args=(hf, own, own is turns[0]))
            for hf, own in zip((plain, recording), turns, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        states = [hf.model.state_dict().values() for hf in (plain, recording)]
        same = all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    found = {"plain": turns[0].spent, "recording": turns[1].spent}
    return {**found, "recorders": kept.seconds, "log": logged.seconds, "same": same}


def main() -> None:
    """Measure and print."""
    found = measure(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
    plain, recording = sum(found["plain"]), sum(found["recording"])
    print(f"load average {machine.load()}; {len(found['plain'])} steps of each run by turns, processor time")
    print(f"without recorders {plain:.2f} s, with them {recording:.2f} s: {100 * (recording / plain - 1):+.2f}%")
    shares = {name: 100 * found[name] / plain for name in ("recorders", "log")}
    print(f"of which recorders {shares['recorders']:.2f}% and the log {shares['log']:.2f}%")
    print("the parameters have the same bits" if found["same"] else "THE PARAMETERS DIFFER")


if __name__ == "__main__":
    main()
