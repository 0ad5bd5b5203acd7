"""Networks of the literature, for the rows of a comparison; MedT is in ``medt.py``.

::

    unet      five levels; every level's map is handed over and concatenated
    segnet    VGG-16's thirteen convolutions and their mirror image; what is handed over is
              only where each maximum lay

They share one body among all heads and have one 1 x 1 convolution a head, so that what
differs from ``cerberus`` is the architecture and not the number of outputs. They label
pixels and have no patch heads. Suffixes name the axes: ``x_BCHW``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.spec import HeadSpec

__all__ = ["MULTIPLE", "Outputs", "SegNet", "UNet", "convolutions", "initialise", "scaled"]

MULTIPLE = 16
"""Height and width of an input are multiples of this."""


class UNet(nn.Module):
    """U-Net with padded convolutions and batch normalisation, without dropout.

    Ronneberger, Fischer & Brox, MICCAI 2015. Padding keeps the size, so the maps that are
    handed over need no crop.

    Args:
        heads: the heads to build; no patch heads.
        width: channels of the finest level; 64 is the published width.
    """

    def __init__(self, heads: Sequence[HeadSpec], *, width: int = 64) -> None:
        super().__init__()
        widths = [width << level for level in range(5)]
        self.down = nn.ModuleList(
            convolutions(before, after, after)
            for before, after in zip([3, *widths], widths, strict=False)
        )
        coarse_to_fine = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 2, stride=2) for before, after in coarse_to_fine
        )
        self.up = nn.ModuleList(
            convolutions(before, after, after) for before, after in coarse_to_fine
        )
        self.heads = Outputs(heads, width)
        self.apply(initialise)

    def forward(
        self, x_BCHW: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Compute the logits of the heads.

        Args:
            x_BCHW: ``(B, 3, H, W)`` floats 0..255, RGB.
            rows: for each wanted head, ``(n,)`` int64 indices of the samples it is computed
                for. None: every head for every sample.

        Returns:
            ``(n, C, H, W)`` logits a head.
        """
        x_BCHW = scaled(x_BCHW)
        maps = []
        for level, down in enumerate(self.down):
            x_BCHW = down(functional.max_pool2d(x_BCHW, 2) if level else x_BCHW)
            maps.append(x_BCHW)
        for grow, up, skip_BCHW in zip(self.grow, self.up, maps[-2::-1], strict=True):
            x_BCHW = up(torch.cat([skip_BCHW, grow(x_BCHW)], 1))
        logits: dict[str, Tensor] = self.heads(x_BCHW, rows)
        return logits


class SegNet(nn.Module):
    """SegNet: the decoder puts each value back where the encoder's maximum lay.

    Badrinarayanan, Kendall & Cipolla, IEEE TPAMI 39 (2017). Its last convolution keeps the
    width, so that the heads' 1 x 1 convolutions can follow it.

    Args:
        heads: the heads to build; no patch heads.
        width: channels of the finest level; 64 is the published width (VGG-16).
    """

    def __init__(self, heads: Sequence[HeadSpec], *, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        counts = [2, 2, 3, 3, 3]
        self.down = nn.ModuleList(
            convolutions(before, *[after] * count)
            for before, after, count in zip([3, *widths], widths, counts, strict=False)
        )
        self.up = nn.ModuleList(
            convolutions(*[before] * count, after)
            for before, after, count in zip(
                widths[::-1], [*widths[-2::-1], width], counts[::-1], strict=True
            )
        )
        self.heads = Outputs(heads, width)
        self.apply(initialise)

    def forward(
        self, x_BCHW: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Compute the logits of the heads; see :meth:`UNet.forward`."""
        x_BCHW = scaled(x_BCHW)
        places = []
        for down in self.down:
            x_BCHW = down(x_BCHW)
            size = (x_BCHW.shape[2], x_BCHW.shape[3])
            # The fifth pooling may meet an odd side, whose last row it must not lose.
            x_BCHW, index_BCHW = functional.max_pool2d(
                x_BCHW, 2, ceil_mode=True, return_indices=True
            )
            places.append((index_BCHW, size))
        for up, (index_BCHW, size) in zip(self.up, reversed(places), strict=True):
            x_BCHW = up(_unpool(x_BCHW, index_BCHW, size))
        logits: dict[str, Tensor] = self.heads(x_BCHW, rows)
        return logits


class Outputs(nn.ModuleDict):
    """One 1 x 1 convolution a head on a shared feature map.

    Args:
        heads: the heads to build.
        width: channels of the feature map.

    Raises:
        ModelBundleError: a head classifies patches.
    """

    def __init__(self, heads: Sequence[HeadSpec], width: int) -> None:
        patch = [head.name for head in heads if head.kind == "patch"]
        if patch:
            msg = f"the comparison networks label pixels and have no patch heads, such as {patch}"
            raise ModelBundleError(msg)
        super().__init__({head.name: nn.Conv2d(width, head.logit_channels, 1) for head in heads})

    def forward(self, x_BCHW: Tensor, rows: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Compute the logits of the wanted heads for the wanted samples."""
        logits = {}
        for name, output in self.items():
            if rows is None:
                logits[name] = output(x_BCHW)
            elif name in rows:
                logits[name] = output(x_BCHW[rows[name]])
        return logits


def convolutions(*widths: int) -> nn.Sequential:
    """3 x 3 convolutions from each width to the next, each normalised and rectified."""
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        parts += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


def _unpool(x_BCHW: Tensor, index_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo a 2 x 2 max-pooling: each value where its maximum lay, zero elsewhere.

    As torch's own, which refuses to run on a GPU where results must be reproducible.
    """
    height, width = size
    place_HW = torch.arange(height * width, device=x_BCHW.device).view(height, width)
    is_there = _repeated(index_BCHW)[..., :height, :width] == place_HW
    return _repeated(x_BCHW)[..., :height, :width] * is_there


def _repeated(x_BCHW: Tensor) -> Tensor:
    """Every pixel 2 x 2 times."""
    x = x_BCHW[..., :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    return x.flatten(4, 5).flatten(2, 3)


def initialise(module: nn.Module) -> None:
    """Draw a convolution's weights as He et al. (ICCV 2015) do."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def scaled(x_BCHW: Tensor) -> Tensor:
    """Check an input and scale it to 0..1."""
    if (
        x_BCHW.ndim != 4
        or x_BCHW.shape[1] != 3
        or any(n % MULTIPLE or not n for n in x_BCHW.shape[2:])
    ):
        msg = f"input must be (B, 3, H, W) with H and W multiples of 16, not {x_BCHW.shape}"
        raise ValueError(msg)
    return x_BCHW / 255
