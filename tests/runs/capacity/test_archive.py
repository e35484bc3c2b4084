"""The reader of the published archive: a small one of its format, damaged ones, and hostile ones."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from runs.capacity import archive
from runs.capacity.archive import read
from runs.capacity.table import COLUMNS, best, export, sentences, table
from runs.capacity.unpickling import PickleError, unpickle

ROWS = [
    {
        "architecture": cell,
        "eval_loss": loss,
        "hparams": {"optimizer": "RMSProp", "lr_init": 0.004 * k, "train_steps": 1000 + k},
        "max_params": 1_280_000,
        "n_layers": 4,
        "num_params": 1_268_217 - k,
        "task_type": task,
        "train_loss": loss - 0.1,
        "valid_loss": loss + 0.01,
        "hyper_iter": k,
    }
    for k, (cell, task, loss) in enumerate(
        [
            ("lstm", "text8", 1.6),
            ("lstm", "text8", 1.549270),
            ("gru", "text8", 1.5),
            ("lstm", "rcf", 0.2),
            ("lstm", "text8", np.inf),
        ]
    )
]


def tar(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for name, content in members.items():
            info = tarfile.TarInfo(f"data/{name}.p")
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


def old(rows: Any, kind: np.dtype[Any] = COLUMNS) -> bytes:
    """As Python 2 wrote it: protocol 2, text as byte strings, numpy.core."""
    plain = pickle.dumps(rows.astype(kind), protocol=2)
    assert b"numpy._core" in plain
    return _as_python_2(plain.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def _as_python_2(plain: bytes) -> bytes:
    """Text in ASCII as SHORT_BINSTRING, which is what str of Python 2 became."""
    made, positions = bytearray(), list(pickletools.genops(plain))
    for (opcode, argument, position), following in zip(positions, [*positions[1:], None], strict=True):
        end = len(plain) if following is None else following[2]
        if opcode.name == "BINUNICODE" and len(argument) < 256 and argument.isascii():  # type: ignore[union-attr,arg-type,operator]
            text = str(argument).encode("ascii")
            made += b"U" + bytes([len(text)]) + text
        else:
            made += plain[position:end]  # type: ignore[misc]
    return bytes(made)


OBJECTS = np.dtype([(name, "O" if kind.kind == "U" else kind) for name, (kind, *_) in COLUMNS.fields.items()])  # type: ignore[union-attr,misc]
ORDERED = np.dtype([(name, OBJECTS[name]) for name in COLUMNS.names])  # type: ignore[union-attr,misc]
BYTES = np.dtype([(name, "S16" if COLUMNS[name].kind == "U" else COLUMNS[name]) for name in COLUMNS.names])  # type: ignore[union-attr,misc]


@pytest.mark.parametrize("kind", [COLUMNS, ORDERED, BYTES])
def test_a_small_archive_of_the_old_protocol_is_read(tmp_path: Path, kind: np.dtype[Any]) -> None:
    rows = table(ROWS)
    content = old(rows, kind)
    assert content[:2] == b"\x80\x02"
    path = tar(tmp_path / "set.tar.gz", fig3=content, fig4=old(rows[:1], kind))
    found = read(path)
    assert found.dtype == COLUMNS
    np.testing.assert_array_equal(found, np.concatenate([rows, rows[:1]]))
    row = best(found, task_type="text8", architecture="lstm")
    assert sentences(row).splitlines() == [
        "best LSTM had final loss 1.549270, was 4-layers, 1268216 parameters, and had HPs:",
        "optimizer: RMSProp",
        "lr_init: 0.004",
        "train_steps: 1001",
    ]
    assert len(archive.checksum(path)) == 64


def test_numbers_in_hyperparameters_may_be_numpys(tmp_path: Path) -> None:
    rows = table([{**ROWS[0], "hparams": {"lr_init": np.float64(0.25), "train_steps": np.int64(7)}}])
    found = read(tar(tmp_path / "set.tar.gz", fig=pickle.dumps(rows, protocol=2)))
    assert found["hparams"][0] == {"lr_init": 0.25, "train_steps": 7}
    assert type(found["hparams"][0]["lr_init"]) is float


@pytest.mark.parametrize("protocol", range(5))
def test_arrays_come_back_from_every_protocol(protocol: int) -> None:
    for array in (
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["a", "bcd"]),
        np.array([b"a", b"bcd"]),
        np.array([1, "x", None], dtype=object),
        np.zeros(2, [("a", "f4"), ("b", [("c", "i2"), ("d", "U3")]), ("e", "f8", (2,))]),
        np.array(3.5),
    ):
        found = unpickle(io.BytesIO(pickle.dumps(array, protocol=protocol)))
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


class Calls:
    """Anything that a pickle can be made to call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile() -> dict[str, tuple[bytes, str]]:
    import builtins
    import os
    import subprocess

    mark = "touch hostile-was-here"
    rows = table(ROWS)
    inside = rows.copy()
    inside["hparams"][1] = {"lr_init": Calls(os.system, mark)}
    name = f"{os.system.__module__}.system"
    return {
        "system": (pickle.dumps(Calls(os.system, mark), protocol=2), name),
        "in a row": (pickle.dumps(inside, protocol=2), name),
        "eval": (pickle.dumps(Calls(builtins.eval, "open('hostile-was-here', 'w')")), "builtins.eval"),
        "getattr": (pickle.dumps(Calls(getattr, "x", "upper")), "builtins.getattr"),
        "subprocess": (pickle.dumps(Calls(subprocess.Popen, mark, -1), protocol=4), "subprocess.Popen"),
        "old class": (b"(S'touch hostile-was-here'\nios\nsystem\n.", "os.system"),
        "by text": (b"cos\nsystem\n(S'touch hostile-was-here'\ntR.", "os.system"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x14ndarray.__reduce__.x\x93.", "numpy.ndarray.__reduce__.x"),
        "numpy's own loader": (b"cnumpy\nload\n(S'x.npy'\ntR.", "numpy.load"),
        "numpy's file": (b"cnumpy.core.records\nfromfile\n.", "numpy.core.records.fromfile"),
        "memory map": (b"cnumpy\nmemmap\n(S'/etc/passwd'\ntR.", "numpy.memmap"),
        "loader of code": (b"cpickle\nloads\n(S'x'\ntR.", "pickle.loads"),
        "codec": (b"c_codecs\ndecode\n(S'x'\nS'zip'\ntR.", "_codecs.decode"),
        "other codec": (b"c_codecs\nencode\n(Vx\nS'rot13'\ntR.", "encodes something else"),
        "outside": (b"Pelsewhere\n.", "outside the file"),
        "class as data": (b"cnumpy\nndarray\n.", "among its data"),
        "extension": (b"\x80\x02\x82\x01.", "damaged or no pickle"),
    }


@pytest.mark.parametrize("form", sorted(hostile()))
def test_a_hostile_pickle_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    content, name = hostile()[form]
    monkeypatch.chdir(tmp_path)
    path = tar(tmp_path / "set.tar.gz", good=pickle.dumps(table(ROWS), protocol=2), bad=content)
    with pytest.raises(ValueError, match=r"bad\.p in .* is refused") as refusal:
        read(path)
    assert name in str(refusal.value)
    assert not (tmp_path / "hostile-was-here").exists()


def reconstructed(shape: tuple[int, ...], kind: bytes, state: bytes, data: bytes) -> bytes:
    """An array in protocol 2 whose parts are of one's own making."""
    numbers = b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in shape)
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01("
        + numbers
        + b"tcnumpy\ndtype\n(U"
        + bytes([len(kind)])
        + kind
        + b"K\x00K\x01tR"
        + state
        + b"\x89U"
        + bytes([len(data)])
        + data
        + b"tb."
    )


