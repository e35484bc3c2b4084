"""A name in a class or module of torch's that stands for something else for as long as some block needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

Method = Callable[..., Any]


class Patch:
    """Replaces ``owner.name`` by ``wrap(plain)`` while at least one block, of whatever thread, is inside."""

    def __init__(self, owner: type | ModuleType, name: str, wrap: Callable[[Method], Method]) -> None:
        self._owner, self._name, self._wrap = owner, name, wrap
        self._lock, self._inside = threading.Lock(), 0

    @contextmanager
    def block(self) -> Iterator[None]:
        """The block in which it is replaced."""
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._plain: Method = getattr(self._owner, self._name)
                setattr(self._owner, self._name, self._wrap(self._plain))
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    setattr(self._owner, self._name, self._plain)
