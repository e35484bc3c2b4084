"""Deep autoencoders: HF beside Adam and Nesterov's momentum in the same time: ``python -m benchmarks.autoencoders``.

Every run is one of ``python -m runs.autoencoder``, ended by Ctrl-C when its optimizer has had its seconds: HF with the
settings of the preset, Adam, and SGD with Nesterov's momentum on the schedule of Sutskever, Martens, Dahl & Hinton
(ICML 2013). The latter two are run with six learning rates each for the first seed, where ``--trial`` is given for that
many seconds, and with the best of them for all seeds.

What counts is the squared error on the training images, summed over pixels and averaged over images, at the tests that
a run makes; seconds are those inside of the optimizers' steps, tests and the fetching of images left out. Results are
written after every run, and ``--resume`` leaves out the runs that are there.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from benchmarks import machine
from hfopt.experiment.store.reader import read_run

ROOT = Path(__file__).parent
OURS = "hf"
RATES = {"adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "nag": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
NAMES = {OURS: "HF", "adam": "Adam", "nag": "Nesterov's momentum"}
COLOURS = {OURS: "C3", "adam": "C0", "nag": "C2"}
SECONDS = {"digits": 20.0, "mnist": 900.0}
# The published error of HF, and where it is from.
PUBLISHED = {
    "mnist": (
        1.40,
        "Martens (2010), as quoted by Sutskever et al. (2013): 1.40 for HF; 0.73 for momentum at its best",
    )
}


@dataclass(frozen=True)
class Options:
    """What to run, and for how long."""

    data: Annotated[Literal["digits", "mnist"], tyro.conf.Positional] = "digits"
    """the images; MNIST's are read from HFOPT_DATA/mnist"""
    seconds: float | None = None
    """of every run; by default 20 for digits, 900 for MNIST"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of first parameters and of the order of images; the first one's runs choose the learning rates"""
    threads: int = 2
    """of torch"""
    rates: tuple[float, ...] = ()
    """learning rates of the others; by default six each"""
    trial: float | None = None
    """seconds of the runs that choose a learning rate; by default as many as of every run"""
    resume: bool = False
    """go on with the results that are there"""
    page_only: bool = False
    """make page and picture from the results as they are"""
    results: Path = ROOT / "results" / "autoencoders"
    """folder of the numbers"""
    page: Path = ROOT.parent / "docs" / "autoencoders.md"
    """the page; its picture goes to the folder images beside it"""

    @property
    def budget(self) -> float:
        """Seconds of every run that is compared."""
        return self.seconds or SECONDS[self.data]


@dataclass(frozen=True)
class Run:
    """A run of so many seconds: errors on the training images at the tests, and the optimizer's seconds before each."""

    budget: float
    optimizer: str
    rate: float | None
    seed: int
    steps: int
    seconds: tuple[float, ...]
    errors: tuple[float, ...]
    command: str

    @property
    def error(self) -> float:
        """The least error of all."""
        return min(self.errors)

    def until(self, seconds: float) -> float:
        """The least error up to a time."""
        return min((e for t, e in zip(self.seconds, self.errors, strict=True) if t <= seconds), default=self.errors[0])

    def reached(self, error: float) -> float:
        """The first time at which the error was as low; infinity if never."""
        return min((t for t, e in zip(self.seconds, self.errors, strict=True) if e <= error), default=math.inf)


