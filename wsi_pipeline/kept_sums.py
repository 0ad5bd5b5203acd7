"""Weights of convolutions rounded so that the sum of each kernel stays near to what it was.

What a convolution sees is smooth and, behind a rectifier, never negative: nearly one number over
the few pixels of a kernel, which the errors of all its weights are multiplied by. Errors that
cancel within the kernel are gone; those of weights that each went to their nearest number add up.
So some go to the number on the other side. It takes no data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MOST_LEVEL", "rounded_to_format", "rounded_to_levels"]

MOST_LEVEL = 127
"""The largest weight in levels; -128 is not used."""


def rounded_to_format(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Round weights to numbers that a shorter format has.

    Of each kernel one weight, whose two neighbours may lie far apart, goes to the farther one
    where that brings the sum nearer to what it was.

    Args:
        weights: ``(O, I, h, w)`` float32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

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


def rounded_to_levels(weights: Tensor) -> Tensor:
    """Round weights to whole numbers.

    Every weight goes to the level below or above. Where the nearest ones add up to half a level
    too much or more, those that were rounded the furthest go the other way.

    Args:
        weights: ``(O, I, h, w)``, in levels.

    Returns:
        int8, -127..127.
    """
    exact = weights.flatten(2)
    nearest = exact.round()
    error = nearest - exact
    surplus = error.sum(2, keepdim=True).round()
    order = (error * surplus.sign()).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    levels = nearest - (order < surplus.abs()) * surplus.sign()
    return levels.clamp(-MOST_LEVEL, MOST_LEVEL).to(torch.int8).view(weights.shape)
