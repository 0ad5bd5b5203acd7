"""Tensors in a folder: safetensors files of at most 16 MiB, in half precision where that is safe.

::

    weights.safetensors                   all tensors, where they fit into one file; else
    weights-00001-of-00003.safetensors    shards, and
    weights.safetensors.index.json        {"metadata": {"total_size": bytes},
                                           "weight_map": {tensor: file}}

The files' bytes are a function of the tensors alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsi_pipeline.checked import parse_json
from wsi_pipeline.errors import ModelBundleError

__all__ = [
    "SHARD_BYTES",
    "halved",
    "number_fault",
    "read_weights",
    "weight_map",
    "write_weights",
]

log = logging.getLogger(__name__)

SHARD_BYTES = 16 * 2**20
"""Size of a file at most, its header included."""
HALF_ERROR = 1e-3
"""Of an output channel, at most, for a kernel to be kept in half precision: the norm of the
rounding errors over the norm of the weights. Rounding normal numbers costs 4.9e-4 at most."""

_WEIGHTS = "weights.safetensors"
_INDEX = "weights.safetensors.index.json"
_HEADER_BYTES = 4096
_ENTRY_BYTES = 160
"""What a tensor takes in a header, beside its name."""


def weight_map(folder: Path) -> dict[str, tuple[str, ...] | None]:
    """Return the weight files in a folder by name; the tensors each must hold, None if unsaid.

    Raises:
        ModelBundleError: there are none, or the index is broken or names files elsewhere.
    """
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _WEIGHTS).is_file():
            raise ModelBundleError(f"{folder} holds neither {_WEIGHTS} nor {_INDEX}")
        _require_inside(folder, _WEIGHTS)
        return {_WEIGHTS: None}
    try:
        entries = parse_json(index.read_text(encoding="utf-8"))["weight_map"].items()
        files = {str(file) for _, file in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelBundleError(f"{index} cannot be read: {error!r}") from error
    for file in files:
        # A bundle may come from anywhere: it must not name files outside its folder.
        if Path(file).name != file or not (folder / file).is_file():
            raise ModelBundleError(f"{index} names {file!r}, which is no file of the bundle")
        _require_inside(folder, file)
    return {
        file: tuple(tensor for tensor, where in entries if where == file) for file in sorted(files)
    }


def _require_inside(folder: Path, file: str) -> None:
    """Refuse a link that leads out of the folder."""
    if not (folder / file).resolve().is_relative_to(folder.resolve()):
        msg = f"{folder / file} is a link out of the bundle: copy what it leads to in its place"
        raise ModelBundleError(msg)


def read_weights(folder: Path, files: Mapping[str, tuple[str, ...] | None]) -> dict[str, Tensor]:
    """Read tensors by name, in the precision they are stored in.

    Args:
        folder: where the files lie.
        files: what :func:`weight_map` found there.

    Raises:
        ModelBundleError: a file is damaged, or holds other tensors than the index says.
    """
    tensors: dict[str, Tensor] = {}
    for name, promised in files.items():
        try:
            found = load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise ModelBundleError(f"{folder / name} cannot be read: {error}") from error
        if promised is not None and set(promised) != set(found):
            raise ModelBundleError(f"{folder / name} does not hold what {_INDEX} says")
        tensors.update(found)
    return tensors


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a folder that has no weights yet.

    Raises:
        ModelBundleError: one tensor alone is larger than a file may be.
    """
    shards = _shards(tensors)
    names = [_WEIGHTS]
    if len(shards) > 1:
        count = len(shards)
        names = [f"weights-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        size = sum(tensor.nbytes for tensor in tensors.values())
        placed = {
            tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, shard in zip(names, shards, strict=True):
        part = {name: tensors[name].detach().cpu().contiguous().clone() for name in shard}
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # it is written for its owner alone


def number_fault(name: str, tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Return what about a tensor's numbers no trained network has; None where all is well.

    Args:
        name: the tensor's; ``running_var`` at its end makes it a variance.
        tensor: as it is stored.
        dtype: what the network computes with.
    """
    if tensor.is_floating_point() != dtype.is_floating_point:
        return f"is {tensor.dtype}, not {dtype}"
    numbers = tensor.to(dtype)  # which may not hold what float64 does
    if not bool(torch.isfinite(numbers).all()):
        return "holds NaN or infinite numbers"
    if name.endswith("running_var") and bool((numbers < 0).any()):
        return "holds negative variances"
    return None


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return kernels in float16, everything else as it is.

    Tensors of one dimension (biases; what a normalisation scales by and remembers) stay: they
    are a hundredth of the bytes, an error in one of their numbers moves a whole channel, and
    variances may be too large or too small for float16. So does a kernel of which float16 would
    hold an output channel worse than ``HALF_ERROR``: it has numbers above 65,504, or consists
    of numbers below about 6e-5, where float16 runs out of digits.
    """
    out = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        if (error := _half_error(tensor)) <= HALF_ERROR:
            out[name] = tensor.to(torch.float16)
        else:
            log.info("%s stays %s: float16 is off by %.1g", name, tensor.dtype, error)
    return out


def _half_error(tensor: Tensor) -> float:
    """Return the worst relative error of an output channel in float16."""
    rows = tensor.detach().double().flatten(1)
    error, norm = (rows.to(torch.float16).double() - rows).norm(dim=1), rows.norm(dim=1)
    return float(torch.where(norm == 0, 0.0, error / norm).max())  # NaN where a weight is


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Fill files with tensors in the order of their names."""
    shards: list[list[str]] = [[]]
    used = _HEADER_BYTES
    for name in sorted(tensors):
        size = tensors[name].nbytes + len(name.encode()) + _ENTRY_BYTES
        if size + _HEADER_BYTES > SHARD_BYTES:
            takes = f"{tensors[name].nbytes:,} bytes"
            msg = f"tensor {name!r} takes {takes}; a weight file holds {SHARD_BYTES:,}"
            raise ModelBundleError(msg)
        if used + size > SHARD_BYTES:
            shards.append([])
            used = _HEADER_BYTES
        shards[-1].append(name)
        used += size
    return shards
