"""Which windows of the slide the network sees, and which pixels each of them owns.

::

    +-------------------------- read --------------------------+
    |                          halo                            |
    |      +------------------ write -------------------+      |
    |      |  owned by this tile alone: whole chunks    |      |
    |      +--------------------------------------------+      |
    |                                                          |
    +----------------------------------------------------------+

``write`` boxes are disjoint, aligned to :attr:`TileGrid.tile_px`, and together cover
the tissue. ``read`` is ``write`` plus the halo; all reads have one size, so they may
reach beyond the slide, where the reader puts white.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wsi_pipeline.geometry import Box, PixelGrid

__all__ = ["PANEL_PX", "Tile", "TileGrid"]

PANEL_PX = 16384
"""Tiles are walked in columns of this width, so memory does not grow with the slide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One window of the network, in pixels of the working grid."""

    column: int
    """Index in x on the lattice of tiles."""
    row: int
    """Index in y."""
    write: Box
    """The pixels this tile alone fills, clipped to the slide."""
    read: Box
    """The pixels the network sees: a fixed size, may reach beyond the slide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGrid:
    """The tiles of one slide, in the order in which they are processed."""

    grid: PixelGrid
    """The working grid: the slide at the pixel size the network sees."""
    tile_px: int
    """Side of a full write box."""
    halo_px: int
    """Margin of the read box."""
    tiles: tuple[Tile, ...]
    """The tiles that touch tissue: panel by panel, row by row, left to right."""

    @classmethod
    def cover(
        cls,
        grid: PixelGrid,
        *,
        tile_px: int,
        halo_px: int,
        panel_px: int = PANEL_PX,
        wanted: Callable[[Box], bool] = lambda _: True,
    ) -> TileGrid:
        """Lay tiles over a grid and keep the wanted ones.

        Args:
            grid: the working grid.
            tile_px: side of a write box, a multiple of 16.
            halo_px: margin of the read boxes, a multiple of 16.
            panel_px: tiles are walked in columns of this width; only their order depends on it.
            wanted: tells whether a write box holds anything worth computing.
        """
        if tile_px < 16 or tile_px % 16 or halo_px < 0 or halo_px % 16:
            msg = f"tile ({tile_px}) and halo ({halo_px}) must be multiples of 16"
            raise ValueError(msg)
        lattice = cls(grid=grid, tile_px=tile_px, halo_px=halo_px, tiles=())
        columns, rows = lattice.shape
        panel = max(1, panel_px // tile_px)
        tiles = (
            lattice.tile(column, row)
            for left in range(0, columns, panel)
            for row in range(rows)
            for column in range(left, min(left + panel, columns))
        )
        return cls(
            grid=grid,
            tile_px=tile_px,
            halo_px=halo_px,
            tiles=tuple(tile for tile in tiles if wanted(tile.write)),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """``(columns, rows)`` of the lattice, tissue or not."""
        width, height = self.grid.size
        return -(-width // self.tile_px), -(-height // self.tile_px)

    @property
    def read_px(self) -> int:
        """Side of every read box."""
        return self.tile_px + 2 * self.halo_px

    def tile(self, column: int, row: int) -> Tile:
        """Return the tile at a place of the lattice."""
        full = Box(
            x=column * self.tile_px, y=row * self.tile_px, width=self.tile_px, height=self.tile_px
        )
        return Tile(
            column=column,
            row=row,
            write=full.intersect(self.grid.box),
            read=full.pad(self.halo_px),
        )

    def shard(self, index: int, count: int) -> TileGrid:
        """Return every ``count``-th tile from ``index`` on; the shards partition the tiles."""
        if not 0 <= index < count:
            msg = f"shard index must be in 0..{count - 1}, not {index}"
            raise ValueError(msg)
        return self.only(self.tiles[index::count])

    def only(self, tiles: tuple[Tile, ...]) -> TileGrid:
        """Return the same lattice with other tiles."""
        return TileGrid(grid=self.grid, tile_px=self.tile_px, halo_px=self.halo_px, tiles=tiles)
