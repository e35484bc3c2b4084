"""Choose a linearisation: the cheapest that the model supports and that fits into memory.

The forward graph is measured: F bytes, counted over the distinct tensors that it saves. Cached double backward is tried
where 2.9 F fit into the budget, and measured again; then a checkpointed graph is made and measured, if the model has
recurrences that can be; then nothing is kept. ``torch.func.linearize`` takes more memory than double backward and comes
in only where the model cannot be differentiated twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hfopt.closure.criteria import Site
from hfopt.closure.frozen import Frozen
from hfopt.closure.loss_scaling import Scaling
from hfopt.closure.run import closure_run
from hfopt.closure.trace import Closure, Trace, outputs_again, trace
from hfopt.curvature.differences import Differences
from hfopt.curvature.linearisation import (
    Checkpoint,
    Cost,
    DoubleBackward,
    Linearisation,
    Linearize,
    Recompute,
    available_bytes,
    not_differentiable,
)
from hfopt.curvature.output_space import Matching
from hfopt.curvature.parts import DOUBLE_BACKWARD_MEMORY, Maybe, Part, PartCollector, SumOfParts
from hfopt.errors import ClosureError, logger, size, warn
from hfopt.linalg import graph
from hfopt.recurrences.segments import Run

# A choice forced by a lack of memory is made again for batches smaller than this share of the original ones.
SMALLER = 0.8

FORCED = ("checkpoint", "partial", "recompute")
T = TypeVar("T")
PreviousChoice = tuple[str, int]


@dataclass
class ClosureRunner:
    """A closure with everything that is needed to run it.

    ``budget``: bytes for what is kept; None: 80% of what is free when the closure is run. ``scaling`` is that of the
    latest run.
    """

    closure: Closure
    params: list[Tensor]
    frozen: Frozen
    loss: Callable[..., Tensor] | None = None
    outputs: nn.Module | None = None
    structural: bool = False
    budget: int | None = None
    scaling: Scaling = field(default_factory=Scaling)

    def run(self, *, checkpoint: bool = False, watch: Any = None) -> tuple[Trace, Run]:
        """Run and trace the closure, checkpointing its recurrences if asked."""
        with closure_run(self.frozen, checkpoint=checkpoint) as run:
            seen = trace(
                self.closure,
                loss=self.loss,
                outputs=self.outputs,
                params=self.params,
                hidden=self.structural,
                watch=watch,
            )
        self.scaling = run.scaling
        return seen, run.recurrences

    def again(self, part: Part) -> Callable[[], list[Tensor]]:
        """A function that computes the heads of ``part`` again."""
        criteria = isinstance(part.space, Matching)
        kind = "criteria" if criteria else "module" if self.outputs else "loss" if self.loss else "result"
        # No method of an object that has the graph: a cycle would keep it alive until the next garbage collection.
        return partial(_heads_again, self.closure, self.frozen, kind, part.sites, self.outputs, part.marked)


def _heads_again(
    closure: Closure, frozen: Frozen, kind: str, sites: list[Site], module: nn.Module | None, marked: list[int]
) -> list[Tensor]:
    """Return the outputs at ``sites`` and the ``marked`` hidden states from another run of the closure."""
    with closure_run(frozen, again=True):
        heads = outputs_again(closure, kind, sites, module=module, hidden=bool(marked))
    return [*heads[: len(sites)], *(heads[len(sites) + i] for i in marked)]


@dataclass
class LinearisedLoss:
    """A linearised loss: its parts, each with its share of the gradient ``J' dL/dz``."""

    seen: Trace
    parts: list[Part]
    gradients: list[Maybe]
    linearisation: Linearisation | SumOfParts


def still_holds(known: PreviousChoice | None, outputs: int) -> bool:
    """Return whether an earlier choice holds for so many outputs: memory still allows, or still forces it."""
    if known is None:
        return False
    name, before = known
    return outputs >= SMALLER * before if name in FORCED else outputs <= before


def build(model: ClosureRunner, policy: str, known: PreviousChoice | None = None) -> LinearisedLoss:
    """Run the closure and linearise it by ``policy``, or under ``"auto"`` by what :class:`_Choice` finds.

    Raises:
        ClosureError: the loss could not be taken apart.
        NotDifferentiable: no policy works for the model.
    """
    return LinearisationChooser(model, policy, known).build()


