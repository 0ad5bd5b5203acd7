"""Nuclei: slightly deformed ellipses that never touch.

Epithelial nuclei stand in a ring inside their crypt. All others start as one candidate in
each cell of a fine lattice; a candidate stays when no candidate of higher (hashed) priority
near it comes closer than the gap (Matérn's second hard-core process), which makes each
nucleus a function of its own neighbourhood alone.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled
from wsi_pipeline.synth.fields import (
    DEPTH,
    EDGE,
    FOLLICLE,
    LOOSE,
    MUSCLE_UM,
    Fields,
    field,
    in_fat,
)
from wsi_pipeline.synth.glands import KEY, LENGTH, NOMINAL, frame, gland_coordinates, radius_at
from wsi_pipeline.synth.noise import mix, noise, uniform

__all__ = ["CLASSES", "NUCLEUS_REACH_UM", "boundary_point", "make_nuclei", "rim"]

CLASSES = ("epithelial", "lymphocyte", "plasma", "fibroblast", "goblet vacuole")
"""Names by class index; the last is mucin, not a nucleus."""
EPITHELIAL, LYMPHOCYTE, PLASMA, FIBROBLAST, VACUOLE = range(5)

NUCLEUS_REACH_UM = 9.0
"""No part of a nucleus (with its cytoplasm) is farther from its centre."""

X, Y, A, B, COS, SIN, C2, S2, C3, S3, INK, CLASS, GLAND, PHASE = range(14)
"""Columns: centre, half axes, direction of the first, harmonics of the outline,
haematoxylin amount, class, row of the crypt (-1: none), texture offset."""

_PITCH_UM = 7.3
_GAP_UM = 0.85
_WAVE_UM = 2.5
_NEAR = 3
"""Lattice cells beyond which two candidates are too far apart to clash."""


@compiled
def rim(n: NDArray[np.float64], c: float, s: float) -> float:
    """Return the outline's radius, relative to the ellipse, in the direction (c, s)."""
    c2, s2 = c * c - s * s, 2.0 * c * s
    third = n[C3] * (c * c2 - s * s2) + n[S3] * (s * c2 + c * s2)
    return float(1.0 + n[C2] * c2 + n[S2] * s2 + third)


@compiled
def boundary_point(n: NDArray[np.float64], angle: float, grow: float) -> tuple[float, float]:
    """Return a point of the outline, moved outward by about ``grow`` micrometres."""
    c, s = math.cos(angle), math.sin(angle)
    r = rim(n, c, s)
    u, v = (n[A] + grow) * r * c, (n[B] + grow) * r * s
    return n[X] + u * n[COS] - v * n[SIN], n[Y] + u * n[SIN] + v * n[COS]


@compiled
def _holds(n: NDArray[np.float64], x: float, y: float, grow: float) -> bool:
    dx, dy = x - n[X], y - n[Y]
    u = (dx * n[COS] + dy * n[SIN]) / (n[A] + grow)
    v = (dy * n[COS] - dx * n[SIN]) / (n[B] + grow)
    q = math.hypot(u, v)
    return q < 1e-9 or q < rim(n, u / q, v / q)


@compiled
def _clash(n: NDArray[np.float64], m: NDArray[np.float64]) -> bool:
    """Tell whether two nuclei come closer than the gap."""
    grow = 0.5 * _GAP_UM
    reach = 1.18 * (max(n[A], n[B]) + max(m[A], m[B]) + _GAP_UM)
    if math.hypot(n[X] - m[X], n[Y] - m[Y]) > reach:
        return False
    if _holds(n, m[X], m[Y], grow) or _holds(m, n[X], n[Y], grow):
        return True
    for k in range(20):
        angle = 2.0 * math.pi * k / 20
        x, y = boundary_point(n, angle, grow)
        if _holds(m, x, y, grow):
            return True
        x, y = boundary_point(m, angle, grow)
        if _holds(n, x, y, grow):
            return True
    return False


