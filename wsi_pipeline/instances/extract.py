"""Maps to objects: the rows of the table, in their final order, as a stream.

Heads with anchor rules go through :mod:`wsi_pipeline.instances.anchors`, heads with run rules
through :mod:`wsi_pipeline.instances.regions`, heads with peak rules through
:mod:`wsi_pipeline.instances.peaks`; no result depends on the window, the halo or the number of
threads, and the order of rows (:mod:`wsi_pipeline.instances.places`) is a function of the
objects alone.

There are two walks. The first (:mod:`wsi_pipeline.instances.survey`) looks at every window, and
can do so while the maps still grow. The second needs all of it: large objects are joined over
the slide, and then every row gets its parent, its tissue and its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances.heads import HeadMaps, MapStore
from wsi_pipeline.instances.kernels import Ints
from wsi_pipeline.instances.parallel import check_stop, ordered_map
from wsi_pipeline.instances.places import cell_side, lay_panels, place_order, split_rows
from wsi_pipeline.instances.regions import Regions, find_regions, lay_tiles
from wsi_pipeline.instances.rows import Surroundings
from wsi_pipeline.instances.runs import Runs
from wsi_pipeline.instances.survey import Arrival, SmallObjects, Survey, count_at_border
from wsi_pipeline.instances.tracing import trace_runs
from wsi_pipeline.spec import HeadSpec, ModelSpec, RunRules

__all__ = ["Extraction", "extract_objects", "outline_polygons"]

_CHUNK = 512
"""Regions drawn at a time."""


class Extraction:
    """Objects on their way from the maps to the table."""

    def __init__(
        self,
        store: MapStore,
        survey: Survey,
        order: list[HeadSpec],
        *,
        workers: int,
        stop: Callable[[], bool],
    ) -> None:
        """Use :func:`extract_objects`."""
        self.truncated = 0
        """Objects that touch the border of the slide, so that a part is missing. After the walk."""
        self.oversized = 0
        """Cores dropped because they exceed ``max_diameter_um``. After the walk."""
        self.batches = self._batches()
        """Rows of ``table.OBJECT_SCHEMA`` in final order; can be walked once."""
        self._store = store
        self._survey = survey
        self._order = order
        self._workers = workers
        self._stop = stop
        self._begun = False

    def begin(self, arrival: Arrival | None = None) -> None:
        """Do all that needs no other part of the maps than a window's own.

        That is most of the work. Without this call, it is done when the batches are walked.

        Args:
            arrival: tells when the maps under a box of the working grid are there (the later,
                the larger); windows are looked at in that order. None: all are there.

        Raises:
            Interrupted: ``stop()`` was true.
        """
        self._begun = True
        self._survey.walk(arrival, workers=self._workers, stop=self._stop)

    def close(self) -> None:
        """Give back what is held for batches that nobody will walk through."""
        self.batches.close()
        self._survey.close()

    def _batches(self) -> Generator[pa.RecordBatch, None, None]:
        """Yield the rows of all heads in the order of the model."""
        try:
            if not self._begun:
                self.begin()
            regions = self._find_regions()
            around = Surroundings(self._store, regions)
            for head in self._store.spec.object_heads:
                maps = HeadMaps(store=self._store, head=head)
                if head.name in regions:
                    yield from self._drawn(maps, regions[head.name], around)
                else:
                    yield from self._put_aside(self._survey.small[head.name], around)
        finally:
            self._survey.close()

    def _find_regions(self) -> dict[str, Regions]:
        regions: dict[str, Regions] = {}
        for head in self._order:
            cores = self._survey.cores[head.name]
            regions[head.name] = find_regions(
                cores.maps,
                cores.rules,
                cores.joined(),
                regions[head.parent] if head.inside_parent and head.parent else None,
                window_px=cores.window_px,
                workers=self._workers,
                stop=self._stop,
            )
        return regions

    def _drawn(
        self, maps: HeadMaps, regions: Regions, around: Surroundings
    ) -> Iterator[pa.RecordBatch]:
        order = place_order(maps, *regions.anchors.T)
        chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]

        def draw(index: Ints) -> tuple[pa.RecordBatch, int]:
            objects = regions.objects(index)
            rows = self._survey.make.rows(maps, objects)
            return around.fill(maps, rows, objects.parents), count_at_border(maps, objects)

        for batch, truncated in ordered_map(draw, chunks, workers=self._workers, stop=self._stop):
            self.truncated += truncated
            yield batch

    def _put_aside(self, small: SmallObjects, around: Surroundings) -> Iterator[pa.RecordBatch]:
        """Yield the rows that were put aside, sorted by place and completed."""
        self.truncated += small.truncated
        self._count_oversized(small)
        maps = small.maps
        cell = cell_side(maps)
        for panel in lay_panels(maps):
            held: list[pa.RecordBatch] = []
            for tile in lay_tiles(panel, small.window_px):
                held += small.rows(tile)
                if tile.x1 == panel.x1 and held:
                    check_stop(self._stop)
                    # A row of windows is done: rows of cells above its end are complete.
                    last = tile.y1 == panel.y1
                    done = maps.grid.size[1] if last else tile.y1 // cell * cell
                    ready, held = split_rows(maps, held, done)
                    for rows in ready:
                        yield around.fill(maps, rows)

    def _count_oversized(self, small: SmallObjects) -> None:
        if small.any_oversized:
            # Where one was met depends on the windows; how many there are does not.
            finder = self._survey.finders[small.maps.head.name]
            tiles = lay_tiles(small.maps.grid.box, small.window_px)
            scan = ordered_map(finder.core_runs, tiles, workers=self._workers, stop=self._stop)
            self.oversized += finder.count_oversized(list(scan))


def extract_objects(
    store: MapStore,
    *,
    slide_id: str,
    window_px: int = 1024,
    halo_px: int = 32,
    workers: int = 1,
    stop: Callable[[], bool] = lambda: False,
    scratch: Path | None = None,
) -> Extraction:
    """Turn the maps of a slide into objects.

    Args:
        store: the maps. They may still be growing if their ``read`` waits for what is not there.
        slide_id: goes into every row.
        window_px: side of the windows, in pixels of each head; only costs depend on it.
        halo_px: margin of the windows; only costs depend on it.
        workers: threads.
        stop: asked before each window.
        scratch: folder for rows that wait for their turn, where they are too many for memory.

    Raises:
        ModelBundleError: the heads' rules contradict each other.
        Interrupted: ``stop()`` was true; raised from the walk through the batches.
    """
    if window_px < 1 or halo_px < 0:
        msg = f"window ({window_px}) must be positive and halo ({halo_px}) not negative"
        raise ValueError(msg)
    order = _parents_first(store.spec)
    survey = Survey(store, slide_id, window_px=window_px, halo_px=halo_px, scratch=scratch)
    return Extraction(store, survey, order, workers=workers, stop=stop)


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
