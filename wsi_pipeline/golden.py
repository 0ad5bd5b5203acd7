"""Golden tiles: what a bundle says about two fixed images, and whether it still says so.

``golden.json`` of a bundle holds, for each tile, the mean colour of the tile itself, and by map
and channel the mean, the share above a half and the means of 8 x 8 cells (a class map counts as
one channel a class, 1 where it was chosen), and the objects found by kind. All of it comes out
of the pipeline's own inference and object extraction, so it guards weights, network code, input
scale, enlargement of logits, object rules, and this machine's arithmetic at once.

What is expected is what float32 gave on the CPU where the bundle was made. Half precision and
8-bit integers have no expectations of their own: they must agree with float32, within more generous
``TOLERANCES``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from wsi_pipeline.bundle import ModelBundle
from wsi_pipeline.device import choose_device, choose_precision, half_pays, why_no_int8
from wsi_pipeline.durable import durable_file
from wsi_pipeline.errors import JobError, ModelBundleError
from wsi_pipeline.fixed_images import golden_tiles
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.predicted import ImageMaps, ImagePredictor, find_objects

__all__ = [
    "TOLERANCES",
    "Tolerances",
    "check_golden",
    "compare",
    "golden_tiles",
    "observe",
    "precisions",
    "read_golden",
    "write_golden",
]

GOLDEN = "golden.json"
CELLS = 8
"""Cells a side whose means are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerances:
    """How far a finding may be from what is expected."""

    mean: float
    """Of a channel's mean."""
    share: float
    """Of a channel's share above a half."""
    cell: float
    """Of a cell's mean."""
    objects: float
    """Of the number of objects of a kind, as a share of it; one object more or less may be."""


TOLERANCES = {
    "fp32": Tolerances(mean=1e-4, share=2e-4, cell=3e-4, objects=0.0),
    "bf16": Tolerances(mean=6e-3, share=1.5e-2, cell=4e-2, objects=0.05),
    "fp16": Tolerances(mean=1e-3, share=1e-3, cell=5e-3, objects=0.03),
    "int8": Tolerances(mean=6e-3, share=1.5e-2, cell=4e-2, objects=0.05),
}
"""By precision. With trained cerberus-lite networks, float32 gave the same numbers to 1e-5 with
SSE 4.1, AVX2 and AVX-512 kernels; bf16 was off by 9e-4 (mean), 1.2e-3 (share) and 6e-3 (cell),
fp16 by 2e-4, 2e-4 and 1.6e-3; one that was unsure about the pen of the blank tile was off by 3e-3,
7e-3 and 2e-2 in bf16. int8 was off by 4e-4, 6e-4 and 5e-3, like bf16. Two to three times that is
allowed: other devices round in other ways."""
_COLOUR = 0.05
"""Grey levels by which a tile's mean colour may differ: drawing it rounds, too."""


def precisions(spec: ModelSpec, device: str) -> tuple[str, ...]:
    """Return the precisions in which a bundle is to agree with itself on a device."""
    if not half_pays(spec.architecture):
        return ("fp32",)
    if device.startswith("cuda"):
        return ("fp32", "bf16", "fp16")
    has_int8 = why_no_int8(device, spec.architecture) is None
    return ("fp32", "bf16", "int8") if has_int8 else ("fp32", "bf16")


def observe(
    spec: ModelSpec, network: nn.Module, *, device: str = "cpu", precision: str = "fp32"
) -> dict[str, Any]:
    """Return what a network says about the tiles, as ``golden.json`` has it under ``tiles``.

    Args:
        spec: the network's.
        network: in evaluation mode; it is moved to the device and the precision.
        device: where it runs.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
    """
    predictor = ImagePredictor(spec, network, device=device, precision=precision)
    found = {}
    for name, image in golden_tiles(spec.mpp).items():
        maps = predictor.predict(image)
        found[name] = {
            "colour": [round(float(mean), 4) for mean in image.mean((0, 1))],
            "maps": {key: _statistics(plane) for key, plane in _planes(maps)},
            "objects": {
                str(spec.head(head).object_kind): len(own.polygons)
                for head, own in find_objects(maps).items()
            },
        }
    return found


