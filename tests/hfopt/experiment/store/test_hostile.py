"""300 changed bytes, 200 truncations, 100 crafted files: each a sentence within 2 s and 300 MB, or the right state."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hfopt
from hfopt.experiment.store.reader import read_run
from tests.hfopt.experiment.store import hostile
from tests.hfopt.tiny import experiment

ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run as a kill leaves it, with rows in its journal; and what came of its damaged copies."""
    folder = tmp_path_factory.mktemp("good") / "run"
    record = [hfopt.HiddenStates(every=2, sequences=2), hfopt.Spectrum(every=3)]
    hf = experiment(folder, save_freq=2, record=record, max_steps=8)
    forget = hf.problem.forget

    def dying() -> None:
        if hf.step == 7:
            shutil.copytree(folder, folder.with_name("killed"))
        forget()

    hf.problem.forget = dying  # type: ignore[method-assign]
    hf.optimize()
    killed = folder.with_name("killed")
    assert len(read_run(killed).steps) == 7
    command = [sys.executable, "-m", hostile.__name__, str(killed), str(folder.parent / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize(("kind", "least"), [("changed_bytes", 300), ("truncations", 200), ("crafted", 100)])
def test_each_is_refused_or_the_right_state(found: Any, kind: str, least: int) -> None:
    cases = found["cases"][kind]
    assert len(cases) >= least
    wrong = [(what, outcome, said) for what, _, outcome, said in cases if outcome not in ("refused", "same")]
    # A journal that ends earlier is one of a run that was killed earlier: its last rows were never acknowledged. An
    # empty file of frames is one that a power cut left; frames of its steps are taken again.
    if kind == "truncations":
        wrong = [case for case in wrong if not case[0].startswith("journal-") and not case[0].endswith(" to 0")]
    assert wrong == []
    refused = [(what, said) for what, _, outcome, said in cases if outcome == "refused"]
    assert len(refused) > 0.6 * len(cases)
    assert [case for case in refused if "\n" in case[1] or not (".h5" in case[1] or ".jsonl" in case[1])] == []


def test_within_seconds_and_megabytes(found: Any) -> None:
    slowest = max((seconds, what) for cases in found["cases"].values() for what, seconds, _, _ in cases)
    assert slowest[0] < 2, slowest
    assert found["grown"] < 300e6
