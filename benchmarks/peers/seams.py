"""Nuclei over tiles as the original finds them: four sets of tiles, each mending the last's seams.

Boxes are ``(x0, y0, x1, y1)`` in pixels of 0.5 micrometres.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from shapely import STRtree, box

from benchmarks.peers.cerberus_objects import Record, describe, label_nuclei

TILE_PX, MARGIN_PX = 4032, 64
GRID, VERTICAL, HORIZONTAL, CORNERS = range(4)


@dataclass(frozen=True)
class SeamTile:
    """A tile of one of the four sets."""

    kind: int
    """Which set: the grid, strips along its vertical and horizontal lines, its corners."""
    bounds: tuple[int, int, int, int]
    flags: tuple[bool, bool, bool, bool]
    """Top, bottom, left, right: whether another tile of the set goes on there."""


def tile_sets(size: tuple[int, int], tile_px: int = TILE_PX) -> list[list[SeamTile]]:
    """Return the four sets of tiles, in the order in which they are done.

    Args:
        size: width and height of the slide.
        tile_px: side of the grid's tiles.
    """
    width, height = size
    columns, rows = _intervals(width, tile_px), _intervals(height, tile_px)
    m = MARGIN_PX

    def tile(kind: int, x: tuple[int, int], y: tuple[int, int]) -> SeamTile:
        vertical = (y[0] > 0, y[1] < height) if kind != HORIZONTAL else (False, False)
        across = (x[0] > 0, x[1] < width) if kind != VERTICAL else (False, False)
        flags = (True,) * 4 if kind == CORNERS else (*vertical, *across)
        return SeamTile(kind=kind, bounds=(x[0], y[0], x[1], y[1]), flags=flags)

    def around(lines: list[tuple[int, int]], by: int, end: int) -> list[tuple[int, int]]:
        return [(start - by, min(start + by, end)) for start, _ in lines[1:]]

    return [
        [tile(GRID, x, y) for y, x in product(rows, columns)],
        [tile(VERTICAL, x, y) for x, y in product(around(columns, m, width), rows)],
        [tile(HORIZONTAL, x, y) for y, x in product(around(rows, m, height), columns)],
        [
            tile(CORNERS, x, y)
            for y, x in product(around(rows, 2 * m, height), around(columns, 2 * m, width))
        ],
    ]


def find_nuclei(
    maps: tuple[Path, Path], tile: SeamTile, known: dict[str, Record]
) -> tuple[dict[str, Record], list[str]]:
    """Find the nuclei of a tile.

    Args:
        maps: files with the probabilities (H, W, 2) and classes (H, W, 1) of the slide.
        tile: where.
        known: nuclei of the earlier tiles, by key.

    Returns:
        New nuclei, and the keys of known ones that they replace.
    """
    x0, y0, x1, y1 = tile.bounds
    inside = np.s_[y0:y1, x0:x1]
    inner, contour = np.moveaxis(np.array(np.load(maps[0], mmap_mode="r")[inside]), -1, 0)
    types = np.array(np.load(maps[1], mmap_mode="r")[inside])[..., 0]
    found = list(describe(label_nuclei(inner, contour), types).values())
    dropped = _dropped(tile, [record["box"] for record in found])
    corner = np.array([x0, y0])
    kept = {}
    for index, record in enumerate(found):
        if index not in dropped:
            record["box"] = record["box"] + np.tile(corner, 2)
            record["centroid"] = record["centroid"] + corner
            record["contour"] = record["contour"] + corner
            kept[uuid.uuid4().hex] = record
    return kept, _replaced(tile, known) if found else []


def _dropped(tile: SeamTile, boxes: list[Any]) -> set[int]:
    """Nuclei near the tile's edges, which another set's tile sees whole."""
    x0, y0, x1, y1 = tile.bounds
    size = (x1 - x0, y1 - y0)
    tree = STRtree([box(*one) for one in boxes])
    dropped: set[int] = set()
    bands, lines = _sides(size, MARGIN_PX), _sides(size, 1)
    for band, line, flag in zip(bands, lines, tile.flags, strict=True):
        if tile.kind in (GRID, CORNERS):
            hit = tree.query(band, predicate="contains") if flag else ()
        else:
            hit = tree.query(band if flag else line, predicate="intersects")
        dropped.update(int(index) for index in hit)
    return dropped


def _replaced(tile: SeamTile, known: dict[str, Record]) -> list[str]:
    """Known nuclei that are cut by the middle of a corner's tile."""
    if tile.kind != CORNERS or not known:
        return []
    keys, m = list(known), MARGIN_PX
    x0, y0, x1, y1 = tile.bounds
    tree = STRtree([box(*record["box"]) for record in known.values()])
    middle = box(x0 + m, y0 + m, x1 - m, y1 - m).exterior
    return [keys[index] for index in tree.query(middle, predicate="intersects")]


def _sides(size: tuple[int, int], depth: int) -> list[Any]:
    width, height = size
    return [
        box(0, 0, width, depth),
        box(0, height - depth, width, height),
        box(0, 0, depth, height),
        box(width - depth, 0, width, height),
    ]


def _intervals(length: int, step: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, length, step), length]))
