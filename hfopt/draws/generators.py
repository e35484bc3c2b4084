"""Random generators: how their states are read and set, and which thread has drawn from one."""

from __future__ import annotations

import ctypes
import functools
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# In how many runs of a step the generators of Python and numpy are looked at: once for each of its closures. Their
# states take as long to read as a small network's loss takes to compute.
_LOOKS = 4

Attribution = Callable[["Source"], bool]


@dataclass(frozen=True)
class Source:
    """A generator: its name for people, how its state is read and set, and whether two states are the same.

    ``shared``: it belongs to the whole process. ``module``: "torch", "random" or "numpy", for telling who drew.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    module: str = ""
    own: str = ""  # what another thread would use instead
    looks: int = sys.maxsize

    @property
    def shared(self) -> bool:
        return bool(self.module)


class _Numpy:
    """The state of numpy's global generator, read as a whole only where it may have changed (150 us)."""

    _bytes = 624 * 4 + 4  # of a Mersenne twister: its key and the position in it

    def __init__(self) -> None:
        self._last: tuple[int, bytes, Any] | None = None

    def get(self) -> Any:
        bits: Any = np.random.mtrand._rand._bit_generator
        if type(bits) is not np.random.MT19937:
            return np.random.get_state(legacy=False)  # noqa: NPY002 - the user's own draws
        address = bits.ctypes.state_address
        key = ctypes.string_at(address, self._bytes)
        last = self._last
        # Where a second normal number is kept for the next call, that call changes nothing of the key.
        if last is not None and last[:2] == (address, key) and not last[2]["has_gauss"]:
            return last[2]
        state = np.random.get_state(legacy=False)  # noqa: NPY002
        self._last = address, key, state
        return state

    @staticmethod
    def set(state: Any) -> None:
        np.random.set_state(state)  # noqa: NPY002


def _same_objects(a: Any, b: Any) -> bool:
    return a is b or pickle.dumps(a) == pickle.dumps(b)


TORCH = Source(
    "torch's generator", torch.get_rng_state, torch.set_rng_state, torch.equal, "torch", "a torch.Generator of its own"
)
PYTHON = Source(
    "Python's random", random.getstate, random.setstate, lambda a, b: bool(a == b), "random", "a random.Random", _LOOKS
)
_numpy = _Numpy()
NUMPY = Source(
    "numpy.random", _numpy.get, _numpy.set, _same_objects, "numpy", "a numpy.random.default_rng()", looks=_LOOKS
)


def on_cuda(device: torch.device) -> Source:
    """The generator of a CUDA device."""
    return Source(
        f"the generator of {device}",
        lambda: torch.cuda.get_rng_state(device),
        lambda state: torch.cuda.set_rng_state(state, device),
        torch.equal,
        "torch",
        "a torch.Generator of its own",
    )


def own_source(generator: Any) -> Source | None:
    """A generator object of torch's, Python's or numpy's; None for any other object, and for those of the process."""
    if any(generator is shared for shared in (torch.default_generator, random._inst, np.random.mtrand._rand)):
        return None  # which all threads share
    name = f"a {type(generator).__name__}"
    if isinstance(generator, torch.Generator):
        return Source(name, generator.get_state, generator.set_state, torch.equal)
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return Source(name, generator.getstate, generator.setstate, lambda a, b: bool(a == b))
    if isinstance(generator, np.random.RandomState):
        return Source(name, _whole_state(generator), generator.set_state, _same_objects)
    if isinstance(generator, np.random.Generator):
        bits: Any = generator.bit_generator
        return Source(name, lambda: bits.state, lambda state: setattr(bits, "state", state), _same_objects)
    return None


def _whole_state(generator: np.random.RandomState) -> Callable[[], Any]:
    """A function that reads the state of a generator of numpy's older kind."""
    return lambda: generator.get_state(legacy=False)


def others() -> bool:
    """Whether any other thread of Python's is alive that may draw: hfopt's own workers do not."""
    here = threading.current_thread()
    return any(t is not here and not t.name.startswith("hfopt") for t in threading.enumerate())


class OwnDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws of this thread on the CPU from a generator of its own, in place of the one that all threads share."""

    def __init__(self, state: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator()
        self.generator.set_state(state)
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seeded = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        if not seeded or not _on_cpu(args, kwargs):
            return func(*args, **kwargs)
        self.drew = True
        taking = _taking_generator(func)
        if taking is not None:
            return taking(*args, **{**kwargs, "generator": self.generator})
        before = torch.get_rng_state()
        try:
            torch.set_rng_state(self.generator.get_state())
            return func(*args, **kwargs)
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)


def _on_cpu(args: Any, kwargs: Any) -> bool:
    devices = [a.device for a in args if isinstance(a, torch.Tensor)]
    if kwargs.get("device") is not None:
        devices.append(torch.device(kwargs["device"]))
    return all(d.type == "cpu" for d in devices)


@functools.cache
def _taking_generator(func: Any) -> Any:
    """The overload of an operator that takes a generator; None if it has none."""
    if any(a.name == "generator" for a in func._schema.arguments):
        return func
    name = func._overloadname
    return getattr(func.overloadpacket, "generator" if name == "default" else f"{name}_generator", None)


_own_draws: ContextVar[OwnDraws | None] = ContextVar("hfopt_own_draws", default=None)


def torch_state() -> torch.Tensor:
    """Return the state of the generator from which this thread draws on the CPU."""
    own = _own_draws.get()
    return torch.get_rng_state() if own is None else own.generator.get_state()


def apart() -> bool:
    """Whether this thread's draws are apart from those of all others."""
    return _own_draws.get() is not None


@contextmanager
def drawing_from(state: torch.Tensor) -> Iterator[OwnDraws]:
    """The block in which this thread draws from ``state`` on, and moves nobody else's generator."""
    own = OwnDraws(state)
    token = _own_draws.set(own)
    try:
        with own:
            yield own
    finally:
        _own_draws.reset(token)


class _TorchDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether this thread calls an operator that draws from a generator of the whole process."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.drew and torch.Tag.nondeterministic_seeded in func.tags:
            self.drew = kwargs.get("generator") is None
        return func(*args, **kwargs)


# How a state is looked at, here and by whoever keeps it.
_LOOKING = ("getstate", "setstate", "get_state", "set_state")


class _PythonDraws:
    """A profile of this thread that notes calls of the methods of Python's global generator, by whatever name."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def __call__(self, _frame: Any, event: str, called: Any) -> None:
        if event != "c_call" or getattr(called, "__self__", None) is not random._inst:
            return
        if called.__name__ not in _LOOKING:
            for seen in self.seen:
                seen.add("random")

    @classmethod
    @contextmanager
    def noting(cls, seen: set[str]) -> Iterator[None]:
        before = sys.getprofile()
        if isinstance(before, cls):
            before.seen.append(seen)
            yield
            return
        if before is not None:  # somebody measures; better rewind what is not ours than not what is
            seen.add("random")
            yield
            return
        profile = cls()
        profile.seen.append(seen)
        try:
            sys.setprofile(profile)
            yield
        finally:
            if sys.getprofile() is profile:
                sys.setprofile(None)


class _NumpyDraws:
    """Notes calls of ``numpy.random``'s functions by the threads inside, which a profile does not show; others pass."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside: dict[int, set[str]] = {}  # by thread
        self._plain: dict[str, Any] = {}
        self._stand_ins: dict[str, Any] = {}

    @contextmanager
    def noting(self, seen: set[str]) -> Iterator[None]:
        here = threading.get_ident()
        outer = self._inside.get(here)
        try:
            with self._lock:
                if not self._inside:
                    self._install()
                self._inside[here] = seen
            yield
        finally:
            with self._lock:
                if outer is not None:
                    self._inside[here] = outer
                    outer |= seen
                else:
                    self._inside.pop(here, None)
                if not self._inside:
                    self._remove()

    def _install(self) -> None:
        shared = np.random.mtrand._rand
        methods = {n: f for n, f in vars(np.random).items() if getattr(f, "__self__", None) is shared}
        self._plain = {n: f for n, f in methods.items() if n not in _LOOKING}
        self._stand_ins = {name: self._stand_in(f) for name, f in self._plain.items()}
        for name, f in self._stand_ins.items():
            setattr(np.random, name, f)

    def _remove(self) -> None:
        for name, f in self._plain.items():
            if getattr(np.random, name) is self._stand_ins.get(name):
                setattr(np.random, name, f)

    def _stand_in(self, plain: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen = self._inside.get(threading.get_ident())
            if seen is not None:
                seen.add("numpy")
            return plain(*args, **kwargs)

        return call


_numpy_draws = _NumpyDraws()


@contextmanager
def attributed(*modules: str) -> Iterator[Attribution]:
    """A block after which the function it yields says whether a change of a source may be this thread's own.

    Where no other thread is alive that is always so, and costs nothing to find out.
    """
    if not others():
        yield lambda source: True
        return
    seen: set[str] = set()
    mode = _TorchDraws()

    def mine(source: Source) -> bool:
        if source.module == "torch":
            return mode.drew
        return not source.shared or source.module in seen

    with ExitStack() as stack:
        if "random" in modules:
            stack.enter_context(_PythonDraws.noting(seen))
        if "numpy" in modules:
            stack.enter_context(_numpy_draws.noting(seen))
        stack.enter_context(mode)
        yield mine
