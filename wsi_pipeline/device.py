"""What this machine computes with: device, precision, and sizes that suit it."""

from __future__ import annotations

from pathlib import Path

import torch

from wsi_pipeline.eight_bit import ARCHITECTURES, obstacle
from wsi_pipeline.errors import JobError
from wsi_pipeline.machine import available_cpus

__all__ = [
    "DTYPES",
    "DeviceSpan",
    "auto_workers",
    "choose_device",
    "choose_precision",
    "half_pays",
    "name_devices",
    "why_no_int8",
]

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}
"""Precisions by the names the command line has for them, with the type of floats in each: with
``int8``, these are the logits and what follows them."""


def choose_device(name: str) -> str:
    """Resolve ``auto`` (cuda, else mps, else cpu) and check that a named device is here.

    Raises:
        JobError: no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(kind)
    if count is None or (index and not (kind == "cuda" and index.isdigit())):
        raise JobError(f"device {name!r} is none of auto, cpu, cuda, cuda:N, mps")
    if int(index or 0) >= count:
        raise JobError(
            f"device {name!r} is not here: torch {torch.__version__} sees {count} {kind}"
        )
    return name


def name_devices(text: str) -> tuple[str, ...]:
    """Return the devices that a run is to use: ``cuda:all`` and lists are several.

    Args:
        text: ``cuda:all``, names of GPUs with commas between them, or any one device, which is
            not looked at.

    Raises:
        JobError: one of several is not here, is none of CUDA's, or is named twice.
    """
    if text == "cuda:all":
        choose_device("cuda")
        return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    if "," not in text:
        return (text,)
    names = tuple(name.strip() for name in text.split(","))
    if len(set(names)) < len(names) or not all(name.startswith("cuda:") for name in names):
        raise JobError(f"device {text!r}: several are named like cuda:0,cuda:2, each once")
    return tuple(map(choose_device, names))


def half_pays(architecture: str) -> bool:
    """Tell whether a network gains by half precision.

    The baseline's thresholds need float32, and it has no convolutions to speed up.
    """
    return architecture != "stain-baseline"


def why_no_int8(device: str, architecture: str) -> str | None:
    """Return why a network does not run in 8-bit integers on a device; None where it does.

    Args:
        device: as :func:`choose_device` returns it.
        architecture: of the network.
    """
    if device != "cpu":
        return f"it is for CPUs, not for {device} (--device cpu)"
    if architecture not in ARCHITECTURES:
        return f"it is for networks of {' or '.join(ARCHITECTURES)}, not for {architecture!r}"
    return obstacle()


def choose_precision(name: str, device: str, *, architecture: str) -> str:
    """Resolve ``auto``: what halves the time where the network gains by it, else fp32.

    That is bf16 on CPUs with the instructions and on GPUs from compute capability 8.0 (Ampere) on,
    fp16 on those from 7.0 on, which have no bf16 convolutions.

    Args:
        name: ``auto``, ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        device: as :func:`choose_device` returns it.
        architecture: of the network; see :func:`half_pays`.

    Raises:
        JobError: no such precision, or the network cannot run in it on the device.
    """
    if name == "int8" and (reason := why_no_int8(device, architecture)) is not None:
        raise JobError(f"precision int8 cannot be had: {reason}; choose auto, bf16 or fp32")
    if name in DTYPES:
        return name
    if name != "auto":
        raise JobError(f"precision {name!r} is none of auto, {', '.join(DTYPES)}")
    return _half_of(device) if half_pays(architecture) else "fp32"


def auto_workers(device: str, share: int = 1) -> int:
    """Return how many threads decode: a CPU that also predicts keeps half of its cores.

    Args:
        device: where the network runs.
        share: processes that divide the processors among them.
    """
    cpus = max(1, available_cpus() // share)
    return min(16, cpus) if device.startswith("cuda") else max(1, min(4, cpus // 2))


def _half_of(device: str) -> str:
    if device == "cpu":
        return "bf16" if _cpu_has_bf16() else "fp32"
    if not device.startswith("cuda"):
        return "fp32"
    capability = torch.cuda.get_device_capability(device)
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"


def _cpu_has_bf16() -> bool:
    # Without these instructions bf16 is emulated, and slower than fp32.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux: fp32 is slower there, never wrong
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class DeviceSpan:
    """The time that a CUDA device works on a batch, by its own clock.

    The first event passes when all that was queued before is done, so spans do not overlap.
    """

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.current_stream(device)
        # Who waits leaves the processor to the threads that decode and write.
        self._begin, self._end = (
            torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self._begin.record(self._stream)

    def end(self) -> None:
        """Mark the last of the work as queued."""
        self._end.record(self._stream)

    def wait_s(self) -> float:
        """Wait for the end of the work and return how long it took."""
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3
