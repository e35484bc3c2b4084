"""Files that only grow, and that a full disk leaves whole: what did not fit is kept and written later."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hfopt.experiment.store.sealed import SyncBudget, cannot_write, write_all


class Appender:
    """Appends to a file, without a buffer of its own.

    Args:
        path: of the file.
        fresh: begin with an empty file.

    Raises:
        WriteError: it cannot be opened; from `write`, that not all could be written. What was not is written first at
            the next call.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self._waiting = bytearray()
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if fresh else os.O_APPEND), 0o666)
            self._end = os.fstat(self._handle).st_size
        except OSError as error:
            raise cannot_write(path, error) from error

    def write(self, text: str = "", budget: SyncBudget | None = None) -> None:
        """Append `text`, and with a budget flush it to the disk if that is due."""
        self._waiting += text.encode("utf-8", "backslashreplace")
        try:
            write_all(self._handle, bytes(self._waiting))
            self._end += len(self._waiting)
            self._waiting.clear()
            if budget is not None and budget.due():
                budget.sync(self._handle)
        except OSError as error:
            # A part of a line would make what is written next unreadable.
            with suppress(OSError):
                os.ftruncate(self._handle, self._end)
                os.lseek(self._handle, self._end, os.SEEK_SET)
            raise cannot_write(self.path, error) from error

    @property
    def waits(self) -> bool:
        """Whether something could not be written yet."""
        return bool(self._waiting)

    def close(self) -> None:
        """Close the file; what waits is dropped."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
