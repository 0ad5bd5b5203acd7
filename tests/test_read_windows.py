"""Windows: the same pixels as single reads, each tile decoded once, nothing else decoded."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slide_fixtures import picture, write_slide

from wsi_pipeline.geometry import Box
from wsi_pipeline.slide import Slide
from wsi_pipeline.slide.bands import read_bands
from wsi_pipeline.slide.planes import Plane, Sampling
from wsi_pipeline.slide.reader import RasterLevel
from wsi_pipeline.tiling import TileGrid

IMAGE = picture(700, 500)
MPPS = (0.25, 0.5, 0.37, 0.2, 1.7)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slides") / "a.svs", IMAGE, "jpeg-ycc420")


@pytest.fixture(scope="module", params=MPPS)
def whole(request, path):
    """A slide, a grid, and the grid read in one go with a white frame of 64 pixels."""
    with Slide.open(path) as slide:
        grid = slide.working_grid(request.param)
        yield slide, grid, slide.read(grid, grid.box.pad(64))


def cut(frame, box):
    return frame[box.shift(64, 64).slices]


def spy(slide):
    """Count how often each tile is decoded from now on."""
    counts = Counter()
    original = slide._reader.tile

    def tile(*place):
        counts[place] += 1
        return original(*place)

    slide._reader.tile = tile
    return counts


boxes_anywhere = st.builds(
    Box, x=st.integers(-60, 300), y=st.integers(-60, 250), width=st.integers(1, 120),
    height=st.integers(1, 120),
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(box=boxes_anywhere)
def test_a_pixel_has_one_value_whatever_box_is_read(whole, box):
    slide, grid, frame = whole
    box = box.intersect(grid.box.pad(64))
    assert np.array_equal(slide.read(grid, box), cut(frame, box))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tile_px=st.sampled_from([16, 48, 96]),
    halo_px=st.sampled_from([0, 16, 48]),
    keep=st.integers(0, 2**64 - 1),
    threads=st.integers(1, 3),
)
def test_windows_equal_single_reads(whole, tile_px, halo_px, keep, threads):
    slide, grid, frame = whole
    cells = iter(range(10**6))
    tiles = TileGrid.cover(
        grid, tile_px=tile_px, halo_px=halo_px, wanted=lambda _: keep >> (next(cells) % 64) & 1
    )
    boxes = [
        tile.read for tile in tiles.tiles if tile.read.intersect(grid.box.pad(64)) == tile.read
    ]
    found = 0
    for box, window in zip(boxes, slide.read_windows(grid, boxes, threads=threads), strict=True):
        assert np.array_equal(window, cut(frame, box))
        found += 1
    assert found == len(boxes)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tile_px=st.sampled_from([48, 96]),
    halo_px=st.sampled_from([0, 16, 48]),
    seed=st.integers(0, 2**32),
)
def test_fitted_windows_equal_single_reads_and_share_tiles(whole, tile_px, halo_px, seed):
    slide, grid, frame = whole
    rng = np.random.default_rng(seed)

    def extent(write):  # the first is whole, so rows are as high as the lattice's
        if write.x == write.y == 0:
            return write
        return Box(
            x=write.x + int(rng.integers(0, write.width)),
            y=write.y + int(rng.integers(0, write.height)),
            width=1 + int(rng.integers(0, 40)),
            height=1 + int(rng.integers(0, 40)),
        ).intersect(write)

    tiles = TileGrid.cover(grid, tile_px=tile_px, halo_px=halo_px, extent=extent, step_px=16)
    boxes = [
        tile.read for tile in tiles.tiles if tile.read.intersect(grid.box.pad(64)) == tile.read
    ]
    counts = spy(slide)
    for box, window in zip(boxes, slide.read_windows(grid, boxes, threads=2), strict=True):
        assert np.array_equal(window, cut(frame, box))
    assert set(counts.values()) == {1}


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(boxes=st.lists(boxes_anywhere, max_size=8))
def test_windows_in_any_order_are_still_right(whole, boxes):
    slide, grid, frame = whole
    boxes = [box.intersect(grid.box.pad(64)) for box in boxes]
    windows = list(map(np.copy, slide.read_windows(grid, boxes, threads=2)))
    assert len(windows) == len(boxes)
    for box, window in zip(boxes, windows, strict=True):
        assert np.array_equal(window, cut(frame, box))


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.37])
def test_each_tile_is_decoded_once_a_panel(path, mpp):
    with Slide.open(path) as slide:
        grid = slide.working_grid(mpp)
        boxes = [
            Box(x=x, y=y, width=96, height=96)
            for y in range(0, grid.size[1] - 96, 24)
            for x in range(0, grid.size[0] - 96, 24)
        ]
        counts = spy(slide)
        for _ in slide.read_windows(grid, boxes, threads=2):
            pass
    assert len(counts) > 20
    assert set(counts.values()) == {1}


def test_a_tile_is_kept_for_a_later_row_that_needs_it(path):
    # the middle row looks elsewhere, the third comes back to the first one's tiles
    boxes = [Box(x=0, y=0, width=64, height=100), Box(x=400, y=10, width=64, height=100),
             Box(x=0, y=20, width=64, height=100)]  # fmt: skip
    with Slide.open(path) as slide:
        counts = spy(slide)
        for _ in slide.read_windows(slide.working_grid(0.25), boxes, threads=1):
            pass
    assert set(counts.values()) == {1}


def test_tiles_that_no_window_touches_are_not_decoded(path):
    boxes = [Box(x=0, y=0, width=64, height=64), Box(x=448, y=0, width=64, height=64)]
    with Slide.open(path) as slide:
        counts = spy(slide)
        for _ in slide.read_windows(slide.working_grid(0.25), boxes, threads=2):
            pass
    assert sorted(counts) == [(0, 0, 0, 1), (0, 7, 0, 1)]


def test_the_next_row_is_decoded_ahead_and_no_more(path):
    boxes = [Box(x=0, y=y, width=64, height=64) for y in range(0, 448, 64)]
    with Slide.open(path) as slide:
        counts = spy(slide)
        windows = slide.read_windows(slide.working_grid(0.25), boxes, threads=1)
        for index, _ in enumerate(windows):
            assert len(counts) <= index + 2
            assert (0, 0, index, 1) in counts


def test_windows_are_read_only_views(path):
    with Slide.open(path) as slide:
        grid = slide.working_grid(0.5)
        box = Box(x=5, y=5, width=40, height=30)
        for window in slide.read_windows(grid, [box, box.shift(10, 0)], threads=1):
            assert window.base is not None
            with pytest.raises(ValueError, match="read-only"):
                window[0] = 0


@pytest.mark.parametrize("threads", [1, 2])
def test_stop_ends_the_iteration(path, threads):
    boxes = [Box(x=0, y=y, width=64, height=64) for y in range(0, 400, 16)]
    with Slide.open(path) as slide:
        grid = slide.working_grid(0.25)
        seen = []
        windows = slide.read_windows(grid, boxes, threads=threads, stop=lambda: len(seen) >= 3)
        for _ in windows:
            seen.append(None)
        assert len(seen) == 3
        assert not list(slide.read_windows(grid, boxes, threads=threads, stop=lambda: True))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_thread_reaches_the_caller(path, threads):
    with Slide.open(path) as slide:

        def fail(*place):
            raise MemoryError("made up")

        slide._reader.tile = fail
        grid = slide.working_grid(0.25)
        with pytest.raises(MemoryError, match="made up"):
            list(slide.read_windows(grid, [Box(x=0, y=0, width=64, height=64)], threads=threads))


@pytest.mark.parametrize("threads", [1, 3])
def test_closing_early_leaves_no_thread(path, threads):
    import threading

    boxes = [Box(x=0, y=y, width=64, height=64) for y in range(0, 400, 16)]
    with Slide.open(path) as slide:
        before = threading.active_count()
        windows = slide.read_windows(slide.working_grid(0.25), boxes, threads=threads)
        next(windows)
        windows.close()
        assert threading.active_count() == before


def test_no_boxes_give_no_windows(path):
    with Slide.open(path) as slide:
        assert list(slide.read_windows(slide.working_grid(0.5), [], threads=1)) == []


@pytest.fixture
def sizes(monkeypatch):
    """Pixels of the bands that are made from now on."""
    from wsi_pipeline.slide import painting

    sizes = []
    original = painting._pair
    monkeypatch.setattr(painting, "_pair", lambda pixels: sizes.append(pixels) or original(pixels))
    return sizes


def test_memory_is_two_bands_however_tall_the_slide_is(path, sizes):
    with Slide.open(path) as slide:
        grid = slide.working_grid(0.25)
        slide.read(grid, Box(x=0, y=0, width=100, height=60_000))
        assert max(sizes) <= 128 * (bands_height := 512 + 2 * 64), bands_height
        for _ in slide.read_windows(
            grid, [Box(x=0, y=y, width=64, height=96) for y in range(-50, 9000, 32)], threads=1
        ):
            pass
    assert sizes[1] <= 64 * (96 + 2 * 64)


def test_a_resampled_band_is_its_windows_and_the_lines_that_tiles_complete(path, sizes):
    with Slide.open(path) as slide:
        grid = slide.working_grid(0.37)
        boxes = [Box(x=0, y=y, width=64, height=96) for y in range(-50, 9000, 32)]
        for _ in slide.read_windows(grid, boxes, threads=1):
            pass
        assert sizes == [64 * (96 + 64 * 25 // 37 + 2)]
        assert 2 * 3 * sizes[0] < slide.band_bytes(grid, (64, 96)) < 2 * 3 * 1.6 * sizes[0]


def test_nothing_is_made_below_the_last_window(path, sizes):
    with Slide.open(path) as slide:
        slide.read(slide.working_grid(0.37), Box(x=3, y=5, width=70, height=10))
    assert sizes == [70 * 10]


def test_memory_is_one_panel_however_wide_the_slide_is(path, sizes, monkeypatch):
    """Panels one row of tiles high begin at the same height, and are still panels."""
    from wsi_pipeline.slide import rows

    monkeypatch.setattr(rows, "_PANEL_PX", 128)
    with Slide.open(path) as slide:
        grid = slide.working_grid(0.25)
        boxes = [Box(x=x, y=0, width=64, height=64) for x in range(0, 9000, 48)]
        for _ in slide.read_windows(grid, boxes, threads=1):
            pass
    assert max(sizes) <= (128 + 2 * 64) * (64 + 2 * 64)


@pytest.mark.parametrize("tile_px", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("scale", [2.5, 3.7, 7.9])
def test_tiles_lower_than_what_a_pixel_is_made_of(tile_px, scale):
    width, height = 60, 90
    image = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
    raster = RasterLevel(size=(width, height), tile_size=(16, tile_px))
    plane = Plane(level=0, reduction=1, raster=raster, spacing=(1.0, 1.0))
    sampling = Sampling(plane=plane, scale=(scale, scale), offset=(0.3, 0.7))

    def fetch(_plane, column, row):
        place = raster.tile_box(column, row).slices
        return np.ascontiguousarray(image[place])

    side = 5
    boxes = [
        Box(x=x - 1, y=y - 1, width=side + 2, height=side + 2)
        for y in range(0, int(height / scale), side)
        for x in range(0, int(width / scale), side)
    ]

    def read(some):
        windows = read_bands(sampling, some, fetch=fetch, threads=2, stop=lambda: False)
        return [window.copy() for window in windows]

    for box, window in zip(boxes, read(boxes), strict=True):
        assert np.array_equal(window, read([box])[0]), box
