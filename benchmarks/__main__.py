"""The command: ``python -m benchmarks --help``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

# The profiler reports each start and stop on its own otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
import tyro

import benchmarks
from benchmarks import cases, claims, gpu, machine, products, report, scaling, steps
from hfopt.experiment.memory import keep_freed_memory

Benchmark = Literal["products", "steps", "scaling", "gpu"]
STEP_CASES = ("autoencoder", "rnn-*")


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    what: Annotated[tuple[Benchmark, ...], tyro.conf.Positional] = ("products", "steps", "scaling")
    """the benchmarks to run; gpu: the tanh recurrence and conjugate gradients on a CUDA device"""
    cases: tuple[str, ...] = ()
    """names or patterns of cases, as rnn-*-B100; default: all (steps: autoencoder and rnn-*)"""
    rounds: int = 21
    """interleaved rounds"""
    seconds: float = 180.0
    """for one case, after which no further round begins (three are always done)"""
    iterations: int = 50
    """of conjugate gradients, at most, in the steps benchmark"""
    threads: int | None = None
    """of torch; default: as torch chooses"""
    device: str = "cpu"
    """cpu or cuda"""
    seed: int = 0
    """of weights and data"""
    toy: bool = False
    """tiny sizes, to see that everything runs"""
    save: bool = True
    """write tables, plots and numbers"""
    out: Path | None = None
    """where; default: benchmarks/results/<processor>-<date>"""


class Folder:
    """Where results go; each benchmark's numbers are written as soon as they are there."""

    def __init__(self, path: Path | None, about: dict[str, str]) -> None:
        self.path, self.about = path, about
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, rows: object, text: str) -> None:
        """``<name>.json`` and ``<name>.md``."""
        if self.path is None:
            return
        about = {**self.about, "load average at the end": machine.load()}
        told = "\n".join(f"- {key}: {value}" for key, value in about.items())
        (self.path / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", "utf-8")
        (self.path / f"{name}.md").write_text(f"{told}\n\n{text}", "utf-8")

    def file(self, name: str) -> Path | None:
        """The path of a further file, or None if nothing is written."""
        return None if self.path is None else self.path / name


def run_products(options: Options, folder: Folder) -> bool:
    """Products of every case; True if all agreed with float64."""
    found: dict[str, list[products.Row]] = {}
    texts = []
    for name, build in cases.chosen(options.cases, options.toy).items():
        torch.manual_seed(options.seed)
        case = build().to(torch.device(options.device))
        found[name] = products.measure(case, options.rounds, options.seconds)
        texts.append(report.product_table(f"{name}: {case.about}", found[name]))
        if options.device == "cpu" and not options.toy:
            texts[-1] += report.claim_table(list(claims.of_products(name, found[name])))
        print(texts[-1], flush=True)
        folder.write("products", {n: _plain(rows) for n, rows in found.items()}, "\n".join(texts))
        if (path := folder.file("products.png")) is not None:
            report.plot_products(found, path)
    return not any(row.skipped == products.WRONG for rows in found.values() for row in rows)


def run_steps(options: Options, folder: Folder) -> None:
    """Whole steps of every case."""
    rows = []
    for build in cases.chosen(options.cases or STEP_CASES, options.toy).values():
        torch.manual_seed(options.seed)
        case = build().to(torch.device(options.device))
        rows.append(steps.measure(case, options.rounds, options.seconds, options.iterations))
        print(report.step_table(rows[-1:]), flush=True)
        folder.write("steps", _plain(rows), report.step_table(rows))


def run_scaling(options: Options, folder: Folder) -> None:
    """Growth along T, B and h."""
    found: dict[str, list[scaling.Row]] = {}
    texts: list[str] = []
    for along in scaling.SIZES:
        torch.manual_seed(options.seed)
        device = torch.device(options.device)
        found[along] = scaling.measure(along, options.rounds, options.seconds, device, options.toy)
        limits = [] if options.toy else list(claims.of_scaling(along, found[along]))
        texts.append(report.scaling_table(found[along]) + report.claim_table(limits))
        print(texts[-1], flush=True)
        folder.write("scaling", {n: _plain(rows) for n, rows in found.items()}, "\n".join(texts))
    if (path := folder.file("scaling.png")) is not None:
        report.plot_scaling(found, path)


def run_gpu(options: Options, folder: Folder) -> None:
    """The tanh recurrence on a CUDA device; a sentence where there is none."""
    if not torch.cuda.is_available():
        print(gpu.NO_DEVICE, flush=True)
        return
    torch.manual_seed(options.seed)
    found = gpu.measure(torch.device("cuda"), options.rounds, options.seconds, options.toy)
    text = report.claim_table(gpu.claims(found))
    print(text, flush=True)
    folder.write("gpu", dataclasses.asdict(found), text)


def _plain(rows: list[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in rows]


def main(args: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a product was wrong."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks", description=benchmarks.__doc__)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.what == ("gpu",) and torch.cuda.is_available() else options.device)
    # Exact float32 for everyone: cuDNN rounds to TF32 otherwise, matrix products by themselves do not.
    torch.backends.cudnn.allow_tf32 = False
    kept = keep_freed_memory()
    about = {**machine.describe(device), "freed memory": "kept by the process" if kept else "as the system has it"}
    path = options.out or Path(__file__).parent / "results" / machine.folder_name(about)
    folder = Folder(path if options.save else None, about)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    agreed = run_products(options, folder) if "products" in options.what else True
    if "steps" in options.what:
        run_steps(options, folder)
    if "scaling" in options.what:
        run_scaling(options, folder)
    if "gpu" in options.what:
        run_gpu(options, folder)
    if folder.path is not None:
        print(f"Written to {folder.path}.")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
