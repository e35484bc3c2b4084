"""The tuner: proposals, infeasible trials, workers that share a study, and workers that die."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from hfopt.experiment.store.reader import read_run
from runs.capacity.archive import read
from runs.capacity.commands import main
from runs.capacity.hyperparameters import FIRST_ORDER, HF, Range, space
from runs.capacity.training import Outcome
from runs.capacity.tuning import Study, _ask, _bury, _open, _signs_of_life, _Worker, load, rows, tune

ROOT = Path(__file__).resolve().parents[3]
TINY = (
    *("--task", "mem_thru", "--architecture", "rnn", "--max-params", "300", "--train-steps", "5", "--batch-size", "10"),
    *("--test-batches", "2", "--options", '{"inputs": 4, "steps": 3}'),
)


def study_in(folder: Path, **changes: Any) -> Study:
    plain = Study(folder, "mem_thru", "rnn", 1, 300, FIRST_ORDER, 5, {"seconds": None})
    return Study(**{**vars(plain), **changes})


def bowl(_: int, hparams: Any) -> Outcome:
    """A loss that depends on two of the hyperparameters, and diverges for large learning rates."""
    x, y = math.log(hparams["lr_init"]), hparams["recurrent_bias_scale_h"]
    loss = (x + 6) ** 2 + (y - 1) ** 2 if x < -4 else math.inf
    return Outcome("max_steps" if loss < math.inf else "diverged", 268, 12, loss, loss, loss + 0.5, 5, 0.1)


def test_the_space_has_the_published_names() -> None:
    assert len(space("lstm", FIRST_ORDER, 7)) == 23  # the 22 published ones and the nonlinearity
    assert set(space("lstm", FIRST_ORDER, 7)) - {"nonlinearity"} == {
        *(f"{what}_{g}" for what in ("recurrent_matrix_scale", "input_scale", "recurrent_bias_scale") for g in "gico"),
        *("recurrent_matrix_init_type", "recurrent_bias_init_type", "forget_gate_bias_hack", "optimizer", "lr_init"),
        *("lr_decay_rate", "optimizer_logit_momentum", "gradient_clip_val", "l2_decay", "train_steps"),
    }
    assert space("gru", FIRST_ORDER, 7)["lr_init"] == Range(1e-4, 1e-1, log=True)
    assert "lr_init" not in space("gru", (HF,), 7)
    with pytest.raises(ValueError, match="a study of its own"):
        space("gru", (HF, "Adam"), 7)


@pytest.mark.slow
def test_it_finds_what_chance_does_not(tmp_path: Path) -> None:
    shared = tune(study_in(tmp_path), 40, bowl)
    found = rows([shared])
    assert len(found) == 40
    assert isinstance(shared.sampler, optuna.samplers.GPSampler)
    first, later = found["valid_loss"][:10], found["valid_loss"][10:]
    assert later.min() < first.min() / 3
    # Divergence is avoided once it has been seen.
    assert np.isinf(later).mean() < 0.3
    assert shared.best_trial.value == later.min()


def test_a_trial_that_diverged_is_infeasible(tmp_path: Path) -> None:
    def never(number: int, hparams: Any) -> Outcome:
        loss = math.inf if number else 1.0
        return Outcome("max_steps", 268, 12, loss, loss, loss, 5, 0.1)

    shared = tune(study_in(tmp_path), 3, never)
    trials = shared.get_trials()
    assert [t.constraints["diverged"] for t in trials] == [0, 1, 1]
    assert [t.value for t in trials] == [1, 1, 1]
    assert shared.best_trial.number == 0
    assert rows([shared])["eval_loss"].tolist() == [1, math.inf, math.inf]


def test_a_study_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    tune(study_in(tmp_path), 2, bowl)
    seen: list[int] = []

    def noting(number: int, hparams: Any) -> Outcome:
        seen.append(number)
        return bowl(number, hparams)

    tune(study_in(tmp_path), 4, noting)
    assert seen == [2, 3]
    tune(study_in(tmp_path), 4, noting)
    assert seen == [2, 3]
    with pytest.raises(ValueError, match="begun with other settings"):
        tune(study_in(tmp_path, train_steps=6), 5, bowl)
    (only,) = load(tmp_path)
    assert rows([only])["hyper_iter"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_trial_that_is_broken_off_does_not_count(tmp_path: Path, error: type[BaseException]) -> None:
    def breaking(number: int, hparams: Any) -> Outcome:
        raise error

    with pytest.raises(error):
        tune(study_in(tmp_path), 2, breaking)
    shared = tune(study_in(tmp_path), 2, bowl)
    assert [t.state for t in shared.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]


def test_a_database_by_url(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    tune(study_in(tmp_path / "a", storage=url), 2, bowl)
    shared = tune(study_in(tmp_path / "b", storage=url), 3, bowl)
    assert len(rows([shared])) == len(rows(load(tmp_path, url))) == 3
    with pytest.raises(ValueError, match="cannot be opened"):
        tune(study_in(tmp_path, storage="nodatabase://x"), 2, bowl)
    with pytest.raises(FileNotFoundError, match="there is no study"):
        load(tmp_path / "nothing")


def test_a_live_worker_of_another_folder_is_not_buried(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    other: list[int] = []

    def while_it_runs(number: int, hparams: Any) -> Outcome:
        if not other:
            other.append(number)
            second = _Worker(tmp_path / "b")
            shared = _open(study_in(tmp_path / "b", storage=url), second)
            _bury(shared, second)
            assert shared.get_trials()[0].state == TrialState.RUNNING
            second.close()
        return bowl(number, hparams)

    shared = tune(study_in(tmp_path / "a", storage=url), 1, while_it_runs)
    assert [t.state for t in shared.get_trials()] == [TrialState.COMPLETE]


@pytest.mark.slow
def test_in_a_database_a_worker_without_signs_of_life_is_buried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runs.capacity.tuning._BEAT", 1)
    study = study_in(tmp_path / "a", storage=f"sqlite:///{tmp_path / 'study.db'}")
    worker = _Worker(tmp_path / "elsewhere")
    shared = _open(study, worker)
    trial = _ask(shared, {}, 2, worker)
    assert trial is not None
    with _signs_of_life(shared, trial):
        time.sleep(5)
        other = _Worker(tmp_path / "a")
        _bury(shared, other)
        other.close()
        assert shared.get_trials()[0].state == TrialState.RUNNING
    worker.close()
    time.sleep(5)
    done = tune(study, 2, bowl)
    assert [t.state for t in done.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]


@pytest.mark.slow
def test_commands_from_tuning_to_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = ("--study", str(tmp_path / "study"))
    assert main(["tune", *TINY, *study, "--trials", "3"]) == 0
    assert "best RNN had final loss" in capsys.readouterr().out
    assert read_run(tmp_path / "study" / "trial-00001").configuration["settings"]["n_layers"] == 1
    assert main(["export", *study, "--to", str(tmp_path / "table.p")]) == 0
    assert main(["export", *study, "--to", str(tmp_path / "table.p")]) == 1
    assert "is there already" in capsys.readouterr().err
    found = read(tmp_path / "table.p")
    assert found["hyper_iter"].tolist() == [0, 1, 2]
    assert (found["num_params"] == 268).all()
    assert main(["best", "--data", str(tmp_path / "table.p"), "--task", "mem_thru", "--architecture", "rnn"]) == 0
    out = capsys.readouterr().out
    assert "SHA-256" in out
    assert f"best RNN had final loss {found['eval_loss'].min():f}, was 1-layers, 268 parameters, and had HPs:" in out
    assert main(["tune", *TINY, *study, "--trials", "3", "--hf", "--train-steps", "2"]) == 0
    assert "hf_cg_iterations: " in capsys.readouterr().out
    assert main(["pictures", "--data", str(tmp_path / "table.p"), "--to", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "trials.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["best", "--data", "none.tar.gz", "--task", "text8", "--architecture", "lstm"],
            "there is no file none.tar.gz",
        ),
        (["tune", *TINY, "--options", "x"], "which is no JSON"),
        (["tune", *TINY, "--options", '{"steps": 0}'], "steps is 0"),
        (["tune", *TINY, "--trials", "0"], "trials is 0"),
        (["tune", *TINY, "--max-params", "3"], "budget is 3"),
    ],
)
def test_wrong_words_are_answered_by_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    extra = ["--study", str(tmp_path / "study")] if words[0] == "tune" else []
    assert main([*words, *extra]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_of_two_workers_one_is_killed_and_nothing_counts_twice(tmp_path: Path) -> None:
    folder, wanted = tmp_path / "study", 8
    words = [sys.executable, "-m", "runs.capacity", "tune", *TINY, "--study", str(folder), "--trials", str(wanted)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(log: str) -> subprocess.Popen[bytes]:
        with (tmp_path / log).open("wb") as out:
            steps = [*words, "--train-steps", "150"]
            return subprocess.Popen(steps, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)

    victim = start("victim")
    survivor = None
    try:
        deadline = time.monotonic() + 240
        while "trial 1 begins" not in (tmp_path / "victim").read_text() and time.monotonic() < deadline:
            assert victim.poll() is None, (tmp_path / "victim").read_text()
            time.sleep(0.02)
        survivor = start("survivor")
        # It is killed in the middle of a trial, while the other one is at work.
        while "begins" not in (tmp_path / "survivor").read_text() and time.monotonic() < deadline:
            assert survivor.poll() is None, (tmp_path / "survivor").read_text()
            time.sleep(0.02)
        while not (tmp_path / "victim").read_text().rstrip().endswith("begins") and time.monotonic() < deadline:
            assert victim.poll() is None, (tmp_path / "victim").read_text()
            time.sleep(0.001)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert survivor.wait(timeout=240) == 0, (tmp_path / "survivor").read_text()
    finally:
        for process in (victim, survivor):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    (shared,) = load(folder)
    trials = shared.get_trials()
    states = [t.state for t in trials]
    assert states.count(TrialState.COMPLETE) == wanted
    assert states.count(TrialState.FAIL) == 1  # what the dead worker was at
    assert len(states) == wanted + 1
    found = rows([shared])
    assert len(set(found["hyper_iter"].tolist())) == len(found) == wanted
    workers = {t.user_attrs["worker"] for t in trials if t.state == TrialState.COMPLETE}
    assert len(workers) == 2
    for row in found:
        assert read_run(folder / f"trial-{row['hyper_iter']:05d}").steps["step"][-1] == 150