@compiled
def _draw(n: NDArray[np.float64], key: int, a: float, b: float, rough: float) -> None:
    """Fill size and deformation of a nucleus."""
    n[A], n[B] = a, b
    n[C2] = rough * (2.0 * uniform(key, 11) - 1.0)
    n[S2] = rough * (2.0 * uniform(key, 12) - 1.0)
    n[C3] = rough * (2.0 * uniform(key, 13) - 1.0)
    n[S3] = rough * (2.0 * uniform(key, 14) - 1.0)
    n[PHASE] = 512.0 * uniform(key, 15)


@compiled
def _in_epithelium(
    n: NDArray[np.float64],
    site: NDArray[np.float64],
    outer: NDArray[np.float32],
    lumen: NDArray[np.float32],
    base: float,
    apex: float,
) -> bool:
    for k in range(16):
        x, y = boundary_point(n, 2.0 * math.pi * k / 16, 0.0)
        d, s = gland_coordinates(site, x, y)
        if d > radius_at(outer, s) - base or d < radius_at(lumen, s) + apex:
            return False
    return True


@compiled
def _ring(
    site: NDArray[np.float64],
    outer: NDArray[np.float32],
    lumen: NDArray[np.float32],
    gland: int,
    out: NDArray[np.float64],
) -> int:
    """Place the epithelial nuclei and the goblet vacuoles of one crypt."""
    key = int(site[KEY])
    around = 2.0 * math.pi * (site[NOMINAL] - 11.0) + 2.0 * site[LENGTH]
    steps = int(around / 3.6)
    count = 0
    for k in range(steps):
        h = mix(key, k, 1)
        s = (k + 0.35 * (uniform(h, 0) - 0.5)) / steps % 1.0
        px, py, nx, ny = frame(site, s)
        tilt = 0.35 * (uniform(h, 1) - 0.5)
        a, b = 3.5 + 1.3 * uniform(h, 2), 2.25 + 0.65 * uniform(h, 3)
        depth = 1.5 + a + 3.0 * uniform(h, 4) ** 2 + 4.0 * (k & 1) * uniform(h, 5)
        for attempt in range(5):
            n = out[count]
            shrink = 1.0 - 0.04 * attempt
            _draw(n, h, a * shrink, b * shrink, 0.05)
            r = radius_at(outer, s) - depth
            n[X], n[Y] = px + r * nx, py + r * ny
            n[COS] = nx * math.cos(tilt) - ny * math.sin(tilt)
            n[SIN] = nx * math.sin(tilt) + ny * math.cos(tilt)
            n[INK] = 0.42 + 0.16 * uniform(h, 6)
            n[CLASS], n[GLAND] = EPITHELIAL, gland
            fits = _in_epithelium(n, site, outer, lumen, 0.9, 1.5)
            for other in range(count):
                if not fits:
                    break
                fits = not _clash(n, out[other])
            if fits:
                count += 1
                break
            depth += 1.6
    share = 0.35 + 0.6 * uniform(key, 3)
    inner = int((2.0 * math.pi * (site[NOMINAL] - 20.0) + 2.0 * site[LENGTH]) / 7.0)
    for k in range(inner):
        h = mix(key, k, 2)
        if uniform(h, 0) > share:
            continue
        s = (k + 0.4 * uniform(h, 1)) / inner % 1.0
        px, py, nx, ny = frame(site, s)
        n = out[count]
        _draw(n, h, 4.0 + 2.8 * uniform(h, 2), 2.5 + 1.2 * uniform(h, 3), 0.06)
        r = radius_at(lumen, s) + n[A] - 0.3 + 2.0 * uniform(h, 4)
        n[X], n[Y], n[COS], n[SIN] = px + r * nx, py + r * ny, nx, ny
        n[INK], n[CLASS], n[GLAND] = 0.0, VACUOLE, gland
        if r + n[A] < radius_at(outer, s) - 6.0:
            count += 1
    return count


