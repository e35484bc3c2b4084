"""Compiles the passes in C with the machine's own compiler, once, into a cache of the user's.

The name of a library in the cache, ``passes-<key>-<checksum>.so``, tells by its key the source, the compiler and the
processor, so that what was compiled for one machine does not run on another that shares the cache; and by its checksum
whether the file is whole: to load what a full disk or a power cut has left half written would kill the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("hfopt")

HERE = Path(__file__).resolve().parent
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden")
_PATIENCE = 600.0  # seconds for the compiler
_SLOWER = "recurrences run on torch's operators, with the same results, but about half as fast on a CPU"

Compiler = tuple[str, ...]


# -- the compiler and the machine ----------------------------------------------------------------------------------


def _compiler() -> Compiler | None:
    """The command that calls the C compiler: that of the environment variable CC ("ccache gcc", "gcc -m64"), or the
    first of cc, gcc and clang that is there.
    """
    wanted = os.environ.get("CC", "").strip()
    for words in (shlex.split(wanted),) if wanted else (["cc"], ["gcc"], ["clang"]):
        found = shutil.which(words[0])
        if found:
            return (found, *words[1:])
    return None


def _run(command: list[str] | Compiler, seconds: float, folder: Path | None = None) -> str:
    """What a command prints. It gets no Ctrl-C from the terminal: that is for this process, which then ends it.

    Raises:
        RuntimeError: it fails, or takes longer; the message holds what it said.
    """
    # Of a compiler's cache, the entry for "native" may come from another machine. Its temporary files are ours.
    environment = {**os.environ, "CCACHE_DISABLE": "1", "LC_ALL": "C"}
    if folder is not None:
        environment["TMPDIR"] = str(folder)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        said, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        raise RuntimeError(f"{shlex.join(command)} took longer than {seconds:.0f} s") from None
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{complaint.strip()[-2000:]}")
    return said


def _end(process: subprocess.Popen[str]) -> None:
    """End a command and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _processor() -> str:
    """What ``-march=native`` depends on; where the system does not tell, the machine itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = ("model name", "cpu model", "cpu", "flags", "Features", "features", "CPU part", "CPU variant", "isa")
    found = sorted({line for line in lines if line.partition(":")[0].strip() in told})
    if not any(line.lower().startswith(("flags", "features", "isa")) for line in found):
        found += [socket.gethostname(), f"{uuid.getnode():x}"]
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *platform.libc_ver(), *found])


@cache
def _version(compiler: Compiler) -> str:
    return _run((*compiler, "--version"), 60.0)


def _key(compiler: Compiler, source: str = "") -> str:
    """A name that changes with the source, the flags, the compiler and the processor."""
    key = hashlib.sha256()
    sources = [*(path.read_bytes() for path in sorted(HERE.glob("*.[ch]"))), *([source.encode()] if source else [])]
    # What the compiler itself takes "native" for: it may know less of the processor than the system does.
    native = ""
    with contextlib.suppress(RuntimeError):
        native = _run((*compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull), 60.0)
    for data in (*sources, *(t.encode() for t in (*FLAGS, *compiler, _version(compiler), native, _processor()))):
        key.update(len(data).to_bytes(8, "little") + data)
    return f"passes-{key.hexdigest()[:24]}"


# -- the cache -----------------------------------------------------------------------------------------------------


def _cache() -> Path:
    """The folder of compiled passes: $HFOPT_CACHE, or hfopt in the user's cache folder, or, where that cannot be
    written, in the folder for temporary files.

    Raises:
        PermissionError: others can write there, so that code must not be loaded from it.
    """
    chosen = os.environ.get("HFOPT_CACHE")
    if chosen:
        return _own_folder(Path(chosen))
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "hfopt"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # a home that is not there, or read-only
        writable = False
    return _own_folder(folder if writable else Path(tempfile.gettempdir()) / f"hfopt-{os.getuid()}")


def _own_folder(folder: Path) -> Path:
    """``folder``, made if need be; nobody else may write to it, nor put another in its place."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{folder} can be written by others, so that code is not loaded from there: take the right from them "
            f"(chmod go-w {folder}) when you have looked what is in it, or set HFOPT_CACHE to a folder of your own"
        )
    for above in folder.parents:
        status = above.stat()
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise PermissionError(
                f"{folder} can be replaced by others, who can write to {above}, so that code is not loaded from there: "
                "set HFOPT_CACHE to a folder of your own"
            )
    return folder


