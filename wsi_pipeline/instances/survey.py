"""The first walk over the maps: what every window says by itself.

::

    anchors, peaks   rows of the objects a window owns     put aside, in a spool
    run rules        runs of the cores a window sees       kept

Neither needs anything but the maps around the window: no parents, no tissue, no neighbours.
So windows may come in any order, and the walk can follow the network through the slide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from wsi_pipeline.geometry import Box
from wsi_pipeline.instances.anchors import AnchorFinder
from wsi_pipeline.instances.heads import HeadMaps, MapStore, Objects
from wsi_pipeline.instances.kernels import Ints
from wsi_pipeline.instances.parallel import ordered_map
from wsi_pipeline.instances.peaks import PeakFinder
from wsi_pipeline.instances.places import lay_panels
from wsi_pipeline.instances.regions import core_runs, lay_tiles
from wsi_pipeline.instances.rows import RowMaker
from wsi_pipeline.instances.runs import Runs
from wsi_pipeline.instances.spool import Spool
from wsi_pipeline.spec import AnchorRules, PeakRules, RunRules
from wsi_pipeline.table import OBJECT_SCHEMA

__all__ = ["CoreRuns", "SmallObjects", "Survey", "count_at_border"]

_SECOND_LOOK_PX = 128
"""How far beyond its halo a window may look again. Farther is right, too, but may have to wait."""

Arrival = Callable[[Box], int]
"""Tells when the maps under a box of the working grid are there: the later, the larger."""


class _HeadSurvey(Protocol):
    """What the walk does for one head."""

    maps: HeadMaps
    reach_px: int

    def windows(self) -> Iterator[Box]:
        """Yield the windows, on the head's grid."""

    def look(self, tile: Box) -> Any:  # noqa: ANN401
        """Look at one window; in any thread."""

    def keep(self, tile: Box, found: Any) -> None:  # noqa: ANN401
        """Keep what was found; in one thread."""


@dataclass(kw_only=True)
class SmallObjects:
    """The objects of a head with anchor or peak rules, as rows in a spool."""

    maps: HeadMaps
    make: RowMaker
    spool: Spool
    find: Callable[[Box], tuple[Objects | None, bool]]
    """Returns the objects a tile owns, and whether any was oversized."""
    window_px: int
    reach_px: int
    numbers: dict[Box, int] = field(default_factory=dict)
    """Where the rows of each window are in the spool; windows without any are left out."""
    truncated: int = 0
    """Objects that touch the border of the slide."""
    any_oversized: bool = False
    """Whether a window met an oversized core."""

    def windows(self) -> Iterator[Box]:
        """Yield the windows panel by panel, row by row."""
        for panel in lay_panels(self.maps):
            yield from lay_tiles(panel, self.window_px)

    def look(self, tile: Box) -> tuple[pa.RecordBatch | None, int, bool]:
        """Make the rows of the objects that a window owns."""
        objects, oversized = self.find(tile)
        if objects is None:
            return None, 0, oversized
        return self.make.rows(self.maps, objects), count_at_border(self.maps, objects), oversized

    def keep(self, tile: Box, found: tuple[pa.RecordBatch | None, int, bool]) -> None:
        """Put the rows aside."""
        batch, truncated, oversized = found
        self.truncated += truncated
        self.any_oversized |= oversized
        if batch is not None:
            self.numbers[tile] = self.spool.put(batch)

    def rows(self, tile: Box) -> list[pa.RecordBatch]:
        """Return the rows of a window, in one batch or none."""
        return [self.spool.get(self.numbers[tile])] if tile in self.numbers else []