@compiled
def _candidate(
    seed: int,
    i: int,
    j: int,
    nodes: NDArray[np.float32],
    i0: int,
    j0: int,
    n: NDArray[np.float64],
) -> bool:
    """Fill the candidate of one lattice cell; False where the tissue there has none."""
    h = mix(seed + 31, i, j)
    x = (i + 0.5 + 0.5 * (j & 1)) * _PITCH_UM
    y = (j + 0.5) * _PITCH_UM
    # The cells of a follicle are packed, hence placed more regularly; a slow wave hides
    # the lattice.
    spread = (0.40 if field(nodes, i0, j0, x, y, FOLLICLE) > 0.0 else 0.66) * _PITCH_UM
    x += spread * (uniform(h, 0) - 0.5) + _WAVE_UM * noise(seed + 34, x / 40.0, y / 40.0)
    y += spread * (uniform(h, 1) - 0.5) + _WAVE_UM * noise(seed + 35, x / 40.0, y / 40.0)
    if field(nodes, i0, j0, x, y, EDGE) < 8.0 or in_fat(seed, nodes, i0, j0, x, y, 2.4):
        return False
    depth = field(nodes, i0, j0, x, y, DEPTH)
    follicle = field(nodes, i0, j0, x, y, FOLLICLE)
    pick = uniform(h, 2)
    clump = 0.7 + 0.5 * noise(seed + 32, x / 28.0, y / 28.0)
    # Shares of lymphocytes, plasma cells and fibroblasts in each kind of tissue.
    if follicle > 0.0:
        shares = (0.86, 0.94, 0.95)
    elif depth < 0.0:
        crowd = clump * (1.5 - 0.7 * field(nodes, i0, j0, x, y, LOOSE))
        shares = (0.32 * crowd, 0.58 * crowd, 0.58 * crowd + 0.10)
    elif depth < MUSCLE_UM:
        shares = (0.01, 0.02, 0.20)
    else:
        shares = (0.02 * clump, 0.035 * clump, 0.10)
    if pick > shares[2]:
        return False
    # Fibres run along the layers: across the gradient of depth.
    gx = field(nodes, i0, j0, x + 4.0, y, DEPTH) - field(nodes, i0, j0, x - 4.0, y, DEPTH)
    gy = field(nodes, i0, j0, x, y + 4.0, DEPTH) - field(nodes, i0, j0, x, y - 4.0, DEPTH)
    angle = math.atan2(gx, -gy) + 0.7 * (uniform(h, 3) - 0.5)
    n[X], n[Y], n[GLAND] = x, y, -1.0
    if pick < shares[0]:
        n[CLASS], n[INK] = LYMPHOCYTE, 0.62 + 0.22 * uniform(h, 4)
        a = (2.65 if follicle < 0.0 else 2.45) + 0.5 * uniform(h, 5)
        _draw(n, h, a, a * (0.80 + 0.2 * uniform(h, 6)), 0.05)
        angle = 6.283185307 * uniform(h, 7)
    elif pick < shares[1]:
        n[CLASS], n[INK] = PLASMA, 0.48 + 0.2 * uniform(h, 4)
        a = 3.1 + 0.7 * uniform(h, 5)
        _draw(n, h, a, a * (0.66 + 0.28 * uniform(h, 6)), 0.06)
        angle = 6.283185307 * uniform(h, 7)
    else:
        n[CLASS], n[INK] = FIBROBLAST, 0.50 + 0.24 * uniform(h, 4)
        long = 4.0 + 2.2 * uniform(h, 5)
        _draw(n, h, long, 1.6 + 0.7 * uniform(h, 6), 0.05)
        if depth < 0.0:
            angle += 2.5 * (uniform(h, 7) - 0.5)
    n[COS], n[SIN] = math.cos(angle), math.sin(angle)
    return True


