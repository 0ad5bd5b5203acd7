"""Arithmetic on a CPU that is the same in every run, on one thread and on many.

Two things in torch are not, and maps are compared byte by byte.

The vector functions of Intel's MKL (``log``, ``exp`` and others of whole tensors) ask at their
first call which instructions the processor has. They store the answer in two steps, the first of
which is a number of another list (``mkl_vml_serv_cpu_detect``, MKL 2024.2). Threads that make
the first call together may read the number between the steps, and then compute their part of the
tensor by a kernel for half the digits: some values of the first tile differed by 1/255, in some
runs, on some Intel processors. A call on one thread before any other settles it.

A 1 x 1 convolution in float32 is computed by oneDNN where torch has several threads, and by a
matrix product of MKL's, which rounds differently, where it has one.

What is left: torch's softmax over channels rounds the last pixels of each thread's part by other
instructions. Between numbers of threads that do not divide a map evenly, one value in some hundred
thousand differs by 1/255. Its form that does not is five to nine times as slow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsi_pipeline.blocks import Logits, convolved

__all__ = ["keep_to_one_kernel", "settle_vector_math"]


def settle_vector_math() -> None:
    """Make the first call of a vector function of this process here, on one thread."""
    torch.log(torch.ones(1, device="cpu"))


def keep_to_one_kernel(network: nn.Module) -> None:
    """Let the convolutions of a network round alike on any number of threads, in place.

    Args:
        network: for inference; what it computes with gradients does not change.
    """
    for module in network.modules():
        if type(module) in (nn.Conv2d, Logits) and module.padding_mode == "zeros":
            module.__class__ = _OneKernelConv2d


class _OneKernelConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return convolved(self, x)
