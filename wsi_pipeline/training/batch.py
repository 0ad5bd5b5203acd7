"""A batch on its way from the sources to the network.

::

    window   cut from an image at the model's mpp, larger than the crop: the network never
             sees it, augmentation turns and scales it and cuts the crop out of its middle
    crop     what the network sees

Labels lie in one tensor a head, with only the samples that carry that label (``rows``), so
whatever follows never meets an unlabelled sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some windows or crops, with the labels of the heads that are labelled."""

    pixels: Tensor
    """Windows: (B, S, S, 3) uint8. Crops: (B, 3, C, C) float32, 0..255. RGB."""
    rows: Mapping[str, Tensor]
    """By head: (n,) int64, the samples that carry a label for it, ascending."""
    labels: Mapping[str, Tensor]
    """By head, in the order of its rows:

    - instance: (n, S, S) int32 ids, 0 background, -1 unknown;
    - class: (n, S, S) uint8 ids, 255 unknown;
    - patch: (n,) int64 ids;
    - detect: (n, M, 4) float32 boxes (left, top, right, bottom in pixels), NaN where a
      sample has fewer than M. Boxes may reach beyond the crop.
    """
    unknown: Mapping[str, Tensor]
    """By detect head: (n, S, S) bool, True where nobody annotated."""

    def to(self, device: str) -> Batch:
        """Move everything to a device; from pinned memory without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Copy everything to pinned memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def all_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(tensor) for name, tensor in tensors.items()}

        return Batch(
            pixels=change(self.pixels),
            rows=all_of(self.rows),
            labels=all_of(self.labels),
            unknown=all_of(self.unknown),
        )
