"""Cerberus' patches: which of a slide's are wanted, and how much tissue that is.

Sizes are ``(width, height)`` in pixels of 0.5 micrometres, boxes ``(x0, y0, x1, y1)``.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PATCH_PX, KEPT_PX, MARGIN_PX = 448, 144, 152
"""What Cerberus sees of a patch; keeps of it, which is the distance between patches; and throws
away on each side."""
MPP = 0.5

Mask = NDArray[np.bool_]


def read_mask(path: Path) -> Mask:
    """Read a tissue mask that shows the whole slide: what is not black is tissue.

    Raises:
        SystemExit: there is no such picture.
    """
    try:
        with Image.open(path) as image:
            mask: Mask = np.asarray(image.convert("L")) > 0
    except OSError as error:
        raise SystemExit(f"the tissue mask {path} cannot be read: {error}") from error
    return mask


def tissue_mm2(mask: Mask, size: tuple[int, int]) -> float:
    """Return the tissue's area: the mask's share of the slide."""
    return float(mask.mean()) * size[0] * size[1] * MPP**2 / 1e6


def wanted_patches(mask: Mask, size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the output boxes that hold tissue, in rows, as the original chooses them.

    They lie side by side from (0, 0) until the slide is covered. The corners are scaled to
    the mask and rounded up; a box narrower than a mask pixel looks at the one before its end.

    Returns:
        ``(n, 4)``.
    """
    per_x, per_y = mask.shape[1] / size[0], mask.shape[0] / size[1]
    boxes = []
    for y0 in range(0, size[1], KEPT_PX):
        rows = _span(y0, per_y)
        for x0 in range(0, size[0], KEPT_PX):
            if mask[rows, _span(x0, per_x)].any():
                boxes.append((x0, y0, x0 + KEPT_PX, y0 + KEPT_PX))
    return np.array(boxes, np.int64).reshape(-1, 4)


def _span(start: int, per_px: float) -> slice:
    end = ceil((start + KEPT_PX) * per_px)
    return slice(min(ceil(start * per_px), end - 1), end)
