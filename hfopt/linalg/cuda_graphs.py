"""CUDA graphs: the kernels of one CG iteration, recorded once and launched together from then on.

A launch takes the host some microseconds, and a product with a curvature matrix is hundreds of small kernels. Recorded
in a graph, they are one launch, and the host is not involved until it reads a result.

A recording has these requirements:

- Nothing waits for the device. An iteration is checked before it is recorded (:meth:`Recording.watch`), since a failed
  recording needs more clean-up than one that was not started.
- All work is on one stream, not the default one. A backward pass runs on the stream on which its graph was built, so
  a whole step runs on :func:`side_stream`, and operators record where they were built (:func:`origin`).
- Memory does not move. Tensors that outlive an iteration are allocated before; an iteration allocates from a pool of
  its own, which is returned to the device when the recorder is closed.
- There are no random draws, and no buffers to restore around a product: linearisations that run the model again are not
  recorded.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from hfopt.linalg.solution import Nested, Recordable

log = logging.getLogger("hfopt")

Work = Callable[[], None]

# The wording of torch.cuda.set_sync_debug_mode's warnings: of what is looked for, and of the mode itself.
_SYNCHRONISES = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype"

# Pools of recordings that became invalid: torch raises an error if one ends while it counts a recording in it.
_lost: list[torch.cuda.MemPool] = []

# Streams of recordings, one for each thread and device: what other threads launched on one would be recorded, too.
_local = threading.local()


@contextmanager
def side_stream(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Run the block on this thread's stream for recordings, ordered after and before the work of the current stream.

    Does nothing for devices other than CUDA's, or where a recording is already going on.
    """
    if device.type != "cuda" or not wanted or torch.cuda.is_current_stream_capturing():
        yield
        return
    current = torch.cuda.current_stream(device)
    streams: dict[torch.device, torch.cuda.Stream] = _local.__dict__.setdefault("streams", {})
    side = streams.get(current.device)
    if side is None:
        side = streams[current.device] = torch.cuda.Stream(current.device)  # type: ignore[no-untyped-call]
    if current == side:
        yield
        return
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


@dataclass(frozen=True)
class Origin:
    """The place where an operator's graph was built.

    Attributes:
        stream: the stream's handle.
        shared: whether a graph that was built elsewhere was using the parameters, too.
        nodes: what stands for the parameters in all graphs; held, so that nobody makes new ones meanwhile.
    """

    stream: int
    shared: bool
    nodes: tuple[Node, ...] = field(repr=False)

    def obstacle(self) -> str | None:
        """Return why products with the operator cannot be recorded on the current stream."""
        if self.shared:
            return (
                "another graph of the same parameters is alive: let go of losses and outputs from before the step, or "
                "detach them"
            )
        if self.stream != torch.cuda.current_stream().cuda_stream:
            return "the operator was built outside of hfopt.linalg.cuda_graphs.side_stream(device)"
        return None


def origin(params: Sequence[Tensor]) -> Origin | None:
    """Return the :class:`Origin` of a graph over ``params`` that is built next; None if the device is not CUDA."""
    if params[0].device.type != "cuda":
        return None
    return nodes_of(params, torch.cuda.current_stream(params[0].device).cuda_stream)


def _marks(node: Node) -> dict[str, object]:
    """Return the attributes that Python code attached to a node; they vanish with the node."""
    return cast("dict[str, object]", node.metadata)  # torch's stubs call it a method


def nodes_of(params: Sequence[Tensor], stream: int) -> Origin:
    """Keep references to the nodes of those of ``params`` that are leaves, and mark them with the stream."""
    leaves = [p for p in params if p.requires_grad and p.grad_fn is None]
    for p in leaves:
        # A node lives as long as a graph uses it, and remembers the stream it was made on. A mark that is still there
        # when all references from here have gone was put on a node that some other graph holds.
        _marks(get_gradient_edge(p).node)["hfopt, seen"] = True
    nodes = tuple(get_gradient_edge(p).node for p in leaves)
    shared = False
    for marks in map(_marks, nodes):
        if marks.get("hfopt, seen"):
            shared |= marks.get("hfopt, stream") != stream
        else:
            marks["hfopt, stream"] = stream
    return Origin(stream, shared, nodes)


def innermost(op: object) -> object:
    """Return the operator to which damping was added."""
    while isinstance(op, Nested):
        op = op.base
    return op


