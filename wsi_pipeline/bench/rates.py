"""What the device itself can do: multiply matrices, and copy memory."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from wsi_pipeline.bench.timing import Clock
from wsi_pipeline.device import DTYPES
from wsi_pipeline.eight_bit import byte_product
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import ModelSpec

__all__ = ["dense_flops", "describe_device", "matrix_rate", "memory_rate"]

MATRIX_SIDE = {"cuda": 8192, "cpu": 2048, "mps": 4096}
"""Large enough that a product is limited by arithmetic."""
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28, "mps": 1 << 28}
"""Larger than the caches."""
WARM_UP, TIMES = 2, 5


def matrix_rate(device: str, precision: str, *, clock: Clock, side: int | None = None) -> float:
    """Return the FLOP/s of a large matrix product, the median of some.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``.
        precision: ``fp32`` (without TF32), ``bf16``, ``fp16``; ``int8``: of bytes.
        clock: what time it is.
        side: of the matrices; None: large enough to be limited by arithmetic.
    """
    side = side or MATRIX_SIDE[device.partition(":")[0]]
    if precision == "int8":
        return 2 * side**3 / _median(byte_product(side), device, clock)
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _median(lambda: torch.mm(a, b, out=out), device, clock)


def memory_rate(device: str, *, clock: Clock) -> float:
    """Return bytes/s, read and written, of a copy within the device's memory."""
    size = COPY_BYTES[device.partition(":")[0]]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _median(lambda: target.copy_(source), device, clock)


def dense_flops(spec: ModelSpec, sizes: Iterable[tuple[int, int]], *, margin_px: int = 0) -> int:
    """Count the FLOPs (2 a multiply-add) of windows, without computing them.

    Only convolutions and products count: 0 for a network that has none.

    Args:
        spec: of the network.
        sizes: width and height of each window.
        margin_px: what of it on every side no logits are wanted of.
    """
    how = {"margin": margin_px} if margin_px else {}
    total = 0
    with torch.device("meta"):
        network = build_network(spec).eval()
    for (width, height), count in Counter(sizes).items():
        pixels = torch.empty(1, 3, height, width, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(pixels, **how)
        total += count * int(counter.get_total_flops())
    return total


def describe_device(device: str) -> str:
    """Return the name of the processor or GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return device
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, device)


def _median(work: Callable[[], object], device: str, clock: Clock) -> float:
    seconds = []
    for _ in range(WARM_UP + TIMES):
        _wait(device)
        begun = clock()
        work()
        _wait(device)
        seconds.append(clock() - begun)
    return statistics.median(seconds[WARM_UP:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
