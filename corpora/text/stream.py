"""A long text as a data object: training windows, evaluation that scores every symbol once, and its metric."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from corpora.text.alphabet import Alphabet, Codes
from corpora.windows import Tiles, column_starts, column_tiles, random_starts, scored, take, tiles
from hfopt.experiment.carried import Carrier
from hfopt.experiment.data import Minibatches, integer
from hfopt.experiment.metrics import Metric

PARTS = ("train", "valid", "test")
REGIMES = ("windows", "columns")
UNSCORED = -100
"""The target of a step that is not scored."""


@dataclass(frozen=True, eq=False)
class Window:
    """T steps of B sequences.

    Attributes:
        inputs: numbers of symbols (T, B).
        targets: those that follow (T - warm_up, B), of the last steps; UNSCORED where a step is not scored.
        warm_up: how many first steps are not scored in any sequence.
        states: the states that the model goes on from; None for those that it starts from.
    """

    inputs: Tensor
    targets: Tensor
    warm_up: int
    states: tuple[Tensor, ...] | None = None


class Text(Minibatches[Window]):
    """A text in three parts, which follow each other in one stream.

    Training minibatches are `regime` "windows": at random places of the training part, the first `warm_up` steps not
    scored; or "columns": the training part is cut into ``train_batches * batch_size`` contiguous columns, and
    :meth:`forget` goes on to the next window of each, with the states carried (see :mod:`hfopt.experiment.carried`);
    at the end of the columns it begins again with the states that the model starts from. A minibatch is a function of
    `(seed, i)` and of the number of calls of `forget` alone, states apart.

    Test minibatches score every symbol of the part `evaluate_on` exactly once, after a past of `warm_up` steps or more;
    that of the first ones is what precedes the part in the stream. For "windows" they are overlapping windows. For
    "columns" they are long columns that are run through in minibatches -1, -2, .. with the states carried; so the
    forward that a model is evaluated with has to return them.

    Args:
        name: of the text.
        codes: numbers of its symbols (N,).
        parts: where training part and validation part end; the test part is the rest.
        alphabet: the symbols.
        words: whether the metric is the perplexity; otherwise it is bits per character.
        note: what should be said of the text with results.
        regime: "windows" or "columns".
        window: T, steps of a window.
        warm_up: steps without a score before those that have one.
        batch_size: B, sequences of a minibatch.
        train_batches: how many there are at a time.
        evaluate_on: the part of the test minibatches: "valid", "test" or "train".
        test_symbols: score only so many of its first symbols; None: all.
        seed: of the random places.
        device: where minibatches lie.
        memory: bytes that the kept minibatches may take in all.

    Attributes:
        V, O: the numbers of inputs and outputs, that of the symbols.
        lengths: symbols of the three parts, by name.
        scored_symbols: how many symbols the test minibatches score.
        metrics: bits per character, or perplexity.

    Raises:
        ValueError: an argument is out of its range, or the text is too short for it.
    """

    def __init__(
        self,
        name: str,
        codes: Codes,
        parts: tuple[int, int],
        alphabet: Alphabet,
        *,
        words: bool = False,
        note: str = "",
        regime: str = "windows",
        window: int = 250,
        warm_up: int = 50,
        batch_size: int = 100,
        train_batches: int = 1,
        evaluate_on: str = "valid",
        test_symbols: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        memory: int = 1 << 28,
    ) -> None:
        for argument, value, known in (("regime", regime, REGIMES), ("evaluate_on", evaluate_on, PARTS)):
            if value not in known:
                raise ValueError(f"{argument} is {value!r}; choose {' or '.join(map(repr, known))}")
        self.name, self.note, self.regime, self.alphabet = name, note, regime, alphabet
        self.window, self.warm_up = integer("window", window, 1), integer("warm_up", warm_up, 0)
        self.batch_size = integer("batch_size", batch_size, 1)
        if self.warm_up >= self.window:
            raise ValueError(f"warm_up is {warm_up}, but a window has {window} steps: nothing in it would be scored")
        self._codes, self._device = codes, torch.device(device)
        self.bounds = dict(zip(PARTS, ((0, parts[0]), parts, (parts[1], len(codes))), strict=True))
        self.lengths = {part: end - begin for part, (begin, end) in self.bounds.items()}
        empty = [part for part, length in self.lengths.items() if length < 1]
        if empty:
            raise ValueError(f"{name} has no symbols for its part {empty[0]!r}: it has only {len(codes)} in all")
        self.V = self.O = len(alphabet)
        self.text_hash = hashlib.sha256(codes.tobytes()).hexdigest()[:12]
        self._carrier = Carrier()
        self.metrics = [_perplexity() if words else _bits()]
        train_batches = integer("train_batches", train_batches, 1)
        if regime == "columns":
            self._columns, self._passes = column_starts(*self.bounds["train"], train_batches * self.batch_size, window)
        else:  # says whether there is room for a window
            random_starts(*self.bounds["train"], window, 1, np.random.default_rng(0))
        self._test_symbols = test_symbols
        self._lay_tests(evaluate_on)
        super().__init__(train_batches, self._tests, seed=seed, memory=memory)

    def _lay_tests(self, part: str) -> None:
        """Choose the windows or columns of the test minibatches."""
        begin, end = self.bounds[part]
        if self._test_symbols is not None:
            end = min(end, begin + integer("test_symbols", self._test_symbols, 1))
        self.evaluate_on, self.scored_symbols = part, end - max(1, begin)
        self._tiles: Tiles
        if self.regime == "windows":
            self._tiles = tiles(begin, end, self.window, self.warm_up)
            self._tests = -(-len(self._tiles.starts) // self.batch_size)
        else:
            self._tiles = column_tiles(begin, end, self.batch_size, self.warm_up)
            self._tests = -(-self._tiles.window // self.window)

    def evaluated_on(self, part: str) -> Text:
        """The same text with test minibatches of all symbols of another part.

        Raises:
            ValueError: an unknown part.
        """
        if part not in PARTS:
            raise ValueError(f"part is {part!r}; choose {' or '.join(map(repr, PARTS))}")
        other = copy(self)
        other._test_symbols = None
        other._lay_tests(part)
        other.test_batches = range(-1, -1 - other._tests, -1)
        other.train_mem, other.test_mem, other._carrier = {}, {}, Carrier()
        return other

    def codes(self, part: str) -> Codes:
        """The numbers of a part's symbols."""
        begin, end = self.bounds[part]
        return self._codes[begin:end]

    def with_past(self, part: str, most: int = 1000) -> tuple[Codes, int]:
        """The numbers of a part's symbols behind up to `most` that precede it, and how many are its own."""
        begin, end = self.bounds[part]
        return self._codes[max(0, begin - most) : end], end - begin

    # -- minibatches ------------------------------------------------------------------------------------

    def __call__(self, i: int) -> Window:
        """Minibatch `i`, with the states that it goes on from."""
        if i == -1:
            self._carrier.forget_tests()
        batch = super().__call__(i)
        return replace(batch, states=self._carrier.states(i)) if self.regime == "columns" else batch

    def draw(self, i: int, epoch: int) -> Window:
        """A window of each sequence, as numbers of symbols."""
        if i < 0:
            return self._test(-1 - i)
        if self.regime == "columns":
            own = self._columns[i * self.batch_size : (i + 1) * self.batch_size]
            symbols = take(self._codes, own + self._position(epoch) * self.window, self.window + 1)
            return self._made(symbols, None, 0)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, i])))
        starts = random_starts(*self.bounds["train"], self.window, self.batch_size, generator)
        return self._made(take(self._codes, starts, self.window + 1), None, self.warm_up)

    def _position(self, epoch: int) -> int:
        # A driver forgets before every step, the first one too.
        return max(0, epoch - 1) % self._passes

    def _test(self, k: int) -> Window:
        found = self._tiles
        if self.regime == "windows":
            some = slice(k * self.batch_size, (k + 1) * self.batch_size)
            starts, first, last, steps = found.starts[some], found.first[some], found.last[some], found.window
        else:
            starts, first, last = found.starts + k * self.window, found.first, found.last
            steps = min(self.window, found.window - k * self.window)
        symbols = take(self._codes, starts, steps + 1)
        return self._made(symbols, scored(starts, steps, first, last), 0)

    def _made(self, symbols: Codes, mask: Any, warm_up: int) -> Window:
        """A minibatch of symbols (T + 1, B); `mask` (T, B) says which steps are scored, None for all."""
        numbers = torch.from_numpy(symbols.astype(np.int64))
        targets = numbers[1:]
        if mask is not None and not mask.all():
            targets = torch.where(torch.from_numpy(mask), targets, UNSCORED)
            warm_up = int(mask.any(1).argmax())
        return Window(numbers[:-1].to(self._device), targets[warm_up:].to(self._device), warm_up)

    def forget(self) -> None:
        """Draw new windows; in columns, go on to the next ones, and hand the states on."""
        super().forget()
        self._carrier.forget(everything=self.regime == "columns" and self._position(self.epoch) == 0)

    def carry(self, i: int, states: Sequence[Tensor]) -> None:
        """Take the states after minibatch `i`, which the next window of its columns goes on from."""
        if self.regime == "columns":
            self._carrier.carry(i, states)

    # -- judging outputs --------------------------------------------------------------------------------

    def size(self, batch: Window) -> int:
        """The number of scored symbols, which the loss is the mean over."""
        return int((batch.targets != UNSCORED).sum())

    def loss(self, outputs: Tensor, batch: Window) -> Tensor:
        """The mean cross-entropy of the scored symbols in nats.

        Args:
            outputs: logits (T, B, V).
            batch: the minibatch.

        Raises:
            ValueError: outputs of another shape.
        """
        if outputs.shape != (*batch.inputs.shape, self.O):
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)}; for inputs {tuple(batch.inputs.shape)} and "
                f"{self.O} symbols they are {(*batch.inputs.shape, self.O)}"
            )
        # UNSCORED is what cross_entropy leaves out.
        return F.cross_entropy(outputs[batch.warm_up :].flatten(0, 1), batch.targets.flatten())

    # -- identity and state -----------------------------------------------------------------------------

    def identity(self) -> dict[str, int | float | str]:
        """The text, its regime and sizes; a hash of all its numbers stands for the text."""
        return {
            "name": self.name,
            "text_hash": self.text_hash,
            "V": self.V,
            "regime": self.regime,
            "window": self.window,
            "warm_up": self.warm_up,
            "batch_size": self.batch_size,
            "train_batches": len(self.train_batches),
            "evaluate_on": self.evaluate_on,
            "scored_symbols": self.scored_symbols,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on, and the states that are carried."""
        return {**super().state_dict(), "states": self._carrier.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the object whose :meth:`state_dict` this is."""
        super().load_state_dict(state)
        self._carrier.load_state_dict(state.get("states", {}))

    def describe(self) -> str:
        """What the text is, in sentences."""
        names = {"train": "for training", "valid": "for validation", "test": "for the test"}
        counts = ", ".join(f"{length:,} {names[part]}" for part, length in self.lengths.items())
        sentence = f"{self.name} has {self.V:,} different symbols; {counts} (hash of their numbers {self.text_hash})."
        return f"{sentence} {self.note}".strip()

    def __repr__(self) -> str:
        return (
            f"{self.name}({len(self._codes):,} symbols, V={self.V}, regime={self.regime!r}, window={self.window}, "
            f"warm_up={self.warm_up}, batch_size={self.batch_size}, evaluate_on={self.evaluate_on!r})"
        )


def nats(outputs: Tensor, batch: Window) -> tuple[float, float]:
    """The summed cross-entropy of the scored symbols in nats, and their number; infinite where an output is NaN."""
    logits = outputs[batch.warm_up :].flatten(0, 1)
    each = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=UNSCORED, reduction="none")
    total = float(each.double().sum())
    return math.inf if math.isnan(total) else total, float((batch.targets != UNSCORED).sum())


def _bits() -> Metric:
    return Metric("bits per character", nats, finish=lambda mean: mean / math.log(2))


def _perplexity() -> Metric:
    return Metric("perplexity", nats, finish=lambda mean: math.exp(mean) if mean < 700 else math.inf)