def _find(folder: Path, key: str) -> Path | None:
    """The library in ``folder`` that is whole and the user's own."""
    return next(
        (path for path in sorted(folder.glob(f"{key}-*.so")) if _digest(path) == path.stem.split("-")[-1]), None
    )


def _digest(library: Path) -> str | None:
    """The checksum of a file that nobody else can write to; None for any other."""
    try:
        with library.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
    except OSError:
        return None
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One builder at a time, where the file system can tell; the system lets go of the lock when a process dies."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _workshop(folder: Path) -> Path:
    """A folder inside ``folder`` to build in; those that dead builders have left are removed."""
    host = socket.gethostname()
    for left in folder.glob("building-*"):
        words = left.name.split("-")
        dead = len(words) == 4 and words[1] == _plain(host) and not _alive(int(words[2]))
        # Of another machine nobody can tell; no compiler takes a day.
        if dead or time.time() - left.lstat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"building-{_plain(host)}-{os.getpid()}-", dir=folder))


def _plain(host: str) -> str:
    return host.replace("-", "_").replace("/", "_")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# -- building and loading ------------------------------------------------------------------------------------------


def build(compiler: Compiler, folder: Path, source: str = "") -> Path:
    """The compiled library in ``folder``, compiled now if it is not there yet, or damaged.

    It is that of the package's own passes, or of a ``source`` that includes the package's headers.

    Raises:
        RuntimeError: the compiler fails; the message holds what it said.
    """
    key = _key(compiler, source)
    if (library := _find(folder, key)) is not None:
        return library
    with _alone(folder):
        # Somebody else may have built it meanwhile.
        return _find(folder, key) or _compile(compiler, folder, key, source)


def _compile(compiler: Compiler, folder: Path, key: str, source: str = "") -> Path:
    damaged = list(folder.glob(f"{key}-*.so"))
    log.info(
        "compiling hfopt's passes over time %swith %s into %s: once for each cell on this machine, in 1 to 20 s",
        "again, since the library in the cache is damaged, " if damaged else "",
        shlex.join(compiler),
        folder,
    )
    start = time.perf_counter()
    workshop = _workshop(folder)
    try:
        fresh = workshop / "passes.so"
        written = HERE / "kernels.c"
        if source:
            written = workshop / "passes.c"
            written.write_text(source, encoding="utf-8")
        command = [*compiler, *FLAGS, f"-I{HERE}", "-o", str(fresh), str(written), "-lm"]
        _run(command, _PATIENCE, workshop)
        fresh.chmod(0o700)
        _sync(fresh)
        for path in damaged:
            path.unlink(missing_ok=True)
        library = folder / f"{key}-{_digest(fresh)}.so"
        fresh.replace(library)
        _sync(folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    log.info("compiled hfopt's passes over time in %.1f s: %s", time.perf_counter() - start, library)
    return library


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, written to the disk, where the file system does that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _switched_off() -> bool:
    return os.environ.get("HFOPT_NATIVE", "1") == "0" or os.name != "posix"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled passes; None where there is no compiler, it fails, or HFOPT_NATIVE=0 asks for none.

    They are tried once a process. Without them torch's operators do the same work, more slowly.
    """
    if _switched_off():
        return None
    try:
        compiler = _compiler()
        if compiler is None:
            wanted = os.environ.get("CC")
            which = f"CC is {wanted!r}" if wanted else "cc, gcc, clang"
            log.warning("no C compiler found (%s): %s. Install one, or set CC to its command", which, _SLOWER)
            return None
        return ctypes.CDLL(str(build(compiler, _cache())))
    except (OSError, RuntimeError, ValueError) as error:
        log.warning("%s, since the compiled passes failed: %s", _SLOWER, error)
        return None


def identity() -> dict[str, str | int | None]:
    """What the recurrences' numbers depend on beside the code, for the record of a run; it compiles nothing.

    Returns:
        ``library``: the checksum of the compiled passes that this process uses or would find in the cache, None where
        there are none; ``compiler``: its command and the first line of its version, or None; ``threads``: how many
        threads share the sequences of a batch.
    """
    found: dict[str, str | int | None] = {"library": None, "compiler": None, "threads": torch.get_num_threads()}
    if _switched_off():
        return found
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        compiler = _compiler()
        if compiler is not None:
            version = _version(compiler).strip().splitlines() or [""]
            found["compiler"] = f"{shlex.join(compiler)}: {version[0]}"
            there = _find(_cache(), _key(compiler))
            found["library"] = None if there is None else there.stem.split("-")[-1]
    return found
