"""The comparison on deep autoencoders: runs ended in time, its bookkeeping, its page. No time is judged."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import autoencoders as a

RUN = a.Run("adam", 0.01, 0, 3, (0.0, 1.0, 2.0), (9.0, 4.0, 5.0), "python -m runs.autoencoder digits")


def test_a_run_is_ended_when_its_optimizer_has_had_its_seconds() -> None:
    for name, rate in ((a.OURS, None), ("nag", 1e-3)):
        run = a.train(a.Options(threads=1), name, rate, 1, 2.0)
        assert (run.optimizer, run.rate, run.seed) == (name, rate, 1)
        assert run.steps > 1
        assert run.seconds[0] == 0.0
        assert all(t <= 2.0 for t in run.seconds)
        assert run.error < run.errors[0]
        assert f"--optimizer {name} --evaluate-on train --seed 1" in run.command


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
    assert a.best(runs, "adam") == [RUN, other]


def test_the_page(tmp_path: Path) -> None:
    options = a.Options(results=tmp_path, page=tmp_path / "docs" / "page.md", page_only=True)
    runs = [replace(RUN, optimizer=n, rate=None if n == a.OURS else 0.01, seed=s) for n in a.NAMES for s in (0, 1)]
    about = dict.fromkeys(("date", "processor", "threads", "torch", "hfopt"), "x")
    found = {"seconds": 2.0, "about": about, "runs": [asdict(r) for r in runs]}
    (tmp_path / "mnist.json").write_text(json.dumps(found), "utf-8")
    a.write(options)
    text = options.page.read_text("utf-8")
    assert "| Adam | 0.01 | 9 | 9 | 4 | 4 | 3 |" in text
    assert "| HF | - | 9 | 9 | 4 | 4 | 3 |" in text
    assert "1.40 for HF" in text
    assert "## digits" not in text
    assert (tmp_path / "docs" / "images" / "autoencoder-mnist.png").read_bytes()[1:4] == b"PNG"
