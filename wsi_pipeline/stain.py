"""The stain baseline: objects from colour alone, without anything learned.

It runs where no trained model is at hand, fast and the same everywhere. It finds nuclei
as haematoxylin that stands out from its surroundings, lumina as unstained space within
solid, haematoxylin-rich epithelium, and glands as the two together. It knows no cell
types, cannot part nuclei that touch, and is no substitute for a trained network.

::

    RGB -> optical density -> haematoxylin -> above the local midpoint?     -> nuclei
                  | 1/4 size       | 1/4 size
                  |                +-> solid, without white gaps?  = wall -+
                  +-> unstained?  = space ---- rays in 8 directions -------+-> lumen, gland

Every step is local: no output depends on input farther than 240 pixels (120 micrometres).
Lengths are meant for 0.5 micrometres a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.spec import HeadSpec

__all__ = ["StainBaseline"]

WHITE = 245.0
"""Intensity of glass: fixed, so that a pixel's maps do not depend on its tile."""
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
"""Optical densities of haematoxylin and eosin in red, green and blue.

Ruifrok & Johnston, Analytical and Quantitative Cytology and Histology 23 (2001)."""

EOSIN_SHARE = 0.15
"""Eosin that counts as nuclear stain: mucin has haematoxylin's hue, but no eosin at all."""

MEANS_PX = 8
"""Side of the cells on which local means of the nuclear stain are taken."""
MEANS_CELLS = 13
"""Cells a side that a local mean covers: 52 micrometres."""
PRIOR = (0.15, 0.7)
"""The means around and in nuclei that a window with little of either falls back to."""
PRIOR_SHARE = 0.01
"""Share of a window's pixels that the prior counts for."""
MIN_CONTRAST = 0.5
"""Nuclei have at least this much more stain than what is around them."""
EDGE = 0.55
"""Where a nucleus ends, between the two means: a bit above the middle, as smoothing
optical densities spreads the dark side."""
SHARPNESS = 10.0
"""Slope of the nuclear probability over the contrast between the means."""
REGROWTH_PX = 12
"""How far from its core a pixel of a thick nucleus may lie."""

COARSE_PX = 4
"""Side of the pixels on which lumina and glands are found: 2 micrometres."""
SPACE_OD = 0.35
"""Unstained: haematoxylin and eosin together are below this."""
WALL = (0.35, 0.6)
"""Haematoxylin that epithelial nuclei side by side have without a gap, from no to yes."""
DARK = 0.85
"""A single nucleus of the stroma; it stops a ray."""
RAY_STEPS = 3
"""Times eight coarse pixels: a ray's reach (46 micrometres)."""
RAYS_MET = 6.0
"""Of eight rays, those that meet the wall from inside a gland."""
EPITHELIUM_PX = 14
"""Coarse pixels: the epithelium is no thicker than this around its lumen."""
GLAND_RIM = 4
"""Half width of a gland's contour in micrometres: bridges up to twice this wide break."""
DIRECTIONS = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))


