"""Changes that a step makes for its own thread while a block needs them, and takes back however the block ends.

A ``with`` statement alone leaves a gap: an interrupt (``KeyboardInterrupt``) may come when a block has been entered but
its exit is not yet sure to be called. So every change is registered, by :func:`undone`, before it is made, and
:func:`settled`, around a whole step, takes back what is still registered when the step is broken off.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch

Method = Callable[..., Any]
T = TypeVar("T")
Undo = Callable[[], None]

_local = threading.local()


class _Change:
    """One change, told from others by its identity."""

    def __init__(self, undo: Undo) -> None:
        self.undo = undo


def _registered() -> list[_Change]:
    """This thread's changes that are to be taken back, the oldest first."""
    found: list[_Change] | None = getattr(_local, "registered", None)
    if found is None:
        found = _local.registered = []
    return found


def _take_back(registered: list[_Change], change: _Change) -> None:
    # Only while it is registered: a broken off block may be closed long after, when its traceback is released.
    if change in registered:
        change.undo()
        registered.remove(change)


@contextmanager
def undone(undo: Undo) -> Iterator[None]:
    """Call ``undo`` at the end of the block, also where an interrupt comes between the block's entry and its body.

    ``undo`` may be called twice, and before anything was done.
    """
    registered, change = _registered(), _Change(undo)
    try:
        registered.append(change)
        yield
    finally:
        _take_back(registered, change)


class _State:
    """The contexts that a thread has entered: the depths of torch's stacks, and hfopt's context variables."""

    def __init__(self) -> None:
        self._registered = len(_registered())
        self._functions = torch._C._len_torch_function_stack()
        self._dispatches = torch._C._len_torch_dispatch_stack()
        self._transforms = torch._C._functorch.get_dynamic_layer_stack_depth()
        self._gradients = torch.is_grad_enabled()
        self._profile = sys.getprofile()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._context = contextvars.copy_context()

    def restore(self) -> None:
        """Leave everything that was entered since; may be called twice."""
        registered = _registered()
        while len(registered) > self._registered:
            _take_back(registered, registered[-1])
        if torch._C._functorch.get_dynamic_layer_stack_depth() > self._transforms:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self._transforms)
        while torch._C._len_torch_dispatch_stack() > self._dispatches:
            torch._C._pop_torch_dispatch_stack(None)
        while torch._C._len_torch_function_stack() > self._functions:
            torch._C._pop_torch_function_stack()
        torch.set_grad_enabled(self._gradients)
        if sys.getprofile() is not self._profile:
            sys.setprofile(self._profile)
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)
        self._restore_variables()

    def _restore_variables(self) -> None:
        for variable, value in contextvars.copy_context().items():
            if variable.name.startswith("hfopt_"):
                before = self._context.get(variable, _default(variable))
                if before is not value:
                    variable.set(before)


def _default(variable: contextvars.ContextVar[T]) -> T:
    return contextvars.Context().run(variable.get)


def settled(body: Callable[[], T]) -> T:
    """Return ``body()``; if it is broken off by an exception, whatever it had entered is left.

    A single interrupt may come at any moment, also while another exception is being dealt with.
    """
    before = _State()
    try:
        try:
            return body()
        except BaseException:
            before.restore()
            raise
    except BaseException:
        before.restore()
        raise


class _Here:
    """A mark of the present thread, seen as well by the threads in which torch runs its backward passes."""

    def __init__(self, name: str) -> None:
        self._key = name

    def set(self) -> None:
        torch._C._stash_obj_in_tls(self._key, True)

    def clear(self) -> None:
        if self:
            torch._C._remove_obj_from_tls(self._key)

    def __bool__(self) -> bool:
        return bool(torch._C._is_key_in_tls(self._key))


class Patch:
    """``wrap(plain)`` in place of ``owner.name`` for the threads that are inside a block; others get ``plain``.

    ``owner`` is a module or a class; ``name`` a function, method or class method of it.
    """

    def __init__(self, owner: type | ModuleType, name: str, wrap: Callable[[Method], Method]) -> None:
        self._owner, self._name, self._wrap = owner, name, wrap
        self._lock = threading.RLock()
        self._here = _Here(f"hfopt.{owner.__name__}.{name}")
        self._holders: dict[object, int] = {}  # by block: its thread
        self._installed: Any = None
        self._own: Any = None  # what the owner itself had by that name; None: inherited

    def block(self) -> AbstractContextManager[None]:
        """Return the block in which it is replaced, for this thread; inside another such block, it does nothing."""
        return nullcontext() if self._here else self._block()

    @contextmanager
    def _block(self) -> Iterator[None]:
        holder = object()
        with undone(lambda: self._leave(holder)):
            self._enter(holder)
            yield

    def _enter(self, holder: object) -> None:
        with self._lock:
            self._holders[holder] = threading.get_ident()
            if self._installed is None:
                self._own = vars(self._owner).get(self._name)
                self._installed = self._stand_in(inspect.getattr_static(self._owner, self._name))
                setattr(self._owner, self._name, self._installed)
        self._here.set()

    def _leave(self, holder: object) -> None:
        with self._lock:
            self._holders.pop(holder, None)
            if not self._holders and self._installed is not None:
                # What somebody else has put there meanwhile stays; ours, inside it, does nothing any more.
                if vars(self._owner).get(self._name) is self._installed:
                    if self._own is None:
                        delattr(self._owner, self._name)
                    else:
                        setattr(self._owner, self._name, self._own)
                self._installed = None
        if threading.get_ident() not in self._holders.values():
            self._here.clear()

    def _stand_in(self, raw: Any) -> Any:
        of_class = isinstance(raw, classmethod)
        plain: Method = raw.__func__ if of_class else raw
        wrapped, here = self._wrap(plain), self._here

        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (wrapped if here else plain)(*args, **kwargs)

        return classmethod(call) if of_class else call


class Switch:
    """One of torch's switches for the whole process, turned while at least one block of any thread is inside.

    For what has no form for a single thread: other threads see it turned meanwhile, and afterwards as it was.
    """

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> None:
        self._get, self._put, self._value = get, put, value
        self._lock = threading.RLock()
        self._holders: set[object] = set()
        self._before: list[Any] = []

    @contextmanager
    def block(self) -> Iterator[None]:
        """The block in which it is turned."""
        holder = object()
        with undone(lambda: self._leave(holder)):
            with self._lock:
                self._holders.add(holder)
                if not self._before:
                    self._before = [self._get()]
                    self._put(self._value)
            yield

    def _leave(self, holder: object) -> None:
        with self._lock:
            self._holders.discard(holder)
            if not self._holders and self._before:
                self._put(self._before[0])
                self._before = []