LITTLE = b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def test_arrays_that_lie_about_their_memory_are_refused() -> None:
    good = unpickle(io.BytesIO(reconstructed((2,), b"i4", LITTLE, struct.pack("<ii", 5, -6))))
    assert good.tolist() == [5, -6]
    for shape, kind, data, sentence in (
        ((1 << 40,), b"i4", b"12345678", "memory for another number"),
        ((-1,), b"i4", b"", "shape"),
        ((1,), b"O8", b"\x00" * 8, "entries are missing"),  # pointers into memory
        ((1 << 47,), b"V0", b"", "memory for another number"),
        ((1,), b"M8", b"\x00" * 8, "type"),
        ((1,), b"i4,O", b"\x00" * 12, "type"),
    ):
        with pytest.raises(PickleError, match=sentence):
            unpickle(io.BytesIO(reconstructed(shape, kind, LITTLE if kind[0:1] in b"iM" else b"", data)))


def test_objects_hidden_by_flags_are_seen() -> None:
    """A type says by flags that it has no objects; here its name and its fields count."""
    array = np.zeros(1, [("a", "O")])
    plain = pickle.dumps(array, protocol=2)
    found = unpickle(io.BytesIO(plain))
    assert found.dtype.hasobject
    assert found[0][0] == 0


def test_nesting_without_end_is_refused() -> None:
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(PickleError, match="nested"):
        unpickle(io.BytesIO(pickle.dumps(deep)))
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(PickleError, match="nested"):
        unpickle(io.BytesIO(pickle.dumps(circle)))


