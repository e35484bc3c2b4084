"""The comparison on deep autoencoders: runs ended in time, its bookkeeping, its page. No time is judged."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import autoencoders as a

RUN = a.Run(2.0, "adam", 0.01, 0, 3, (0.0, 1.0, 2.0), (9.0, 4.0, 5.0), "python -m runs.autoencoder digits")
ABOUT = dict.fromkeys(("date", "processor", "threads", "torch", "hfopt"), "x")


@pytest.mark.slow
def test_a_run_is_ended_when_its_optimizer_has_had_its_seconds() -> None:
    for name, rate in ((a.OURS, None), ("nag", 1e-3)):
        run = a.train(a.Options(threads=1), name, rate, 1, 2.0)
        assert (run.optimizer, run.rate, run.seed) == (name, rate, 1)
        assert run.steps > 1
        assert run.seconds[0] == 0.0
        assert all(t <= 2.0 for t in run.seconds)
        assert run.error < run.errors[0]
        assert f"--optimizer {name} --evaluate-on train --seed 1" in run.command


@pytest.mark.slow
def test_a_run_that_breaks_down_says_what_it_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFOPT_DATA", raising=False)
    with pytest.raises(RuntimeError, match=r"runs.autoencoder mnist .* ended by itself:\n.*HFOPT_DATA"):
        a.train(a.Options(data="mnist"), a.OURS, None, 0, 5.0)


def test_errors_up_to_a_time() -> None:
    assert [RUN.until(t) for t in (0.5, 1.0, 9.0)] == [9.0, 4.0, 4.0]
    assert RUN.error == 4.0


def test_the_rate_is_that_of_the_first_seed() -> None:
    worse = replace(RUN, rate=0.1, errors=(9.0, 8.0, 7.0))
    other = replace(RUN, seed=1, errors=(9.0, 9.0, 8.0))
    runs = [worse, RUN, other, replace(worse, seed=1, errors=(1.0, 1.0, 1.0))]
    assert a.best(runs, "adam", 2.0) == [RUN, other]
    with pytest.raises(ValueError, match="in 2 s adam made no test"):
        a.best([replace(RUN, seconds=(0.0,), errors=(9.0,))], "adam", 2.0)


def test_rates_are_tried_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best rate of the trials alone gets the whole time, for every seed; what is there is not run again."""
    ran: list[tuple[str, float | None, int, float]] = []

    def train(_: a.Options, name: str, rate: float | None, seed: int, seconds: float) -> a.Run:
        ran.append((name, rate, seed, seconds))
        return replace(RUN, optimizer=name, rate=rate, seed=seed, budget=seconds, errors=(9.0, 9.0, 1 / (rate or 1)))

    monkeypatch.setattr(a, "train", train)
    options = a.Options(seconds=8.0, trial=2.0, rates=(0.1, 0.2), seeds=(5, 6))
    runs: list[a.Run] = []
    kept: list[int] = []
    a.measure(options, runs, lambda: kept.append(len(runs)))
    tried = [(n, r, 5, 2.0) for n in ("adam", "nag") for r in (0.1, 0.2)]
    expected = [("hf", None, 5, 8.0), *tried[:2], ("adam", 0.2, 5, 8.0), *tried[2:], ("nag", 0.2, 5, 8.0)]
    expected += [("hf", None, 6, 8.0), ("adam", 0.2, 6, 8.0), ("nag", 0.2, 6, 8.0)]
    assert ran == expected
    assert kept == list(range(1, len(expected) + 1))
    assert [r.seed for r in a.best(runs, "adam", 8.0)] == [5, 6]
    del runs[4:]
    ran.clear()
    a.measure(options, runs, lambda: None)
    assert ran == expected[4:]
    text = a.section("mnist", 8.0, ABOUT, runs, "p.png")
    assert "Rates tried with Adam for 2 s each: 0.1, 0.2. Rates tried with Nesterov's momentum for 2 s" in text


def test_runs_of_other_threads_are_not_gone_on_with(tmp_path: Path) -> None:
    found = {"seconds": 2.0, "about": {"threads": "64"}, "runs": [asdict(RUN)]}
    (tmp_path / "digits.json").write_text(json.dumps(found), "utf-8")
    with pytest.raises(SystemExit, match=r"digits.json has runs of 64 threads: --threads as many, or no --resume"):
        a.main(["digits", "--resume", "--threads", "1", "--results", str(tmp_path)])


def test_the_page(tmp_path: Path) -> None:
    options = a.Options(results=tmp_path, page=tmp_path / "docs" / "page.md", page_only=True)
    runs = [replace(RUN, optimizer=n, rate=None if n == a.OURS else 0.01, seed=s) for n in a.NAMES for s in (0, 1)]
    runs = [replace(r, errors=(9.0, 1.4, 1.5)) if r.optimizer == a.OURS else r for r in runs]
    found = {"seconds": 2.0, "about": ABOUT, "runs": [asdict(r) for r in runs]}
    (tmp_path / "mnist.json").write_text(json.dumps(found), "utf-8")
    halfway = {**found, "runs": found["runs"][:2]}  # type: ignore[index]
    (tmp_path / "digits.json").write_text(json.dumps(halfway), "utf-8")
    a.write(options)
    text = options.page.read_text("utf-8")
    assert "| Adam | 0.01 | 9 | 9 | 4 | 4 | 3 |" in text
    assert "| HF | - | 9 | 9 | 1.4 | 1.4 | 3 |" in text
    assert "1.40 for HF" in text
    assert "1.40 or less: HF 1 s, Adam not within this time, Nesterov's momentum not within this time." in text
    assert "## digits" not in text
    assert (tmp_path / "docs" / "images" / "autoencoder-mnist.png").read_bytes()[1:4] == b"PNG"