def compare(
    expected: Mapping[str, Any], found: Mapping[str, Any], precision: str = "fp32"
) -> list[str]:
    """Return a line for each statistic that is not as expected; none where all is well.

    Args:
        expected: ``tiles`` of ``golden.json``.
        found: what :func:`observe` returned.
        precision: that it was observed in.
    """
    allowed = TOLERANCES[precision]
    if expected.keys() != found.keys():
        return [f"tiles {list(found)}, not {list(expected)}"]
    faults = []
    for tile, wanted in expected.items():
        own = found[tile]
        away = np.abs(np.subtract(wanted["colour"], own["colour"])).max()
        if not away <= _COLOUR:
            faults.append(f"tile {tile}: drawn differently, its mean colour is {own['colour']}")
            continue
        unlike = [key for key in ("maps", "objects") if wanted[key].keys() != own[key].keys()]
        if unlike:
            faults += [f"{tile}: {k} {list(own[k])}, not {list(wanted[k])}" for k in unlike]
            continue
        for channel, numbers in wanted["maps"].items():
            for name in ("mean", "share", "cell"):
                away = np.abs(np.subtract(numbers[name], own["maps"][channel][name])).max()
                if not away <= getattr(allowed, name):
                    faults.append(f"{tile}: {channel} {name} is off by {away:.4f} in {precision}")
        for kind, count in wanted["objects"].items():
            if not abs(own["objects"][kind] - count) <= max(1, allowed.objects * count):
                faults.append(f"{tile}: {own['objects'][kind]} of kind {kind}, not {count}")
    return faults


def write_golden(bundle: ModelBundle) -> Path:
    """Write ``golden.json`` of a bundle: what float32 gives on this CPU; returns its path.

    Raises:
        ModelBundleError: the weights do not fit the spec.
        DiskFullError: no space.
    """
    tiles = observe(bundle.spec, bundle.load_network())
    path = bundle.path / GOLDEN
    with durable_file(path) as beside:
        beside.write_text(json.dumps({"sha256": bundle.digest, "tiles": tiles}) + "\n")
    return path


def read_golden(bundle: ModelBundle) -> dict[str, Any] | None:
    """Return the content of ``golden.json``: ``sha256`` and ``tiles``; None if there is none.

    Raises:
        ModelBundleError: it cannot be read, or lacks a number.
    """
    path = bundle.path / GOLDEN
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tiles = {name: _read_tile(tile) for name, tile in content["tiles"].items()}
        return {"sha256": str(content["sha256"]), "tiles": tiles}
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError,
    ) as error:  # fmt: skip
        raise ModelBundleError(f"{path} cannot be read: {error!r}") from error


def _read_tile(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tile's statistics, every number there and finite, or raise what Python raises."""
    return {
        "colour": _numbers(content["colour"], (3,)),
        "maps": {
            channel: {
                "mean": _numbers(own["mean"], ()),
                "share": _numbers(own["share"], ()),
                "cell": _numbers(own["cell"], (CELLS, CELLS)),
            }
            for channel, own in content["maps"].items()
        },
        "objects": {kind: _numbers(count, ()) for kind, count in content["objects"].items()},
    }


def _numbers(content: object, shape: tuple[int, ...]) -> Any:  # noqa: ANN401 - a number or lists
    array = np.array(content)
    if array.dtype.kind not in "if" or array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{str(content)[:40]} is no array {shape} of finite numbers")
    return content


def check_golden(
    bundle: ModelBundle, *, device: str = "auto", precision: str = "auto"
) -> list[str]:
    """Return what is not as it was when the bundle was made; nothing where all is well.

    Args:
        bundle: the model.
        device: as of ``wsi-run``.
        precision: as of ``wsi-run``.

    Raises:
        ModelBundleError: the bundle has no golden tiles, or its weights do not fit.
        JobError: no such device or precision, or nothing is expected of the bundle in it.
    """
    golden = read_golden(bundle)
    if golden is None:
        msg = f"{bundle.path} has no {GOLDEN}; `wsi models golden --write` makes one"
        raise ModelBundleError(msg)
    device = choose_device(device)
    precision = choose_precision(precision, device, architecture=bundle.spec.architecture)
    if precision not in (held := precisions(bundle.spec, device)):
        msg = f"{bundle.name} is not held to {precision} on {device}: choose {' or '.join(held)}"
        raise JobError(msg)
    faults = []
    if golden["sha256"] != bundle.digest:
        faults.append(
            f"spec or weights have changed: the bundle is {bundle.digest[:12]}, {GOLDEN} is of "
            f"{golden['sha256'][:12]}"
        )
    found = observe(bundle.spec, bundle.load_network(), device=device, precision=precision)
    return faults + compare(golden["tiles"], found, precision)


def _planes(maps: ImageMaps) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield each channel of each map by its name, values 0..1."""
    for key, array in maps.arrays.items():
        head = maps.spec.maps[key]
        if key.endswith("/class"):
            for number, name in enumerate(head.classes):
                yield f"{key}/{name}", (array == number).astype(np.float64)
        else:
            for name, plane in zip(head.prob_channels, array, strict=True):
                yield f"{key}/{name}", plane / 255.0


def _statistics(plane: NDArray[np.float64]) -> dict[str, Any]:
    height, width = plane.shape
    rows, columns = (np.linspace(0, n, CELLS, endpoint=False).astype(int) for n in plane.shape)
    sums = np.add.reduceat(np.add.reduceat(plane, rows, 0), columns, 1)
    areas = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    return {
        "mean": round(float(plane.mean()), 6),
        "share": round(float((plane > 0.5).mean()), 6),
        "cell": np.round(sums / areas, 5).tolist(),
    }
