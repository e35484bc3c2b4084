"""Stopping on request: the first Ctrl-C waits for the step that runs, the second does not."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While entered, turns SIGINT and SIGTERM into `requested`, and a second one into what it would have
    been.

    In a thread other than the main one, which receives no signals, it does nothing.
    """

    def __init__(self, what: str) -> None:
        """`what` is said to be finished first: a step, say."""
        self.requested: signal.Signals | None = None
        self._what = what
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def pass_on(self) -> None:
        """Send a SIGTERM that was held back to whom it was meant for; a Ctrl-C has had its effect."""
        if self.requested == signal.SIGTERM:
            self._restore()
            signal.raise_signal(signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            self._restore()
            signal.raise_signal(number)
            return
        self.requested = signal.Signals(number)
        # Not print(): the signal may have come in the middle of one.
        os.write(2, f"\nstopping after this {self._what}; once more to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
