"""Random numbers that depend on what they are for, and on nothing that was drawn before.

Every minibatch has a stream of its own: the counter-based generator Philox (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), keyed by a hash of ``(seed, role, epoch, index)``. Whether, when and
how often other minibatches are drawn makes no difference, nor do device and dtype: the numbers are drawn on
the CPU in float64, where a method does not say otherwise.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Stream:
    """The draws of one minibatch.

    Args:
        seed: the problem's seed.
        role: what the minibatch is for ("train", "test").
        epoch: how often the draws of this role were renewed.
        index: the minibatch's index within its role.
    """

    def __init__(self, seed: int, role: str, epoch: int, index: int) -> None:
        text = repr((int(seed), str(role), int(epoch), int(index)))
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self._generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def uniform(self, *shape: int) -> npt.NDArray[np.float64]:
        """``U[0, 1)`` of the given shape."""
        return self._generator.random(shape)

    def integers(self, low: int | Integers, high: int | Integers, *shape: int) -> Integers:
        """Uniform integers from ``low`` to ``high``, both included; bounds may be one per element."""
        return self._generator.integers(low, high, size=shape, dtype=np.int64, endpoint=True)

    def small(self, count: int, *shape: int) -> npt.NDArray[np.uint8]:
        """Uniform integers from 0 to ``count - 1``, at most 255, as bytes: many times faster than :meth:`integers`."""
        return self._generator.integers(0, count, size=shape, dtype=np.uint8)

    def normal(self, *shape: int) -> npt.NDArray[np.float32]:
        """``N(0, 1)`` of the given shape, in single precision."""
        return self._generator.standard_normal(shape, dtype=np.float32)
