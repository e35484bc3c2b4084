"""Damaged and crafted files: a sentence with the file's name, or what was written, and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hfopt.cli import main
from hfopt.experiment.store import checkpoints, sealed
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run
from tests.hfopt.tiny import experiment


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rows in run.h5 and in its journal, as a kill leaves it."""
    folder = tmp_path_factory.mktemp("good") / "run"
    hf = experiment(folder, optimizer="adam", save_freq=2)
    hf.optimize(4)
    forget = hf.problem.forget

    def dying() -> None:
        if hf.step == 7:
            shutil.copytree(folder, folder.with_name("killed"))
        forget()

    hf.problem.forget = dying  # type: ignore[method-assign]
    hf.optimize(8)
    killed = folder.with_name("killed")
    assert len((killed / journal(killed)).read_bytes().splitlines()) == 3
    return killed


def journal(folder: Path) -> str:
    return next(p.name for p in folder.glob("journal-*"))


def contents(folder: Path) -> Any:
    """All that a run's files say, to be compared."""
    run = read_run(folder)
    parameters = {c.key: {k: v.numpy().tobytes() for k, v in run.parameters(c.key).items()} for c in run.checkpoints}
    state = run.checkpoint()
    rest = json.dumps({k: state[k] for k in ("step", "totals", "problem")}, sort_keys=True)
    header = (run.name, run.seed, run.configuration, run.versions, run.outcome, run.checkpoints)
    return run.steps.tobytes(), run.checks.tobytes(), parameters, rest, header


def files(folder: Path) -> list[str]:
    return [
        "run.h5",
        journal(folder),
        *(f"checkpoints/{p.name}" for p in sorted((folder / "checkpoints").glob("*.h5"))),
    ]


@pytest.mark.parametrize("which", range(3))
def test_a_changed_byte_is_told_or_makes_no_difference(good: Path, tmp_path: Path, which: int) -> None:
    names, chance = files(good), np.random.default_rng(which)
    name = names[min(which, 2)] if which < 2 else names[-1]
    shutil.copytree(good, tmp_path / "run")
    path, whole, expected = tmp_path / "run" / name, (good / name).read_bytes(), contents(good)
    said: list[str] = []
    # Places where a change is easily overlooked, and any others.
    places = [0, 17, 30, 100, 500, 511, 512, len(whole) - 1, *chance.integers(len(whole), size=52).tolist()]
    for place in places:
        if place >= len(whole):
            continue
        changed = bytearray(whole)
        changed[place] ^= 1 << int(chance.integers(8))
        path.write_bytes(changed)
        try:
            assert contents(tmp_path / "run") == expected
        except RunError as error:
            said.append(str(error))
    assert len(said) > 50
    assert all(name.rpartition("/")[2] in sentence and "\n" not in sentence for sentence in said)


@pytest.mark.parametrize("which", ["run.h5", "a checkpoint"])
def test_a_truncated_file_is_told(good: Path, tmp_path: Path, which: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(good, folder)
    name = "run.h5" if which == "run.h5" else f"checkpoints/{read_run(folder).checkpoints[0].key}.h5"
    path, whole = folder / name, (good / name).read_bytes()
    key = path.stem
    for length in [0, 1, 17, 511, 512, 513, len(whole) - 1, *np.linspace(20, len(whole) - 2, 20).astype(int).tolist()]:
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=key if which != "run.h5" else r"run\.h5"):
            read_run(folder).parameters(key if which != "run.h5" else "last")


