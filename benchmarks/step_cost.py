"""What a training step costs at least: its arithmetic, its bytes, its launches; and what it takes.

Every operation that reaches the device is counted while the work runs, or while it is traced on
``meta`` tensors, which have shapes and no numbers. Arithmetic is that of convolutions and matrix
products, as torch's own counter has it. Bytes are each input read once and each output written
once. An operation takes at least the longer of the two at the rates measured on the machine, and
work takes at least the sum, or what starting its operations takes if that is longer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wsi_pipeline.bench.rates import matrix_rate
from wsi_pipeline.device import DTYPES
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.augment import augment
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.begin import begin
from wsi_pipeline.training.fit import Learner
from wsi_pipeline.training.loader import Loaded, load_batches
from wsi_pipeline.training.ranks import Ranks
from wsi_pipeline.training.recipe import Recipe
from wsi_pipeline.training.sampler import Sampler

Result = dict[str, Any]

__all__ = [
    "Operation",
    "Rates",
    "counted",
    "floor_seconds",
    "measure_rates",
    "median_seconds",
    "network_pass",
    "step_cost",
    "totals",
]

WRITE_ONLY = ("copy_", "zero_", "fill_")
"""Operations in place that do not read what they overwrite."""
ALLOCATES = ("empty", "new_empty")
"""Operations that touch no memory."""
TEN_MINUTES_S = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One operation on a device."""

    name: str
    """As ATen has it, such as ``convolution``."""
    flops: int
    """Of convolutions and matrix products; 0 otherwise."""
    bytes: int
    """Read and written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a machine reaches."""

    flops: float
    """Of a large matrix product, a second."""
    bytes: float
    """Read and written by a large copy, a second."""
    launch_s: float
    """Seconds between the starts of two small operations."""
    waits: bool
    """Whether the next operation starts only when the last has ended, as on a CPU."""


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        works = func.namespace == "aten" and not func.is_view and not name.startswith(ALLOCATES)
        if works:
            count = flop_registry.get(func._overloadpacket)
            flops = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
            moved = _bytes_moved(name, func._schema.is_mutable, args, kwargs or {}, out)
            self.operations.append(Operation(name=name, flops=flops, bytes=moved))
        return out


def counted(work: Callable[[], object]) -> tuple[Operation, ...]:
    """Run some work and return its operations."""
    with _Counter() as counter:
        work()
    return tuple(counter.operations)


def network_pass(
    spec: ModelSpec, rows: Mapping[str, int], *, size: int, crop_px: int, dtype: torch.dtype
) -> tuple[Operation, ...]:
    """Count the forward and the backward pass of a network, from its architecture alone.

    Args:
        spec: the network's.
        rows: labelled samples of a batch, by head; the heads without any do not run.
        size: samples of a batch.
        crop_px: side of a crop.
        dtype: of weights and maps.
    """
    with torch.device("meta"):
        network = build_network(spec).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pixels = torch.empty(size, 3, crop_px, crop_px, dtype=dtype)
        at = {head: torch.empty(count, dtype=torch.int64) for head, count in rows.items()}

    def work() -> None:
        _backward(network(pixels.to(memory_format=torch.channels_last), at))

    return counted(work)


def totals(operations: Sequence[Operation]) -> dict[str, float]:
    """Return the sums of some operations, for a report."""
    return {
        "tflop": sum(op.flops for op in operations) / 1e12,
        "gigabytes": sum(op.bytes for op in operations) / 1e9,
        "operations": len(operations),
    }


def floor_seconds(operations: Sequence[Operation], rates: Rates) -> float:
    """Return the time that some operations take at least."""
    device = sum(max(op.flops / rates.flops, op.bytes / rates.bytes) for op in operations)
    host = len(operations) * rates.launch_s
    return device + host if rates.waits else max(device, host)


def measure_rates(device: str, precision: str, *, small: bool = False) -> Rates:
    """Measure a machine's ceilings.

    Args:
        device: ``cpu``, ``cuda``, ...
        precision: of the matrix product.
        small: little work, for a test of this code; the numbers mean nothing then.
    """
    cuda = device.startswith("cuda")
    source = torch.rand((1 << 20) if small else (1 << 30 if cuda else 1 << 26), device=device)
    target = torch.empty_like(source)
    copy_s = median_seconds(lambda: target.copy_(source), device)
    tiny = torch.zeros(1, device=device)
    count = 200

    def starts() -> None:
        for _ in range(count):
            tiny.add_(1)

    return Rates(
        flops=matrix_rate(device, precision, clock=time.perf_counter, side=256 if small else None),
        bytes=2 * source.nbytes / copy_s,
        launch_s=median_seconds(starts, device) / count,
        waits=not cuda,
    )


def median_seconds(
    work: Callable[[], object], device: str, *, repeats: int = 7, warm_up: int = 2
) -> float:
    """Time some work, the device's part included."""
    seconds = []
    for _ in range(warm_up + repeats):
        wait_for(device)
        begun = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[warm_up:])


