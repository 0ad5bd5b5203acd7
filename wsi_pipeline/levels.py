"""Maps of bytes that stand for numbers: what the convolutions of ``eight_bit`` pass on.

``Levels`` takes a tensor's place between the modules of a network. What the networks do there
with maps other than convolve them (slice, join, pool, double, divide) is done with the bytes;
every other function of torch is given the numbers, as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.compiled import compiled

__all__ = ["Levels"]


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Numbers ``(level - zero) * scale``."""

    values: Tensor
    """``(B, C, H, W)`` uint8, the levels."""
    scale: float
    """From a level to the next."""
    zero: int = 0
    """The level of 0."""

    @property
    def shape(self) -> torch.Size:
        """``(B, C, H, W)``."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """4."""
        return self.values.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of the levels: uint8."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the levels are."""
        return self.values.device

    def numel(self) -> int:
        """Return how many numbers there are."""
        return self.values.numel()

    def element_size(self) -> int:
        """Return the bytes of a level: 1."""
        return self.values.element_size()

    def __len__(self) -> int:
        """Return the batch size."""
        return len(self.values)

    def __getitem__(self, part: Any) -> Levels:  # noqa: ANN401 - whatever a tensor takes
        """Return a view of a part."""
        return replace(self, values=self.values[part])

    def __truediv__(self, divisor: float) -> Levels:
        """Return the same levels with a smaller scale."""
        return replace(self, scale=self.scale / divisor)

    def floats(self) -> Tensor:
        """Return the numbers, in float32."""
        return self.values.to(torch.float32).sub_(self.zero).mul_(self.scale)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what the function returns
        kwargs = dict(kwargs or {})
        if function is torch.cat:
            parts, *axis = args
            if {(part.scale, part.zero) for part in parts} != {(parts[0].scale, parts[0].zero)}:
                raise NotImplementedError("maps of several scales are not joined in bytes")
            joined = torch.cat([part.values for part in parts], *axis, **kwargs)
            return replace(parts[0], values=joined)
        if function is functional.interpolate and kwargs.get("scale_factor") == 2:
            (own,) = args
            if kwargs.get("mode") != "bilinear" or kwargs.get("align_corners"):
                raise NotImplementedError("bytes are doubled bilinearly, corner on corner, alone")
            return replace(own, values=_doubled(own.values))
        if function is functional.max_pool2d:
            own, kernel = args
            if kwargs.get("dilation", 1) != 1 or kwargs.get("ceil_mode"):
                raise NotImplementedError("bytes are pooled without dilation and ceil_mode alone")
            return replace(own, values=_pooled(own.values, kernel, **kwargs))
        return function(*map(_plain, args), **{key: _plain(own) for key, own in kwargs.items()})


def _plain(value: object) -> object:
    return value.floats() if isinstance(value, Levels) else value


def _doubled(values_BCHW: Tensor) -> Tensor:
    """Interpolate bilinearly, corner on corner, and round to the nearest level."""
    batch, channels, height, width = values_BCHW.shape
    out = np.empty((batch, 2 * height, width, 2, channels), np.uint8)
    for rows, doubled in zip(_rows(values_BCHW), out, strict=True):
        _double(rows, doubled)
    wide = torch.from_numpy(out.reshape(batch, 2 * height, 2 * width, channels))
    return wide.permute(0, 3, 1, 2)


def _pooled(
    values_BCHW: Tensor,
    kernel: int,
    *,
    stride: int | None = None,
    padding: int = 0,
    **_others: object,
) -> Tensor:
    """Return the largest level of each window; torch counts the places of bytes in bytes."""
    step = stride or kernel
    batch, channels, height, width = values_BCHW.shape
    sides = ((side + 2 * padding - kernel) // step + 1 for side in (height, width))
    out = np.empty((batch, *sides, channels), np.uint8)
    for rows, pooled in zip(_rows(values_BCHW), out, strict=True):
        _pool(rows, pooled, kernel, step, padding)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def _rows(values_BCHW: Tensor) -> NDArray[np.uint8]:
    """Return (B, H, W C), the channels of a pixel beside each other."""
    laid = values_BCHW.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    array: NDArray[np.uint8] = laid.numpy()
    return array.reshape(*array.shape[:2], -1)


@compiled
def _pool(
    source: NDArray[np.uint8], out: NDArray[np.uint8], kernel: int, step: int, padding: int
) -> None:
    """Take maxima over rows, then over pixels; outside of the map there is level 0, the least.

    Args:
        source: (H, W C).
        out: (h, w, C), written.
        kernel: side of a window.
        step: from a window to the next.
        padding: by how much the first window begins before the map.
    """
    height, length = source.shape
    channels = out.shape[2]
    line = np.empty(length, np.uint8)
    for y in range(out.shape[0]):
        line[:] = 0
        for row in range(max(0, y * step - padding), min(height, y * step - padding + kernel)):
            above = source[row]
            for i in range(length):
                line[i] = max(line[i], above[i])
        for x in range(out.shape[1]):
            pixel = out[y, x]
            pixel[:] = 0
            first = max(0, x * step - padding) * channels
            last = min(length, (x * step - padding + kernel) * channels)
            for start in range(first, last, channels):
                beside = line[start : start + channels]
                for c in range(channels):
                    pixel[c] = max(pixel[c], beside[c])


@compiled
def _double(source: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Double a map by rows, then columns, in 16 bits; rounded once.

    Args:
        source: (H, W C) the channels of a pixel beside each other.
        out: (2 H, W, 2, C), written.
    """
    height, length = source.shape
    width, channels = out.shape[1], out.shape[3]
    # A row with its first and its last pixel once more at its ends.
    line = np.empty(length + 2 * channels, np.uint16)
    middle = line[channels : channels + length]
    blended = np.empty(length, np.uint8)
    for y in range(2 * height):
        near = y >> 1
        next_one = near + 1 if y & 1 else near - 1
        first, second = source[near], source[min(max(next_one, 0), height - 1)]
        for i in range(length):
            middle[i] = np.uint16(3) * first[i] + second[i]
        line[:channels] = middle[:channels]
        line[channels + length :] = middle[length - channels :]
        for side in range(2):
            beside = line[2 * channels * side : 2 * channels * side + length]
            # One loop over all that lies beside each other becomes vector instructions; the
            # places it belongs to are every second pixel's.
            for i in range(length):
                total = np.uint16(3) * middle[i] + beside[i] + np.uint16(8)
                blended[i] = np.uint8(total >> np.uint16(4))
            for x in range(width):
                pixel = out[y, x, side]
                for c in range(channels):
                    pixel[c] = blended[x * channels + c]
