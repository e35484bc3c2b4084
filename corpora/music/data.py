"""Piano rolls as a data object: the next frame is predicted from all frames before it."""

from __future__ import annotations

import itertools
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from corpora.music.rolls import PITCHES, ROLES, Pieces, Roll
from corpora.sequences import Groups, Sequences, by_length, padded
from hfopt.experiment.data import Shuffled, integer
from hfopt.experiment.metrics import Metric

FIRST = ("predicted", "left out")


class Window(NamedTuple):
    """A part of a piece: frames `begin` to `end`, of which those before `score` are context alone."""

    piece: int
    begin: int
    score: int
    end: int


class Music(Shuffled[Groups]):
    """Piano rolls in minibatches, with the log-likelihood and the accuracy of a model that predicts each frame.

    The input at step t is frame t - 1, and no note before the first: the first frame is predicted from the model's
    learned start. Training cases are windows: a piece of more than `window` frames is cut into equal parts of no
    more, each after up to `context` frames that are seen but not scored, so that every frame is scored exactly once.
    Validation and test pieces are never cut. They lie in minibatches of similar length.

    Args:
        pieces: the rolls and their parts.
        batch_size: training windows in a minibatch at most; None: all in one.
        window: frames of a window that are scored at most; None: pieces are not cut.
        context: frames before them.
        first: "predicted" where the first frame of a piece counts in the loss, as in 2012; "left out", as in 2018.
        evaluate_on: what the test minibatches are, "valid" to choose by, "test", or "train".
        test_frames: frames that a test minibatch takes at most, padding included; one piece at least.
        conditional: whether outputs also depend on the other notes of their frame, as in RNN-NADE: such a model has
            no frame accuracy that could be compared with others', and gets none.
        seed, shuffle_every, memory: see :class:`hfopt.experiment.data.Shuffled`.
        device, dtype: of the minibatches.

    Attributes:
        metrics: "nats/frame" over all frames, the first ones predicted (2012); "nats/frame from 2nd" without the first
            ones (2018); "accuracy", TP / (TP + FP + FN) over all frames with notes of probability 1/2 or more;
            "expected accuracy", the same formula with probabilities in place of notes.

    Raises:
        ValueError: an argument is out of its range.

    Source: Boulanger-Lewandowski, Bengio & Vincent, "Modeling temporal dependencies in high-dimensional sequences",
    ICML 2012; Bay, Ehmann & Downie, ISMIR 2009, for the accuracy.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        batch_size: int | None = None,
        window: int | None = None,
        context: int = 0,
        first: str = "predicted",
        evaluate_on: str = "valid",
        test_frames: int = 20_000,
        conditional: bool = False,
        seed: int = 0,
        shuffle_every: int | None = 1,
        memory: int = 2 << 30,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value, known in (("first", first, FIRST), ("evaluate_on", evaluate_on, ROLES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose {' or '.join(map(repr, known))}")
        self.name, self.fingerprint = pieces.name, pieces.fingerprint()
        self.first, self.evaluate_on = first, evaluate_on
        self.window = None if window is None else integer("window", window, 1)
        self.context = integer("context", context, 0)
        self.device, self.dtype = torch.device(device), dtype
        self.pieces, self._test_frames = pieces, integer("test_frames", test_frames, 1)
        self._windows = [
            part
            for k, roll in enumerate(pieces.parts["train"])
            for part in windows(k, len(roll), self.window, self.context)
            if first == "predicted" or part.end > max(part.score, 1)
        ]
        if not self._windows:
            raise ValueError(f"no training piece of {pieces.name} has two frames, and the first one is left out")
        super().__init__(
            len(self._windows),
            len(pieces.parts[evaluate_on]),
            batch_size=batch_size,
            seed=seed,
            shuffle_every=shuffle_every,
            memory=memory,
        )
        self._group()
        self.metrics = [
            Metric("nats/frame", self._all_frames, column="nats_per_frame"),
            Metric("nats/frame from 2nd", self._later_frames, column="nats_per_later_frame"),
        ]
        if not conditional:
            self.metrics += [
                Metric("accuracy", self._accuracy, unit="%", better="higher"),
                Metric("expected accuracy", self._expected, unit="%", better="higher", column="expected_accuracy"),
            ]

    def _group(self) -> None:
        """Put the pieces that are evaluated into minibatches of similar length."""
        lengths = [len(roll) for roll in self.pieces.parts[self.evaluate_on]]
        groups: list[list[int]] = []
        for k in sorted(range(len(lengths)), key=lambda k: lengths[k]):
            if groups and lengths[k] * (len(groups[-1]) + 1) <= self._test_frames:
                groups[-1].append(k)
            else:
                groups.append([k])
        self._groups = groups
        self._test_count = len(lengths)
        self.test_batches = range(-1, -1 - len(groups), -1)

    def evaluated_on(self, role: str) -> Music:
        """The same training minibatches with test minibatches of another role: "valid", "test" or "train".

        Raises:
            ValueError: another role.
        """
        if role not in ROLES:
            raise ValueError(f"role is {role!r}; choose {' or '.join(map(repr, ROLES))}")
        other = copy(self)
        other.evaluate_on, other.train_mem, other.test_mem = role, {}, {}
        other._group()
        return other

    # -- minibatches ------------------------------------------------------------------------------------

    def draw(self, i: int, epoch: int) -> Groups:
        """See :meth:`Shuffled.draw`; test minibatch `i` has the pieces of similar length that belong together."""
        if i >= 0:
            return super().draw(i, epoch)
        rolls = self.pieces.parts[self.evaluate_on]
        return self._batch(
            self.evaluate_on, [Window(k, 0, 0, len(rolls[k])) for k in self._groups[-1 - i]], "predicted"
        )

    def take(self, role: str, cases: slice | Tensor) -> Groups:
        """The given training windows."""
        chosen = self._windows[cases] if isinstance(cases, slice) else [self._windows[k] for k in cases.tolist()]
        return self._batch("train", chosen, self.first)

    def _batch(self, role: str, chosen: list[Window], first: str) -> Groups:
        members = by_length([w.end - w.begin for w in chosen])
        groups = (self._group_of(self.pieces.parts[role], [chosen[k] for k in group], first) for group in members)
        return Groups(tuple(groups), members)

    def _group_of(self, rolls: list[Roll], chosen: list[Window], first: str) -> Sequences:
        silence = np.zeros((1, PITCHES), dtype=np.uint8)
        targets = padded([rolls[w.piece][w.begin : w.end] for w in chosen])
        before = [rolls[w.piece][w.begin - 1 : w.begin] if w.begin else silence for w in chosen]
        later = [rolls[w.piece][w.begin : w.end - 1] for w in chosen]
        inputs = padded([np.concatenate(both) for both in zip(before, later, strict=True)])
        lengths = np.array([w.end - w.begin for w in chosen])
        steps = np.arange(len(targets))[:, None]
        unscored = [w.score - w.begin if w.score or first == "predicted" else 1 for w in chosen]
        mask = (steps < lengths) & (steps >= np.array(unscored))
        return Sequences(
            inputs=torch.from_numpy(inputs).to(self.device, self.dtype),
            targets=torch.from_numpy(targets).to(self.device, self.dtype),
            mask=torch.from_numpy(mask).to(self.device),
            lengths=torch.from_numpy(lengths).to(self.device),
        )

    def size(self, batch: Groups) -> int:
        """The number of scored frames, which the loss is the mean over."""
        return batch.size

    # -- judging outputs --------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, batch: Groups) -> Tensor:
        """The mean over scored frames of the negative log-likelihood in nats, summed over the 88 pitches.

        Args:
            outputs: logits of the scored frames `(N, 88)`.
            batch: whose frames they predict.

        Raises:
            ValueError: outputs of another shape.
        """
        return F.binary_cross_entropy_with_logits(self._checked(outputs, batch), batch.targets) * PITCHES

    def _checked(self, outputs: Tensor, batch: Groups) -> Tensor:
        if outputs.shape != batch.targets.shape:
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)}, but the scored frames {tuple(batch.targets.shape)}: give "
                "one logit per frame and pitch, group by group"
            )
        return outputs

    def nats(self, outputs: Tensor, batch: Groups) -> Tensor:
        """Each scored frame's negative log-likelihood `(N,)`, in nats and double precision, summed over pitches."""
        z, y = self._checked(outputs, batch).double(), batch.targets.double()
        return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)

    def _all_frames(self, outputs: Tensor, batch: Groups) -> Tensor:
        return self.nats(outputs, batch)

    def _later_frames(self, outputs: Tensor, batch: Groups) -> Tensor:
        later = torch.cat([group.scored >= group.mask.shape[1] for group in batch.groups])
        return self.nats(outputs, batch)[later]

    def _accuracy(self, outputs: Tensor, batch: Groups) -> tuple[float, float]:
        on, y = self._checked(outputs, batch) >= 0, batch.targets > 0.5
        return float((on & y).sum()), float((on | y).sum())

    def _expected(self, outputs: Tensor, batch: Groups) -> tuple[float, float]:
        p, y = self._checked(outputs, batch).double().sigmoid(), batch.targets.double()
        right = float((p * y).sum())
        return right, float(p.sum() + y.sum()) - right

    def identity(self) -> dict[str, int | float | str]:
        """Name and hash of the pieces, how they are cut, what is scored and evaluated, and the minibatches."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "window": self.window or 0,
            "context": self.context,
            "first": self.first,
            "evaluate_on": self.evaluate_on,
            **super().identity(),
        }

    def __repr__(self) -> str:
        frames = ", ".join(f"{len(self.pieces.parts[r])} {r} pieces of {self.pieces.frames(r):,} frames" for r in ROLES)
        return (
            f"{self.name}({frames}, batch_size={self.batch_size}, seed={self.seed}, evaluate_on={self.evaluate_on!r})"
        )


def windows(piece: int, length: int, window: int | None, context: int) -> list[Window]:
    """The equal parts of a piece, of at most `window` frames, each after up to `context` frames more."""
    parts = 1 if window is None else -(-length // window)
    bounds = [k * length // parts for k in range(parts + 1)]
    return [Window(piece, max(0, score - context), score, end) for score, end in itertools.pairwise(bounds)]
