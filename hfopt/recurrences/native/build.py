"""Compiles the passes in C with the machine's own compiler, once, into a cache of the user's."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger("hfopt")

HERE = Path(__file__).resolve().parent
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden")


def _compiler() -> str | None:
    """The C compiler to use: that of the environment variable CC, or the first of cc, gcc and clang that is there."""
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    return None


def _cache() -> Path:
    """The folder of compiled passes: $HFOPT_CACHE, or hfopt in the user's cache folder; nobody else may write there."""
    chosen = os.environ.get("HFOPT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hfopt"
    folder = Path(chosen) if chosen else base
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by others; code is not loaded from there")
    return folder


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(told)})])


def _name(compiler: str) -> str:
    """A name that changes with the source, the flags, the compiler and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    key = hashlib.sha256()
    sources = [path.read_bytes() for path in sorted(HERE.glob("*.[ch]"))]
    for data in (*sources, *(told.encode() for told in (*FLAGS, compiler, _processor())), version):
        key.update(len(data).to_bytes(8, "little") + data)
    return f"passes-{key.hexdigest()[:24]}.so"


def build(compiler: str, folder: Path) -> Path:
    """The compiled library in `folder`, compiled now if it is not there yet.

    Raises:
        RuntimeError: the compiler fails; the message holds what it said.
    """
    library = folder / _name(compiler)
    if library.is_file():
        return library
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    fresh = Path(name)
    try:
        command = [compiler, *FLAGS, "-o", str(fresh), str(HERE / "kernels.c"), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
        # Another process may do the same at the same time; whichever is last wins, and both are whole.
        fresh.replace(library)
    finally:
        fresh.unlink(missing_ok=True)
    log.info("compiled hfopt's passes over time with %s into %s", compiler, library)
    return library


@cache
def library() -> ctypes.CDLL | None:
    """The compiled passes; None where there is no compiler, it fails, or HFOPT_NATIVE=0 asks for none.

    They are tried once a process. Without them torch's operators do the same work, more slowly.
    """
    if os.environ.get("HFOPT_NATIVE", "1") == "0" or os.name != "posix":
        return None
    compiler = _compiler()
    if compiler is None:
        log.info("no C compiler found (cc, gcc, clang, or CC): recurrences run on torch's operators, more slowly")
        return None
    try:
        return ctypes.CDLL(str(build(compiler, _cache())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("recurrences run on torch's operators, more slowly, since the compiled passes failed: %s", error)
        return None