def test_a_checkpoint_that_goes_while_it_is_looked_for(good: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A run that goes on removes old checkpoints: between the listing of a folder and the look into a file, too."""
    shutil.copytree(good, tmp_path / "run")
    own, gone = sealed.read_facts, tmp_path / "run" / "checkpoints" / "00000004.h5"

    def late(path: Path) -> Any:
        if path == gone:
            path.unlink()
        return own(path)

    monkeypatch.setattr(sealed, "read_facts", late)
    assert [c.key for c in read_run(tmp_path / "run").checkpoints if c.key == "00000004"] == []
    assert not gone.exists()


def test_the_newest_checkpoint_is_missed(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "run")
    hf = experiment(tmp_path / "run", optimizer="adam", save_freq=2)
    hf.load()
    hf.optimize(8)
    newest = tmp_path / "run" / "checkpoints" / "00000008.h5"
    for damage in (newest.unlink, lambda: newest.write_bytes(b"")):
        whole = newest.read_bytes()
        damage()
        run = read_run(tmp_path / "run")
        for which in ("last", "best", -1):
            with pytest.raises(RunError, match=r"00000008\.h5 is missing or truncated.*there are .*4, 6"):
                run.parameters(which)
        assert run.find(6).step == 6
        newest.write_bytes(whole)
    # After a power cut, a file that was never flushed may be empty; run.h5 does not know it.
    shutil.copy(newest, newest.with_name("00000010.h5"))
    (newest.with_name("00000010.h5")).write_bytes(bytes(4096))
    assert read_run(tmp_path / "run").find().step == 8
    # An earlier one is the way out, and leads to the same.
    newest.unlink()
    hf = experiment(tmp_path / "run", optimizer="adam", save_freq=2)
    with pytest.raises(RunError, match="missing"):
        hf.load()
    hf.load(6)
    hf.optimize(8)
    assert newest.read_bytes()[512:] != b""
    assert read_run(tmp_path / "run").find().step == 8


def test_journals_of_which_lines_are_changed(good: Path, tmp_path: Path) -> None:
    name = journal(good)
    shutil.copytree(good, tmp_path / "run")
    path, whole = tmp_path / "run" / name, (good / name).read_bytes()
    assert whole.count(b"\n") == 3
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    for changed in (
        whole[:-1] + b" ",  # the last newline
        whole.replace(b"\n", b" ", 1),
        whole.replace(b'"step":', b'"stop":', 1),
        whole[: ends[0]] + whole[ends[0] + 1 :],
        whole.replace(b"\n", b"\n\n", 1),
        b"[" * 100_000 + b"\n",
        b'{"step":{"step":"x"},"checks":[]}\n',
    ):
        path.write_bytes(changed)
        with pytest.raises(RunError, match="damaged"):
            read_run(tmp_path / "run")
    rows = len(read_run(good).steps)
    for length in (len(whole) - 1, ends[1] + 5):  # torn while the last line was written
        path.write_bytes(whole[:length])
        assert len(read_run(tmp_path / "run").steps) == rows - 1


# -- crafted files, with checksums that are right -----------------------------------------------------------


def crafted(path: Path, change: Callable[[Any], None]) -> None:
    """Change a sealed file and seal it again, as somebody who knows the format could."""
    data = path.read_bytes()
    with sealed.open_sealed(path) as (facts, _):
        pass
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        change(file)
    sealed.write_sealed(path, facts, [buffer.getvalue()[sealed.BLOCK :]])


def replace(name: str, value: Any, **options: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        if value is not None:
            file.create_dataset(name, data=value, **options)

    return change


def link(name: str, target: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file[name] = target

    return change


def text(name: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        sealed.put_text(file, name, value)

    return change


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        if value is None:
            del file.attrs[name]
        else:
            file.attrs[name] = value

    return change


def huge(name: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file.create_dataset(name, shape=(10**12,), dtype="f8", chunks=(1024,))

    return change


def virtual(name: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        layout = h5py.VirtualLayout(shape=(4,), dtype="u1")
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(4,))
        file.create_virtual_dataset(name, layout)

    return change


def external(name: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file.create_dataset(name, shape=(64,), dtype="u1", external=[("/etc/passwd", 0, 64)])

    return change


PARTS = ("configuration", "versions", "metrics", "sessions", "steps", "checks", "checkpoints")
STEPS = np.array([(3,), (1,)], dtype=[("step", "i8")])
CHANGES: dict[str, Callable[[Any], None]] = {
    **{f"no {name}": replace(name, None) for name in PARTS},
    **{f"{name} is a number": replace(name, 3.0) for name in PARTS},
    **{f"{name} is text": replace(name, "text") for name in PARTS},
    **{f"{name} is huge": huge(name) for name in PARTS},
    **{f"{name} is compressed": replace(name, np.zeros(10**6), compression="gzip", chunks=True) for name in PARTS},
    **{f"{name} is elsewhere": link(name, h5py.ExternalLink("/etc/passwd", "/")) for name in PARTS},
    **{f"{name} is another": link(name, h5py.SoftLink("/steps" if name != "steps" else "/checks")) for name in PARTS},
    **{f"{name} lies outside": external(name) for name in PARTS},
    **{f"{name} is virtual": virtual(name) for name in PARTS},
    **{f"{name} is an empty list": text(name, []) for name in ("configuration", "versions")},
    **{f"{name} is a word": text(name, "x") for name in ("configuration", "versions", "metrics", "sessions")},
    **{
        f"{name} is missing": attribute(name, None) for name in ("format", "id", "name", "journal", "serial", "outcome")
    },
    **{f"{name} is wrong": attribute(name, [1, 2]) for name in ("format", "seed", "name", "journal", "serial")},
    **{f"{name} is words": attribute(name, "one") for name in ("format", "seed", "journal", "serial")},
    "deep": replace("configuration", np.frombuffer(b"[" * 50_000, np.uint8)),
    "no JSON": replace("configuration", np.frombuffer(b"{'a': 1}", np.uint8)),
    "no UTF-8": replace("versions", np.frombuffer(b'{"a":"\xff"}', np.uint8)),
    "falling steps": replace("steps", STEPS),
    "steps of text": replace("steps", np.array([b"a"], dtype=[("step", "S4")][0][1])),
    "metric of odd name": text("metrics", [{"name": "\x1b[2J", "unit": "", "better": "lower", "column": "x"}]),
    "metric without column": text("metrics", [{"name": "x"}]),
}


@pytest.mark.parametrize("change", list(CHANGES), ids=lambda name: name.replace(" ", "-"))
def test_crafted_runs(good: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good, tmp_path / "run")
    crafted(tmp_path / "run" / "run.h5", CHANGES[change])
    began = time.perf_counter()
    with pytest.raises(RunError, match=r"run\.h5") as error:
        read_run(tmp_path / "run")
    assert time.perf_counter() - began < 5
    assert "\n" not in str(error.value)
    assert main(["show", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("part", ["model", "problem", "optimizer", "batches"])
def test_a_configuration_without_its_parts(
    good: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good, tmp_path / "run")
    rest = {key: value for key, value in read_run(good).configuration.items() if key != part}
    crafted(tmp_path / "run" / "run.h5", text("configuration", rest))
    assert main(["show", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "run.h5 cannot be read" in said
    assert said.count("\n") == 1


def test_nothing_in_a_file_is_markup_or_controls_the_terminal(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good, tmp_path / "run")
    crafted(tmp_path / "run" / "run.h5", attribute("name", "[red]x[/nothing]\x1b[2J"))
    configuration = dict(read_run(good).configuration)
    configuration["problem"] = {**configuration["problem"], "class": "[link=file:///etc]P\x1b]0;t\x07"}
    crafted(tmp_path / "run" / "run.h5", text("configuration", configuration))
    for command in ("show", "compare"):
        assert main([command, str(tmp_path / "run")]) == 0
        printed = capsys.readouterr().out
        assert "[red]x[/nothing]" in printed.replace("\n", "")
        assert "\x1b" not in printed
        assert "\x07" not in printed
    assert main(["list", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def tree(path: Path, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Change the JSON text of a checkpoint."""

    def changed(file: Any) -> None:
        words = json.loads(sealed.text(file["hfopt:tree"]))
        change(words)
        del file["hfopt:tree"]
        sealed.put_text(file, "hfopt:tree", words)

    return changed


def weight(words: Any) -> Any:
    return words["parameters"]["readout.weight"]


STATES: dict[str, Callable[[Any], None]] = {
    "no tree": replace("hfopt:tree", None),
    "no tensor": replace("parameters/readout.weight", None),
    "a huge tensor": huge("parameters/readout.weight"),
    "a tensor of another file": link("parameters/readout.weight", h5py.ExternalLink("/etc/passwd", "/x")),
    "another name of a tensor": link("parameters/readout.weight", h5py.SoftLink("/parameters/readout.bias")),
    "bytes of another file": external("parameters/readout.weight"),
    "words": replace("parameters/readout.weight", "text"),
    "objects": replace("parameters/readout.weight", np.array(["a", "b"], dtype=h5py.string_dtype())),
    "a type of none": tree(Path(), lambda w: weight(w).update(dtype="os")),
    "a function": tree(Path(), lambda w: weight(w).update(dtype="load")),
    "another type": tree(Path(), lambda w: weight(w).update(dtype="int64")),
    "no place": tree(Path(), lambda w: weight(w).pop("at")),
    "the root": tree(Path(), lambda w: weight(w).update(at="/")),
    "above": tree(Path(), lambda w: weight(w).update(at="../../etc/passwd")),
    "a group": tree(Path(), lambda w: weight(w).update(at="parameters")),
    "keys that are none": tree(Path(), lambda w: w.update(parameters={"$": "dict", "keys": [[]], "values": [1]})),
    "too few keys": tree(Path(), lambda w: w.update(parameters={"$": "dict", "keys": [], "values": [1]})),
    "no parameters": tree(Path(), lambda w: w.pop("parameters")),
}


@pytest.mark.parametrize("change", list(STATES), ids=lambda name: name.replace(" ", "-"))
def test_crafted_checkpoints(good: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(good, tmp_path / "run")
    run = read_run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / f"{run.find().key}.h5"
    crafted(path, STATES[change])
    with pytest.raises(RunError, match=path.name) as error:
        run.parameters()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"step": -1},
        {"step": "0"},
        {"step": 1},
        {"serial": 0},
        {"serial": None},
        {"named": 1},
        {"saved": "now"},
        {"kind": "run"},
        {"step": True},
    ],
    ids=str,
)
def test_facts_of_a_checkpoint(good: Path, tmp_path: Path, facts: dict[str, Any]) -> None:
    shutil.copytree(good, tmp_path / "run")
    key = read_run(good).find().key
    path = tmp_path / "run" / "checkpoints" / f"{key}.h5"
    data = path.read_bytes()
    sealed.write_sealed(path, {**sealed.read_facts(path), **facts}, [data[sealed.BLOCK :]])
    with pytest.raises(RunError, match=key):
        read_run(tmp_path / "run").parameters()