class StainBaseline(nn.Module):
    """Colour deconvolution, local contrast and enclosure.

    Args:
        heads: of these names: ``nuclei`` (logits at scale 1), ``gland``, ``lumen`` (scale 2).
    """

    unmix: Tensor

    def __init__(self, heads: Sequence[HeadSpec]) -> None:
        super().__init__()
        self.names = tuple(head.name for head in heads)
        unknown = sorted(set(self.names) - {"nuclei", "gland", "lumen"})
        if unknown:
            raise ModelBundleError(f"the stain baseline has no heads {unknown}")
        # Not learned, but it decides the maps: it is kept where weights are kept.
        self.register_buffer("unmix", _unmixing())

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the logarithms of the probabilities of background, inner and contour."""
        if any(side % 16 for side in x_BCHW.shape[2:]):
            raise ValueError(f"height and width must be multiples of 16, not {x_BCHW.shape}")
        stains_BCHW = self._stains(x_BCHW)
        logits = {}
        if "nuclei" in self.names:
            p_B1HW = _nuclei(stains_BCHW[:, :1] + EOSIN_SHARE * stains_BCHW[:, 1:])
            logits["nuclei"] = _logits(_cores(p_B1HW), _dilate(p_B1HW))
        if "gland" in self.names or "lumen" in self.names:
            lumen, gland = _glands(functional.avg_pool2d(stains_BCHW, COARSE_PX))
            gland = _enlarge(gland, 2)
            logits["gland"] = _logits(
                _repeat(_erode, gland, GLAND_RIM), _repeat(_dilate, gland, GLAND_RIM)
            )
            lumen = _enlarge(lumen, 2)
            logits["lumen"] = _logits(lumen, _dilate(lumen))
        return {name: logits[name] for name in self.names}

    def _stains(self, x_BCHW: Tensor) -> Tensor:
        """Haematoxylin and eosin in optical density (natural logarithm), each at least 0."""
        x_BCHW = x_BCHW.contiguous()  # planes
        od_BCHW = math.log(WHITE + 1) - torch.log1p(x_BCHW.clamp(max=WHITE))
        red, green, blue = od_BCHW.unbind(1)
        planes = [red * row[0] + green * row[1] + blue * row[2] for row in self.unmix]
        return torch.stack(planes, 1).clamp(min=0)


def _unmixing() -> Tensor:
    """Return the ``(2, 3)`` matrix from optical densities to haematoxylin and eosin."""
    vectors = functional.normalize(torch.tensor(STAINS, dtype=torch.float64), dim=1)
    residual = functional.normalize(torch.linalg.cross(vectors[0], vectors[1]), dim=0)
    matrix: Tensor = torch.linalg.inv(torch.stack([*vectors, residual])).T[:2]
    return matrix.float().contiguous()


def _nuclei(stain_B1HW: Tensor) -> Tensor:
    """Probability of nucleus: stain above a point between two local means.

    About midway is where the blurred edge of an object of uniform stain lies. The means
    are those of the pixels below and above the last such point: 2-means, place by place.
    """
    stain_B1HW = _blur(stain_B1HW)
    sample = stain_B1HW[..., ::2, ::2].contiguous()
    edge = torch.full_like(sample, PRIOR[0] + EDGE * (PRIOR[1] - PRIOR[0]))
    for _ in range(3):
        low, high = _local_means(sample, sample > edge)
        contrast = (high - low).clamp(min=MIN_CONTRAST)
        middle = low + EDGE * contrast
        edge = _enlarge(middle, MEANS_PX // 2)
    slope = SHARPNESS / _enlarge(contrast, MEANS_PX)
    return torch.sigmoid((stain_B1HW - _enlarge(middle, MEANS_PX)) * slope)


def _local_means(values: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the values that are not above, and above, each drawn a little to its prior."""
    weight = above.to(values.dtype)
    cell = MEANS_PX // 2
    sums = [weight * values, values, weight]
    both, total, share = (
        functional.avg_pool2d(
            functional.avg_pool2d(part, cell),
            MEANS_CELLS,
            stride=1,
            padding=MEANS_CELLS // 2,
            count_include_pad=False,
        )
        for part in sums
    )
    low = (total - both + PRIOR_SHARE * PRIOR[0]) / (1 - share + PRIOR_SHARE)
    return low, (both + PRIOR_SHARE * PRIOR[1]) / (share + PRIOR_SHARE)


