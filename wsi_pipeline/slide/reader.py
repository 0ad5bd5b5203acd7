"""What the rest of this room needs of a file format: tiles, and nothing else.

A reader shows each level as a lattice of equal tiles, whatever the file holds: the
TIFF reader shows the file's own tiles, the others regions of a convenient size. Bands,
windows and resampling are written once, on top of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.geometry import Box

__all__ = ["NotTakenError", "RasterLevel", "TileError", "TileReader"]


class TileError(Exception):
    """One tile cannot be decoded; the slide may still be good."""


class NotTakenError(Exception):
    """A reader does not take this file; another one may."""

    def __init__(self, reason: str, *, damaged: bool) -> None:
        super().__init__(reason)
        self.damaged = damaged
        """Whether the reason is damage rather than a kind of file it does not know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RasterLevel:
    """One resolution of a slide as its reader sees it."""

    size: tuple[int, int]
    """``(width, height)`` in pixels of this level."""
    tile_size: tuple[int, int]
    """``(width, height)`` of every tile; those at the right and bottom edge are cropped."""

    @property
    def lattice(self) -> tuple[int, int]:
        """``(columns, rows)`` of tiles."""
        return -(-self.size[0] // self.tile_size[0]), -(-self.size[1] // self.tile_size[1])

    def tile_box(self, column: int, row: int) -> Box:
        """Return the pixels of this level that a tile covers, cropped to the level."""
        width, height = self.tile_size
        whole = Box(x=0, y=0, width=self.size[0], height=self.size[1])
        return Box(x=column * width, y=row * height, width=width, height=height).intersect(whole)


class TileReader(Protocol):
    """An open file; :meth:`tile` may be called from several threads at once."""

    @property
    def kind(self) -> str:
        """``tiff``, ``openslide`` or ``tiffslide``."""

    @property
    def vendor(self) -> str:
        """The scanner's format, by openslide's name for it."""

    @property
    def properties(self) -> Mapping[str, str]:
        """What the file says about itself, under openslide's names."""

    @property
    def associated(self) -> Mapping[str, tuple[int, int]]:
        """``(width, height)`` of pictures beside the slide by name: label, macro. Never read."""

    @property
    def levels(self) -> tuple[RasterLevel, ...]:
        """Finest first."""

    def tile(self, level: int, column: int, row: int, reduction: int) -> NDArray[np.uint8] | None:
        """Decode one tile.

        Args:
            level: index into :attr:`levels`.
            column: index of the tile in x.
            row: index of the tile in y.
            reduction: a power of two that divides the tile's width and height.

        Returns:
            ``(ceil(h / reduction), ceil(w / reduction), 3)`` uint8 of the cropped tile,
            area-averaged; None where the file has no tile.

        Raises:
            TileError: the tile is there and cannot be decoded.
            SlideError: its bytes cannot be read now, for reasons outside the slide.
        """

    def close(self) -> None:
        """Release the file."""
