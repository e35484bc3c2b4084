"""scikit-learn's handwritten digits, 8x8: the small data set that needs no files."""

from __future__ import annotations

from typing import Any

import numpy as np

from corpora.images.images import Images

TRAIN = 1500


def digits(**options: Any) -> Images:
    """Images of handwritten digits, 8x8 with 17 levels of grey: the first 1,500 for training, the other 297 for test.

    They come with scikit-learn (its extra here: `digits`), nothing is downloaded.

    Args:
        options: those of :class:`corpora.Images`: batch_size, seed, loss, device, dtype, ...

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Source: Alpaydin & Kaynak, "Optical recognition of handwritten digits", UCI 1998; its test part.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise ModuleNotFoundError(
            "corpora.digits needs scikit-learn, which brings the images along; pip install scikit-learn", name="sklearn"
        ) from error
    images = np.asarray(load_digits().data).astype(np.uint8)
    return Images("digits", images[:TRAIN], images[TRAIN:], white=16, shape=(8, 8), **options)
