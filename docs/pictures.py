"""Makes the pictures of looking_inside.md and README.md from a short run of the demo.

    python docs/pictures.py        makes them again, whether or not anything has changed

The docs' build calls `make`, which does nothing while the code that draws is as it was when the pictures were made.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "images" / "looking_inside"
MADE_FROM = PICTURES / "made_from.txt"
DRAWN_BY = ("docs/pictures.py", "hfopt/experiment/visualize/*.py", "hfopt/experiment/recorders/*.py")
SMALL = ("--T", "15", "--hidden", "50", "--batch-size", "300", "--test-batches", "3")
RUNS = {"demo": SMALL, "demo-adam": (*SMALL, "--optimizer", "adam", "--max-steps", "500")}
SEQUENCE = 3


def state() -> str:
    """A hash of the code that draws."""
    found = hashlib.sha256()
    for pattern in DRAWN_BY:
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()


def is_current() -> bool:
    """Whether the pictures are those of the code as it is."""
    return MADE_FROM.is_file() and MADE_FROM.read_text(encoding="ascii").strip() == state()


def chosen_step(run: Path) -> int:
    """A step at which backtracking took an iterate before the last, as late as possible."""
    from hfopt.experiment.store.reader import read_run

    rows = read_run(run).steps
    rows = rows[(rows["backtracked"] > 0) & (rows["backtracked"] < rows["cg_iterations"])]
    return int(rows["step"][-1])


def make() -> None:
    """Run the demo and draw."""
    import matplotlib

    matplotlib.use("agg")
    from hfopt.experiment import visualize

    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, words in RUNS.items():
            command = [sys.executable, "-m", "runs.demo", *words, "--name", str(Path(folder, name))]
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
            )
            if done.returncode and "no success" not in done.stdout:
                raise RuntimeError(f"the run {name} failed:\n{done.stdout}{done.stderr}")
        run, adam = (Path(folder, name) for name in RUNS)
        figures = {
            "curves": visualize.plot_runs(run),
            "cg": visualize.draw_cg_table(run, chosen_step(run)),
            "hidden": visualize.draw_hidden_states(run, sequence=SEQUENCE),
            "gradient_by_lag": visualize.draw_gradient_by_lag(run),
            "spectrum": visualize.draw_spectrum(run),
            "curvature": visualize.draw_curvature_density(run),
            "compare": visualize.compare_runs([run, adam]),
        }
        for name, figure in figures.items():
            figure.savefig(PICTURES / f"{name}.png", dpi=100)
        visualize.animate_hidden_states(run, PICTURES / "hidden.gif", SEQUENCE, dpi=70, most=30)
    MADE_FROM.write_text(state() + "\n", encoding="ascii")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    make()