def obstacle(op: object) -> str | None:
    """Return why products with ``op`` cannot be recorded on the current stream, as far as known beforehand."""
    if isinstance(op, Recordable):
        return op.unrecordable()
    return obstacle(op.base) if isinstance(op, Nested) else None


@dataclass
class Attempts:
    """Results of earlier solves, so that nothing is tried in vain or reported twice.

    Attributes:
        refused: why recording was given up.
        proven: kinds of systems of which a recorded iteration was found to do what it should.
        said: reasons that have been logged.
    """

    refused: str | None = None
    proven: set[tuple[type, int]] = field(default_factory=set)
    said: set[str] = field(default_factory=set)

    def tell(self, reason: str, required: bool) -> None:
        """Log ``reason`` once; where graphs are required, raise it.

        Raises:
            RuntimeError: with ``required``.
        """
        if required:
            raise RuntimeError(f"cuda_graphs is True, but CG cannot be recorded into a CUDA graph: {reason}")
        if reason not in self.said:
            self.said.add(reason)
            log.warning("CG runs without a CUDA graph: %s", reason)


class Recording:
    """Records work on the current stream, which must not be the default one; made for one solve.

    Args:
        attempts: what earlier solves found.
        kind: tells apart systems whose recordings have nothing in common.
        required: raise instead of going on without a graph.
    """

    def __init__(self, attempts: Attempts, kind: tuple[type, int], required: bool) -> None:
        self._attempts, self._kind, self._required = attempts, kind, required
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool: torch.cuda.MemPool | None = None
        self._unfit: str | None = None

    @property
    def proven(self) -> bool:
        """Whether a recording of this kind has been compared with the work itself."""
        return self._kind in self._attempts.proven

    def prove(self) -> None:
        """Record that recordings of this kind need no comparison."""
        self._attempts.proven.add(self._kind)

    def watch(self, work: Work) -> None:
        """Do ``work``, and find out whether it waits for the device."""
        if self.proven:
            work()
            return
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in seen:
            text = str(warning.message)
            if _SYNCHRONISES in text:
                self._unfit = (
                    f"a product or the preconditioner waits for the device ({warning.filename}:{warning.lineno})"
                )
            elif _PROTOTYPE not in text:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def record(self, work: Work) -> Work | None:
        """Return a function that repeats ``work`` in one launch, without running it; None if it cannot be recorded."""
        if self._unfit is not None:
            self.refuse(self._unfit)
            return None
        try:
            self._graph, self._pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
            _capture(self._graph, self._pool, work)
        except RuntimeError as error:
            self.refuse(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error))
            return None
        return self._graph.replay

    def refuse(self, reason: str) -> None:
        """Give up recording, for later solves too; :class:`RuntimeError` where graphs are required."""
        self.close()
        self._attempts.refused = reason
        self._attempts.tell(reason, self._required)

    def close(self) -> None:
        """Release the graph, and its memory to the device."""
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._pool = None


def _capture(graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool, work: Work) -> None:
    """Record ``work`` into ``graph``; torch's own context manager would empty the allocator's cache every time."""
    collects = gc.isenabled()
    gc.disable()  # a CUDA object that is collected while recording would break it off
    try:
        # Other threads (those that load data, say) may do what this one must not while recording.
        graph.capture_begin(pool=cast("torch.cuda._POOL_HANDLE", pool.id), capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):
                _end(graph, pool)
            raise
        _end(graph, pool)
    finally:
        if collects:
            gc.enable()


def _end(graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        # A recording that has become invalid leaves torch 2.11 believing that it still goes on: the generator would
        # refuse to draw, the allocator would keep the pool.
        index = torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        with suppress(RuntimeError):
            generator.graphsafe_set_state(generator.clone_state())
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, pool.id)
        _lost.append(pool)
        raise


@contextmanager
def recording(op: object, b: Tensor, option: bool | str, attempts: Attempts) -> Iterator[Recording | None]:
    """Set up recording while a system with ``op`` and ``b`` is solved; yields None if nothing is recorded.

    Raises:
        RuntimeError: with ``option=True`` where a recording is known to be impossible.
    """
    if option is False:
        yield None
        return
    reason = attempts.refused
    if reason is None:
        with side_stream(b.device):
            reason = obstacle(op)
            if reason is None:
                recorder = Recording(attempts, (type(innermost(op)), b.numel()), option is True)
                try:
                    yield recorder
                finally:
                    recorder.close()
                return
    attempts.tell(reason, option is True)
    yield None
