"""Networks of convolutions in 8-bit integers, for a CPU.

::

    fold_batch_norms -> watch a float32 pass over fixed images -> every convolution in integers
      convolutions        the range of what each one yields         uint8 maps, int8 weights
      with biases

A convolution's weights get one scale an output channel, its result one scale and one zero point,
from the least and the largest value that it had on the images. These are fixed, so the answer
does not depend on what is predicted before. Sums are exact (32 bits); a result is rounded once,
after what is added to it and the rectifier. The logits are float32.

Rounded weights are where most of the error comes from, if each goes to its nearest level. Rounded
so that the sums of kernels are kept (``kept_sums.py``), their error is a third (nuclei of
``cerberus-lite``: mean error of a probability 0.0019, then 0.0006; bfloat16 altogether 0.0007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsi_pipeline.blocks import DoubledSum, FusedConv, Logits, convolved, rectified, summed
from wsi_pipeline.kept_sums import MOST_LEVEL, rounded_to_levels
from wsi_pipeline.levels import Levels

__all__ = [
    "ARCHITECTURES",
    "byte_product",
    "obstacle",
    "pixel_levels",
    "to_eight_bits",
]

ARCHITECTURES = ("cerberus", "cerberus-lite")
"""Those that pass on nothing but sums and results of rectifiers."""
_STEPS = 32
"""Scales are multiples of a power of two by so many steps: ranges that differ in their last bits,
as float32 has them on other processors, give the same scales."""


def obstacle() -> str | None:
    """Return why this machine cannot compute in 8 bits; None where it can.

    Asked for by a convolution whose sums do not fit 16 bits: processors without the instructions
    for such sums (VNNI) cut them off, silently.
    """
    convolution = getattr(torch.ops.onednn, "qconv2d_pointwise", None)
    if not hasattr(convolution, "binary"):
        return f"torch {torch.__version__} has no 8-bit convolutions here"
    conv = nn.Conv2d(64, 16, 3, padding=1, bias=False).requires_grad_(False).eval()
    conv.weight.fill_(1.0)
    white = pixel_levels(torch.full((1, 64, 8, 8), 255, dtype=torch.uint8))
    found = _EightBitConv(conv, scale=1.0, zero=0, floats=True)(white)
    if not math.isclose(float(found[0, 0, 4, 4]), 64 * 9 * 255, rel_tol=1e-5):
        return "this processor lacks instructions for sums of 8-bit products (VNNI)"
    return None


def pixel_levels(pixels_BCHW: Tensor) -> Tensor:
    """Return uint8 pixels as what such a network takes for floats 0..255."""
    return cast(Tensor, Levels(pixels_BCHW, 1.0))


def to_eight_bits(network: nn.Module, images: Iterable[NDArray[np.uint8]]) -> None:
    """Replace the convolutions of a network by such in 8 bits, in place; once is enough.

    Args:
        network: of one of :data:`ARCHITECTURES`, in float32 on the CPU, in evaluation mode, its
            normalisations folded. It then takes what :func:`pixel_levels` returns.
        images: (H, W, 3) RGB; what their ranges do not hold is cut off later.
    """
    if any(isinstance(module, _EightBitConv) for module in network.modules()):
        return
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, DoubledSum):
            module.add_by_convolution()
    _replace(network, nn.Conv2d, _Watched)
    with torch.no_grad():
        for image in images:
            pixels = torch.from_numpy(image.copy())[None].permute(0, 3, 1, 2)
            network(pixels.to(torch.float32))
    _replace(network, _Watched, _Watched.in_eight_bits)


def byte_product(side: int) -> Callable[[], object]:
    """Return what multiplies two square matrices of bytes, by the library of the convolutions."""
    levels = torch.randint(0, 256, (side, side), dtype=torch.uint8)
    weights = torch.randint(-MOST_LEVEL, MOST_LEVEL + 1, (side, side), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weights, None)
    scales, zeros = torch.ones(side), torch.zeros(side, dtype=torch.int64)
    given = (levels, 1.0, 0, packed, scales, zeros, None)
    result: tuple[Any, ...] = (256.0 * side, 0, torch.uint8, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(*given, *result)


class _Watched(FusedConv):
    """A convolution in float32 that remembers the range of its results."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.low = self.high = 0.0

    def fused(self, x_BCHW: Tensor, plus_BCHW: Tensor | None, *, relu: bool) -> Tensor:
        if relu:
            found = rectified(self.conv, nn.Identity(), x_BCHW, plus_BCHW=plus_BCHW)
        elif plus_BCHW is not None:
            found = summed(self.conv, x_BCHW, plus_BCHW)
        else:
            found = convolved(self.conv, x_BCHW)
        self.low = min(self.low, float(found.min()))
        self.high = max(self.high, float(found.max()))
        return found

    def in_eight_bits(self) -> _EightBitConv:
        scale = _upper_step((self.high - self.low) / 255)
        return _EightBitConv(
            self.conv,
            scale=scale,
            zero=min(255, round(-self.low / scale)),
            floats=isinstance(self.conv, Logits),
        )


