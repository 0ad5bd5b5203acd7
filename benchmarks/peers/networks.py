"""The two networks that every tool runs: all of Cerberus, and one that costs next to nothing.

Both take ``(B, 3, H, W)`` floats 0..255 and return the logits of Cerberus' six heads, so one
wrapper fits either. The full network says
what a pipeline wastes of it; the colour network what everything around it costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers.patches import MPP, PATCH_PX
from wsi_pipeline.blocks import enlarged
from wsi_pipeline.checkpoint import cerberus_heads
from wsi_pipeline.network import Cerberus
from wsi_pipeline.spec import ModelSpec

HALO_PX = 160
"""Context around a tile of ours, for both: what Cerberus needs."""
SEED = 0

STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical densities of haematoxylin, eosin and the rest: Ruifrok & Johnston 2001."""
CELL_PX = 8
"""Side of the cells on which local means are taken; divides every tool's tile origins."""
EOSIN_OF_TYPES = (-0.4, -0.15, 0.1, 0.35, 0.6, 0.85)
"""Share of eosin in which the six nuclear classes differ."""
TISSUE_CENTRES = tuple(0.1 * step for step in range(9))
"""Haematoxylin in which the tissue classes differ."""


def make_network(name: str) -> nn.Module:
    """Return a network in evaluation mode, with the same weights in every process.

    Args:
        name: ``colour`` or ``full``. The full one has random weights: time does not depend
            on what they are.
    """
    if name == "colour":
        return ColourNetwork().eval()
    torch.manual_seed(SEED)
    return Cerberus(cerberus_heads()).eval()


def make_spec(name: str) -> ModelSpec:
    """Return what our engine has to know of a network: Cerberus' heads and object rules."""
    architecture = "cerberus" if name == "full" else "colour"
    return ModelSpec(
        name=f"peers-{name}",
        architecture=architecture,
        mpp=MPP,
        halo_px=HALO_PX,
        heads=cerberus_heads(),
        options={},
    )


def patch_logits(logits_BCHW: Tensor, *, first: int, size: int) -> Tensor:
    """Return the logits of a part of a patch at full resolution.

    Args:
        logits_BCHW: of whole patches, a pixel of the slide or coarser.
        first: row and column of the part's first pixel in the patch.
        size: pixels a side of the part.
    """
    times = PATCH_PX // logits_BCHW.shape[-1]
    # A cell more on each side: enlarging looks at the neighbours.
    begin, end = max(first // times - 1, 0), -(-(first + size) // times) + 1
    fine_BCHW = enlarged(logits_BCHW[..., begin:end, begin:end], times)
    part = slice(first - begin * times, first - begin * times + size)
    return fine_BCHW[..., part, part]


def patch_class(logits_BCHW: Tensor) -> Tensor:
    """Return the ``(B,)`` class of each patch: that of its middle cell, which sees 144 pixels."""
    middle = (logits_BCHW.shape[-1] - 1) // 2
    return logits_BCHW[..., middle, middle].argmax(1)


class ColourNetwork(nn.Module):
    """Cerberus' heads from colour alone: realistic numbers of objects, of no meaning.

    Nuclei are haematoxylin above its surroundings; glands are wide areas with much of it, and
    lumina the bright ones in them. All but the nuclei is left on cells of 8 x 8 pixels. Cells
    begin at multiples of 8 pixels, as the patches and tiles of every tool do, so all of them
    get the same maps: no output depends on pixels farther away than 80.
    """

    unmix: Tensor

    def __init__(self) -> None:
        super().__init__()
        stains = functional.normalize(torch.tensor(STAINS, dtype=torch.float64), dim=1)
        self.register_buffer("unmix", torch.linalg.inv(stains).T[:2, :, None, None].float())

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Return ``{head: logits}``."""
        density_BCHW = (x_BCHW.contiguous() + 1).log_().neg_().add_(math.log(256))
        cells_BCHW = functional.avg_pool2d(density_BCHW, CELL_PX)
        stains_BCHW = functional.conv2d(cells_BCHW, self.unmix)
        brightness = -_mean(cells_BCHW.mean(1, keepdim=True), 3)
        haematoxylin, eosin = _mean(stains_BCHW, 3).split(1, 1)
        wide = _mean(stains_BCHW[:, :1], 9)
        space = torch.minimum(0.25 + brightness, 4 * (wide - 0.08))
        share = (eosin / (haematoxylin + 0.1)).clamp(-1, 2)
        around = enlarged((1.3 * haematoxylin).clamp(min=0.2), CELL_PX)
        dark = _smooth(functional.conv2d(density_BCHW, self.unmix[:1])) - around
        tissue = _mean(functional.avg_pool2d(stains_BCHW[:, :1], 2), 9)
        return {
            "nuclei": _instances(dark, steepness=40, rim=0.03, bias=0.4),
            "nuclei-class": _peaks(share, (-9.0, *EOSIN_OF_TYPES)),
            "gland": _instances(wide - 0.36, steepness=60, rim=0.02, bias=-1),
            "gland-class": _peaks(eosin * (wide > 0.36), (-0.2, 0.0, 0.2)),
            "lumen": _instances(space, steepness=80, rim=0.01, bias=-1),
            "tissue": _peaks(tissue, TISSUE_CENTRES),
        }


def _instances(depth_B1HW: Tensor, *, steepness: float, rim: float, bias: float) -> Tensor:
    """Background, inner and contour logits of what is positive; contour within ``rim`` of 0."""
    contour = steepness * (rim - depth_B1HW.abs()) + bias
    return torch.cat([-steepness * depth_B1HW, steepness * (depth_B1HW - rim), contour], 1)


def _peaks(x_B1HW: Tensor, centres: tuple[float, ...]) -> Tensor:
    """One class a centre, the likelier the nearer.

    The classes of a pixel lie side by side, as those of a network of convolutions do: torch
    finds the largest of them ten times as fast so.
    """
    peaks_BCHW = torch.cat([-(((x_B1HW - centre) / 0.2) ** 2) for centre in centres], 1)
    return peaks_BCHW.contiguous(memory_format=torch.channels_last)


def _mean(x_BCHW: Tensor, cells: int) -> Tensor:
    """Mean over ``cells`` x ``cells`` neighbours, of those that exist."""
    return functional.avg_pool2d(x_BCHW, cells, 1, cells // 2, count_include_pad=False)


def _smooth(x_B1HW: Tensor) -> Tensor:
    """Binomial of 5 x 5 pixels by sums of neighbours: what a scanner's noise needs."""
    x_B1HW = functional.pad(x_B1HW, (2, 2, 2, 2))
    for axis in (2, 3):
        for _ in range(4):
            size = x_B1HW.shape[axis] - 1
            x_B1HW = x_B1HW.narrow(axis, 0, size) + x_B1HW.narrow(axis, 1, size)
    return x_B1HW / 2**8
