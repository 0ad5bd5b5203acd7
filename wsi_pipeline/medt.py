"""MedT, the Medical Transformer: gated axial attention in a global and a local branch.

::

    x -+-> stem -> 2 stages -> decoder --------------------------------+-> (+) -> features
       +-> 4 x 4 parts, each: stem -> 4 stages -> decoder -> together -+

Valanarasu, Oza, Hacihaliloglu & Patel, MICCAI 2021. Suffixes name the axes: ``x_BCHW``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.comparison import MULTIPLE, Outputs, convolutions, initialise, scaled
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.spec import HeadSpec

__all__ = ["MedT"]

_PARTS = 4
"""Parts a side into which the local branch cuts the image."""
_GATES = (0.1, 0.1, 0.1, 1.0)
"""Initial gates of the attention: places of query, key and value; content of value."""


class MedT(nn.Module):
    """Medical Transformer, after the paper's formula, with three differences.

    The gates learn from the first step; logits of
    the attention are divided by the root of the query's length and not normalised by batch,
    which would undo the gates; the parts of the local branch are one batch.

    Attention reaches across the whole input, so a pixel's logits depend on its tile.

    Args:
        heads: the heads to build; no patch heads.
        width: channels of the feature map; 16 is the published width.
        attention_heads: of every attention; twice this number divides the width.
        image_px: the longest input side, a multiple of 16: the reach of the tables of
            relative places. Shorter inputs use their middle.
    """

    sees_whole_input = True
    """Whether what is said of a pixel depends on all of the input, however far it is."""

    def __init__(
        self,
        heads: Sequence[HeadSpec],
        *,
        width: int = 16,
        attention_heads: int = 8,
        image_px: int = 512,
    ) -> None:
        super().__init__()
        if width < 1 or attention_heads < 1 or width % (2 * attention_heads):
            msg = f"medt: width {width} must be a multiple of twice {attention_heads} heads"
            raise ModelBundleError(msg)
        if image_px < MULTIPLE or image_px % MULTIPLE:
            msg = f"medt: image_px {image_px} must be a multiple of {MULTIPLE}"
            raise ModelBundleError(msg)
        self.image_px = image_px
        self.whole = _Branch(width, (1, 2), attention_heads, image_px, bottleneck=False)
        self.parts = _Branch(
            width, (1, 2, 4, 1), attention_heads, image_px // _PARTS, bottleneck=True
        )
        self.fuse = nn.Conv2d(width, width, 3, padding=1)
        self.heads = Outputs(heads, width)
        self.apply(initialise)

    def forward(
        self, x_BCHW: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Compute the logits of the heads; see :meth:`UNet.forward`.

        Raises:
            ValueError: the input is longer than ``image_px``.
        """
        x_BCHW = scaled(x_BCHW)
        if max(x_BCHW.shape[2:]) > self.image_px:
            msg = (
                f"this MedT takes inputs up to {self.image_px} x {self.image_px} px, not "
                f"{x_BCHW.shape[3]} x {x_BCHW.shape[2]}: train one with a larger image_px"
            )
            raise ValueError(msg)
        parts_BCHW = _join(self.parts(_cut(x_BCHW)))
        x_BCHW = functional.relu(self.fuse(self.whole(x_BCHW) + parts_BCHW))
        logits: dict[str, Tensor] = self.heads(x_BCHW, rows)
        return logits