@dataclass(kw_only=True)
class CoreRuns:
    """The cores of a head with run rules."""

    maps: HeadMaps
    rules: RunRules
    window_px: int
    reach_px: int = 0
    parts: list[tuple[Ints, Ints]] = field(default_factory=list)

    def windows(self) -> Iterator[Box]:
        """Yield the windows row by row."""
        yield from lay_tiles(self.maps.grid.box, self.window_px)

    def look(self, tile: Box) -> tuple[Ints, Ints]:
        """Return the runs of cores in a window."""
        return core_runs(self.maps, self.rules, tile)

    def keep(self, tile: Box, found: tuple[Ints, Ints]) -> None:
        """Keep the runs."""
        self.parts.append(found)

    def joined(self) -> Runs:
        """Return the runs of the whole map."""
        return Runs.join(self.maps.grid.size[0], self.parts)


class Survey:
    """The first walk over the maps of a slide."""

    def __init__(
        self,
        store: MapStore,
        slide_id: str,
        *,
        window_px: int,
        halo_px: int,
        scratch: Path | None,
    ) -> None:
        """Prepare to walk; see :func:`wsi_pipeline.instances.extract_objects`."""
        self._spool = Spool(OBJECT_SCHEMA, scratch)
        self.make = RowMaker(store.spec, slide_id)
        self.small: dict[str, SmallObjects] = {}
        self.cores: dict[str, CoreRuns] = {}
        self.finders: dict[str, AnchorFinder] = {}
        for head in store.spec.object_heads:
            maps = HeadMaps(store=store, head=head)
            find: Callable[[Box], tuple[Objects | None, bool]]
            if isinstance(head.rules, RunRules):
                self.cores[head.name] = CoreRuns(maps=maps, rules=head.rules, window_px=window_px)
                continue
            if isinstance(head.rules, AnchorRules):
                finder = self.finders[head.name] = AnchorFinder(maps, head.rules)
                find, reach_px = _anchored(finder, halo_px), halo_px + _SECOND_LOOK_PX
            else:
                assert isinstance(head.rules, PeakRules)
                peaks = PeakFinder(maps, head.rules)
                find, reach_px = _peaked(peaks), peaks.margin_px
            self.small[head.name] = SmallObjects(
                maps=maps,
                make=self.make,
                spool=self._spool,
                find=find,
                window_px=window_px,
                reach_px=reach_px,
            )

    def walk(self, arrival: Arrival | None, *, workers: int, stop: Callable[[], bool]) -> None:
        """Look at every window of every head, as the maps arrive.

        Args:
            arrival: None: everything is there, and heads are walked one after another.
            workers: threads.
            stop: asked before each window.

        Raises:
            Interrupted: ``stop()`` was true.
        """
        heads: list[_HeadSurvey] = [*self.small.values(), *self.cores.values()]
        looks = [(head, tile) for head in heads for tile in head.windows()]
        if arrival is not None:
            looks.sort(key=lambda look: arrival(_seen(*look)))
        found = ordered_map(lambda look: look[0].look(look[1]), looks, workers=workers, stop=stop)
        with closing(found):  # its threads end here, whatever happens
            for (head, tile), result in zip(looks, found, strict=True):
                head.keep(tile, result)

    def close(self) -> None:
        """Give the memory of the rows back."""
        self._spool.close()


def count_at_border(maps: HeadMaps, objects: Objects) -> int:
    """Count the objects that touch the border of the slide."""
    width, height = maps.grid.size
    left, top, right, bottom = (
        objects.outlines.column(name) for name in ("left", "top", "right", "bottom")
    )
    touches = (left <= 0) | (top <= 0) | (right >= 2 * width) | (bottom >= 2 * height)
    return int(np.count_nonzero(touches))


def _seen(head: _HeadSurvey, tile: Box) -> Box:
    """Return what a window may look at, on the working grid."""
    window = tile.pad(head.reach_px).intersect(head.maps.grid.box)
    return window.refine(head.maps.head.stride)


def _anchored(finder: AnchorFinder, halo_px: int) -> Callable[[Box], tuple[Objects | None, bool]]:
    return lambda tile: finder.find(tile, halo_px)


def _peaked(finder: PeakFinder) -> Callable[[Box], tuple[Objects | None, bool]]:
    return lambda tile: (finder.find(tile), False)
