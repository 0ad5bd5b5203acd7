"""The maps of one head that yields objects, measured in that head's own pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.instances.kernels import Ints
from wsi_pipeline.instances.outlines import Outlines
from wsi_pipeline.spec import HeadSpec, ModelSpec

__all__ = ["HeadMaps", "MapStore", "Objects", "above"]


class MapStore(Protocol):
    """What the objects are made from: finished maps that are read box by box."""

    @property
    def spec(self) -> ModelSpec:
        """The model that made the maps."""

    @property
    def grid(self) -> PixelGrid:
        """The working grid."""

    @property
    def pixel_size(self) -> tuple[float, float]:
        """Micrometres per level-0 pixel, x and y."""

    def head_grid(self, name: str) -> PixelGrid:
        """Return the grid of a head's maps."""

    def read(self, key: str, box: Box) -> Ints:
        """Return uint8 ``(C, h, w)`` or ``(h, w)``; 0 outside the map. Safe in threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """Some objects of one head."""

    anchors: Ints
    """(N, 2) int64 x, y of each core's raster-first pixel, or of the peak: what identifies the
    object."""
    outlines: Outlines
    """Polygons and their measures."""
    sums: Ints
    """(N, 2) int64: pixels of the label (filled holes are not), summed inner values; of a box
    1 and the heat."""
    votes: Ints
    """(N, C) int64: pixels of the label by class id; C is 0 without a class head."""
    parents: Ints | None = None
    """(N,) labels of the parent regions, where they are known beforehand."""

    @classmethod
    def concatenate(cls, parts: list[Objects]) -> Objects:
        """Join objects without known parents."""
        return cls(
            anchors=np.concatenate([part.anchors for part in parts]),
            outlines=Outlines.concatenate([part.outlines for part in parts]),
            sums=np.concatenate([part.sums for part in parts]),
            votes=np.concatenate([part.votes for part in parts]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMaps:
    """One instance or detect head of a store, with its class head if it has one."""

    store: MapStore
    """Where the maps are."""
    head: HeadSpec
    """A head of the store's model that yields objects."""

    @property
    def grid(self) -> PixelGrid:
        """The grid of the head's maps."""
        return self.store.head_grid(self.head.name)

    @property
    def mpp(self) -> tuple[float, float]:
        """Micrometres per pixel of the head's maps, x and y."""
        spacing, pixel_size = self.grid.spacing, self.store.pixel_size
        return spacing[0] * pixel_size[0], spacing[1] * pixel_size[1]

    @property
    def class_head(self) -> HeadSpec | None:
        """The head on whose map the objects vote."""
        return self.store.spec.class_head(self.head.name)

    @property
    def n_classes(self) -> int:
        """Number of class ids, "none" included; 0 without a class head."""
        return len(self.class_head.classes) if self.class_head else 0

    def probabilities(self, box: Box) -> tuple[Ints, ...]:
        """Return the head's ``prob_channels`` of a box, (h, w) uint8, not to be written to."""
        return tuple(_plain(channel) for channel in self.store.read(f"{self.head.name}/prob", box))

    def classes(self, box: Box) -> Ints:
        """Return the class ids of a box, (h, w) uint8; one zero without a class head."""
        if self.class_head is None:
            return np.zeros((1, 1), np.uint8)
        return _plain(self.store.read(f"{self.class_head.name}/class", box))

    def area_px(self, um2: float) -> int:
        """Convert an area; areas smaller than the result are smaller than ``um2``."""
        return math.floor(um2 / (self.mpp[0] * self.mpp[1]) + 1e-6)

    def length_px(self, um: float) -> int:
        """Convert a length to the nearest whole number of pixels."""
        return round(um / ((self.mpp[0] + self.mpp[1]) / 2))


def above(threshold: float) -> int:
    """Return the smallest stored value whose probability is above a threshold."""
    return math.floor(threshold * 255) + 1


def _plain(array: Ints) -> Ints:
    """Give kernels one memory layout: contiguous and writable, so they compile once."""
    return np.require(array, np.uint8, ["C", "W"])
