"""Where tissue is and of which kind: smooth fields over the slide, in micrometres.

A field is defined on lattice nodes 8 micrometres apart and linear between them, so that
placing objects and drawing pixels read the same values.

::

    glass | lamina propria with crypts | muscularis | submucosa, fat ...
    ------+----------------------------+------------+-------------------> into the piece
    EDGE<0  EDGE>0, DEPTH<0              0<DEPTH<60   DEPTH>60
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled
from wsi_pipeline.synth.noise import mix, noise, uniform

__all__ = [
    "DEPTH",
    "EDGE",
    "EOSIN",
    "FAT",
    "FOLLICLE",
    "HAEMATOXYLIN",
    "HUE",
    "LOOSE",
    "MUSCLE_UM",
    "NODE_UM",
    "Fields",
    "fat_wall",
    "field",
    "in_fat",
    "make_fields",
]

NODE_UM = 8.0
"""Distance between lattice nodes."""
MUSCLE_UM = 60.0
"""Thickness of the muscularis mucosae."""

EDGE, DEPTH, FAT, FOLLICLE, LOOSE, HAEMATOXYLIN, EOSIN, HUE = range(8)
"""Channels: distance into tissue; depth below the mucosa; fat and lymphoid follicles where
positive; looseness of the lamina propria 0-1; stain gains around 1; hue -1 to 1."""

_PIECE_UM = (4400.0, 3400.0)
_MARGIN_UM = 70.0
_CORNER_UM = 350.0
_BEND_UM = 700.0
_FAT_PITCH_UM = 54.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """The fields over one window of the slide."""

    nodes: NDArray[np.float32]
    """``(ny, nx, 8)`` values at the lattice nodes."""
    origin: tuple[int, int]
    """Lattice index (x, y) of the first node."""


@compiled
def _piece_edge(seed: int, x: float, y: float) -> float:
    """Return the signed distance (inside positive) to the piece of tissue in this place."""
    i = math.floor(x / _PIECE_UM[0])
    j = math.floor(y / _PIECE_UM[1])
    h = mix(seed + 11, i, j)
    x0 = i * _PIECE_UM[0] + _MARGIN_UM
    y0 = j * _PIECE_UM[1] + _MARGIN_UM
    # The first piece starts at the slide's corner, so that small slides show tissue.
    if i != 0 or j != 0:
        x0 += 350.0 * uniform(h, 0)
        y0 += 350.0 * uniform(h, 1)
    x1 = (i + 1) * _PIECE_UM[0] - 160.0 - 600.0 * uniform(h, 2)
    y1 = (j + 1) * _PIECE_UM[1] - 160.0 - 450.0 * uniform(h, 3)
    dx = abs(x - 0.5 * (x0 + x1)) - 0.5 * (x1 - x0) + _CORNER_UM
    dy = abs(y - 0.5 * (y0 + y1)) - 0.5 * (y1 - y0) + _CORNER_UM
    # A smooth maximum inside, so that layers bend round the corners of a piece.
    blend = max(0.0, 1.0 - abs(dx - dy) / _BEND_UM)
    inner = max(dx, dy) + 0.25 * _BEND_UM * blend * blend
    outside = math.hypot(max(dx, 0.0), max(dy, 0.0)) + min(inner, 0.0)
    return _CORNER_UM - outside


@compiled
def _fill_nodes(seed: int, i0: int, j0: int, nodes: NDArray[np.float32]) -> None:
    for j in range(nodes.shape[0]):
        for i in range(nodes.shape[1]):
            x = (i0 + i) * NODE_UM
            y = (j0 + j) * NODE_UM
            piece = _piece_edge(seed, x, y)
            smooth = piece + 55.0 * noise(seed + 1, x / 420.0, y / 420.0)
            edge = smooth + 22.0 * noise(seed + 2, x / 110.0, y / 110.0)
            edge += 9.0 * noise(seed + 3, x / 38.0, y / 38.0)
            thickness = 560.0 + 150.0 * noise(seed + 4, x / 900.0, y / 900.0)
            depth = smooth - thickness + 70.0 * noise(seed + 10, x / 330.0, y / 330.0)
            nodes[j, i, EDGE] = edge
            nodes[j, i, DEPTH] = depth
            fat = noise(seed + 5, x / 520.0, y / 520.0) + 0.4 * noise(
                seed + 6, x / 180.0, y / 180.0
            )
            nodes[j, i, FAT] = min(fat - 0.1, (depth - MUSCLE_UM - 110.0) / 150.0)
            # Turned and roughened, lest the lattice of the noise shows as straight edges.
            u, v = 0.8 * x + 0.6 * y, 0.8 * y - 0.6 * x
            follicle = noise(seed + 7, u / 430.0, v / 430.0) - 0.55
            follicle += 0.22 * noise(seed + 8, x / 130.0, y / 130.0)
            nodes[j, i, FOLLICLE] = min(follicle, 0.4 - abs(depth + 60.0) / 450.0)
            nodes[j, i, LOOSE] = 0.5 + 0.5 * noise(seed + 9, x / 260.0, y / 260.0)
            nodes[j, i, HAEMATOXYLIN] = 1.0 + 0.13 * noise(seed + 12, x / 1500.0, y / 1500.0)
            nodes[j, i, EOSIN] = 1.0 + 0.18 * noise(seed + 13, x / 1300.0, y / 1300.0)
            nodes[j, i, HUE] = noise(seed + 14, x / 1700.0, y / 1700.0)


@compiled
def _fat_cell(seed: int, x: float, y: float) -> tuple[float, float, float]:
    """Return the centre of the fat cell around a point and the distance to its wall."""
    i = math.floor(x / _FAT_PITCH_UM)
    j = math.floor(y / _FAT_PITCH_UM)
    best, second = 1e18, 1e18
    bx, by, sx, sy = 0.0, 0.0, 0.0, 0.0
    for dj in range(-1, 2):
        for di in range(-1, 2):
            h = mix(seed + 41, i + di, j + dj)
            px = (i + di + 0.15 + 0.7 * uniform(h, 0)) * _FAT_PITCH_UM
            py = (j + dj + 0.15 + 0.7 * uniform(h, 1)) * _FAT_PITCH_UM
            d = (x - px) ** 2 + (y - py) ** 2
            if d < best:
                second, sx, sy = best, bx, by
                best, bx, by = d, px, py
            elif d < second:
                second, sx, sy = d, px, py
    return bx, by, 0.5 * (second - best) / max(math.hypot(bx - sx, by - sy), 1e-6)


@compiled
def field(nodes: NDArray[np.float32], i0: int, j0: int, x: float, y: float, channel: int) -> float:
    """Return one field at a point in micrometres, which must lie in the window."""
    fx = x / NODE_UM - i0
    fy = y / NODE_UM - j0
    i = min(max(int(fx), 0), nodes.shape[1] - 2)
    j = min(max(int(fy), 0), nodes.shape[0] - 2)
    u = fx - i
    v = fy - j
    top = nodes[j, i, channel] * (1.0 - u) + nodes[j, i + 1, channel] * u
    low = nodes[j + 1, i, channel] * (1.0 - u) + nodes[j + 1, i + 1, channel] * u
    return float(top * (1.0 - v) + low * v)


def make_fields(seed: int, window_um: tuple[float, float, float, float]) -> Fields:
    """Compute the fields over ``(x0, y0, x1, y1)`` micrometres."""
    x0, y0, x1, y1 = window_um
    i0, j0 = math.floor(x0 / NODE_UM), math.floor(y0 / NODE_UM)
    size = (math.ceil(y1 / NODE_UM) - j0 + 2, math.ceil(x1 / NODE_UM) - i0 + 2, 8)
    nodes = np.empty(size, np.float32)
    _fill_nodes(seed, i0, j0, nodes)
    return Fields(nodes=nodes, origin=(i0, j0))


@compiled
def fat_wall(seed: int, nodes: NDArray[np.float32], i0: int, j0: int, x: float, y: float) -> float:
    """Return the distance to the wall of the fat cell around a point, -1 outside of fat."""
    if field(nodes, i0, j0, x, y, FAT) < -0.5:
        return -1.0
    cx, cy, wall = _fat_cell(seed, x, y)
    return wall if field(nodes, i0, j0, cx, cy, FAT) > 0.0 else -1.0


@compiled
def in_fat(
    seed: int, nodes: NDArray[np.float32], i0: int, j0: int, x: float, y: float, margin: float
) -> bool:
    """Tell whether a point lies in a fat cell, except close to its wall."""
    return fat_wall(seed, nodes, i0, j0, x, y) > margin
