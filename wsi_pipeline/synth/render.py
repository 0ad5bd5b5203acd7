"""How much dye each point of the synthetic world takes up, painted in layers.

Layers, from below: glass, stroma and fat, cytoplasm, crypts, mucin, nuclei, pen. Every
pixel is a function of its place, so a region drawn alone equals the same part of a larger
one. Shapes have edges about as soft as an objective makes them.
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
    fat_wall,
    field,
)
from wsi_pipeline.synth.glands import LENGTH, NOMINAL, gland_coordinates, radius_at
from wsi_pipeline.synth.noise import TEXTURE_SIZE, noise, sample_texture, uniform
from wsi_pipeline.synth.nuclei import (
    CLASS,
    COS,
    EPITHELIAL,
    INK,
    LYMPHOCYTE,
    PHASE,
    PLASMA,
    SIN,
    VACUOLE,
    A,
    B,
    X,
    Y,
    rim,
)

__all__ = ["CYTOPLASM", "MUCIN", "NUCLEI", "paint_crypts", "paint_nuclei", "paint_stroma"]

CYTOPLASM, MUCIN, NUCLEI = range(3)
"""Layers of :func:`paint_nuclei`; crypts come after the first."""


@compiled
def _smooth(x: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return x * x * (3.0 - 2.0 * x)


@compiled
def _stroma(
    seed: int,
    texture: NDArray[np.float32],
    x: float,
    y: float,
    depth: float,
    follicle: float,
    wall: float,
    loose: float,
) -> tuple[float, float]:
    """Return (haematoxylin, eosin) of the tissue between crypts and nuclei."""
    fine = sample_texture(texture, x * 1.7, y * 1.7)
    coarse = sample_texture(texture, x * 0.37 + 91.0, y * 0.37 + 33.0)
    mucosa = _smooth(0.5 - depth / 24.0)
    h, e = 0.0, 0.0
    if mucosa > 0.0:
        middle = sample_texture(texture, x * 0.9 + 55.0, y * 0.9)
        strand = _smooth(1.15 - 1.5 * abs(middle))
        gap = _smooth((0.4 * fine - 0.4 * strand + 0.65 * coarse + 1.3 * loose - 0.45) * 0.8)
        dense = 0.115 + 0.05 * strand + 0.025 * fine
        e = (dense * (1.0 - 0.9 * gap)) * mucosa
        h = (0.05 + 0.015 * fine) * (1.0 - 0.85 * gap) * mucosa
    if mucosa < 1.0:
        wave = 10.0 * noise(seed + 42, x / 60.0, y / 60.0)
        deep = _smooth((depth - MUSCLE_UM) / 30.0)
        fibre = sample_texture(
            texture, (0.7 * x + 0.7 * y) * 0.11 + 17.0, (depth + wave * deep) * (1.2 - 0.5 * deep)
        )
        split = _smooth((-0.5 - fibre) * 0.8) * (0.25 + 0.75 * deep)
        dense = 0.25 - 0.06 * deep + 0.05 * fibre + 0.02 * fine
        e += (1.0 - mucosa) * dense * (1.0 - 0.85 * split)
        h += (1.0 - mucosa) * (0.06 + 0.012 * fine) * (1.0 - 0.7 * split)
    if follicle > -0.05:
        share = _smooth((follicle + 0.05) * 10.0)
        e += share * (0.11 + 0.02 * fine - e)
        h += share * (0.15 + 0.03 * fine - h)
    if wall > 0.0:
        line = 1.0 - _smooth((wall - 0.5) / 0.9)
        e = 0.012 + 0.19 * line
        h = 0.004 + 0.05 * line
    return max(h, 0.0), max(e, 0.0)


@compiled
def paint_stroma(
    seed: int,
    texture: NDArray[np.float32],
    nodes: NDArray[np.float32],
    node: tuple[int, int],
    corner: tuple[int, int],
    mpp: float,
    dyes: NDArray[np.float32],
) -> None:
    """Fill ``dyes`` (2, H, W) with what lies below crypts and nuclei."""
    i0, j0 = node
    for r in range(dyes.shape[1]):
        y = (corner[1] + r + 0.5) * mpp
        for c in range(dyes.shape[2]):
            x = (corner[0] + c + 0.5) * mpp
            edge = field(nodes, i0, j0, x, y, EDGE)
            if edge < -6.0:
                dyes[0, r, c] = 0.0
                dyes[1, r, c] = 0.0
                continue
            edge += 2.2 * sample_texture(texture, x * 0.8 + 200.0, y * 0.8)
            cover = _smooth(0.5 + edge / 3.0)
            h, e = _stroma(
                seed,
                texture,
                x,
                y,
                field(nodes, i0, j0, x, y, DEPTH),
                field(nodes, i0, j0, x, y, FOLLICLE),
                fat_wall(seed, nodes, i0, j0, x, y),
                field(nodes, i0, j0, x, y, LOOSE),
            )
            dyes[0, r, c] = cover * h
            dyes[1, r, c] = cover * e


@compiled
def _span(low: float, high: float, corner: int, mpp: float, size: int) -> tuple[int, int]:
    """Return the pixels whose centres lie between two micrometre positions."""
    first = max(math.floor(low / mpp - 0.5) - corner, 0)
    last = min(math.ceil(high / mpp + 0.5) - corner, size)
    return first, last


@compiled
def paint_crypts(
    texture: NDArray[np.float32],
    sites: NDArray[np.float64],
    outer: NDArray[np.float32],
    lumen: NDArray[np.float32],
    corner: tuple[int, int],
    mpp: float,
    dyes: NDArray[np.float32],
) -> None:
    """Paint basement membrane, epithelium and lumen over ``dyes``."""
    soft = 0.3 + 0.5 * mpp
    for g in range(sites.shape[0]):
        site = sites[g]
        limit = site[NOMINAL] + 2.0
        reach = limit + 0.5 * site[LENGTH]
        phase = uniform(int(site[6]), 9) * TEXTURE_SIZE
        c0, c1 = _span(site[0] - reach, site[0] + reach, corner[0], mpp, dyes.shape[2])
        r0, r1 = _span(site[1] - reach, site[1] + reach, corner[1], mpp, dyes.shape[1])
        for r in range(r0, r1):
            y = (corner[1] + r + 0.5) * mpp
            for c in range(c0, c1):
                x = (corner[0] + c + 0.5) * mpp
                d, s = gland_coordinates(site, x, y)
                if d > limit:
                    continue
                out = radius_at(outer[g], s)
                base = out - d
                if base < -1.6:
                    continue
                inner = radius_at(lumen[g], s)
                streak = sample_texture(texture, s * TEXTURE_SIZE, 0.22 * base + phase)
                fine = sample_texture(texture, x * 1.9, y * 1.9 + phase)
                basal = _smooth((d - inner) / (out - inner) * 1.6 - 0.35)
                h = 0.11 + 0.07 * basal + 0.022 * streak + 0.014 * fine
                e = 0.15 + 0.02 * basal + 0.03 * streak + 0.02 * fine
                apex = d - inner
                if apex < 2.0:
                    e += 0.05 * _smooth(1.0 - apex / 2.0)
                if apex < soft:
                    open_ = _smooth(0.5 - 0.5 * apex / soft)
                    cloud = sample_texture(texture, x * 0.8 + phase, y * 0.8)
                    strand = _smooth(1.0 - 2.2 * abs(cloud - 0.4)) * _smooth(0.5 + fine)
                    h += open_ * (0.008 + 0.035 * strand - h)
                    e += open_ * (0.010 + 0.045 * strand - e)
                if base < 0.6:
                    line = _smooth(1.0 - abs(base + 0.5) / 1.1)
                    e = e * (1.0 - line) + 0.27 * line
                    h = h * (1.0 - line) + 0.08 * line
                cover = _smooth(0.5 + 0.5 * (base + 1.0) / soft)
                dyes[0, r, c] += cover * (h - dyes[0, r, c])
                dyes[1, r, c] += cover * (e - dyes[1, r, c])


@compiled
def _depth_in(n: NDArray[np.float64], dx: float, dy: float, grow: float) -> float:
    """Return about how deep a point lies inside a nucleus grown by ``grow`` (negative: out)."""
    a, b = n[A] + grow, n[B] + grow
    u = (dx * n[COS] + dy * n[SIN]) / a
    v = (dy * n[COS] - dx * n[SIN]) / b
    q = math.hypot(u, v)
    if q < 1e-6:
        return float(b)
    slope = math.hypot(u / a, v / b) / q
    return float((rim(n, u / q, v / q) - q) / slope)


@compiled
def _cytoplasm(n: NDArray[np.float64]) -> tuple[float, float, float, float, float]:
    """Return centre, growth over the nucleus, haematoxylin and eosin of a cell's body."""
    if n[CLASS] != PLASMA:
        return n[X], n[Y], 1.0, 0.09, 0.15
    # The nucleus of a plasma cell lies to one side; some are eosinophils instead.
    angle = n[PHASE] * (2.0 * math.pi / TEXTURE_SIZE)
    x, y = n[X] + 1.5 * math.cos(angle), n[Y] + 1.5 * math.sin(angle)
    if n[PHASE] > 460.0:
        return x, y, 2.2, 0.06, 0.36
    return x, y, 2.2, 0.13, 0.15


