"""The draws of a function's first run, repeated in every further one.

Generators of the whole process are shared with other threads, such as a loader that prefetches. Their states are put
back only where the calling thread itself was seen to draw, so that what other threads draw is never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from hfopt.draws.generators import (
    NUMPY,
    PYTHON,
    TORCH,
    Attribution,
    OwnDraws,
    Source,
    apart,
    attributed,
    drawing_from,
    on_cuda,
    others,
    own_source,
    torch_state,
)

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
    own: OwnDraws | None = None  # this thread's draws on the CPU, where others are there to draw
    start: torch.Tensor | None = None  # of these


class Draws:
    """Repeats the draws of a function's first run in every further one.

    A run is ``run = new(first)``, then, inside :meth:`watch`, :meth:`begin` and the function, and :meth:`end` however
    it ends: after the first run the draws stay, after any other all sources are as they were before it.
    """

    def __init__(self, device: torch.device, tell: Callable[[str], None]) -> None:
        """``tell`` is given the warning that another thread draws from a generator that the runs draw from, too."""
        cuda = [on_cuda(device)] if device.type == "cuda" else []
        self._torch = _Tracked(TORCH)
        self._tracked = [self._torch, *(_Tracked(source) for source in (*cuda, PYTHON, NUMPY))]
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
            with ExitStack() as stack:
                if modules:
                    run.mine = stack.enter_context(attributed(*modules))
                if others() and (run.first or self._torch.drew or self._torch.suspect):
                    run.start = torch_state() if run.first else self._torch.base
                    run.own = stack.enter_context(drawing_from(run.start))
                yield
        finally:
            self._open.remove(run)
            _watching.reset(token)

    def begin(self, run: Run) -> None:
        """Rewind what the runs before have drawn from."""
        for t in self._tracked:
            if t is self._torch and run.own is not None:
                t.left = None
            elif t.drew:
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
        own, run.own = run.own, None
        if own is not None:
            self._end_own(run, own)
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

    def _end_own(self, run: Run, own: OwnDraws) -> None:
        """After draws apart from those of other threads."""
        if self._torch.base is None:
            self._torch.base = run.start
        self._torch.drew |= own.drew
        # The generator of all threads stands where this thread's draws leave it, unless others have moved it since.
        if run.first and own.drew and run.start is not None and not apart() and torch.equal(TORCH.get(), run.start):
            TORCH.set(own.generator.get_state())

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
                f"{t.source.name} has moved between two runs of a closure that draws from it: another thread draws "
                "from it, too. The closure's draws are repeated in every run of a step, so that those of the other "
                f"thread may be repeated as well: give that thread {t.source.own}, or prefetch in processes"
            )
