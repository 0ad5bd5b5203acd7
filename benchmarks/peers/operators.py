"""Lets ``import torchvision`` succeed beside a torch that its compiled part was not built for.

Package indexes carry torchvision built for CUDA; next to a torch for CPUs its shared library
does not load, and the import stops because the operators it lacks are named in Python.
TIAToolbox imports torchvision and, for what is measured here, calls none of them: they are
declared without being there.
"""

from __future__ import annotations

import torch

OPERATORS = (
    "nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d",
)  # fmt: skip


def declare_missing() -> torch.library.Library:
    """Declare the operators that are not there.

    Returns:
        What holds the declarations: they last as long as it does.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor unused) -> Tensor")
    return library