def train(options: Options, optimizer: str, rate: float | None, seed: int, seconds: float) -> Run:
    """One run, ended when its optimizer has had ``seconds``.

    Raises:
        RuntimeError: the run ended by itself; the message has what it printed.
    """
    words = ["-m", "runs.autoencoder", options.data, "--optimizer", optimizer, "--evaluate-on", "train"]
    words += ["--seed", str(seed), "--threads", str(options.threads)]
    words += [] if rate is None else ["--lr", f"{rate:g}"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        process = subprocess.Popen(
            [sys.executable, *words, "--max-steps", "1000000", "--name", str(run)],
            cwd=ROOT.parent,
            env=dict(os.environ, PYTHONPATH=str(ROOT.parent)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None and _spent(run) < seconds:
            time.sleep(min(1.0, seconds / 20))
        ended = process.poll()
        process.send_signal(signal.SIGINT)
        printed = process.communicate()[0].decode(errors="replace")
        if ended is not None or not (run / "run.h5").exists():
            raise RuntimeError(f"python {' '.join(words)} ended by itself:\n{printed}")
        rows = read_run(run).steps
    # A test belongs to the parameters before the row's own step.
    before = np.cumsum(np.nan_to_num(rows["optimizer_seconds"])) - np.nan_to_num(rows["optimizer_seconds"])
    kept = np.isfinite(rows["error_rate"]) & (before <= seconds)
    return Run(
        seconds, optimizer, rate, seed, int((before <= seconds).sum()), tuple(np.round(before[kept], 4).tolist()),
        tuple(float(f"{e:.6g}") for e in rows["error_rate"][kept]), "python " + " ".join(words),
    )  # fmt: skip


def _spent(run: Path) -> float:
    """The optimizer's seconds so far."""
    try:
        return float(np.nansum(read_run(run).steps["optimizer_seconds"]))
    except (FileNotFoundError, OSError, ValueError):
        return 0.0  # nothing is written yet


def measure(options: Options, runs: list[Run], keep: Callable[[], None]) -> None:
    """Append all runs to those that are there already, and ``keep()`` after each."""
    trial = options.trial or options.budget

    def run(name: str, rate: float | None, seed: int, budget: float) -> None:
        if any((r.optimizer, r.rate, r.seed, r.budget) == (name, rate, seed, budget) for r in runs):
            return
        runs.append(train(options, name, rate, seed, budget))
        at = "" if rate is None else f" lr {rate:g}"
        print(f"{name}{at} seed {seed}: {runs[-1].error:.4g} after {runs[-1].steps} steps", flush=True)
        keep()

    for seed in options.seeds:
        for name in NAMES:
            if name == OURS:
                run(name, None, seed, options.budget)
                continue
            if seed == options.seeds[0]:
                for rate in options.rates or RATES[name]:
                    run(name, rate, seed, trial)
            run(name, best_rate(runs, name, trial), seed, options.budget)


def best_rate(runs: list[Run], name: str, budget: float) -> float | None:
    """The learning rate that was best of those of the first seed.

    Raises:
        ValueError: a run was too short to tell.
    """
    own = [r for r in runs if r.optimizer == name and r.budget == budget]
    if any(len(r.errors) < 2 for r in own):
        raise ValueError(f"in {budget:g} s {name} made no test but that of the start; give the trials more time")
    return min((r for r in own if r.seed == own[0].seed), key=lambda r: r.error).rate


def best(runs: list[Run], name: str, seconds: float) -> list[Run]:
    """The runs of so many seconds of an optimizer at its best learning rate, one a seed."""
    own = [r for r in runs if r.optimizer == name and r.budget == seconds]
    rate = best_rate(own, name, seconds)
    return [r for r in own if r.rate == rate]


def section(data: str, seconds: float, about: dict[str, str], runs: list[Run], picture: str) -> str:
    """Markdown on one data set."""
    shares = (0.1, 0.25, 0.5, 1.0)
    heads = " | ".join(f"{share * seconds:g} s" for share in shares)
    lines = [f"## {data}", "", f"| optimizer | rate | {heads} | steps |", "|---|--:|" + "--:|" * (len(shares) + 1)]
    chosen = {name: best(runs, name, seconds) for name in NAMES}
    for name, own in chosen.items():
        cells = [f"{statistics.median(r.until(share * seconds) for r in own):.3g}" for share in shares]
        rate = "-" if own[0].rate is None else f"{own[0].rate:g}"
        lines.append(f"| {NAMES[name]} | {rate} | {' | '.join(cells)} | {statistics.median(r.steps for r in own):g} |")
    count, first = len({r.seed for r in runs}), runs[0].seed
    lines += ["", f"Lowest training errors up to each time, medians over {count} seed{'s' * (count > 1)}."]
    for name, title in NAMES.items():
        tried = {(r.rate, r.budget) for r in runs if r.optimizer == name and r.rate is not None and r.seed == first}
        budget = min((b for _, b in tried), default=0.0)
        rates = ", ".join(f"{rate:g}" for rate, b in sorted(tried) if b == budget)
        lines[-1] += f" Rates tried with {title} for {budget:g} s each: {rates}." if tried else ""
    if data in PUBLISHED:
        published, source = PUBLISHED[data]
        times = {NAMES[n]: statistics.median(r.reached(published) for r in own) for n, own in chosen.items()}
        words = [f"{title} " + (f"{t:.0f} s" if t < math.inf else "not within this time") for title, t in times.items()]
        lines += ["", f"{source}. First test at {published:.2f} or less: {', '.join(words)}."]
    lines += ["", f"![Training error over seconds](images/{picture})", ""]
    lines += [f"- `{own[0].command}`" for own in chosen.values()]
    keys = ("date", "processor", "threads", "torch", "hfopt")
    return "\n".join([*lines, "", "; ".join(f"{k}: {about[k]}" for k in keys) + "."])


def plot(data: str, runs: list[Run], seconds: float, path: Path, threads: str) -> None:
    """Training error over seconds: every seed at the best rate, the first in bold; a dashed line for the published."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, label in NAMES.items():
        for i, run in enumerate(best(runs, name, seconds)):
            at = "" if run.rate is None else f", rate {run.rate:g}"
            ax.plot(run.seconds, run.errors, color=COLOURS[name], lw=0.7 if i else 1.8, label=None if i else label + at)
    if data in PUBLISHED:
        ax.axhline(PUBLISHED[data][0], color="0.5", lw=0.8, ls="--", label=f"{PUBLISHED[data][0]:.2f}, HF of 2010")
    title = f"{data}, {threads} thread{'s' * (threads != '1')}"
    ax.set(yscale="log", xlabel="seconds", ylabel="squared error on the training images", title=title)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


HEAD = """# Deep autoencoders in equal time

`python -m benchmarks.autoencoders` (for MNIST `python -m benchmarks.autoencoders mnist`) generates this page. It runs
the commands below and stops each when its optimizer has used the given seconds. HF uses the settings of its preset. The
others try several learning rates on the first seed and use the best one for all seeds. On MNIST, tests use running
averages of the parameters. The error is the squared error on the training images, summed over pixels and averaged over
images. Seconds are those spent inside the steps of the optimizers.

"""


def results(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """What a file of results says, and its runs."""
    found = json.loads(path.read_text("utf-8"))
    runs = [Run(**{**r, "seconds": tuple(r["seconds"]), "errors": tuple(r["errors"])}) for r in found["runs"]]
    return found, runs


def write(options: Options) -> None:
    """The page, from the results of all data sets."""
    images = options.page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    sections = []
    for data in SECONDS:
        path = options.results / f"{data}.json"
        if path.exists():
            found, runs = results(path)
            if any(not [r for r in runs if (r.optimizer, r.budget) == (n, found["seconds"])] for n in NAMES):
                continue  # was stopped halfway
            picture = f"autoencoder-{data}.png"
            plot(data, runs, found["seconds"], images / picture, found["about"]["threads"])
            sections.append(section(data, found["seconds"], found["about"], runs, picture))
    options.page.write_text(HEAD + "\n\n".join(sections) + "\n", "utf-8")


def main(args: list[str] | None = None) -> int:
    """Run what the command line asks for, and write the page."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks.autoencoders", description=__doc__)
    if not options.page_only:
        torch.set_num_threads(options.threads)
        path = options.results / f"{options.data}.json"
        about, runs = machine.describe(torch.device("cpu")), list[Run]()
        if options.resume and path.exists():
            found, runs = results(path)
            if found["about"]["threads"] != about["threads"]:
                sys.exit(f"{path} has runs of {found['about']['threads']} threads: --threads as many, or no --resume")

        def keep() -> None:
            options.results.mkdir(parents=True, exist_ok=True)
            found = {"seconds": options.budget, "about": about, "runs": [asdict(r) for r in runs]}
            path.write_text(json.dumps(found) + "\n", "utf-8")

        measure(options, runs, keep)
    write(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
