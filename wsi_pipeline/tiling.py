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
the tissue. What is computed is the whole tile, or as much of it as holds tissue::

    +--------------- read ---------------+- - - - - - - -+
    |  halo                              |
    |      +-------- computed -------+ . . . write . +   |
    |      |        tissue           |       .       .
    |      +-------------------------+ . . . . . . . +   |
    |                                    |
    +------------------------------------+- - - - - - - -+

``read`` is that plus the halo. Both may reach beyond the slide, where the reader puts white.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from wsi_pipeline.geometry import Box, PixelGrid

__all__ = ["PANEL_PX", "Tile", "TileGrid", "fit_step"]

PANEL_PX = 16384
"""Tiles are walked in columns of this width, so memory does not grow with the slide."""
_FIT_STEP_PX = 128
"""Sides of fitted windows differ by multiples of this or, in tiles of 2,048 px and more, of an
eighth of a tile: there are few sizes, each of which has its first time."""


def fit_step(tile_px: int) -> int:
    """Return the step of the sides of windows in tiles of a size."""
    return _FIT_STEP_PX * max(1, tile_px // 1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One window of the network, in pixels of the working grid."""

    column: int
    """Index in x on the lattice of tiles."""
    row: int
    """Index in y."""
    write: Box
    """The pixels this tile alone fills, clipped to the slide."""
    computed: Box
    """The pixels the network makes maps of; what else there is of ``write`` stays blank."""
    read: Box
    """The pixels the network sees."""

    @property
    def predicted(self) -> Box:
        """The pixels of ``write`` that are computed."""
        return self.computed.intersect(self.write)


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
        extent: Callable[[Box], Box] | None = None,
        step_px: int | None = None,
    ) -> TileGrid:
        """Lay tiles over a grid and keep the wanted ones.

        Args:
            grid: the working grid.
            tile_px: side of a write box, a multiple of 16.
            halo_px: margin of the read boxes, a multiple of 16.
            panel_px: tiles are walked in columns of this width; only their order depends on it.
            wanted: tells whether a write box holds anything worth computing.
            extent: the part of a wanted write box that is worth computing, not empty; None: the
                whole tile, so that all windows have one size.
            step_px: windows are fitted to the extent in steps of this, a multiple of 16. None:
                :func:`fit_step`.
        """
        step_px = fit_step(tile_px) if step_px is None else step_px
        if tile_px < 16 or any(px < 0 or px % 16 for px in (tile_px, halo_px, step_px)):
            msg = f"tile ({tile_px}), halo ({halo_px}), step ({step_px}) must be multiples of 16"
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
        kept = (tile for tile in tiles if wanted(tile.write))
        if extent is not None:
            kept = (lattice.fitted(tile, extent(tile.write), step_px) for tile in kept)
        return cls(grid=grid, tile_px=tile_px, halo_px=halo_px, tiles=tuple(kept))

    @property
    def shape(self) -> tuple[int, int]:
        """``(columns, rows)`` of the lattice, tissue or not."""
        width, height = self.grid.size
        return -(-width // self.tile_px), -(-height // self.tile_px)

    @property
    def read_px(self) -> int:
        """Side of the read box of a whole tile; no window is larger."""
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
            computed=full,
            read=full.pad(self.halo_px),
        )

    def fitted(self, tile: Tile, extent: Box, step_px: int) -> Tile:
        """Return a whole tile with no more computed than covers a box within it.

        Steps are counted from the tile's corner: what the network sees of a pixel then lies on
        the same lattice of its coarser maps as if all of the tile were computed.
        """
        full = tile.computed

        def edges(start: int, stop: int, first: int, last: int) -> tuple[int, int]:
            low = first + (start - first) // step_px * step_px
            high = first - (first - max(stop, start + 1)) // step_px * step_px
            return low, min(last, high)

        x0, x1 = edges(extent.x, extent.x1, full.x, full.x1)
        y0, y1 = edges(extent.y, extent.y1, full.y, full.y1)
        computed = Box.from_edges(x0, y0, x1, y1)
        return replace(tile, computed=computed, read=computed.pad(self.halo_px))

    def shard(self, index: int, count: int) -> TileGrid:
        """Return every ``count``-th tile from ``index`` on; the shards partition the tiles."""
        if not 0 <= index < count:
            msg = f"shard index must be in 0..{count - 1}, not {index}"
            raise ValueError(msg)
        return self.only(self.tiles[index::count])

    def only(self, tiles: tuple[Tile, ...]) -> TileGrid:
        """Return the same lattice with other tiles."""
        return TileGrid(grid=self.grid, tile_px=self.tile_px, halo_px=self.halo_px, tiles=tiles)
