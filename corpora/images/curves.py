"""Images of curves, of the kind on which deep autoencoders were first trained, drawn from a seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from corpora.images.images import Images

Floats = npt.NDArray[np.float64]

SIDE = 28
MARGIN = 3.0
"""Pixels at each edge that no curve's control point lies in."""
WIDTH = 0.8
"""Standard deviation of the pen's profile, in pixels."""
_SAMPLES = 96
_CHUNK = 500


def curves(train: int = 20_000, test: int = 10_000, *, data_seed: int = 0, seed: int = 0, **options: Any) -> Images:
    """Images of smooth curves through the plane, 28x28 with 256 levels of grey: 20,000 for training, 10,000 for test.

    Each is a quadratic Bezier curve whose three control points are uniform over the image but for a margin, so that
    six numbers make an image, as in the set CURVES of Hinton & Salakhutdinov. That set itself is not to be had and how
    it was drawn is not known in detail: errors on these images are NOT comparable to the digit with those published.

    Args:
        train, test: numbers of images. A smaller set is the beginning of a larger one.
        data_seed: what the images are drawn from.
        seed: what the order of the training images is drawn from.
        options: the others of :class:`corpora.Images`: batch_size, loss, device, dtype, ...

    Raises:
        ValueError: a number of images below 1, or a negative seed.

    Source: for the kind of data: Hinton & Salakhutdinov, "Reducing the dimensionality of data with neural networks",
    Science 2006, supporting material.
    """
    for name, count in (("train", train), ("test", test)):
        if count < 1:
            raise ValueError(f"{name} is {count}; choose at least 1 image")
    if data_seed < 0:
        raise ValueError(f"data_seed is {data_seed}; choose a non-negative integer")
    drawn = [draw(control_points(count, data_seed, role)) for role, count in enumerate((train, test))]
    return Images("curves", *drawn, white=255, shape=(SIDE, SIDE), seed=seed, data_seed=data_seed, **options)


def control_points(count: int, seed: int, role: int) -> Floats:
    """`(count, 3, 2)`: control points (row, column), in pixels; `role` is 0 for training and 1 for test images."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, role])))
    return MARGIN + (SIDE - 1 - 2 * MARGIN) * generator.random((count, 3, 2))


def draw(points: Floats) -> npt.NDArray[np.uint8]:
    """Images `(N, 784)` of the Bezier curves with control points `(N, 3, 2)`.

    The ink at pixel x is ``min(1, int |c'(t)| exp(-|x - c(t)|^2 / 2 w^2) dt / (sqrt(2 pi) w))``, w the width of the
    pen: 1 on a straight line, falling off beside it as the profile does.
    """
    images = np.empty((len(points), SIDE * SIDE), dtype=np.uint8)
    for start in range(0, len(points), _CHUNK):
        images[start : start + _CHUNK] = _ink(points[start : start + _CHUNK])
    return images


def _ink(points: Floats) -> npt.NDArray[np.uint8]:
    t = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    position = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    velocity = np.stack([2 * t - 2, 2 - 4 * t, 2 * t])
    curve, tangent = (np.einsum("ks,nkx->nxs", weights, points) for weights in (position, velocity))
    length = np.linalg.norm(tangent, axis=1) / _SAMPLES  # (N, samples)
    # The profile is a product of one in each direction, so the sum over samples is a product of matrices.
    distance = np.arange(SIDE)[:, None] - curve[:, :, None, :]  # (N, 2, SIDE, samples)
    profile = np.exp(-0.5 * (distance / WIDTH) ** 2)
    weighted = profile[:, 0] * (length / (math.sqrt(2 * math.pi) * WIDTH))[:, None, :]
    ink = weighted @ profile[:, 1].transpose(0, 2, 1)
    levels: npt.NDArray[np.uint8] = np.rint(255 * np.minimum(ink, 1)).astype(np.uint8)
    return levels.reshape(len(points), -1)
