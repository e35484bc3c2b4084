"""One writer per run: a lock on its folder that says who holds it, and that the system releases however they end."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.sealed import cannot_write

if sys.platform != "win32":
    import fcntl

LOCK = "lock"


class Lock:
    """The lock of a folder, held from here to `release`.

    Raises:
        RunError: another process holds it; the message says which.
        WriteError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._handle: IO[str] | None = None
        if sys.platform == "win32":  # there, a run is not protected from a second writer
            folder.mkdir(parents=True, exist_ok=True)
            return
        path = folder / LOCK
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handle = path.open("a+", encoding="utf-8")
            except FileNotFoundError:  # the folder was moved aside in between
                continue
            except OSError as error:
                raise cannot_write(path, error) from error
            try:
                _take(handle)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read(500)
                handle.close()
                raise RunError(_held(folder, holder)) from None
            except OSError:  # a file system without locks
                self._handle = handle
                return
            # Who moved the folder aside while this process waited has taken the file along.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                    break
            handle.close()
        self._handle = handle
        with suppress(OSError):  # a full disk: nobody can be told who holds it
            handle.truncate(0)
            handle.write(f"{os.getpid()}\n{socket.gethostname()}\n{time.strftime('%Y-%m-%d %H:%M:%S')}\n{_command()}\n")
            handle.flush()

    def release(self) -> None:
        """Let others have it."""
        if self._handle is not None:
            with suppress(OSError):  # what a full disk did not take is still in the buffer
                self._handle.close()
            self._handle = None


def is_held(folder: Path) -> bool:
    """Whether a process is writing the run in a folder."""
    if sys.platform == "win32":
        return False
    try:
        with (folder / LOCK).open("r", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _take(handle: IO[str]) -> None:
    """Lock a file, or raise BlockingIOError; who only looks whether it is held holds it for an instant."""
    for _ in range(10):
        with suppress(BlockingIOError):
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _command() -> str:
    return " ".join(sys.argv)[:200].replace("\n", " ")


def _held(folder: Path, holder: str) -> str:
    pid, *more = holder.splitlines() or ["?"]
    host, since, command = (*more, "", "", "")[:3]
    details = ", ".join(filter(None, [host and f"on {host}", since and f"since {since}", command]))
    return (
        f"process {pid} is writing the run in {folder}{f' ({details})' if details else ''}; wait until it ends, or "
        "choose another name"
    )
