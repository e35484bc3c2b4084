"""What a model of text has to beat: counts of the symbols behind short contexts, with back-off to shorter ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from corpora.text.alphabet import Codes

Keys = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    """Counts of one order: of contexts followed by a symbol, and of contexts; keys are sorted."""

    grams: Keys
    counts: npt.NDArray[np.int64]
    contexts: Keys
    totals: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int64]


class BackOff:
    """Probabilities of a symbol behind the last `order` symbols, by counts, mixed with those behind fewer.

    p_k(c) = (n(context, c) + t p_{k-1}(c)) / (n + t), where the last k symbols occurred n times in the training text,
    with t different symbols behind them, and p_{-1} is uniform. So what a context does not know is left to shorter ones
    in proportion to how often something new followed it.

    Args:
        codes: numbers of the training text's symbols (N,).
        symbols: V, how many there are.
        order: symbols of context at most.

    Raises:
        ValueError: a negative order, or so high a one that V^(order + 1) exceeds 64-bit integers.

    Source: Witten & Bell, IEEE Trans. Information Theory 37, 1991, method C; interpolated as in Chen & Goodman,
    "An empirical study of smoothing techniques for language modeling", 1998.
    """

    def __init__(self, codes: Codes, symbols: int, order: int = 3) -> None:
        if order < 0 or (order + 1) * math.log2(symbols) > 62:
            raise ValueError(
                f"order is {order}; with {symbols} symbols it is from 0 to {int(62 / math.log2(symbols)) - 1}"
            )
        self.symbols, self.order = symbols, order
        self._orders = [self._counted(codes, k) for k in range(order + 1)]

    def _keys(self, codes: Codes, k: int) -> Keys:
        """Every symbol from the kth on with the k before it, as one number each."""
        keys = np.zeros(max(0, len(codes) - k), np.int64)
        for j in range(k + 1):
            keys *= self.symbols
            keys += codes[j : len(codes) - k + j]
        return keys

    def _counted(self, codes: Codes, k: int) -> _Order:
        grams, counts = np.unique(self._keys(codes, k), return_counts=True)
        contexts, first = np.unique(grams // self.symbols, return_index=True)
        if not len(contexts):
            return _Order(grams, counts, contexts, counts, counts)
        return _Order(grams, counts, contexts, np.add.reduceat(counts, first), np.diff([*first, len(grams)]))

    def probabilities(self, codes: Codes, scored: int | None = None) -> npt.NDArray[np.float64]:
        """The probability of each of the last `scored` symbols behind those before it; None: of all.

        A symbol with fewer than `order` before it has the context that there is.

        Returns:
            (scored,).
        """
        scored = len(codes) if scored is None else scored
        found = np.full(len(codes), 1 / self.symbols)
        for k, o in enumerate(self._orders):
            keys = self._keys(codes, k)
            p = found[k:]
            n, t = (_looked_up(o.contexts, x, keys // self.symbols) for x in (o.totals, o.kinds))
            known = n > 0
            count = _looked_up(o.grams, o.counts, keys)
            p[known] = (count[known] + t[known] * p[known]) / (n[known] + t[known])
        return found[len(codes) - scored :]

    def bits(self, codes: Codes, scored: int | None = None) -> float:
        """The mean of -log2 p over the last `scored` symbols: bits per character."""
        return float(-np.log2(self.probabilities(codes, scored)).mean())


def _looked_up(keys: Keys, values: npt.NDArray[np.int64], wanted: Keys) -> npt.NDArray[np.int64]:
    """The values of keys; 0 for those that are not there."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
