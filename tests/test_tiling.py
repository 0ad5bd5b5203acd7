"""Tiles: disjoint, complete, aligned, with the halo around them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.tiling import PANEL_PX, TileGrid


def grid(width: int, height: int) -> PixelGrid:
    return PixelGrid(origin=(0.0, 0.0), spacing=(2.0, 2.0), size=(width, height))


sizes = st.integers(1, 700)
sides = st.integers(1, 12).map(lambda n: 16 * n)


@given(sizes, sizes, sides, st.integers(0, 4).map(lambda n: 16 * n))
def test_writes_cover_the_grid_once_and_reads_surround_them(width, height, tile_px, halo_px):
    tiles = TileGrid.cover(grid(width, height), tile_px=tile_px, halo_px=halo_px)
    count = np.zeros((height, width), int)
    for tile in tiles.tiles:
        count[tile.write.slices] += 1
        assert tile.write.x % tile_px == 0
        assert tile.write.y % tile_px == 0
        assert tile.read.size == (tiles.read_px, tiles.read_px)
        assert tile.read.pad(-halo_px).contains(tile.write)
        assert tile.read.x == tile.write.x - halo_px
        assert tiles.tile(tile.column, tile.row) == tile
    assert (count == 1).all()


@given(st.integers(0, 2**32), st.integers(1, 5))
@settings(max_examples=30)
def test_shards_partition_the_wanted_tiles(seed, count):
    rng = np.random.default_rng(seed)
    tissue = rng.random((20, 30)) < 0.3
    tiles = TileGrid.cover(
        grid(30 * 16, 20 * 16),
        tile_px=16,
        halo_px=16,
        wanted=lambda box: bool(tissue[box.y // 16, box.x // 16]),
    )
    assert {(t.row, t.column) for t in tiles.tiles} == set(zip(*np.nonzero(tissue), strict=True))
    shards = [tile for i in range(count) for tile in tiles.shard(i, count).tiles]
    assert sorted(shards, key=tiles.tiles.index) == list(tiles.tiles)


@given(sizes, sizes, sides, st.integers(0, 2**32), st.sampled_from([16, 32, 64]))
def test_fitted_windows_are_the_fewest_steps_around_the_extent(width, height, side, seed, step):
    rng = np.random.default_rng(seed)
    extents = []

    def extent(write):
        (x0, x1), (y0, y1) = (
            np.sort(rng.integers(0, size + 1, 2)) + start
            for size, start in zip(write.size, (write.x, write.y), strict=True)
        )
        extents.append(Box.from_edges(int(x0), int(y0), max(int(x1), x0 + 1), max(int(y1), y0 + 1)))
        return extents[-1].intersect(write) if extents[-1].intersect(write).area else write

    found = TileGrid.cover(
        grid(width, height), tile_px=side, halo_px=32, extent=extent, step_px=step
    )
    whole = TileGrid.cover(grid(width, height), tile_px=side, halo_px=32)
    assert [tile.write for tile in found.tiles] == [tile.write for tile in whole.tiles]
    for tile, of_whole, box in zip(found.tiles, whole.tiles, extents, strict=True):
        full, computed = of_whole.computed, tile.computed
        assert tile.read == computed.pad(32)
        assert full.contains(computed)
        box = box.intersect(tile.write)
        assert not box.area or computed.contains(box)
        assert tile.predicted == computed.intersect(tile.write)
        for low, high, first, last, need, end in (
            (computed.x, computed.x1, full.x, full.x1, box.x, box.x1),
            (computed.y, computed.y1, full.y, full.y1, box.y, box.y1),
        ):
            assert (low - first) % step == 0
            assert (high - first) % step == 0 or high == last
            if box.area:
                assert low + step > need
                assert high - step < end


def test_windows_are_of_one_size_unless_they_are_fitted():
    tiles = TileGrid.cover(grid(100, 100), tile_px=64, halo_px=16).tiles
    assert {tile.read.size for tile in tiles} == {(96, 96)}
    assert tiles[-1].predicted == tiles[-1].write != tiles[-1].computed


def test_an_empty_extent_is_one_step():
    empty = Box(x=0, y=0, width=0, height=0)
    (tile,) = TileGrid.cover(
        grid(64, 64), tile_px=64, halo_px=16, extent=lambda _: empty, step_px=32
    ).tiles
    assert tile.computed == Box(x=0, y=0, width=32, height=32)


def test_wide_slides_are_walked_in_panels():
    tiles = TileGrid.cover(grid(3 * PANEL_PX + 5, 5000), tile_px=1024, halo_px=0).tiles
    panels = [tile.write.x // PANEL_PX for tile in tiles]
    assert panels == sorted(panels)
    for panel in set(panels):
        places = [(t.row, t.column) for t, p in zip(tiles, panels, strict=True) if p == panel]
        assert places == sorted(places)


def test_senseless_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        TileGrid.cover(grid(10, 10), tile_px=100, halo_px=16)
    with pytest.raises(ValueError, match="multiples of 16"):
        TileGrid.cover(grid(10, 10), tile_px=96, halo_px=10)
    with pytest.raises(ValueError, match="multiples of 16"):
        TileGrid.cover(grid(10, 10), tile_px=96, halo_px=16, step_px=24)
    with pytest.raises(ValueError, match="shard index"):
        TileGrid.cover(grid(10, 10), tile_px=96, halo_px=16).shard(2, 2)
