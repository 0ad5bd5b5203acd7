"""What the networks of the Cerberus family are made of."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = [
    "INPUT_MULTIPLE",
    "BasicBlock",
    "ConvUnit",
    "DoubledSum",
    "FusedConv",
    "Logits",
    "PixelShares",
    "begin_undecided",
    "check_input",
    "conv_unit",
    "convolved",
    "cropped",
    "enlarged",
    "fold_batch_norms",
    "in_strips",
    "initialise",
    "rectified",
    "stage_margins",
    "summed",
]

INPUT_MULTIPLE = 16
"""Height and width of an input are multiples of this: the total stride of the encoders."""
_STRIP_BYTES = 16 << 20
"""Of one map in a strip: what is computed from it next finds it in the cache."""
_MOST_ENLARGED = (1 << 31) - 2
"""Elements of the largest map that CUDA's interpolation of channels-last maps makes."""
_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet's basic block)."""

    def __init__(self, width_in: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(width)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H / stride, W / stride)``."""
        y_BCHW = rectified(self.conv1, self.norm1, x_BCHW)
        if self.shortcut is not None:
            # A 1 x 1 convolution of every second pixel. Written with stride=2, its backward pass
            # in oneDNN (torch 2.13, channels last, 8 to 12 channels) writes beyond its memory.
            x_BCHW = self.shortcut(x_BCHW[:, :, :: self.stride, :: self.stride])
        return rectified(self.conv2, self.norm2, y_BCHW, plus_BCHW=x_BCHW)


class ConvUnit(nn.Sequential):
    """Convolution, normalisation, ReLU: its children are ``conv`` and ``norm``."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C, H / stride, W / stride)``."""
        return rectified(self.get_submodule("conv"), self.get_submodule("norm"), x_BCHW)


class FusedConv(nn.Module):
    """A convolution that itself adds to its result and rectifies it; see ``eight_bit.py``."""

    def fused(self, x_BCHW: Tensor, plus_BCHW: Tensor | None, *, relu: bool) -> Tensor:
        """Return ``conv(x) + plus``, rectified or not."""
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the convolution of ``x``."""
        return self.fused(x_BCHW, None, relu=False)


class Logits(nn.Conv2d):
    """The last convolution of a head: its results are floats, whatever the others compute in."""


class PixelShares(nn.Module):
    """Pixels 0..255 as shares of ``most``."""

    most: float = 255

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Divide pixels."""
        return x_BCHW / self.most


