"""The tissue mask that every tool of the comparison gets: Otsu's threshold on the overview.

This is how TIAToolbox finds tissue by itself. Ours finds less of the glass, which is why it is
not used here: the same tissue for all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from skimage.filters import threshold_otsu

from wsi_pipeline.slide import Slide

MASK_MPP = 8.0
"""Pixel size of the overview in micrometres."""


def write_mask(slide: Path, path: Path) -> float:
    """Write a slide's tissue as a PNG, white on black, and return its share of the slide."""
    with Slide.open(str(slide)) as opened:
        overview, _ = opened.thumbnail(MASK_MPP)
    grey = overview.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    mask = grey < threshold_otsu(grey)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return float(mask.mean())