def test_damage_is_a_sentence(tmp_path: Path) -> None:
    whole = tar(tmp_path / "set.tar.gz", fig=pickle.dumps(table(ROWS), protocol=2)).read_bytes()
    cut = tmp_path / "cut.tar.gz"
    for length in (3, len(whole) // 2, len(whole) - 20):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged|no table"):
            read(cut)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "nothing")
    (tmp_path / "plain").write_bytes(b"no pickle at all")
    with pytest.raises(ValueError, match="is refused: it is damaged"):
        read(tmp_path / "plain")
    with pytest.raises(ValueError, match="at most 10 are read"):
        read(tmp_path / "set.tar.gz", largest=10)
    with pytest.raises(ValueError, match="no table"):
        read(tar(tmp_path / "empty.tar.gz"))
    other = np.zeros(2, [("architecture", "U4"), ("loss", "f8")])
    with pytest.raises(ValueError, match="without the columns eval_loss"):
        read(tar(tmp_path / "other.tar.gz", fig=pickle.dumps(other)))


def test_the_published_sample_usage_works_on_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = export(table(ROWS), tmp_path / "fig3_txt8rcf.p")
    data = np.load(path, allow_pickle=True)  # written a line above
    assert data.dtype.names == (
        "architecture",
        "eval_loss",
        "hparams",
        "max_params",
        "n_layers",
        "num_params",
        "task_type",
        "train_loss",
        "valid_loss",
        "hyper_iter",
    )
    assert str(np.unique(data["task_type"])) == "['rcf' 'text8']"
    assert str(np.unique(data["architecture"])) == "['gru' 'lstm']"
    lstms = data[(data["task_type"] == "text8") & (data["architecture"] == "lstm")]
    row = lstms[np.argmin(lstms["eval_loss"])]
    print("best LSTM had final loss %f, was %d-layers" % (row["eval_loss"], row["n_layers"]))  # noqa: UP031
    for key, value in row["hparams"].items():
        print(f"{key}: {value}")
    assert "final loss 1.549270, was 4-layers\noptimizer: RMSProp\n" in capsys.readouterr().out
    np.testing.assert_array_equal(read(path), table(ROWS))


def test_tables_are_written_as_hdf5_and_never_replaced(tmp_path: Path) -> None:
    path = export(table(ROWS), tmp_path / "new" / "table.h5")
    with h5py.File(path) as file:
        assert set(file) == set(COLUMNS.names or ())
        assert file["architecture"].asstr()[:].tolist() == [row["architecture"] for row in ROWS]
        assert file["hparams"].asstr()[1] == '{"lr_init": 0.004, "optimizer": "RMSProp", "train_steps": 1001}'
        np.testing.assert_array_equal(file["num_params"], [row["num_params"] for row in ROWS])
        assert file["eval_loss"].dtype == "f8"
    with pytest.raises(FileExistsError, match="there already"):
        export(table(ROWS), path)
    with pytest.raises(ValueError, match=r"ends in '.csv'"):
        export(table(ROWS), tmp_path / "t.csv")
    npy = export(table(ROWS), tmp_path / "table.npy")
    np.testing.assert_array_equal(np.load(npy, allow_pickle=True), table(ROWS))


def test_what_is_not_in_a_table_is_named() -> None:
    with pytest.raises(ValueError, match="no text8 with ugrnn; it has rcf lstm, text8 gru, text8 lstm"):
        best(table(ROWS), task_type="text8", architecture="ugrnn")
    with pytest.raises(ValueError, match="diverged"):
        best(table(ROWS[4:]), task_type="text8", architecture="lstm")
    with pytest.raises(ValueError, match="row 0 of the table lacks n_layers"):
        table([{key: value for key, value in ROWS[0].items() if key != "n_layers"}])