class DoubledSum(nn.Module):
    """A coarse map at twice its size plus a fine one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width
        self.identity: nn.Module | None = None

    def forward(self, coarse_BCHW: Tensor, fine_BCHW: Tensor) -> Tensor:
        """Add ``(B, C, H / 2, W / 2)`` and ``(B, C, H, W)``."""
        doubled_BCHW = enlarged(coarse_BCHW, 2)
        if self.identity is not None:
            return summed(self.identity, fine_BCHW, doubled_BCHW)
        return doubled_BCHW.add_(fine_BCHW)

    def add_by_convolution(self) -> None:
        """Add as a convolution does: for arithmetic in which nothing else adds."""
        identity = nn.Conv2d(self._width, self._width, 1, bias=False).requires_grad_(False)
        nn.init.dirac_(identity.weight)
        self.identity = identity


def conv_unit(
    width_in: int, width_out: int, *, kernel: int = 3, stride: int = 1, bias: bool = True
) -> ConvUnit:
    """Return convolution, batch normalisation, ReLU."""
    conv = nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=bias)
    parts = OrderedDict(conv=conv, norm=nn.BatchNorm2d(width_out))
    return ConvUnit(parts)


def rectified(
    conv: nn.Module, norm: nn.Module, x_BCHW: Tensor, *, plus_BCHW: Tensor | None = None
) -> Tensor:
    """Return ``relu(norm(conv(x)) + plus)``.

    On a CPU a network whose normalisations are folded spends half its time passing over memory
    for sums and rectifiers. There oneDNN adds and rectifies while the convolution's result is
    still in the cache, and rounds once instead of three times.

    Args:
        conv: the convolution.
        norm: of its result; ``nn.Identity`` where it was folded into the convolution.
        x_BCHW: its input.
        plus_BCHW: what is added before the rectifier, of the result's shape.
    """
    if isinstance(norm, nn.Identity) and isinstance(conv, FusedConv):
        return conv.fused(x_BCHW, plus_BCHW, relu=True)
    if isinstance(norm, nn.Identity) and isinstance(conv, nn.Conv2d) and _fuses(conv, x_BCHW):
        return _fused(conv, x_BCHW, plus_BCHW, then="relu")
    y_BCHW: Tensor = norm(conv(x_BCHW))
    if plus_BCHW is not None:
        y_BCHW = y_BCHW.add_(plus_BCHW)
    return functional.relu(y_BCHW, inplace=True)


def summed(conv: nn.Module, x_BCHW: Tensor, plus_BCHW: Tensor) -> Tensor:
    """Return ``conv(x) + plus``, on a CPU in one pass over memory as in :func:`rectified`."""
    if isinstance(conv, FusedConv):
        return conv.fused(x_BCHW, plus_BCHW, relu=False)
    if isinstance(conv, nn.Conv2d) and _fuses(conv, x_BCHW):
        return _fused(conv, x_BCHW, plus_BCHW, then=None)
    y_BCHW: Tensor = conv(x_BCHW)
    return y_BCHW.add_(plus_BCHW)


def convolved(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """Return ``conv(x)``, on a CPU by the same library as :func:`rectified`."""
    if _fuses(conv, x_BCHW):
        return _fused(conv, x_BCHW, None, then=None)
    return nn.Conv2d.forward(conv, x_BCHW)


def _fused(conv: nn.Conv2d, x_BCHW: Tensor, plus_BCHW: Tensor | None, then: str | None) -> Tensor:
    """Call what inductor calls: oneDNN's convolution with what is done to its result."""
    fused = torch.ops.mkldnn._convolution_pointwise
    how = (conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    found: Tensor
    if plus_BCHW is None:
        found = fused(x_BCHW, *how, then or "none", [], None)
    else:
        found = fused(x_BCHW, plus_BCHW, *how, "add", 1.0, then, [], None)
    return found


def _fuses(conv: nn.Conv2d, x_BCHW: Tensor) -> bool:
    return (
        _ONEDNN
        and x_BCHW.device.type == "cpu"
        and x_BCHW.dtype == conv.weight.dtype
        and x_BCHW.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def initialise(module: nn.Module) -> None:
    """Give a convolution He et al.'s weights; for ``nn.Module.apply``."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def begin_undecided(logits: nn.Module, *, few: bool) -> None:
    """Start a head with nearly equal logits: a confident guess must be unlearnt first.

    A detect head (``few``) starts at a heat of 1 % everywhere, as centres are rare (Lin et al.,
    "Focal Loss", 2017, 4.1).
    """
    assert isinstance(logits, nn.Conv2d)
    assert logits.bias is not None
    nn.init.normal_(logits.weight, std=0.01 if few else 0.1)
    nn.init.zeros_(logits.bias)
    if few:
        nn.init.constant_(logits.bias[:1], math.log(0.01 / 0.99))


def check_input(x_BCHW: Tensor) -> None:
    """Raise ``ValueError`` for what is not (B, 3, H, W) with sides of 16 pixels' multiples."""
    if (
        x_BCHW.ndim != 4
        or x_BCHW.shape[1] != 3
        or any(n % INPUT_MULTIPLE for n in x_BCHW.shape[2:])
    ):
        msg = f"input must be (B, 3, H, W) with H and W multiples of 16, not {x_BCHW.shape}"
        raise ValueError(msg)


def enlarged(logits_BCHW: Tensor, times: int) -> Tensor:
    """Interpolate logits coarser than the stored map bilinearly, corner on corner.

    Training compares and inference stores the same enlarged logits.
    """
    if times == 1:
        return logits_BCHW
    if times == 2 and logits_BCHW.dtype == torch.bfloat16 and _is_inference(logits_BCHW):
        return _doubled(logits_BCHW)
    if logits_BCHW.numel() * times**2 > _MOST_ENLARGED:
        axis = 0 if len(logits_BCHW) > 1 else 1
        halves = logits_BCHW.chunk(2, axis)
        return torch.cat([enlarged(half, times) for half in halves], axis)
    return functional.interpolate(
        logits_BCHW, scale_factor=times, mode="bilinear", align_corners=False
    )


def _doubled(x_BCHW: Tensor) -> Tensor:
    """Do what ``interpolate`` does at twice the speed: its bf16 loops on CPUs are scalar.

    Rows, then columns; each result is three parts its nearest pixel and one part the next.
    """
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    batch, height, width, channels = x_BHWC.shape
    tall = x_BHWC.new_empty(batch, height, 2, width, channels)
    _blend(x_BHWC, tall[:, :, 0], tall[:, :, 1], axis=1)
    tall_BHWC = tall.view(batch, 2 * height, width, channels)
    wide = x_BHWC.new_empty(batch, 2 * height, width, 2, channels)
    _blend(tall_BHWC, wide[:, :, :, 0], wide[:, :, :, 1], axis=2)
    return wide.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def _blend(x: Tensor, before: Tensor, after: Tensor, *, axis: int) -> None:
    """Write the points a quarter before and after each pixel along an axis; ends repeat."""
    count = x.shape[axis]
    first, last = x.narrow(axis, 0, count - 1), x.narrow(axis, 1, count - 1)
    torch.lerp(last, first, 0.25, out=before.narrow(axis, 1, count - 1))
    before.select(axis, 0).copy_(x.select(axis, 0))
    torch.lerp(first, last, 0.25, out=after.narrow(axis, 0, count - 1))
    after.select(axis, count - 1).copy_(x.select(axis, count - 1))


def cropped(map_BCHW: Tensor, margin: int, scale: int) -> Tensor:
    """Cut a margin off a map.

    Args:
        map_BCHW: ``(B, C, H / scale, W / scale)``.
        margin: input pixels on every side; what is no whole pixel of the map stays.
        scale: input pixels that a pixel of the map spans.
    """
    if margin < scale:
        return map_BCHW
    cut, (height, width) = margin // scale, map_BCHW.shape[-2:]
    return map_BCHW[:, :, cut : height - cut, cut : width - cut]


def stage_margins(margin: int, scales: Sequence[int], *, reach: int) -> list[tuple[int, int]]:
    """Return what each stage of a decoder, from the finest on, leaves out of its maps.

    A stage doubles a coarser map, adds one of its own scale and convolves the sum. Near the border
    of what it is given its result is another than it would be on a larger map.

    Args:
        margin: input pixels on every side of which no result of the finest stage is wanted.
        scales: of the stages, the finest first: input pixels that a pixel of a map spans.
        reach: pixels by which a stage's result depends on its border.

    Returns:
        For each stage the input pixels on every side of which it needs no maps, whole pixels of
        the coarser map, and the pixels of its result's border that nobody looks at.
    """
    margins = []
    for scale in scales:
        begin = max(0, (margin - reach * scale) // (2 * scale) * 2 * scale)
        margins.append((begin, margin // scale - begin // scale))
        margin = begin
    return margins


def in_strips(
    join: Callable[[Tensor, Tensor], Tensor],
    steps: Sequence[tuple[Callable[[Tensor], Tensor], int]],
    coarse_BCHW: Tensor,
    fine_BCHW: Tensor,
    *,
    cut: int = 0,
) -> Tensor:
    """Join two maps and take steps from there; on a CPU in strips, so that they stay in its cache.

    The result is the same (up to how sums of its size are rounded) and the whole map, the
    largest there is, is never in memory. No row is computed that the next step does not look at.

    Args:
        join: doubles the coarse map and adds the fine one.
        steps: what is done with their sum, in turn, and how many rows up and down each looks.
        coarse_BCHW: ``(B, C, H / 2, W / 2)``.
        fine_BCHW: ``(B, C', H, W)``.
        cut: pixels on every side that are not wanted.

    Returns:
        What the last step does, ``(B, C'', H - 2 cut, W - 2 cut)``.
    """
    height, width = fine_BCHW.shape[2:]
    rows = height
    if _is_inference(fine_BCHW) and fine_BCHW.numel():
        row_bytes = fine_BCHW[:, :, 0].numel() * fine_BCHW.element_size()
        rows = max(16, _STRIP_BYTES // row_bytes)
    strips = []
    for top in range(cut, height - cut, rows):
        bottom = min(top + rows, height - cut)
        reach = sum(looks for _, looks in steps)
        # One row more for the interpolation, from an even one on.
        first = max(0, top - reach - 1) // 2 * 2
        last = min(height, bottom + reach + 2) // 2 * 2
        x_BCHW = join(coarse_BCHW[:, :, first // 2 : last // 2], fine_BCHW[:, :, first:last])
        for step, looks in steps:
            begin, end = max(0, top - reach), min(height, bottom + reach)
            x_BCHW = step(x_BCHW[:, :, begin - first : end - first])
            first, reach = begin, reach - looks
        strips.append(x_BCHW[:, :, top - first : bottom - first, cut : width - cut])
    return torch.cat(strips, 2) if len(strips) > 1 else strips[0]


def _is_inference(x: Tensor) -> bool:
    """Tell whether the ways of this module suit a CPU; a compiler has its own."""
    return (
        x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )


def fold_batch_norms(network: nn.Module) -> None:
    """Work the normalisations that follow a convolution into it, in place.

    In evaluation mode a normalisation is an affine map of each channel, so the network computes
    the same function (up to rounding) with one pass over memory less for each. Those that do
    not directly follow a convolution stay.

    Args:
        network: in evaluation mode.
    """
    for module in list(network.modules()):
        pairs: list[tuple[str, str]] = []
        if isinstance(module, BasicBlock):
            pairs = [("conv1", "norm1"), ("conv2", "norm2")]
        elif isinstance(module, nn.Sequential):
            names = list(dict(module.named_children()))
            pairs = list(itertools.pairwise(names))
        for first, second in pairs:
            conv, norm = getattr(module, first), getattr(module, second)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())
