"""Single images through the pipeline's own inference and object extraction.

An annotated image is treated as a small slide whose level 0 is at the model's pixel size: the
same network code, the same uint8 maps, the same objects as ``wsi-run`` makes. Only what lies
beyond the image differs: a slide has glass or tissue there, an image is mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray
from torch import nn

from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.instances import extract_objects
from wsi_pipeline.network import INPUT_MULTIPLE, PATCH_CELLS
from wsi_pipeline.spec import HeadSpec, ModelSpec
from wsi_pipeline.table import OBJECT_SCHEMA
from wsi_pipeline.tiling import TileGrid
from wsi_pipeline.training.raster import mirrored

__all__ = ["FoundObjects", "ImageMaps", "ImagePredictor", "find_objects", "patch_probabilities"]

WHOLE_PX = 1536
"""Images up to this side are seen whole; larger ones in tiles with the model's halo."""
TILE_PX = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageMaps:
    """The maps of one image; what ``instances`` needs of a prediction store."""

    spec: ModelSpec
    """Of the model that made them."""
    size: tuple[int, int]
    """Width and height of the image at the model's mpp."""
    arrays: Mapping[str, NDArray[np.uint8]]
    """``<head>/prob`` (C, h, w) and ``<head>/class`` (h, w), as in a store."""

    @property
    def grid(self) -> PixelGrid:
        """The grid of the image: its pixels are level 0."""
        return PixelGrid.level0(self.size)

    @property
    def pixel_size(self) -> tuple[float, float]:
        """Micrometres per pixel, x and y."""
        return self.spec.mpp, self.spec.mpp

    def head_grid(self, name: str) -> PixelGrid:
        """Return the grid of a head's maps."""
        return self.grid.coarsen(self.spec.head(name).stride)

    def read(self, key: str, box: Box) -> NDArray[np.uint8]:
        """Return a box of a map, 0 outside of it."""
        array = self.arrays[key]
        height, width = array.shape[-2:]
        out = np.zeros((*array.shape[:-2], box.height, box.width), np.uint8)
        part = box.intersect(Box(x=0, y=0, width=width, height=height))
        out[(..., *part.relative_to(box).slices)] = array[(..., *part.slices)]
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundObjects:
    """The rows of the table that belong to one head."""

    polygons: NDArray[np.object_]
    """(N,) shapely polygons in pixels of the image at the model's mpp."""
    classes: tuple[str | None, ...]
    """(N,) class names; None where the model has none."""
    scores: NDArray[np.float32]
    """(N,)."""
    centres: NDArray[np.float64]
    """(N, 2) x, y of the centroids."""


class ImagePredictor:
    """A network that is shown images instead of slides."""

    def __init__(self, spec: ModelSpec, network: nn.Module, *, device: str, precision: str) -> None:
        """Take a network in evaluation mode; it is moved to the device and the precision."""
        self.spec = spec
        self._device = device
        self._precision = precision
        self._network = network
        strides = [head.stride for head in spec.heads]
        self._multiple = math.lcm(INPUT_MULTIPLE, *strides)

    def predict(self, image: NDArray[np.uint8]) -> ImageMaps:
        """Return the maps of an image.

        Args:
            image: (H, W, 3) RGB at the model's mpp.
        """
        height, width = image.shape[:2]
        side = -(-max(height, width) // self._multiple) * self._multiple
        whole = side <= WHOLE_PX
        tile_px = side if whole else TILE_PX
        predictor = TorchPredictor(
            self.spec,
            self._network,
            device=self._device,
            precision=self._precision,
            tile_px=tile_px,
            halo_px=0 if whole else self.spec.halo_px,
            batch_size=1,
            workers=1,
        )
        grid = PixelGrid.level0((width, height))
        tiles = TileGrid.cover(grid, tile_px=tile_px, halo_px=predictor.halo_px)
        arrays = {key: _empty(key, head, grid) for key, head in self.spec.maps.items()}
        for block in predictor.predict(_Mirrored(image), tiles):
            for key, part in block.arrays.items():
                box = block.tile.write.coarsen(self.spec.maps[key].stride)
                arrays[key][(..., *box.slices)] = part
        return ImageMaps(spec=self.spec, size=(width, height), arrays=arrays)


def find_objects(maps: ImageMaps) -> dict[str, FoundObjects]:
    """Return the objects of every head that yields objects, as the table has them."""
    extraction = extract_objects(maps, slide_id="image")
    table = pa.Table.from_batches(extraction.batches, OBJECT_SCHEMA)
    kinds = np.asarray(table["kind"].to_pylist(), object)
    found = {}
    for head in maps.spec.object_heads:
        rows = table.filter(pa.array(kinds == head.object_kind))
        found[head.name] = FoundObjects(
            polygons=shapely.from_wkb(np.asarray(rows["geometry"].to_pylist(), object)),
            classes=tuple(rows["class"].to_pylist()),
            scores=rows["score"].to_numpy().astype(np.float32),
            centres=np.stack(
                [rows["centroid_x"].to_numpy(), rows["centroid_y"].to_numpy()], axis=1
            ),
        )
    return found


def patch_probabilities(maps: ImageMaps, head: HeadSpec) -> NDArray[np.float64]:
    """Return the class probabilities of an image that is one patch.

    The mean over the cells that see a whole patch of it, or over its middle if it is smaller.

    Args:
        maps: of the image.
        head: a patch head.

    Returns:
        (C,), summing to 1.
    """
    prob = maps.arrays[f"{head.name}/prob"].astype(np.float64)
    rims = [min(PATCH_CELLS // 2, (side - 1) // 2) for side in prob.shape[1:]]
    rows, columns = (slice(rim, side - rim) for rim, side in zip(rims, prob.shape[1:], strict=True))
    mean = prob[:, rows, columns].mean((1, 2))
    return np.asarray(mean / max(mean.sum(), 1e-9))


def _empty(key: str, head: HeadSpec, grid: PixelGrid) -> NDArray[np.uint8]:
    width, height = grid.coarsen(head.stride).size
    if key.endswith("/class"):
        return np.zeros((height, width), np.uint8)
    return np.zeros((len(head.prob_channels), height, width), np.uint8)


@dataclass(frozen=True, slots=True)
class _Mirrored:
    """An image that goes on as its own mirror image beyond its edges."""

    image: NDArray[np.uint8]

    def read_windows(
        self,
        grid: PixelGrid,
        boxes: Sequence[Box],
        *,
        threads: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the pixels of each box; ``grid`` is the image's own."""
        for box in boxes:
            rows = mirrored(np.arange(box.y, box.y1), self.image.shape[0])
            columns = mirrored(np.arange(box.x, box.x1), self.image.shape[1])
            yield self.image[np.ix_(rows, columns)]
