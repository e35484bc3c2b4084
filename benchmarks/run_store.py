"""What many runs and long runs cost: `python -m benchmarks.run_store`.

Lists 500 runs, shows a run of 100,000 steps, makes its report, and measures the memory of the process that writes it.
Times are those of whole commands, the median of five; a command imports h5py and rich, but not torch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hfopt
from benchmarks import machine

RUNS, ROWS, STEPS, ROUNDS = 500, 50, 100_000, 5


def main() -> None:
    """Print the measurements as JSON."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        memory = write_long(root / "long")
        for number in range(RUNS):
            with hfopt.Run(root / "many" / f"run-{number}", {"model": "none", "lr": 0.1 + number}) as run:
                for step in range(ROWS):
                    run.log(step, loss=1.0 / (step + 1))
        commands = {
            "nothing (--version)": ["--version"],
            f"list of {RUNS} runs": ["list", "--root", str(root / "many")],
            f"show of {STEPS:,} steps": ["show", str(root / "long")],
            f"report of {STEPS:,} steps": ["report", str(root / "long"), "-o", str(root / "report.html")],
        }
        found = {name: timed(words) for name, words in commands.items()}
        size = (root / "report.html").stat().st_size / 1e6
    print(json.dumps({"load": machine.load(), "seconds": found, "report MB": round(size, 2), **memory}, indent=1))


def write_long(folder: Path) -> dict[str, object]:
    """Write the long run; the resident memory of this process on the way, in MB, by steps, and the time of a row."""
    resident: dict[int, float] = {}
    began = time.process_time()
    with hfopt.Run(folder, {"model": "none"}) as run:
        for step in range(STEPS):
            run.log(step, loss=1.0 / (step + 1), test_loss=1.0 / (step + 2), cg_iterations=10)
            if step % (STEPS // 5) == STEPS // 5 - 1:
                pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
                resident[step + 1] = round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
    return {
        "resident MB of the writer after steps": resident,
        "processor microseconds per row": round(1e6 * (time.process_time() - began) / STEPS),
    }


def timed(words: list[str]) -> dict[str, float]:
    """Wall and processor seconds of a command, medians."""
    walls, processors = [], []
    for _ in range(ROUNDS):
        before, began = os.times(), time.perf_counter()
        subprocess.run([sys.executable, "-m", "hfopt", *words], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        walls.append(time.perf_counter() - began)
        processors.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return {"wall": round(statistics.median(walls), 2), "processor": round(statistics.median(processors), 2)}


if __name__ == "__main__":
    main()
