"""Music, typed: it learns, stops by validation, reports the best parameters, and writes pictures and MIDI files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runs.music as m
from corpora.music.baseline import FirstOrder
from corpora.music.midi import read_midi
from hfopt.experiment.store.reader import read_run
from runs.music_presets import PRESETS
from runs.validated import BEST

RUN = "music"
FEW = ("--pieces", "20")
SMALL = (*FEW, "--hidden", "12", "--nade", "8", "--cg-iterations", "10")


def test_a_run_from_start_to_picture(tmp_path: Path, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ("--name", str(folder), *SMALL)
    assert typed(*words, "--max-steps", "3") == 0
    printed = capsys.readouterr().out
    assert "rules obeyed by model" in printed
    report = json.loads((folder / "report.json").read_text())
    run = read_run(folder)
    assert report["step"] == run.find(BEST).step == 3
    # What is reported on the validation part is what the run's own test of the best parameters was.
    best = run.steps["nats_per_frame"].min()
    assert report["valid"]["nats_per_frame"] == pytest.approx(best, rel=1e-6)
    assert report["valid"]["nats_per_frame"] == pytest.approx(report["valid"]["loss"], rel=1e-5)
    assert report["test"]["nats_per_frame"] != report["valid"]["nats_per_frame"]
    assert best < run.steps["nats_per_frame"][0]
    assert read_midi(folder / "sample.mid").shape[1] == 88
    assert (folder / "sample.png").read_bytes()[1:4] == b"PNG"
    assert typed(*words, "--max-steps", "4", "--resume") == 0
    assert typed(*words, "--picture", str(tmp_path / "roll.png")) == 0
    assert (tmp_path / "roll.png").stat().st_size > 10_000
    assert (tmp_path / "roll.mid").read_bytes()[:4] == b"MThd"
    (folder / "report.json").unlink()
    assert typed(*words, "--report") == 0
    assert json.loads((folder / "report.json").read_text())["valid"]["nats_per_frame"] < best


@pytest.mark.parametrize("name", ["adam", "muon", "rmsprop", "sgd"])
def test_first_order_optimizers_learn_and_resume_to_the_same_bits(typed: Any, tmp_path: Path, name: str) -> None:
    words = (*FEW, "--optimizer", name, "--hidden", "10", "--nade", "0", "--dropout", "0.2", "--weight-noise", "0.01")
    words += ("--halve", "1", "--clip", "5", "--weight-decay", "1e-5")
    assert typed(*words, "--name", str(tmp_path / "whole"), "--max-steps", "40") == 0
    assert typed(*words, "--name", str(tmp_path / "parts"), "--max-steps", "20") == 0
    assert typed(*words, "--name", str(tmp_path / "parts"), "--max-steps", "40", "--resume") == 0
    whole, parts = (read_run(tmp_path / n).parameters() for n in ("whole", "parts"))
    assert all(whole[key].equal(parts[key]) for key in whole)
    nats = read_run(tmp_path / "whole").steps["nats_per_frame"]
    assert nats[-1] < nats[0]


def test_validation_ends_a_run(typed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*FEW, "--optimizer", "sgd", "--lr", "0", "--hidden", "5", "--nade", "0", "--patience", "2")
    assert typed(*words, "--name", str(tmp_path / "run"), "--max-steps", "1000") == 0
    assert "no progress of nats/frame in 2 tests" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["step"] == 0


@pytest.mark.slow
def test_the_default_beats_a_first_order_model_and_keeps_more_rules(typed: Any, tmp_path: Path, capsys: Any) -> None:
    assert typed("--name", str(tmp_path / "run")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    chain = FirstOrder(m.pieces).nats(m.pieces.parts["test"])
    assert report["test"]["nats_per_frame"] < 0.8 * chain[0]
    printed = capsys.readouterr().out
    assert "rules obeyed by model" in printed
    shares = {who: rules["mean"] for who, rules in report["rules"].items()}
    assert shares["model"] > shares["first order"] + 0.05
    assert shares["test pieces"] == 1
    assert report["first order"]["nats_per_frame"] == pytest.approx(chain[0])


def test_from_python() -> None:
    assert m.settings == PRESETS["counterpoint"]
    rolls = m.samples(2, 5, seed=1)
    assert [roll.shape for roll in rolls] == [(5, 88)] * 2
    assert np.array_equal(rolls, m.samples(2, 5, seed=1))
    figure = m.visualize_batch(16)
    assert [axes.get_title(loc="left") for axes in figure.axes][2] == "a piece of counterpoint"


def test_bad_words_end_with_a_sentence(typed: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    for words, message in {
        ("jazz",): "there is no preset 'jazz'; choose from counterpoint, jsb",
        ("--data", "nothing"): "there is no collection, file or folder 'nothing'",
        ("--data", str(tmp_path / "bad.mat")): "bad.mat is damaged or truncated",
        ("--data", "musedata", "--folder", str(tmp_path)): "there is no MuseData.mat in",
        ("--optimizer", "lbfgs"): "optimizer lbfgs has no settings here; choose hf, adam, sgd, rmsprop, muon",
        ("--dropout", "1"): "dropout is 1.0",
        ("--hidden", "0"): "hidden is 0",
        ("--name", str(tmp_path / "none"), "--report"): "there is no run at",
    }.items():
        assert message in str(typed(*words))


DATA = os.environ.get("HFOPT_DATA", "")


@pytest.mark.skipif(not DATA or not Path(DATA, "music").is_dir(), reason="HFOPT_DATA has no music")
def test_published_pieces(tmp_path: Path, typed: Any) -> None:
    words = ("--name", str(tmp_path / "run"), "--optimizer", "adam", "--hidden", "10", "--max-steps", "10")
    assert typed("jsb", *words) == 0
    assert read_run(tmp_path / "run").configuration["problem"]["name"] == "jsb"