def wait_for(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def step_cost(
    recipe: Recipe, *, device: str, batches: int, repeats: int, small: bool = False
) -> Result:
    """Say what a training step takes at least, then measure it; print a table.

    Args:
        recipe: whose batches are counted and measured.
        device: where.
        batches: how many.
        repeats: of each measurement.
        small: see :func:`measure_rates`.
    """
    start = begin(recipe, name="cost", device=device)
    learner = Learner(recipe, start.spec, start.network, Ranks(rank=0, world=1, device=device))
    rates = measure_rates(device, learner.precision, small=small)
    print(
        f"measured: {learner.precision} matrix product {rates.flops / 1e12:.1f} TFLOP/s, "
        f"copy {rates.bytes / 1e12:.3f} TB/s, {rates.launch_s * 1e6:.1f} us a launch"
    )
    sampler = Sampler(start.sizes, recipe.batches, seed=recipe.seed)
    loading = load_batches(start.sources, sampler, start.spec, workers=recipe.batches.workers)
    try:
        loaded = list(islice(loading, batches))
        found = {
            "device": _device_name(device),
            "precision": learner.precision,
            "rates": asdict(rates),
            **_predicted_and_measured(learner, loaded, rates, repeats=repeats),
            "loader_s": _loading_seconds(loading, count=2 * batches),
        }
    finally:
        loading.close()  # type: ignore[attr-defined]  # a generator: its threads end here
    if device.startswith("cuda"):
        found["peak_gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9
    _print_cost(found)
    return found


def _predicted_and_measured(
    learner: Learner, loaded: Sequence[Loaded], rates: Rates, *, repeats: int
) -> Result:
    """Return, of the network alone and of a whole step, the means over some batches."""
    crops = [_crops(learner, one) for one in loaded]
    works = {
        "network": [_counted_pass(learner, own) for own in crops],
        "step": [counted(lambda one=one: learner.learn(one)) for one in loaded],  # type: ignore[misc]
    }
    found: Result = {}
    for name, own in works.items():
        floor = statistics.fmean(floor_seconds(work, rates) for work in own)
        found[name] = {**_means([totals(work) for work in own]), "at_least_s": floor}
        print(f"predicted: {name} takes at least {1e3 * floor:.2f} ms")
    runs: dict[str, list[Callable[[], object]]] = {
        "network": [lambda own=own: _pass(learner, own) for own in crops],  # type: ignore[misc]
        "step": [lambda one=one: learner.learn(one) for one in loaded],  # type: ignore[misc]
    }
    for name, each in runs.items():
        took = [median_seconds(run, learner.ranks.device, repeats=repeats) for run in each]
        found[name]["measured_s"] = statistics.fmean(took)
    return found


def _crops(learner: Learner, loaded: Loaded) -> Batch:
    return augment(
        loaded.windows.to(learner.ranks.device),
        learner.spec,
        learner.recipe.augment,
        crop_px=loaded.crop_px,
        seeds=loaded.seeds,
        scales=loaded.scales,
    )


def _counted_pass(learner: Learner, crops: Batch) -> tuple[Operation, ...]:
    size, crop_px = len(crops.pixels), crops.pixels.shape[-1]
    rows = {head: len(own) for head, own in crops.rows.items()}
    dtype = DTYPES[learner.precision]
    return network_pass(learner.spec, rows, size=size, crop_px=crop_px, dtype=dtype)


def _pass(learner: Learner, crops: Batch) -> None:
    """Run the network forward and backward, and nothing else of a step."""
    learner.network.zero_grad(set_to_none=True)
    half = learner.precision != "fp32"
    with torch.autocast(learner.ranks.device.partition(":")[0], torch.bfloat16, enabled=half):
        logits = learner.network(crops.pixels, crops.rows)
    _backward(logits)


def _loading_seconds(batches: Iterator[Loaded], *, count: int) -> float:
    """Return seconds a batch when the threads that cut windows work alone."""
    for _ in range(4):  # these were begun before
        next(batches)
    begun = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - begun) / count


def _print_cost(found: Result) -> None:
    print("part            TFLOP       GB   operations   at least, ms   measured, ms   ratio")
    for name in ("network", "step"):
        row = found[name]
        print(
            f"{name:12} {row['tflop']:8.4f} {row['gigabytes']:8.3f} {row['operations']:12.0f} "
            f"{1e3 * row['at_least_s']:14.2f} {1e3 * row['measured_s']:14.2f} "
            f"{row['measured_s'] / row['at_least_s']:7.2f}"
        )
    slower = max(found["step"]["measured_s"], found["loader_s"])
    print(f"loader alone, decoding what it meets first: {1e3 * found['loader_s']:.2f} ms a batch")
    print(f"steps in ten minutes, without validation: {TEN_MINUTES_S / slower:.0f}")


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _backward(logits: Mapping[str, Tensor]) -> None:
    loss = torch.stack([value.float().mean() for value in logits.values()]).sum()
    loss.backward()  # type: ignore[no-untyped-call]


def _bytes_moved(
    name: str,
    mutable: bool,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Any,
) -> int:
    first = args[:1] if mutable else ()
    read = args[1:] if name in WRITE_ONLY else args
    # Some operations in place return nothing; what they write is their first argument.
    written = first if out is None else out
    return _size(read) + _size(list(kwargs.values())) + _size(written)


def _size(values: Any) -> int:
    # A tensor that was expanded has fewer bytes than elements.
    return sum(
        min(leaf.nbytes, leaf.untyped_storage().nbytes())
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor)
    )
