"""Pictures of images; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_images(rows: Mapping[str, Tensor], shape: tuple[int, int], *, title: str = "") -> Figure:
    """Images in rows, one below the other, each row with its name: white is 1 and black 0.

    Args:
        rows: name and images `(N, D)` of each row.
        shape: rows and columns of an image, D in all.
        title: above the picture.

    Raises:
        ValueError: rows of different length, or without images.
    """
    from matplotlib import pyplot as plt

    counts = {len(images) for images in rows.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"rows have {sorted(counts)} images; give the same number, at least 1, for every row")
    (count,) = counts
    figure, grid = plt.subplots(
        len(rows), 1, figsize=(0.9 * count + 1.6, 0.95 * len(rows) + 0.5), squeeze=False, layout="constrained"
    )
    for axes, (name, images) in zip(grid[:, 0], rows.items(), strict=True):
        pixels = images.detach().cpu().float().reshape(count, *shape)
        gap = torch.full((count, shape[0], 1), torch.nan)  # a line of background between two images
        strip = torch.cat([pixels, gap], dim=2).transpose(0, 1).flatten(1)[:, :-1]
        axes.imshow(strip.numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.suptitle(title)
    return figure
