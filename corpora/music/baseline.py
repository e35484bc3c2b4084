"""The model to beat: each note by itself, given whether it sounded one frame before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from corpora.music.rolls import PITCHES, Pieces, Roll


class FirstOrder:
    """A Markov chain of first order for every pitch, all of them independent.

    P(v_t | v_{t-1}) and the chances of the first frame come from counts in the training pieces, with 1/2 added to
    each count.

    Args:
        pieces: whose training part is counted.
    """

    def __init__(self, pieces: Pieces) -> None:
        rolls = pieces.parts["train"]
        first = sum(roll[0].astype(np.int64) for roll in rolls)
        self.start: npt.NDArray[np.float64] = (first + 0.5) / (len(rolls) + 1)
        befores = np.concatenate([roll[:-1] for roll in rolls])
        afters = np.concatenate([roll[1:] for roll in rolls])
        chances = []
        for state in (0, 1):
            there = befores == state
            chances.append(((there & (afters == 1)).sum(0) + 0.5) / (there.sum(0) + 1))
        self.after: npt.NDArray[np.float64] = np.stack(chances)
        """(2, 88): the chance that a note sounds after one frame of silence, and after one where it sounded."""

    def probabilities(self, roll: Roll) -> npt.NDArray[np.float64]:
        """The chances (T, 88) of all notes in a piece, given the frame before."""
        later = np.where(roll[:-1] == 1, self.after[1], self.after[0])
        return np.concatenate([self.start[None], later])

    def nats(self, rolls: list[Roll]) -> tuple[float, float]:
        """The negative log-likelihood in nats per frame: over all frames, and over those after the first ones."""
        each = []
        for roll in rolls:
            p = self.probabilities(roll)
            each.append(-np.log(np.where(roll == 1, p, 1 - p)).sum(1))
        later = np.concatenate([x[1:] for x in each])
        return float(np.concatenate(each).mean()), float(later.mean()) if len(later) else float("nan")

    def sample(self, steps: int, generator: np.random.Generator) -> Roll:
        """A piece of so many frames drawn from the model."""
        roll = np.zeros((steps, PITCHES), dtype=np.uint8)
        p = self.start
        for t in range(steps):
            roll[t] = generator.random(PITCHES) < p
            p = np.where(roll[t] == 1, self.after[1], self.after[0])
        return roll
