"""Windows of unlabelled pixels, drawn at random from the tissue of slides or from images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.slide import Slide
from wsi_pipeline.tissue import TissueMask, detect_tissue

__all__ = ["ImageWindows", "SlideWindows"]

_TISSUE_MPP = 8.0
"""Pixel size of the thumbnail on which tissue is found, in micrometres."""


class SlideWindows:
    """Windows around random points of the tissue of some slides, the same for the same step.

    A slide is drawn as often as it has tissue. Windows may reach beyond the tissue, and
    beyond the slide, where it is white.

    Args:
        slides: paths, and the pixel size of each; None where the file says it.
        mpp: micrometres a pixel of the windows.
        window_px: side of a window.
        batch: windows a step.
        seed: of the places.

    Raises:
        SlideError: a slide cannot be read or has no pixel size.
        DatasetError: no slide has tissue.
    """

    def __init__(
        self,
        slides: Mapping[Path, float | None],
        *,
        mpp: float,
        window_px: int,
        batch: int,
        seed: int,
    ) -> None:
        self._window_px, self._batch, self._seed = window_px, batch, seed
        self._slides: list[tuple[Slide, PixelGrid, TissueMask, NDArray[np.int64]]] = []
        areas = []
        try:
            for path, pixel_um in slides.items():
                slide = Slide.open(path, mpp=pixel_um)
                size = slide.pixel_size.x, slide.pixel_size.y
                tissue = detect_tissue(*slide.thumbnail(_TISSUE_MPP), size)
                places = np.flatnonzero(tissue.mask)
                self._slides.append((slide, slide.working_grid(mpp), tissue, places))
                areas.append(tissue.area_mm2(size))
            if not any(areas):
                raise DatasetError(f"there is no tissue on {[str(path) for path in slides]}")
        except BaseException:
            self.close()
            raise
        self._shares = np.asarray(areas, np.float64) / sum(areas)

    def __enter__(self) -> SlideWindows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the files."""
        for slide, *_ in self._slides:
            slide.close()

    def __call__(self, step: int) -> Tensor:
        """Return the ``(B, S, S, 3)`` uint8 windows of a step."""
        rng = np.random.default_rng((self._seed, step))
        chosen = rng.choice(len(self._slides), self._batch, p=self._shares)
        return torch.from_numpy(np.stack([self._window(int(index), rng) for index in chosen]))

    def _window(self, index: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        slide, grid, tissue, places = self._slides[index]
        row, column = np.divmod(places[rng.integers(len(places))], tissue.mask.shape[1])
        # Anywhere in the mask's pixel: all tissue is equally likely to be the centre.
        centre = tissue.grid.to_level0(np.array([[column, row]]) + rng.random((1, 2)))
        x, y = np.floor(grid.from_level0(centre)[0]).astype(int) - self._window_px // 2
        box = Box(x=int(x), y=int(y), width=self._window_px, height=self._window_px)
        return slide.read(grid, box)


class ImageWindows:
    """Random windows of images in memory, the same for the same step.

    Args:
        images: ``(H, W, 3)`` uint8 RGB, at the wanted pixel size and no smaller than a window.
        window_px: side of a window.
        batch: windows a step; different images as far as there are enough.
        seed: of the places.

    Raises:
        DatasetError: no image, or one that is smaller than a window.
    """

    def __init__(
        self, images: Sequence[NDArray[np.uint8]], *, window_px: int, batch: int, seed: int
    ) -> None:
        if not images:
            raise DatasetError("there is no image to cut windows from")
        smallest = min(min(image.shape[:2]) for image in images)
        if smallest < window_px:
            msg = f"windows of {window_px} px are larger than an image of {smallest} px"
            raise DatasetError(msg)
        self._images = images
        self._window_px, self._batch, self._seed = window_px, batch, seed

    def __call__(self, step: int) -> Tensor:
        """Return the ``(B, S, S, 3)`` uint8 windows of a step."""
        rng = np.random.default_rng((self._seed, step))
        order = rng.permutation(len(self._images))
        chosen = np.resize(order, self._batch)
        return torch.from_numpy(
            np.stack([self._window(self._images[int(index)], rng) for index in chosen])
        )

    def _window(self, image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        height, width = image.shape[:2]
        x, y = rng.integers((width - self._window_px + 1, height - self._window_px + 1))
        return image[y : y + self._window_px, x : x + self._window_px]