def _glands(stains_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of lumen and of gland (lumen included), on coarse pixels."""
    h, e = stains_BCHW[:, :1], stains_BCHW[:, 1:]
    space = (_blur(h + e) < SPACE_OD).to(h.dtype)
    solid = _repeat(_dilate, _repeat(_erode, _blur(h), 2), 2)
    wall = ((solid - WALL[0]) / (WALL[1] - WALL[0])).clamp(0, 1)
    # A ray from inside a gland crosses space and cytoplasm and then meets the wall; between
    # the glands it meets the lone nuclei of the stroma first.
    is_wall = (wall > 0.5).to(h.dtype)
    free = (1 - is_wall) * (_blur(h) < DARK)
    target = _dilate(is_wall)
    met = sum((_first_met(target, free, way) for way in DIRECTIONS), torch.zeros_like(h))
    met = _box(met * free) / (_box(free) + 0.05)
    inside = (met - RAYS_MET + 0.5).clamp(0, 1) * (1 - wall)
    lumen = _box(_repeat(_dilate, _repeat(_erode, torch.minimum(space, inside), 2), 2))
    near = (_repeat(_dilate_by_two, lumen, EPITHELIUM_PX // 2) > 0.5).to(h.dtype)
    return lumen, torch.maximum(_box(near * torch.maximum(wall, inside)), lumen)


def _first_met(value: Tensor, free: Tensor, way: tuple[int, int]) -> Tensor:
    """Value of the first pixel on a ray that is not free, 0 where none is in reach."""
    for distance in (1, 2, 4):
        value = torch.maximum(value, free * _shift(value, way, distance))
        free = free * _shift(free, way, distance)
    start = value
    for _ in range(RAY_STEPS - 1):
        value = torch.maximum(start, free * _shift(value, way, 8))
    return value


def _shift(x_BCHW: Tensor, way: tuple[int, int], distance: int) -> Tensor:
    """Give each pixel what lies ``distance`` ahead of it, 0 beyond the edge."""
    dx, dy = way[0] * distance, way[1] * distance
    height, width = x_BCHW.shape[-2:]
    y_BCHW = torch.zeros_like(x_BCHW)
    y_BCHW[..., max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)] = x_BCHW[
        ..., max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)
    ]
    return y_BCHW


def _cores(p_B1HW: Tensor) -> Tensor:
    """Interiors: each object eroded by a pixel, thick ones by two, so that bridges break.

    What survives three erosions is the core of a thick object, and speaks for every pixel
    that it reaches within the object; elsewhere one erosion is enough.
    """
    thin = _erode(p_B1HW)
    core = _dilate((_erode(_erode(thin)) > 0.5).to(torch.uint8))
    within = (p_B1HW > 0.5).to(torch.uint8)
    near = core
    for _ in range(REGROWTH_PX):
        near = torch.minimum(_dilate(near), within)
    return thin * (1 - near + core)


def _logits(inner: Tensor, whole: Tensor) -> Tensor:
    """Logits of background, inner and contour; the contour is what ``whole`` has more."""
    return torch.cat([1 - whole, inner, whole - inner], 1).clamp(min=1e-4).log()


def _repeat(step: Callable[[Tensor], Tensor], x_BCHW: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x_BCHW = step(x_BCHW)
    return x_BCHW


def _dilate(x_BCHW: Tensor) -> Tensor:
    """Maximum over the pixel and its four neighbours."""
    y_BCHW = x_BCHW.clone()
    torch.maximum(y_BCHW[..., 1:], x_BCHW[..., :-1], out=y_BCHW[..., 1:])
    torch.maximum(y_BCHW[..., :-1], x_BCHW[..., 1:], out=y_BCHW[..., :-1])
    torch.maximum(y_BCHW[..., 1:, :], x_BCHW[..., :-1, :], out=y_BCHW[..., 1:, :])
    torch.maximum(y_BCHW[..., :-1, :], x_BCHW[..., 1:, :], out=y_BCHW[..., :-1, :])
    return y_BCHW


def _dilate_by_two(x_BCHW: Tensor) -> Tensor:
    """Maximum within an octagon of radius 2: rounder than two crosses."""
    return _dilate(functional.max_pool2d(x_BCHW, 3, stride=1, padding=1))


def _erode(x_BCHW: Tensor) -> Tensor:
    """Minimum over the pixel and its four neighbours."""
    return -_dilate(-x_BCHW)


def _blur(x_BCHW: Tensor) -> Tensor:
    """Binomial smoothing, (1 2 1) in both directions; standard deviation 0.7 pixels."""
    for dim in (2, 3):
        size = x_BCHW.shape[dim]
        first, last = x_BCHW.narrow(dim, 0, 1), x_BCHW.narrow(dim, size - 1, 1)
        wide = torch.cat([first, x_BCHW, last], dim)
        x_BCHW = 0.5 * x_BCHW + 0.25 * (wide.narrow(dim, 0, size) + wide.narrow(dim, 2, size))
    return x_BCHW


def _box(x_BCHW: Tensor) -> Tensor:
    return functional.avg_pool2d(x_BCHW, 5, stride=1, padding=2, count_include_pad=False)


def _enlarge(x_BCHW: Tensor, factor: int) -> Tensor:
    return functional.interpolate(x_BCHW, scale_factor=factor, mode="bilinear", align_corners=False)