def test_the_seal_is_a_hash_of_all_other_bytes(good: Path) -> None:
    data = (good / "run.h5").read_bytes()
    title, facts, rest = data[:512].split(b"\n", 2)
    assert title == b"hfopt sealed HDF5"
    assert json.loads(facts) == {"kind": "run", "version": 2}
    start = len(title) + len(facts) + 2
    others = data[:start] + data[start + 64 :]
    assert rest[:64].decode() == hashlib.blake2b(others, digest_size=32).hexdigest()


def test_states_keep_every_kind_of_value(tmp_path: Path) -> None:
    writer = checkpoints.CheckpointWriter(tmp_path, "id")
    state = {
        "step": 3,
        "a/b": {".": torch.zeros(0, 3), "": torch.tensor(7), "$": torch.tensor(True), "hfopt:tree": torch.ones(2)},
        "kinds": [(1, 2), [0.1, float("inf")], None, True, "λ", {3: torch.arange(4).bfloat16(), -1: (), 2: {}}],
        "large": 2**70,
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "complex": torch.tensor([1 + 2j]),
        "view": torch.arange(6.0).reshape(2, 3).t(),
    }
    for serial, factor in ((1, 1.0), (2, 3.0)):  # the second is put into the structure of the first
        state["view"] = torch.arange(6.0).reshape(2, 3).t() * factor
        made = checkpoints.Checkpoint("00000003", 3, serial, False, 0.0)
        writer.write(made, state)
        back = checkpoints.read_checkpoint(writer.path("00000003"), serial)
        assert repr(back) == repr(state)
        assert back["kinds"][5][3].dtype == torch.bfloat16
        assert torch.equal(back["view"], state["view"])
    for value in (object(), torch.eye(2).to_sparse(), {1, 2}, np.array([object()])):
        with pytest.raises(TypeError, match="/outer/inner"):
            writer.write(made, {"outer": {"inner": value}})
