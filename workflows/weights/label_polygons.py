"""Label images to polygons along the edges of pixels, corners cut."""

from __future__ import annotations

import itertools

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances.tracing import trace_runs

__all__ = ["connected", "polygons"]


def connected(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Number the 4-connected pieces of all labels."""
    # Cracks between labels become pixels that are in no piece.
    height, width = labels.shape
    fine = np.zeros((2 * height - 1, 2 * width - 1), np.bool_)
    fine[::2, ::2] = labels > 0
    fine[1::2, ::2] = (labels[1:] == labels[:-1]) & (labels[1:] > 0)
    fine[::2, 1::2] = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] > 0)
    pieces: NDArray[np.int32] = ndimage.label(fine)[0][::2, ::2]
    return pieces


def polygons(labels: NDArray[np.int32], grid: PixelGrid) -> list[shapely.Polygon]:
    """Trace label images.

    Args:
        labels: ``(H, W)``, 4-connected.
        grid: of the image.

    Returns:
        The polygons of 1, 2, ... in level-0 pixels.
    """
    count = int(labels.max(initial=0))
    padded = np.pad(labels, ((0, 0), (1, 1)))
    begins = padded[:, 1:] != padded[:, :-1]
    rows, columns = np.nonzero(begins)
    values = padded[rows, columns + 1]
    # A run ends where the next begins; behind the last of a row, one of nothing does.
    ends = np.roll(columns, -1)
    there = values > 0
    order = np.argsort(values[there], kind="stable")
    runs = np.stack([rows, columns, ends])[:, there][:, order].astype(np.int32)
    last = np.cumsum(np.bincount(values[there], minlength=count + 1)[1:])
    traced = trace_runs(np.ascontiguousarray(runs), last, np.zeros((count, 2), np.int64))
    offsets, data = traced.wkb(grid)
    raw = data.tobytes()
    pieces = [raw[i:j] for i, j in itertools.pairwise(offsets)]
    return list(shapely.from_wkb(pieces))