@compiled
def _texture_of(
    texture: NDArray[np.float32],
    n: NDArray[np.float64],
    layer: int,
    at: tuple[float, float],
    inside: float,
    dyes: tuple[float, float],
) -> tuple[float, float]:
    """Return the dyes at a point of a cell: chromatin, mucin or granules."""
    (dx, dy), (h, e) = at, dyes
    if layer == NUCLEI:
        coarse = 0.24 if n[CLASS] == PLASMA or n[CLASS] == EPITHELIAL else 0.15
        chromatin = sample_texture(texture, dx * 3.1 + n[PHASE], dy * 3.1 + 2.0 * n[PHASE])
        return h * (1.0 + coarse * chromatin + 0.16 * _smooth(1.0 - inside / 0.9)), e
    if layer == MUCIN:
        line = _smooth(1.0 - abs(inside - 0.2) / 0.7)
        cloud = sample_texture(texture, dx * 1.3 + n[PHASE], dy * 1.3)
        return h + 0.04 * line + 0.015 * cloud, e + 0.08 * line + 0.012 * cloud
    if e > 0.3:
        return h, e * (1.0 + 0.35 * sample_texture(texture, dx * 3.7 + n[PHASE], dy * 3.7))
    return h, e


@compiled
def _paint_one(
    texture: NDArray[np.float32],
    n: NDArray[np.float64],
    layer: int,
    corner: tuple[int, int],
    mpp: float,
    dyes: NDArray[np.float32],
) -> None:
    """Paint one object of a layer."""
    soft = 0.28 + 0.5 * mpp
    x0, y0, grow, h0, e0 = n[X], n[Y], 0.0, n[INK], 0.16
    if layer == MUCIN:
        h0, e0 = 0.05, 0.035
    if layer == CYTOPLASM:
        x0, y0, grow, h0, e0 = _cytoplasm(n)
        soft += 0.5
    reach = 1.18 * (n[A] + grow) + soft
    c0, c1 = _span(x0 - reach, x0 + reach, corner[0], mpp, dyes.shape[2])
    r0, r1 = _span(y0 - reach, y0 + reach, corner[1], mpp, dyes.shape[1])
    for r in range(r0, r1):
        dy = (corner[1] + r + 0.5) * mpp - y0
        for c in range(c0, c1):
            dx = (corner[0] + c + 0.5) * mpp - x0
            inside = _depth_in(n, dx, dy, grow)
            if inside < -soft:
                continue
            cover = _smooth(0.5 + 0.5 * inside / soft)
            h, e = _texture_of(texture, n, layer, (dx, dy), inside, (h0, e0))
            dyes[0, r, c] += cover * (max(h, 0.02) - dyes[0, r, c])
            dyes[1, r, c] += cover * (e - dyes[1, r, c])


@compiled
def paint_nuclei(
    texture: NDArray[np.float32],
    nuclei: NDArray[np.float64],
    layer: int,
    corner: tuple[int, int],
    mpp: float,
    dyes: NDArray[np.float32],
) -> None:
    """Paint one layer over ``dyes``: 0 cytoplasm of stromal cells, 1 mucin, 2 nuclei."""
    for k in range(nuclei.shape[0]):
        kind = int(nuclei[k, CLASS])
        if (kind == VACUOLE) != (layer == MUCIN):
            continue
        if layer == CYTOPLASM and kind != LYMPHOCYTE and kind != PLASMA:
            continue
        _paint_one(texture, nuclei[k], layer, corner, mpp, dyes)