class _Branch(nn.Module):
    """MedT's stem, stages of attention and a decoder of convolutions; keeps the size.

    Args:
        width: channels of what it returns.
        blocks: of each stage; every stage after the first halves the size.
        attention_heads: of every attention.
        image_px: the longest side of an input.
        bottleneck: whether one more halving, a plain convolution, follows the stages.
    """

    def __init__(
        self,
        width: int,
        blocks: Sequence[int],
        attention_heads: int,
        image_px: int,
        *,
        bottleneck: bool,
    ) -> None:
        super().__init__()
        narrow = width // 2
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, narrow, 7, stride=2, padding=3, bias=False), _norm(narrow)),
            *convolutions(narrow, 8 * width, narrow),
        )
        self.stages = nn.ModuleList()
        before, span = narrow, -(-image_px // 2)
        for level, count in enumerate(blocks):
            stage = []
            for index in range(count):
                halve = level > 0 and index == 0
                stage.append(_AxialBlock(before, width << level, attention_heads, span, halve))
                before = 2 * (width << level)
                span = -(-span // 2) if halve else span
            self.stages.append(nn.Sequential(*stage))
        self.bottleneck = (
            nn.Conv2d(before, before, 3, stride=2, padding=1) if bottleneck else nn.Identity()
        )
        widths = [2 * (width << level) for level in range(len(blocks))]
        before_after = list(zip(widths[::-1], [*widths[-2::-1], width], strict=True))
        if bottleneck:
            before_after.insert(0, (before, before))
        self.decoder = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in before_after
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        size = x_BCHW.shape[2:]
        x_BCHW = self.stem(x_BCHW)
        maps = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        if isinstance(self.bottleneck, nn.Identity):
            maps.pop()
        else:
            x_BCHW = functional.relu(self.bottleneck(x_BCHW))
        for conv, skip_BCHW in zip(self.decoder[:-1], reversed(maps), strict=True):
            x_BCHW = functional.relu(_resized(conv(x_BCHW), skip_BCHW.shape[2:])) + skip_BCHW
        return functional.relu(_resized(self.decoder[-1](x_BCHW), size))


class _AxialBlock(nn.Module):
    """A bottleneck block of attention along the columns, then along the rows."""

    def __init__(
        self, width_in: int, width: int, attention_heads: int, span: int, halve: bool
    ) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), _norm(width))
        self.columns = _AxialAttention(width, attention_heads, span)
        self.rows = _AxialAttention(width, attention_heads, span)
        self.leave = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        )
        self.shortcut = (
            nn.Sequential(nn.Conv2d(width_in, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width))
            if halve or width_in != 2 * width
            else nn.Identity()
        )
        self.halve = halve

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.columns(self.enter(x_BCHW))
        y_BCHW = self.rows(y_BCHW.transpose(2, 3)).transpose(2, 3)
        if self.halve:
            x_BCHW, y_BCHW = _halved(x_BCHW), _halved(y_BCHW)
        y_BCHW = self.leave(functional.relu(y_BCHW))
        return functional.relu(y_BCHW + self.shortcut(x_BCHW))


class _AxialAttention(nn.Module):
    """Gated attention among the pixels of each column (equation 3 of the paper).

    With a query q, keys k and values v of one column and learned vectors r for each distance
    j - i along it, shared by the heads::

        w_ij = softmax_j (q_i k_j + G1 q_i r1_ij + G2 k_j r2_ij)
        y_i  = sum_j w_ij (G4 v_j + G3 r3_ij)
    """

    def __init__(self, width: int, attention_heads: int, span: int) -> None:
        super().__init__()
        self.attention_heads, self.span = attention_heads, span
        value = width // attention_heads
        self.split = [value // 2, value // 2, value]
        self.project = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        )
        self.places = nn.Parameter(torch.randn(2 * value, 2 * span - 1) * value**-0.5)
        self.gates = nn.Parameter(torch.tensor(_GATES))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Axes: b batch, g attention head, d channel of it, x column, i and j along the column.
        batch, _, height, width = x_BCHW.shape
        qkv = self.project(x_BCHW).reshape(batch, self.attention_heads, -1, height, width)
        query, key, value = torch.split(qkv, self.split, 2)
        query = query * self.split[0] ** -0.5
        of_query, of_key, of_value = torch.split(self._places(height), self.split)
        gates = self.gates
        logits = (
            torch.einsum("bgdix,bgdjx->bgxij", query, key)
            + gates[0] * torch.einsum("bgdix,dij->bgxij", query, of_query)
            + gates[1] * torch.einsum("bgdjx,dij->bgxij", key, of_key)
        )
        weights = logits.softmax(-1)
        y = gates[3] * torch.einsum("bgxij,bgdjx->bgdix", weights, value)
        y = y + gates[2] * torch.einsum("bgxij,dij->bgdix", weights, of_value)
        y_BCHW: Tensor = self.norm(y.flatten(1, 2))
        return y_BCHW

    def _places(self, length: int) -> Tensor:
        """Return ``(2d, length, length)``: the vector for the way from i to j at [:, i, j]."""
        near = self.places[:, self.span - length : self.span + length - 1]
        return near.unfold(1, length, 1).flip(1)


def _norm(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _cut(x_BCHW: Tensor) -> Tensor:
    """Cut images into 4 x 4 parts, ``(16 B, C, H / 4, W / 4)``."""
    batch, channels, height, width = x_BCHW.shape
    x = x_BCHW.reshape(batch, channels, _PARTS, height // _PARTS, _PARTS, width // _PARTS)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _join(x_BCHW: Tensor) -> Tensor:
    """Undo :func:`_cut`."""
    x = x_BCHW.reshape(-1, _PARTS, _PARTS, *x_BCHW.shape[1:]).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(4, 5).flatten(2, 3)


def _halved(x_BCHW: Tensor) -> Tensor:
    return functional.avg_pool2d(x_BCHW, 2, ceil_mode=True)


def _resized(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(x_BCHW, tuple(size), mode="bilinear", align_corners=False)