def lacks_memory(error: RuntimeError) -> bool:
    """Return whether an allocation failed; torch has a special exception for that only on devices."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@dataclass
class LinearisationChooser:
    """Chooses a linearisation by model and memory."""

    model: ClosureRunner
    policy: str
    known: PreviousChoice | None
    seen: Trace = field(init=False)
    part: Part = field(init=False)
    run: Run = field(init=False)
    budget: int = 0
    seconds: float = 0.0
    attempts: dict[str, Exception] = field(default_factory=dict)
    ran_out: bool = False  # of memory, with cached products

    def build(self) -> LinearisedLoss:
        auto, watch = self.policy == "auto", None
        checkpoint = self.policy == "checkpoint" or (auto and self.known is not None and self.known[0] == "checkpoint")
        if auto:
            given = self.model.budget
            self.budget = int(0.8 * available_bytes(self.model.params[0].device)) if given is None else given
        if self.policy in ("auto", "recompute") and not checkpoint:
            fits = self.known[1] if auto and self.known is not None and self.known[0] not in FORCED else 0
            watch = PartCollector(self.model.params, self.budget, fits)
        self._look(checkpoint, watch)
        if watch is not None and watch.parts:
            return self._summed(watch)
        if not auto:
            return self._explicit()
        outputs = sum(z.numel() for z in self.part.space.outputs)
        if self.known is not None and still_holds(self.known, outputs):
            name = "recompute" if self.known[0] == "partial" else self.known[0]
            found = self._attempt(name) if name in FORCED else self._if_memory_lasts(lambda: self._attempt(name))
            if found:
                return self._built(*found)
        if checkpoint:
            self._look(False)
        return self._choose()

    def _look(self, checkpoint: bool, watch: PartCollector | None = None) -> None:
        """Run the closure, after releasing an existing graph."""
        self.seen = self.part = self.run = None  # type: ignore[assignment]
        start = self._now()
        self.seen, self.run = self.model.run(checkpoint=checkpoint, watch=watch)
        self.seconds = self._now() - start
        if watch is None or not watch.parts:
            self.part = Part.of(self.seen, self.model.params)

    def _now(self) -> float:
        """Return the time in seconds after all work on the device is done."""
        if self.model.params[0].device.type == "cuda":
            torch.cuda.synchronize(self.model.params[0].device)
        return time.perf_counter()

    # -- one policy ------------------------------------------------------------------------------------------------

    def _linearise(self, policy: str) -> tuple[Linearisation, Maybe]:
        """The linearisation of the present graph, and the gradient ``J' dL/dz``."""
        part, params, heads = self.part, self.model.params, self.part.heads
        if policy == "double-backward":
            double = DoubleBackward(heads, params, part.at)
            return double, double.gradient
        if policy == "checkpoint":
            around = partial(self.model.frozen.again, watch=False)
            kept = Checkpoint(heads, params, part.at, self.run.checkpointed, around)
            return kept, kept.gradient
        again = self.model.again(part)
        if policy == "differences":
            differences = Differences(heads, params, again)
            return differences, differences.vjp(part.at)
        if policy == "linearize":
            frozen = self.model.frozen
            lin = Linearize(heads, params, again, partial(frozen.again, watch=False), frozen.drew)
            return lin, lin.vjp(part.at)
        keep = not isinstance(part.space, Matching)
        with graph.unhooked(params):
            gradient = torch.autograd.grad(heads, params, part.at, allow_unused=True, retain_graph=keep)
        return Recompute(params, again), list(gradient)

    def _attempt(self, policy: str) -> tuple[Linearisation, Maybe] | None:
        """The linearisation by ``policy``, or None with the reason in ``attempts`` if the model does not allow it.

        torch has no exception of its own for an operation without a second derivative or a forward mode. Whatever the
        reason, the next policy is tried, the warning or error quotes it, and lack of memory is passed on as it is.
        """
        try:
            return self._linearise(policy)
        except ClosureError:
            raise
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            self.attempts[policy] = error
            return None

    def _if_memory_lasts(self, make: Callable[[], T | None]) -> T | None:
        """Return ``make`` of the present graph, or None if memory ran out, after rebuilding the plain graph."""
        try:
            return make()
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            logger.info("memory ran out over cached products: %s", error)
        # The exception, whose frames hold what filled the memory, is gone here.
        self.ran_out = True
        self._look(False)
        return None

    def _built(self, lin: Linearisation, gradient: Maybe) -> LinearisedLoss:
        self.part.linearisation = lin
        self.part.heads = []
        if lin.name == "recompute":
            self.part.release_graph()
            self.seen.total = self.seen.total.detach()
        return LinearisedLoss(self.seen, [self.part], [gradient], lin)

    def _explicit(self) -> LinearisedLoss:
        if self.policy == "checkpoint" and not self.run.checkpointed:
            warn(
                "linearisation='checkpoint' needs a recurrence of hfopt (hfopt.recurrences), but none was found in the "
                "closure: every product runs the model again, as under 'recompute'"
            )
            return self._built(*self._linearise("recompute"))
        if found := self._attempt(self.policy):
            return self._built(*found)
        raise not_differentiable(self.attempts) from self.attempts[self.policy]

    # -- the choice ------------------------------------------------------------------------------------------------

    def _choose(self) -> LinearisedLoss:
        """Return the first policy that works and fits."""
        need = int(DOUBLE_BACKWARD_MEMORY * graph.saved_bytes(self.part.heads, self.model.params))
        fits = need <= self.budget and not self.ran_out
        if fits and (found := self._if_memory_lasts(lambda: self._measured("double-backward"))):
            assert found.linearisation.cost is not None
            need = found.linearisation.cost.kept
            if need <= self.budget:
                return found
            del found
            self._look(False)
        if "double-backward" in self.attempts and (found := self._measured("linearize")):
            warn(f"products use 'linearize', since double backward failed: {self.attempts}")
            return found
        if self.run.recurrences and (found := self._checkpointed(need)):
            return found
        if "double-backward" not in self.attempts and (found := self._measured("recompute")):
            self._tell("recompute", need, "every product runs the model again (about twice as slow)")
            return found
        if "linearize" not in self.attempts:
            self._look(False)
            found = self._measured("linearize")
        if found is not None:
            warn(f"products use 'linearize', whatever memory it takes, since all else failed: {self.attempts}")
            return found
        raise not_differentiable(self.attempts)

    def _checkpointed(self, need: int) -> LinearisedLoss | None:
        """Return the checkpointed linearisation if it fits; otherwise rebuild the plain graph."""
        self._look(True)
        if self.run.checkpointed and (found := self._if_memory_lasts(lambda: self._measured("checkpoint"))):
            assert found.linearisation.cost is not None
            if found.linearisation.cost.kept <= self.budget:
                self._tell("checkpoint", need, "sequences are computed again in pieces (about 1.5 times as slow)")
                return found
            del found
        self._look(False)
        return None

    def _measured(self, policy: str) -> LinearisedLoss | None:
        """The linearisation by ``policy``, with what it costs from a first product; None if the model forbids it."""
        start = self._now()
        attempt = self._attempt(policy)
        if attempt is None:
            return None
        lin, gradient = attempt
        made = self._now()
        try:
            # An operation without a second derivative shows only when the graph is used.
            lin.jvp([torch.zeros_like(p) for p in self.model.params])
            pushed = self._now()
            lin.vjp(self.part.at)
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            self.attempts[policy] = error
            return None
        end = self._now()
        # The first run in a process does much for the first time; warm, a forward pass is no more than an adjoint one.
        gradient_seconds = min(self.seconds, end - pushed) + end - pushed
        lin.cost = Cost(lin.kept_bytes(), self.budget, gradient_seconds, made - start, end - made)
        logger.info("linearisation %r %s", lin.name, lin.cost)
        return self._built(lin, gradient)

    def _tell(self, name: str, need: int, consequence: str) -> None:
        """Warn of a slower policy, unless it was used before."""
        if self.known is not None and self.known[0] == name:
            return
        if self.ran_out:
            warn(
                f"products use {name!r}, since memory ran out over the graph for cached products: {consequence}. Use a "
                f"smaller curvature batch, or a memory_budget below the present {size(self.budget)}"
            )
        else:
            warn(
                f"products use {name!r}, since the graph for cached products would take {size(need)}, over the budget "
                f"of {size(self.budget)}: {consequence}. Use a smaller curvature batch, or raise memory_budget"
            )

    def _summed(self, batches: PartCollector) -> LinearisedLoss:
        """Return the sum of the parts of the closure's batches."""
        summed = SumOfParts(batches.parts, batches.largest)
        if self.policy == "auto" and (self.known is None or self.known[0] != summed.name):
            many = f"{summed.kept} of {len(summed.parts)} batches are kept, the others computed again in every product"
            logger.info("linearisation %r: %s; keeps %s", summed.name, many, size(summed.kept_bytes()))
            warn(
                f"the linearisations of all batches do not fit into the budget of {size(self.budget)}: {many}. Use "
                "fewer or smaller curvature batches, or raise memory_budget"
            )
        return LinearisedLoss(self.seen, batches.parts, batches.gradients, summed)
