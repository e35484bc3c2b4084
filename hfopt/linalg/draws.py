"""Random generators that a function draws from: whether it drew, and the draws of one run repeated in another.

Generators of the whole process are shared with other threads, such as a loader that prefetches. Their states are put
back only where the calling thread itself was seen to draw, so that what other threads draw is never repeated.
"""

from __future__ import annotations

import ctypes
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
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
    set: Callable[[Any], None]
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
        bits: Any = np.random.mtrand._rand._bit_generator  # type: ignore[attr-defined]
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
    """A generator object of torch's, Python's or numpy's; None for any other object."""
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


# -- who drew ------------------------------------------------------------------------------------------------------


def others() -> bool:
    """Whether any other thread of Python's is alive that may draw: hfopt's own workers do not."""
    here = threading.current_thread()
    return any(t is not here and not t.name.startswith("hfopt") for t in threading.enumerate())


class _TorchDraws(TorchDispatchMode):
    """Notes whether this thread calls an operator that draws from a generator of the whole process."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.drew and torch.Tag.nondeterministic_seeded in func.tags:
            self.drew = kwargs.get("generator") is None
        return func(*args, **kwargs)


@contextmanager
def _python_draws(seen: set[str]) -> Iterator[None]:
    """Notes calls of the methods of Python's global generator in this thread, by whatever name."""
    shared = random._inst  # type: ignore[attr-defined]
    if sys.getprofile() is not None:  # somebody measures; better rewind what is not ours than not what is
        seen.add("random")
        yield
        return

    def look(_frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__self__", None) is shared:
            seen.add("random")

    sys.setprofile(look)
    try:
        yield
    finally:
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
        shared = np.random.mtrand._rand  # type: ignore[attr-defined]
        self._plain = {n: f for n, f in vars(np.random).items() if getattr(f, "__self__", None) is shared}
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
            stack.enter_context(_python_draws(seen))
        if "numpy" in modules:
            stack.enter_context(_numpy_draws.noting(seen))
        stack.enter_context(mode)
        yield mine


# -- the same draws in every run -----------------------------------------------------------------------------------

_watching: ContextVar[Draws | None] = ContextVar("hfopt_draws", default=None)


def using(keywords: Mapping[str, Any]) -> None:
    """Tell a run that is going on which generator of its own a torch function is called with."""
    draws = _watching.get()
    generator = keywords.get("generator")
    if draws is not None and generator is not None:
        draws.add(generator, certain=True)


@dataclass(eq=False)
class _Tracked:
    source: Source
    drew: bool = False
    base: Any = None  # where every run that draws begins
    left: Any = None  # where the last run left it
    suspect: bool = False  # changed in a later run, perhaps by another thread
    looks: int = 0


@dataclass(eq=False)
class Run:
    """One run of a function: how each source was when it began, and which were rewound then."""

    first: bool
    before: dict[_Tracked, Any] = field(default_factory=dict)
    rewound: set[_Tracked] = field(default_factory=set)
    mine: Attribution = field(default=lambda source: True)


class Draws:
    """Repeats the draws of a function's first run in every further one.

    A run is ``run = new(first)``, then, inside :meth:`watch`, :meth:`begin` and the function, and :meth:`end` however
    it ends: after the first run the draws stay, after any other all sources are as they were before it.
    """

    def __init__(self, device: torch.device, tell: Callable[[str], None]) -> None:
        """``tell`` is given the warning that another thread draws from a generator that the runs draw from, too."""
        cuda = [on_cuda(device)] if device.type == "cuda" else []
        self._tracked = [_Tracked(source) for source in (TORCH, *cuda, PYTHON, NUMPY)]
        self._own: dict[int, Any] = {}
        self._open: list[Run] = []
        self._tell: Callable[[str], None] | None = tell

    @property
    def drew(self) -> bool:
        """Whether any run so far has drawn random numbers."""
        return any(t.drew for t in self._tracked)

    def add(self, generator: Any, certain: bool = False) -> None:
        """A generator object that runs may draw from, before the first that does; ``certain``: one is about to."""
        if id(generator) in self._own:
            return
        source = own_source(generator)
        if source is None:
            return
        self._own[id(generator)] = generator  # held, so that no other object gets its id
        t = _Tracked(source)
        for run in self._open:
            run.before[t] = source.get()
            if certain:
                t.drew, t.base = True, run.before[t]
                run.rewound.add(t)
        self._tracked.append(t)

    def new(self, first: bool) -> Run:
        """A run that has not begun."""
        return Run(first)

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        """The block of a run, in which it is found out who draws, if that cannot be told afterwards."""
        modules = {t.source.module for t in self._tracked if t.source.shared and (run.first or t.suspect)}
        token = _watching.set(self)
        self._open.append(run)
        try:
            if modules:
                with attributed(*modules) as run.mine:
                    yield
            else:
                yield
        finally:
            self._open.remove(run)
            _watching.reset(token)

    def begin(self, run: Run) -> None:
        """Rewind what the runs before have drawn from."""
        for t in self._tracked:
            if t.drew:
                now = run.before[t] = t.source.get()
                if run.first:
                    continue
                if t.source.shared and t.left is not None and not t.source.same(now, t.left):
                    self._foreign(t)
                run.rewound.add(t)
                t.source.set(t.base)
            elif t.looks < t.source.looks:
                run.before[t] = t.source.get()

    def end(self, run: Run) -> None:
        """Put back what was rewound, and learn what this run has drawn from; a second call does nothing more."""
        while run.before:
            t, before = next(iter(run.before.items()))
            if t in run.rewound:
                if not run.first:
                    t.source.set(before)
                t.left = t.source.get()
            elif not t.source.same(before, t.source.get()):
                self._changed(t, run, before)
            t.looks += 1
            del run.before[t]

    def _changed(self, t: _Tracked, run: Run, before: Any) -> None:
        """A source has another state than before the run, and was not known to be drawn from."""
        unwatched = not run.first and not t.suspect and t.source.shared and others()
        if unwatched or not run.mine(t.source):
            t.suspect = True
            return
        t.drew, t.base = True, before
        if not run.first:
            t.source.set(before)
        t.left = t.source.get()

    def _foreign(self, t: _Tracked) -> None:
        tell, self._tell = self._tell, None
        if tell is not None and others():
            tell(
                f"{t.source.name} has moved between two runs of a closure that draws from it: another thread draws from "
                "it, too. The closure's draws are repeated in every run of a step, so that those of the other thread "
                f"may be repeated as well: give that thread {t.source.own}, or let the loader prefetch in processes"
            )
