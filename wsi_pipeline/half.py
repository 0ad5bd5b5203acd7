"""Networks in half precision that stay near to float32, at no cost.

bfloat16 keeps eight binary digits. Rounded as they are, weights and pixels are off by up to a
part in 512, always to the same side, and what adds up over a kernel or over an area of one colour
does not average out:

- A pixel divided by 255 is rounded; divided by 256 it is exact. So the first convolution takes
  256ths, and its weights make up for it.
- Weights are rounded so that the sums of kernels are kept (``kept_sums.py``).

The first halves the error of probabilities that is left when the second is done, and the other
way round: ``python -m benchmarks.precisions``.
"""

from __future__ import annotations

import torch
from torch import nn

from wsi_pipeline.blocks import PixelShares
from wsi_pipeline.kept_sums import rounded_to_format

__all__ = ["to_half"]

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
            module.weight.copy_(rounded_to_format(module.weight, dtype))
