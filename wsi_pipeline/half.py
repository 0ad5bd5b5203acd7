"""Networks in half precision that stay near to float32, at no cost.

bfloat16 keeps eight binary digits. Rounded as they are, weights and pixels are off by up to a
part in 512, always to the same side, and what adds up over a kernel or over an area of one colour
does not average out:

- A pixel divided by 255 is rounded; divided by 256 it is exact. So the first convolution takes
  256ths, and its weights make up for it.
- What a convolution sees is smooth and, behind a rectifier, never negative. So in each kernel, of
  which every weight goes to one of its two neighbours, one weight goes to the farther one where
  that brings the kernel's sum nearer to what it was.

The first halves the error of probabilities that is left when the second is done, and the other
way round: ``python -m benchmarks.precisions``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wsi_pipeline.blocks import PixelShares

__all__ = ["rounded_kernels", "to_half"]

_LEVELS = 256
"""The power of two by which pixels are divided: exact in any binary format."""


@torch.no_grad()
def to_half(network: nn.Module, dtype: torch.dtype) -> None:
    """Make the weights of a network's convolutions numbers of a shorter format, in place.

    They stay in the format they have; casting them is exact then.

    Args:
        network: in evaluation mode, its normalisations folded.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    shares = getattr(network, "shares", None)
    if isinstance(shares, PixelShares):
        first = network.get_submodule("encoder.stem.conv")
        assert isinstance(first, nn.Conv2d)
        first.weight *= _LEVELS / shares.most
        shares.most = _LEVELS
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(rounded_kernels(module.weight, dtype))


def rounded_kernels(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Round weights so that the sum of each kernel stays near to what it was.

    Args:
        weights: ``(O, I, h, w)`` float32.
        dtype: a shorter format.

    Returns:
        Float32, each value of it one that ``dtype`` has, next to the one it was.
    """
    exact = weights.flatten(2)
    short = exact.to(dtype)
    nearest = short.float()
    beyond = torch.where(nearest < exact, math.inf, -math.inf).to(dtype)
    farther = torch.where(nearest == exact, nearest, torch.nextafter(short, beyond).float())
    surplus = (nearest - exact).sum(2, keepdim=True)
    left, which = (surplus + farther - nearest).abs().min(2, keepdim=True)
    chosen = torch.where(left < surplus.abs(), farther.gather(2, which), nearest.gather(2, which))
    return nearest.scatter(2, which, chosen).view(weights.shape)