class _EightBitConv(FusedConv):
    """A convolution of levels by int8 weights; of floats (a patch head's) by its own."""

    def __init__(self, conv: nn.Conv2d, *, scale: float, zero: int, floats: bool) -> None:
        """Round the weights.

        Args:
            conv: the convolution, in float32; its weights are given up when levels come.
            scale: of the result's levels.
            zero: of the same.
            floats: the result is float32 instead.
        """
        super().__init__()
        self.conv = conv
        self._result = (1.0, 0, torch.float32) if floats else (scale, zero, torch.uint8)
        weights = conv.weight.detach()
        self._scales = weights.abs().amax((1, 2, 3)).clamp(min=1e-12) / MOST_LEVEL
        self._zeros = torch.zeros(len(weights), dtype=torch.int8)
        self._levels: Tensor | None = rounded_to_levels(weights / self._scales[:, None, None, None])
        self._packed: Tensor | None = None

    def fused(
        self, x_BCHW: Tensor | Levels, plus_BCHW: Tensor | Levels | None, *, relu: bool
    ) -> Tensor:
        """Return the result as ``Levels``; those of ``plus`` are overwritten by it."""
        if not isinstance(x_BCHW, Levels):
            assert plus_BCHW is None
            found = convolved(self.conv, x_BCHW)
            return found.relu_() if relu else found
        conv, x = self.conv, x_BCHW
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if self._packed is None:  # what a layer is given always has the same scale
            self._packed = torch.ops.onednn.qconv_prepack(
                self._levels, self._scales, x.scale, x.zero, *how, None
            )
            self._levels = None
            conv.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # needed no more
        given = (x.values, x.scale, x.zero, self._packed, self._scales, self._zeros)
        scale, zero, dtype = self._result
        then: tuple[Any, ...] = ("relu" if relu else "none", [], "")
        if plus_BCHW is None:
            values = torch.ops.onednn.qconv2d_pointwise(
                *given, conv.bias, *how, scale, zero, dtype, *then
            )
        else:
            assert isinstance(plus_BCHW, Levels)
            plus = plus_BCHW
            values = torch.ops.onednn.qconv2d_pointwise.binary(
                *given, plus.values, conv.bias, *how, scale, zero, dtype,
                plus.scale, plus.zero, "sum", 1.0, *then,
            )  # fmt: skip
        return cast(Tensor, values if dtype == torch.float32 else Levels(values, scale, zero))


def _replace(network: nn.Module, kind: type[nn.Module], make: Callable[..., nn.Module]) -> None:
    """Replace the modules of a kind, but not those within what they are replaced by."""
    for module in list(network.modules()):
        if isinstance(module, FusedConv):
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                setattr(module, name, make(child))


def _upper_step(value: float) -> float:
    """Return the least number of few digits that is not below a positive one."""
    fraction, exponent = math.frexp(max(value, 1e-9))
    return math.ldexp(math.ceil(fraction * _STEPS) / _STEPS, exponent)