@compiled
def _outside_glands(
    n: NDArray[np.float64], sites: NDArray[np.float64], outer: NDArray[np.float32]
) -> bool:
    """Tell whether a nucleus keeps clear of every crypt; close to one it lies along it."""
    for g in range(sites.shape[0]):
        if math.hypot(n[X] - sites[g, 0], n[Y] - sites[g, 1]) > 125.0:
            continue
        d, s = gland_coordinates(sites[g], n[X], n[Y])
        away = d - radius_at(outer[g], s)
        if away < 0.0:
            return False
        if away > 10.0:
            continue
        if n[CLASS] == FIBROBLAST:
            _, _, nx, ny = frame(sites[g], s)
            n[COS], n[SIN] = -ny, nx
        for k in range(16):
            x, y = boundary_point(n, 2.0 * math.pi * k / 16, 0.0)
            d, s = gland_coordinates(sites[g], x, y)
            if d < radius_at(outer[g], s) + 0.8:
                return False
    return True


@compiled
def _wins(grid: NDArray[np.float64], rank: NDArray[np.int64], i: int, j: int) -> bool:
    """Tell whether no candidate of higher rank clashes; rank 0 means there is none."""
    for q in range(j - _NEAR, j + _NEAR + 1):
        for p in range(i - _NEAR, i + _NEAR + 1):
            if rank[q, p] > rank[j, i] and _clash(grid[j, i], grid[q, p]):
                return False
    return True


@compiled
def _fill_stroma(
    seed: int,
    nodes: NDArray[np.float32],
    node: tuple[int, int],
    cells: tuple[int, int, int, int],
    sites: NDArray[np.float64],
    outer: NDArray[np.float32],
    out: NDArray[np.float64],
) -> int:
    """Keep the candidates that win against all others near them."""
    width, height = cells[2] - cells[0] + 2 * _NEAR, cells[3] - cells[1] + 2 * _NEAR
    grid = np.empty((height, width, 14))
    rank = np.zeros((height, width), np.int64)
    for j in range(height):
        for i in range(width):
            ci, cj = cells[0] - _NEAR + i, cells[1] - _NEAR + j
            if _candidate(seed, ci, cj, nodes, node[0], node[1], grid[j, i]) and _outside_glands(
                grid[j, i], sites, outer
            ):
                rank[j, i] = (mix(seed + 33, ci, cj) >> 2 & 0xFFFFFFFFFFFF) + 1
    count = 0
    for j in range(_NEAR, height - _NEAR):
        for i in range(_NEAR, width - _NEAR):
            if rank[j, i] > 0 and _wins(grid, rank, i, j):
                out[count] = grid[j, i]
                count += 1
    return count


@compiled
def _fill_rings(
    sites: NDArray[np.float64],
    outer: NDArray[np.float32],
    lumen: NDArray[np.float32],
    out: NDArray[np.float64],
) -> int:
    count = 0
    for g in range(sites.shape[0]):
        count += _ring(sites[g], outer[g], lumen[g], g, out[count:])
    return count


def make_nuclei(
    seed: int,
    fields: Fields,
    glands: tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]],
    window_um: tuple[float, float, float, float],
) -> NDArray[np.float64]:
    """Make every nucleus that may reach into a window, and the crypts' mucin vacuoles.

    Args:
        seed: Of the world.
        fields: Over at least the window padded by 64 micrometres.
        glands: All crypts that reach into the window padded by 64 micrometres; the
            nuclei of each of them are all returned.
        window_um: ``(x0, y0, x1, y1)`` in micrometres.

    Returns:
        ``(N, 14)``, columns as :data:`X` and following.
    """
    sites, outer, lumen = glands
    x0, y0, x1, y1 = window_um
    reach = NUCLEUS_REACH_UM
    cells = (
        math.floor((x0 - reach) / _PITCH_UM) - 2,
        math.floor((y0 - reach) / _PITCH_UM) - 1,
        math.ceil((x1 + reach) / _PITCH_UM) + 1,
        math.ceil((y1 + reach) / _PITCH_UM) + 1,
    )
    rings = np.empty((200 * len(sites) + 1, 14))
    count = _fill_rings(sites, outer, lumen, rings)
    stroma = np.empty(((cells[2] - cells[0]) * (cells[3] - cells[1]) + 1, 14))
    others = _fill_stroma(seed, fields.nodes, fields.origin, cells, sites, outer, stroma)
    return np.concatenate([rings[:count], stroma[:others]])
