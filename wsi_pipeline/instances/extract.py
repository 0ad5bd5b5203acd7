"""Maps to objects: the rows of the table, in their final order, as a stream.

Heads with anchor rules go through :mod:`wsi_pipeline.instances.anchors`, heads with run rules
through :mod:`wsi_pipeline.instances.regions`, heads with peak rules through
:mod:`wsi_pipeline.instances.peaks`; no result depends on the window, the halo or the number of
threads, and the order of rows is a function of the objects alone:

    head (as the model lists them), panel (column of 8192 px), cell (2048 px; row by
    row within the panel), ``object_id``

Windows are walked panel by panel, so only the cells of one row of windows are held.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.instances.anchors import AnchorFinder
from wsi_pipeline.instances.heads import HeadMaps, MapStore, Objects
from wsi_pipeline.instances.kernels import Ints
from wsi_pipeline.instances.parallel import ordered_map
from wsi_pipeline.instances.peaks import PeakFinder
from wsi_pipeline.instances.regions import Regions, find_regions, lay_tiles
from wsi_pipeline.instances.rows import ID_BITS, RowMaker
from wsi_pipeline.instances.runs import Runs
from wsi_pipeline.instances.tracing import trace_runs
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules, RunRules

__all__ = ["Extraction", "extract_objects", "outline_polygons"]

_PANEL_PX = 8192
_CELL_PX = 2048
_CHUNK = 512
"""Regions drawn at a time."""


@dataclass(kw_only=True)
class Extraction:
    """Objects on their way from the maps to the table."""

    batches: Iterator[pa.RecordBatch] = field(init=False)
    """Rows of ``table.OBJECT_SCHEMA`` in final order; can be walked once."""
    truncated: int = 0
    """Objects that touch the border of the slide, so that a part is missing. After the walk."""
    oversized: int = 0
    """Cores dropped because they exceed ``max_diameter_um``. After the walk."""


def extract_objects(
    store: MapStore,
    *,
    slide_id: str,
    window_px: int = 1024,
    halo_px: int = 32,
    workers: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> Extraction:
    """Turn the maps of a slide into objects.

    Args:
        store: finished maps.
        slide_id: goes into every row.
        window_px: side of the windows, in pixels of each head; only costs depend on it.
        halo_px: margin of the windows; only costs depend on it.
        workers: threads.
        stop: asked before each window.

    Raises:
        ModelBundleError: the heads' rules contradict each other.
        Interrupted: ``stop()`` was true; raised from the walk through the batches.
    """
    if window_px < 1 or halo_px < 0:
        msg = f"window ({window_px}) must be positive and halo ({halo_px}) not negative"
        raise ValueError(msg)
    extraction = Extraction()
    walk = _Walk(
        store=store,
        slide_id=slide_id,
        window_px=window_px,
        halo_px=halo_px,
        workers=workers,
        stop=stop,
        extraction=extraction,
    )
    order = _parents_first(store.spec)
    extraction.batches = walk.batches(order)
    return extraction


def outline_polygons(image: Ints, grid: PixelGrid) -> list[tuple[int, bytes, int]]:
    """Draw the 4-connected components of a mask or label image.

    Args:
        image: (H, W) bool or uint8; 0 is background.
        grid: where the image lies on the slide.

    Returns:
        ``(value, WKB polygon with holes in level-0 pixels, pixels)`` of each component, in
        raster order.
    """
    runs = Runs.of_image(np.ascontiguousarray(image, np.uint8))
    labels, count = runs.components()
    values = np.zeros(count + 1, np.int32)
    values[labels] = runs.values
    table = runs.describe(labels, count)
    anchors = np.ascontiguousarray(table[:, 5:7])
    outlines = trace_runs(*runs.relabel(labels).by_value(), anchors)
    offsets, data = outlines.wkb(grid)
    text = data.tobytes()
    return [
        (int(values[i + 1]), text[offsets[i] : offsets[i + 1]], int(table[i, 0]))
        for i in range(count)
    ]


def _parents_first(spec: ModelSpec) -> list[HeadSpec]:
    """Return the heads with run rules so that each comes after its parent."""
    order: list[HeadSpec] = []
    waiting = []
    for head in spec.instance_heads:
        if isinstance(head.rules, RunRules):
            waiting.append(head)
        elif head.inside_parent:
            msg = f"head {head.name!r}: inside_parent needs run rules"
            raise ModelBundleError(msg)
    while waiting:
        names = {head.name for head in waiting}
        ready = [head for head in waiting if head.parent not in names]
        if not ready:
            msg = f"model {spec.name!r}: heads {sorted(names)} are each other's parents"
            raise ModelBundleError(msg)
        order += ready
        waiting = [head for head in waiting if head not in ready]
    return order


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """One pass over all heads of a slide."""

    store: MapStore
    slide_id: str
    window_px: int
    halo_px: int
    workers: int
    stop: Callable[[], bool]
    extraction: Extraction

    def batches(self, order: list[HeadSpec]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of all heads in the order of the model."""
        regions: dict[str, Regions] = {}
        for head in order:
            assert isinstance(head.rules, RunRules)
            regions[head.name] = find_regions(
                HeadMaps(store=self.store, head=head),
                head.rules,
                regions[head.parent] if head.inside_parent and head.parent else None,
                window_px=self.window_px,
                workers=self.workers,
                stop=self.stop,
            )
        make = RowMaker(self.store, self.slide_id, regions)
        for head in self.store.spec.object_heads:
            maps = HeadMaps(store=self.store, head=head)
            if isinstance(head.rules, AnchorRules):
                yield from self._anchored(maps, head.rules, make)
            elif isinstance(head.rules, PeakRules):
                yield from self._peaked(maps, head.rules, make)
            else:
                yield from self._drawn(maps, regions[head.name], make)

    def _drawn(self, maps: HeadMaps, regions: Regions, make: RowMaker) -> Iterator[pa.RecordBatch]:
        order = _place_order(maps, *regions.anchors.T)
        chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]

        def draw(index: Ints) -> tuple[pa.RecordBatch, int]:
            objects = regions.objects(index)
            return make.rows(maps, objects), _at_border(maps, objects)

        for batch, truncated in ordered_map(draw, chunks, workers=self.workers, stop=self.stop):
            self.extraction.truncated += truncated
            yield batch

    def _anchored(
        self, maps: HeadMaps, rules: AnchorRules, make: RowMaker
    ) -> Iterator[pa.RecordBatch]:
        finder = AnchorFinder(maps, rules)
        find = partial(finder.find, halo_px=self.halo_px)
        if (yield from self._in_windows(maps, find, make)):
            # Where one was met depends on the windows; how many there are does not.
            scan = partial(ordered_map, workers=self.workers, stop=self.stop)
            tiles = lay_tiles(maps.grid.box, self.window_px)
            self.extraction.oversized += finder.count_oversized(list(scan(finder.core_runs, tiles)))

    def _peaked(self, maps: HeadMaps, rules: PeakRules, make: RowMaker) -> Iterator[pa.RecordBatch]:
        finder = PeakFinder(maps, rules)
        yield from self._in_windows(maps, lambda tile: (finder.find(tile), False), make)

    def _in_windows(
        self,
        maps: HeadMaps,
        find: Callable[[Box], tuple[Objects | None, bool]],
        make: RowMaker,
    ) -> Generator[pa.RecordBatch, None, bool]:
        """Yield rows of the objects that each window owns; return whether any was oversized."""

        def rows(tile: Box) -> tuple[pa.RecordBatch | None, int, bool]:
            objects, oversized = find(tile)
            if objects is None:
                return None, 0, oversized
            return make.rows(maps, objects), _at_border(maps, objects), oversized

        cell = max(1, _CELL_PX // maps.head.stride)
        any_oversized = False
        for panel in _panels(maps):
            held: list[pa.RecordBatch] = []
            tiles = lay_tiles(panel, self.window_px)
            results = ordered_map(rows, tiles, workers=self.workers, stop=self.stop)
            for tile, (batch, truncated, oversized) in zip(tiles, results, strict=True):
                self.extraction.truncated += truncated
                any_oversized |= oversized
                held += [] if batch is None else [batch]
                if tile.x1 == panel.x1 and held:
                    # A row of windows is done: rows of cells above its end are complete.
                    last = tile.y1 == panel.y1
                    done = maps.grid.size[1] if last else tile.y1 // cell * cell
                    ready, held = _split(maps, held, done)
                    yield from ready
        return any_oversized


def _panels(maps: HeadMaps) -> Iterator[Box]:
    side = max(1, _PANEL_PX // maps.head.stride)
    width, height = maps.grid.size
    for x in range(0, width, side):
        yield Box(x=x, y=0, width=min(side, width - x), height=height)


def _place_order(maps: HeadMaps, x: Ints, y: Ints) -> Ints:
    """Return the order of rows by panel, cell and id."""
    panel = max(1, _PANEL_PX // maps.head.stride)
    cell = max(1, _CELL_PX // maps.head.stride)
    return np.lexsort((x, y, x // cell, y // cell, x // panel))


def _split(
    maps: HeadMaps, batches: list[pa.RecordBatch], done_y: int
) -> tuple[list[pa.RecordBatch], list[pa.RecordBatch]]:
    """Sort rows by place; return those with anchors above ``done_y``, and the others."""
    table = pa.concat_batches(batches)
    number = table.column("object_id").to_numpy() & ((1 << ID_BITS) - 1)
    y, x = np.divmod(number, maps.grid.size[0])
    order = _place_order(maps, x, y)
    ready = table.take(pa.array(order[y[order] < done_y]))
    rest = table.take(pa.array(np.flatnonzero(y >= done_y)))
    return ([ready] if len(ready) else []), ([rest] if len(rest) else [])


def _at_border(maps: HeadMaps, objects: Objects) -> int:
    """Count the objects that touch the border of the slide."""
    width, height = maps.grid.size
    left, top, right, bottom = (
        objects.outlines.column(name) for name in ("left", "top", "right", "bottom")
    )
    touches = (left <= 0) | (top <= 0) | (right >= 2 * width) | (bottom >= 2 * height)
    return int(np.count_nonzero(touches))
