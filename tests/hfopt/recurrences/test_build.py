"""How the compiled passes get into the user's cache and out of it: whole, the user's own, and made for this machine."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import hfopt
from hfopt.recurrences.native import build as b

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this machine")

# Compiles an empty file in no time instead of the passes, and notes every call.
FAKE = """#!/bin/sh
echo "$@" >> "{folder}/calls"
case "$*" in
*--version*) echo "fake cc {version}"; exit 0;;
*-dM*) echo "#define {macro} 1"; exit 0;;
esac
{before}
while [ "$1" != "-o" ]; do shift; done
exec gcc -shared -fPIC -x c /dev/null -o "$2"
"""


@pytest.fixture(autouse=True)
def _fresh_versions() -> None:
    b._version.cache_clear()


def fake(folder: Path, name: str = "cc", version: str = "1.0", macro: str = "__AVX2__", before: str = "") -> Path:
    script = folder / name
    script.write_text(FAKE.format(folder=folder, version=version, macro=macro, before=before))
    script.chmod(0o755)
    return script


def calls(folder: Path, word: str) -> int:
    return sum(word in line for line in (folder / "calls").read_text().splitlines())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    return folder


@needs_gcc
@pytest.mark.parametrize("damage", ["truncated", "empty", "one byte", "writable by others"])
def test_a_damaged_library_is_built_again(
    damage: str, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading a truncated one would end the process with SIGBUS."""
    compiler = (str(fake(tmp_path)),)
    library = b.build(compiler, cache)
    content = library.read_bytes()
    assert b.build(compiler, cache) == library
    assert calls(tmp_path, "kernels.c") == 1
    if damage == "truncated":
        os.truncate(library, len(content) // 2)
    elif damage == "empty":
        os.truncate(library, 0)
    elif damage == "one byte":
        library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        library.chmod(0o777)
    with caplog.at_level(logging.INFO, "hfopt"):
        again = b.build(compiler, cache)
    assert calls(tmp_path, "kernels.c") == 2
    assert "again, since the library in the cache is damaged" in caplog.text
    assert again.read_bytes() == content
    assert stat.S_IMODE(again.stat().st_mode) == 0o700
    ctypes.CDLL(str(again))
    assert [p.name for p in cache.iterdir()] == [again.name]


@needs_gcc
def test_the_name_tells_compiler_and_processor(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled for one processor is not found by another that shares the cache."""
    first = fake(tmp_path)
    kept = b.build((str(first),), cache)
    # The same command with another version, then another processor by what the compiler, then by what the system says.
    fake(tmp_path, version="1.1")
    b._version.cache_clear()
    second = b.build((str(first),), cache)
    fake(tmp_path, version="1.1", macro="__AVX512F__")
    third = b.build((str(first),), cache)
    monkeypatch.setattr(b, "_processor", lambda: "flags : another")
    fourth = b.build((str(first),), cache)
    fifth = b.build((str(first), "-m64"), cache)
    assert len({kept, second, third, fourth, fifth}) == 5
    assert len(list(cache.glob("*.so"))) == 5


def test_where_the_system_does_not_describe_the_processor_the_machine_is_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(b.Path, "read_text", lambda *_, **__: "processor : 0\nmodel name : some machine\n")
    found = set()
    for host in ("one", "two"):
        monkeypatch.setattr(b.socket, "gethostname", lambda host=host: host)
        found.add(b._processor())
    assert len(found) == 2

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(b.Path, "read_text", missing)
    for host in ("one", "two"):
        monkeypatch.setattr(b.socket, "gethostname", lambda host=host: host)
        found.add(b._processor())
    assert len(found) == 4


def test_a_compiler_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ccache, cc = fake(tmp_path, "ccache"), fake(tmp_path, "my cc")
    for value, words in (
        (f"{ccache} gcc", (str(ccache), "gcc")),
        (f"'{cc}' -m64", (str(cc), "-m64")),
        (f"  {ccache}  ", (str(ccache),)),
    ):
        monkeypatch.setenv("CC", value)
        assert b._compiler() == words
    monkeypatch.setenv("CC", "nothing-of-that-name -m64")
    assert b._compiler() is None
    monkeypatch.setenv("CC", " ")  # as if it were not set
    assert b._compiler() == next(((found,) for c in ("cc", "gcc", "clang") if (found := shutil.which(c))), None)


@needs_gcc
def test_several_builders_at_once_compile_once(tmp_path: Path, cache: Path) -> None:
    compiler = (str(fake(tmp_path, before="sleep 0.3")),)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(b.build(compiler, cache))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert calls(tmp_path, "kernels.c") == 1


BUILD = """
import sys
from pathlib import Path
from hfopt.recurrences.native import build as b
try:
    b.build((sys.argv[1],), Path(sys.argv[2]))
except KeyboardInterrupt:
    print("interrupted")
"""


def started(compiler: Path, cache: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(compiler), str(cache)],
        env={**os.environ, "PYTHONPATH": str(Path(hfopt.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not (cache.parent / "compiling").exists() and time.monotonic() < until:
        time.sleep(0.02)
    return process


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


@pytest.mark.slow
@needs_gcc
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_an_interrupt_ends_the_compiler_and_a_kill_leaves_nothing_for_long(tmp_path: Path, cache: Path) -> None:
    """Ctrl-C goes to the whole foreground group, in which the compiler is not; the process ends it and goes on."""
    compiler = fake(
        tmp_path, before=f'echo $$ > "{tmp_path}/pid"; mv "{tmp_path}/pid" "{tmp_path}/compiling"; sleep 60'
    )
    process = started(compiler, cache)
    compiling = int((tmp_path / "compiling").read_text())
    assert os.getpgid(compiling) != process.pid
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("interrupted\n", 0)
    assert gone(compiling)
    assert not list(cache.iterdir())
    # Killed outright, it cannot clean up; the next build does.
    (tmp_path / "compiling").unlink()
    process = started(compiler, cache)
    process.kill()
    process.communicate()
    os.killpg(int((tmp_path / "compiling").read_text()), signal.SIGKILL)
    (left,) = cache.iterdir()
    assert left.name.startswith("building-")
    elsewhere = cache / "building-other_host-1-abc"
    elsewhere.mkdir()
    library = b.build((str(fake(tmp_path)),), cache)
    assert {p.name for p in cache.iterdir()} == {library.name, elsewhere.name}
    os.utime(elsewhere, (0, 0))
    library.unlink()
    library = b.build((str(tmp_path / "cc"),), cache)
    assert {p.name for p in cache.iterdir()} == {library.name}


def test_a_failing_compiler_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    compiler = fake(tmp_path, before="echo no space left >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"(?s)kernels\.c.*failed.*no space left"):
        b.build((str(compiler),), cache)
    assert not list(cache.iterdir())


def test_a_cache_that_others_can_change_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all = tmp_path / "shared"
    (open_to_all / "hfopt").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HFOPT_CACHE", str(open_to_all / "hfopt"))
    assert b._cache() == open_to_all / "hfopt"
    open_to_all.chmod(0o777)
    with pytest.raises(PermissionError, match=r"can be replaced by others.*HFOPT_CACHE"):
        b._cache()
    open_to_all.chmod(0o1777)  # as /tmp: each user's entries are the user's own
    assert b._cache() == open_to_all / "hfopt"
    for mode in (0o770, 0o702):
        (open_to_all / "hfopt").chmod(mode)
        with pytest.raises(PermissionError, match=r"can be written by others.*chmod go-w"):
            b._cache()
    (open_to_all / "hfopt").chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(open_to_all / "hfopt")
    monkeypatch.setenv("HFOPT_CACHE", str(link))
    assert b._cache() == open_to_all / "hfopt"


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container of another user: the folder for temporary files has one of the user's own."""
    home = tmp_path / "home"
    home.write_text("no folder")
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("HFOPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(b.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    found = b._cache()
    assert found == tmp_path / "tmp" / f"hfopt-{os.getuid()}"
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


@needs_gcc
def test_identity_compiles_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fake(tmp_path, version="7.3")
    monkeypatch.setenv("CC", f"{compiler} -m64")
    monkeypatch.setenv("HFOPT_CACHE", str(cache))
    monkeypatch.delenv("HFOPT_NATIVE", raising=False)
    expected = {"library": None, "compiler": f"{compiler} -m64: fake cc 7.3", "threads": torch.get_num_threads()}
    assert b.identity() == expected
    assert calls(tmp_path, "kernels.c") == 0
    library = b.build((str(compiler), "-m64"), cache)
    assert b.identity() == {**expected, "library": b._digest(library)}
    os.truncate(library, 10)
    assert b.identity() == expected
    monkeypatch.setenv("HFOPT_NATIVE", "0")
    assert b.identity() == {"library": None, "compiler": None, "threads": torch.get_num_threads()}


def test_without_a_compiler_it_is_said_once_what_that_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "nothing-of-that-name")
    monkeypatch.delenv("HFOPT_NATIVE", raising=False)
    b.library.cache_clear()
    try:
        assert b.library() is None
        assert b.library() is None
    finally:
        b.library.cache_clear()
    (record,) = [r for r in caplog.records if r.name == "hfopt"]
    assert record.levelno == logging.WARNING
    assert "no C compiler found (CC is 'nothing-of-that-name')" in record.getMessage()
    assert "about half as fast" in record.getMessage()
