"""How maps are laid out for viewers: zarr v3 arrays, pyramids and OME-Zarr 0.5 metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from wsi_pipeline.chunks import ZSTD_LEVEL
from wsi_pipeline.geometry import PixelGrid

__all__ = [
    "create_arrays",
    "multiscale",
    "oddity",
    "ome_attributes",
]

Shape = tuple[int, ...]


def create_arrays(
    group: zarr.Group, layout: Mapping[str, tuple[Shape, Shape]]
) -> dict[str, zarr.Array[Any]]:
    """Create uint8 maps, zstd-compressed; chunks of zeros take no file.

    All in one call: one by one, each takes zarr three times as long.

    Args:
        group: where to.
        layout: by path below the group, the shape, ``(C, H, W)`` or ``(H, W)``, and the shape of
            the chunks, of the same length. What is there is replaced.
    """
    nodes: dict[str, Any] = {key: _metadata(*how) for key, how in layout.items()}
    made = dict(group.create_hierarchy(nodes, overwrite=True)) if nodes else {}
    arrays = {key: made[key] for key in layout}
    return cast("dict[str, zarr.Array[Any]]", arrays)


def _metadata(shape: Shape, chunks: Shape) -> object:
    array = zarr.create_array(
        {},
        shape=shape,
        chunks=chunks,
        dtype="uint8",
        compressors=ZstdCodec(level=ZSTD_LEVEL),
        fill_value=0,
        dimension_names=("c", "y", "x")[-len(shape) :],
        zarr_format=3,
    )
    return array.metadata


def oddity(array: zarr.Array[Any], shape: tuple[int, ...], chunks: tuple[int, ...]) -> str | None:
    """Tell in what an array differs from those that :func:`create_arrays` makes; None in nothing.

    Asked before a chunk is read: the metadata of a store that a stranger made choose what its
    bytes are decoded with, up to codecs that run code, where its chunks lie, and how large they
    are.

    Args:
        array: as it was opened.
        shape: what it must have.
        chunks: what it must have.
    """
    if array.metadata.zarr_format != 3:
        return f"is of zarr format {array.metadata.zarr_format}"
    said: dict[str, Any] = dict(array.metadata.to_dict())
    codecs = [codec["name"] for codec in said["codecs"]]
    if codecs != ["bytes", "zstd"] or said["storage_transformers"]:
        return f"is packed by {codecs}, not by zstd alone"
    keys = said["chunk_key_encoding"]
    if keys["name"] != "default" or keys["configuration"] != {"separator": "/"}:
        return "names its chunks in another way"
    if array.dtype != np.uint8:
        return f"holds {array.dtype}, not uint8"
    if said["chunk_grid"]["name"] != "regular" or (array.shape, array.chunks) != (shape, chunks):
        return f"is {array.shape} in chunks of {array.chunks}, not {shape} in {chunks}"
    return None


def multiscale(
    name: str,
    levels: Sequence[zarr.Array[Any]],
    *,
    grid: PixelGrid,
    pixel_size: tuple[float, float],
    channels: Sequence[str],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Return the ``multiscales`` entry of one map.

    Coordinates are micrometres between pixel centres; the centre of level-0 pixel (0, 0)
    is the origin. So a pixel that spans ``s`` level-0 pixels from ``o`` on has its centre
    at ``(o + (s - 1) / 2) * mpp``.

    Args:
        name: name of the map, the path of its finest level.
        levels: finest first, each half the size of the one before.
        grid: where the finest level lies on the slide.
        pixel_size: micrometres per level-0 pixel, x and y.
        channels: names of the channels; empty for a map without a channel axis.
        classes: names of the class ids.
    """
    datasets = []
    for number, level in enumerate(levels):
        spacing = [side * 2**number for side in grid.spacing]
        scale = [side * mpp for side, mpp in zip(spacing, pixel_size, strict=True)]
        shift = [
            (start + (side - 1) / 2) * mpp
            for start, side, mpp in zip(grid.origin, spacing, pixel_size, strict=True)
        ]
        transforms = [
            {"type": "scale", "scale": [1.0] * bool(channels) + scale[::-1]},
            {"type": "translation", "translation": [0.0] * bool(channels) + shift[::-1]},
        ]
        datasets.append({"path": level.path, "coordinateTransformations": transforms})
    space = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in ("y", "x")]
    return {
        "name": name,
        "axes": [{"name": "c", "type": "channel"}] * bool(channels) + space,
        "datasets": datasets,
        "metadata": {"channels": list(channels), "classes": list(classes)},
    }


def ome_attributes(entries: Sequence[dict[str, Any]], *, below: str = "") -> dict[str, Any]:
    """Return the ``ome`` attribute of a group.

    Args:
        entries: results of :func:`multiscale`.
        below: path of the group within the store, taken off the paths of the datasets.
    """
    prefix = f"{below}/" if below else ""
    relative = [
        {
            **entry,
            "datasets": [
                {**level, "path": level["path"].removeprefix(prefix)} for level in entry["datasets"]
            ],
        }
        for entry in entries
    ]
    return {"version": "0.5", "multiscales": relative}
