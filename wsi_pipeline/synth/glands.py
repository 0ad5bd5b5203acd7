r"""Crypts: where they lie and the shape of their epithelium and lumen.

A crypt grows around a *skeleton*: a point, or a segment for a crypt cut lengthwise. Its
outline is the skeleton's own Voronoi cell among the neighbours', shrunk by a gap, rounded
and limited to a radius; so crypts flatten against each other and never touch.

::

       .--------------.        a capsule around the segment c0-c1;
      /   n(s)^        \       s runs once around it (0..1); each s has a skeleton
     |   c0---+----c1   |      point, a normal n, and two radii: outer(s), lumen(s)
      \                /
       `--------------'
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled
from wsi_pipeline.synth.fields import DEPTH, EDGE, FOLLICLE, Fields, field
from wsi_pipeline.synth.noise import mix, noise, uniform

__all__ = [
    "CRYPT_REACH_UM",
    "SAMPLES",
    "frame",
    "gland_coordinates",
    "make_glands",
    "outline",
    "radius_at",
]

SAMPLES = 128
"""Points of an outline."""
CRYPT_REACH_UM = 115.0
"""No part of a crypt is farther from its centre."""

CX, CY, EX, EY, LENGTH, NOMINAL, KEY = range(7)
"""Columns of a skeleton: centre, unit direction, segment length, nominal radius, hash."""

_PITCH_UM = (98.0, 90.0)
_JITTER_UM = 14.0
_GAP_UM = 10.0


@compiled
def _site(seed: int, i: int, j: int) -> tuple[float, float]:
    h = mix(seed + 21, i, j)
    # Every other row is shifted, left or right, so that long crypts lean both ways.
    side = 0.5 if uniform(mix(seed + 24, j >> 1, 0), 0) < 0.5 else -0.5
    shift = 0.5 + side * (j & 1)
    x = (i + shift) * _PITCH_UM[0] + _JITTER_UM * (2.0 * uniform(h, 0) - 1.0)
    y = (j + 0.5) * _PITCH_UM[1] + _JITTER_UM * (2.0 * uniform(h, 1) - 1.0)
    return x, y


@compiled
def _partner(seed: int, i: int, j: int) -> int:
    """Tell what a lattice cell holds: 0 a round crypt, 1/2 a long one right/down, -1 nothing."""
    block = uniform(mix(seed + 22, i >> 1, j >> 1), 0)
    a, b = i & 1, j & 1
    if block < 0.52:
        return 0
    if block < 0.64:
        return 0 if b == 0 else (1 if a == 0 else -1)
    if block < 0.76:
        return 0 if a == 0 else (2 if b == 0 else -1)
    if block < 0.88:
        return 2 if b == 0 else -1
    return 1 if a == 0 else -1


@compiled
def _skeleton(seed: int, i: int, j: int, out: NDArray[np.float64]) -> bool:
    """Fill the skeleton of one lattice cell; False where its site belongs to a neighbour."""
    kind = _partner(seed, i, j)
    if kind < 0:
        return False
    h = mix(seed + 23, i, j)
    x0, y0 = _site(seed, i, j)
    x1, y1 = x0, y0
    if kind == 1:
        x1, y1 = _site(seed, i + 1, j)
    if kind == 2:
        x1, y1 = _site(seed, i, j + 1)
    length = math.hypot(x1 - x0, y1 - y0)
    angle = 6.283185307 * uniform(h, 1)
    out[EX], out[EY] = math.cos(angle), math.sin(angle)
    if length > 0.0:
        out[EX], out[EY] = (x1 - x0) / length, (y1 - y0) / length
    out[CX], out[CY] = 0.5 * (x0 + x1), 0.5 * (y0 + y1)
    # Round sections are a little oval: a short segment.
    out[LENGTH] = length * 0.9 if length > 0.0 else 20.0 * uniform(h, 2)
    out[NOMINAL] = 36.0 + 11.0 * uniform(h, 3) - (4.0 if length > 0.0 else 0.0)
    out[KEY] = float(h >> 20)
    return True


@compiled
def _distance(site: NDArray[np.float64], x: float, y: float) -> float:
    u = (x - site[CX]) * site[EX] + (y - site[CY]) * site[EY]
    v = (y - site[CY]) * site[EX] - (x - site[CX]) * site[EY]
    return math.hypot(max(abs(u) - 0.5 * site[LENGTH], 0.0), v)


@compiled
def frame(site: NDArray[np.float64], s: float) -> tuple[float, float, float, float]:
    """Return the skeleton point and the outward normal at ``s`` in [0, 1) around a crypt."""
    radius, length = site[NOMINAL], site[LENGTH]
    arc = s * (2.0 * math.pi * radius + 2.0 * length)
    half = math.pi * radius
    if arc < half:
        u, angle = 0.5 * length, arc / radius - 0.5 * math.pi
    elif arc < half + length:
        u, angle = 0.5 * length - (arc - half), 0.5 * math.pi
    elif arc < 2.0 * half + length:
        u, angle = -0.5 * length, (arc - length) / radius - 0.5 * math.pi
    else:
        u, angle = -0.5 * length + (arc - 2.0 * half - length), 1.5 * math.pi
    c, s_ = math.cos(angle), math.sin(angle)
    ex, ey = site[EX], site[EY]
    return site[CX] + u * ex, site[CY] + u * ey, c * ex - s_ * ey, c * ey + s_ * ex


@compiled
def gland_coordinates(site: NDArray[np.float64], x: float, y: float) -> tuple[float, float]:
    """Return ``(distance from the skeleton, s)``: the inverse of :func:`frame`."""
    radius, length = site[NOMINAL], site[LENGTH]
    u = (x - site[CX]) * site[EX] + (y - site[CY]) * site[EY]
    v = (y - site[CY]) * site[EX] - (x - site[CX]) * site[EY]
    whole = 2.0 * math.pi * radius + 2.0 * length
    half = math.pi * radius
    if u > 0.5 * length:
        u -= 0.5 * length
        return math.hypot(u, v), radius * (math.atan2(v, u) + 0.5 * math.pi) / whole
    if u < -0.5 * length:
        u += 0.5 * length
        return math.hypot(u, v), (
            half + length + radius * (0.5 * math.pi - math.atan2(v, -u))
        ) / whole
    if v >= 0.0:
        return v, (half + 0.5 * length - u) / whole
    return -v, (2.0 * half + length + u + 0.5 * length) / whole


@compiled
def radius_at(radii: NDArray[np.float32], s: float) -> float:
    """Interpolate the radius around a crypt at ``s``."""
    f = s * SAMPLES
    k = int(f)
    u = f - k
    return float(radii[k % SAMPLES] * (1.0 - u) + radii[(k + 1) % SAMPLES] * u)


@compiled
def _cell_radius(site: NDArray[np.float64], others: NDArray[np.float64], s: float) -> float:
    """Return how far the shrunk Voronoi cell reaches along the normal at ``s``."""
    px, py, nx, ny = frame(site, s)
    low, high = 0.0, float(site[NOMINAL])
    for k in range(others.shape[0]):
        if _distance(others[k], px + high * nx, py + high * ny) - high >= _GAP_UM:
            continue
        low = 0.0
        for _ in range(12):
            middle = 0.5 * (low + high)
            if _distance(others[k], px + middle * nx, py + middle * ny) - middle >= _GAP_UM:
                low = middle
            else:
                high = middle
        high = low
    return high


@compiled
def _shape(
    site: NDArray[np.float64],
    others: NDArray[np.float64],
    outer: NDArray[np.float32],
    lumen: NDArray[np.float32],
) -> bool:
    """Fill both radii around a crypt; False where it would be too small to be one."""
    raw = np.empty(SAMPLES)
    key = int(site[KEY])
    for k in range(SAMPLES):
        angle = 2.0 * math.pi * k / SAMPLES
        wobble = 1.8 * noise(key, 1.9 * math.cos(angle) + 7.0, 1.9 * math.sin(angle) + 7.0) - 1.8
        raw[k] = _cell_radius(site, others, k / SAMPLES) + wobble
    thickness = 24.0 + 5.0 * uniform(key, 1)
    smallest = 1e9
    for k in range(SAMPLES):
        total = 0.0
        for d in range(-9, 10):
            total += raw[(k + d) % SAMPLES] * (10.0 - abs(d))
        outer[k] = min(total / 100.0, raw[k])
        smallest = min(smallest, outer[k])
        angle = 2.0 * math.pi * k / SAMPLES
        wobble = 2.6 * noise(key + 1, 1.7 * math.cos(angle) + 7.0, 1.7 * math.sin(angle) + 7.0)
        thick = min(thickness + wobble, 0.72 * outer[k])
        lumen[k] = outer[k] - thick
    return bool(smallest > 20.0)


@compiled
def _in_mucosa(
    site: NDArray[np.float64],
    outer: NDArray[np.float32],
    nodes: NDArray[np.float32],
    i0: int,
    j0: int,
) -> bool:
    for k in range(0, SAMPLES, 2):
        px, py, nx, ny = frame(site, k / SAMPLES)
        x, y = px + outer[k] * nx, py + outer[k] * ny
        if field(nodes, i0, j0, x, y, EDGE) < 9.0 or field(nodes, i0, j0, x, y, DEPTH) > -6.0:
            return False
        if field(nodes, i0, j0, x, y, FOLLICLE) > 0.0:
            return False
    return True


@compiled
def _fill_glands(
    seed: int,
    nodes: NDArray[np.float32],
    node: tuple[int, int],
    cells: tuple[int, int, int, int],
    sites: NDArray[np.float64],
    outer: NDArray[np.float32],
    lumen: NDArray[np.float32],
) -> int:
    count = 0
    others = np.empty((25, 7))
    for j in range(cells[1], cells[3]):
        for i in range(cells[0], cells[2]):
            if not _skeleton(seed, i, j, sites[count]):
                continue
            near = 0
            for dj in range(-2, 3):
                for di in range(-2, 3):
                    same = di == 0 and dj == 0
                    if not same and _skeleton(seed, i + di, j + dj, others[near]):
                        near += 1
            whole = _shape(sites[count], others[:near], outer[count], lumen[count])
            if whole and _in_mucosa(sites[count], outer[count], nodes, node[0], node[1]):
                count += 1
    return count


def make_glands(
    seed: int, fields: Fields, window_um: tuple[float, float, float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """Make every crypt that may reach into a window.

    Args:
        seed: Of the world.
        fields: Over at least the window padded by twice :data:`CRYPT_REACH_UM`.
        window_um: ``(x0, y0, x1, y1)`` in micrometres.

    Returns:
        Skeletons ``(N, 7)``, outer radii and lumen radii ``(N, SAMPLES)`` in micrometres.
    """
    x0, y0, x1, y1 = window_um
    reach = CRYPT_REACH_UM
    cells = (
        math.floor((x0 - reach) / _PITCH_UM[0]) - 1,
        math.floor((y0 - reach) / _PITCH_UM[1]) - 1,
        math.ceil((x1 + reach) / _PITCH_UM[0]) + 1,
        math.ceil((y1 + reach) / _PITCH_UM[1]) + 1,
    )
    room = (cells[2] - cells[0]) * (cells[3] - cells[1]) + 1
    sites = np.empty((room, 7))
    outer = np.empty((room, SAMPLES), np.float32)
    lumen = np.empty((room, SAMPLES), np.float32)
    # Cells whose centre is out of reach are left out, so that their fields are not needed.
    count = _fill_glands(seed, fields.nodes, fields.origin, cells, sites, outer, lumen)
    keep = (
        (sites[:count, CX] > x0 - reach)
        & (sites[:count, CX] < x1 + reach)
        & (sites[:count, CY] > y0 - reach)
        & (sites[:count, CY] < y1 + reach)
    )
    return sites[:count][keep], outer[:count][keep], lumen[:count][keep]


def outline(site: NDArray[np.float64], radii: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return an outline as ``(SAMPLES, 2)`` points in micrometres."""
    points = np.empty((SAMPLES, 2))
    for k in range(SAMPLES):
        px, py, nx, ny = frame(site, k / SAMPLES)
        points[k] = px + radii[k] * nx, py + radii[k] * ny
    return points
