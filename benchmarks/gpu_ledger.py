"""Everything that may make the network faster on a GPU, tried in one call; then whole slides.

    python -m benchmarks.gpu_ledger --out FOLDER [--seconds 480]
    python -m benchmarks.gpu_ledger --out FOLDER --device cpu --tiny      (a smoke test)

For a machine that is lent for minutes: the parts run in the order of what is most wanted, each
result is on the disk before the next begins, a part that fails is written down with its error,
and none begins after ``--seconds``.

rates      matrix products in each precision, a copy in memory: what nothing can be faster than
network    the full network (random weights), windows that lie on the device, to uint8 maps: by
           tile size and variant below, seconds of the first pass and of a tile, useful megapixels
           a second, the share of the matrix rate (FLOPs of the write box alone, so that halos
           count as waste), peak memory, and, for small tiles, how far the maps are from float32
           on the CPU
profile    where the time of the variants ``as it is`` goes, kernel by kernel
slides     the main job on five slides at 0.25 um (one piece of tissue all over): seconds by stage,
           how busy the device was (launching counts as busy), megapixels a second to be held
           against those of ``network``

The main tile size comes first, ``as it is``, then the slides, then the other variants of that
tile, those that compile last, then the other tile sizes without them.

=====================  ===========================================================================
variant                what it is
=====================  ===========================================================================
as it is               what this package does: eager, channels last, bf16, window by window
in batches             of up to eight windows
fp16, fp32             in other precisions (float32 without TF32)
added by cuDNN         convolution, bias, sum and rectifier in one call of cuDNN
captured               a CUDA graph of the whole pass
compiled               torch.compile of the network
compiled, heads too    torch.compile of network, softmax, shrinking and quantising
compiled, captured     the same, as CUDA graphs
=====================  ===========================================================================
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import wsi_pipeline as wsi
from benchmarks.gpu import differences, make_bundle
from benchmarks.memory import write_repeated
from benchmarks.step_cost import median_seconds, wait_for
from wsi_pipeline import blocks
from wsi_pipeline.bench.rates import dense_flops, matrix_rate, memory_rate
from wsi_pipeline.bundle import ModelBundle, open_bundle
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.synth import write_slide

Pass = Callable[[Tensor], dict[str, Tensor]]
VARIANTS = {
    "as it is": "bf16",
    "in batches": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "added by cuDNN": "bf16",
    "captured": "bf16",
    "compiled": "bf16",
    "compiled, heads too": "bf16",
    "compiled, captured": "bf16",
}
"""Their precisions."""
WARM_UP, TIMES = 3, 10


class Ledger:
    """What was found so far, on the disk."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.found: dict[str, Any] = {}
        self._until = time.monotonic() + seconds

    def try_(self, name: str, work: Callable[[], Any]) -> None:
        """Do a part, unless time is up; write down what it gave, or its error."""
        if time.monotonic() > self._until:
            self.found[name] = "no time was left"
        else:
            begun = time.monotonic()
            try:
                self.found[name] = work()
            except Exception:
                self.found[name] = {"error": traceback.format_exc(limit=-3)}
            print(f"{name}: {time.monotonic() - begun:.1f} s", self.found[name], flush=True)
        text = json.dumps(self.found, indent=2, default=str)
        (self.folder / "gpu-ledger.json").write_text(text + "\n", encoding="utf-8")


def added_by_cudnn(conv: nn.Conv2d, x: Tensor, plus: Tensor | None, then: str | None) -> Tensor:
    """Stand in for ``blocks._fused``: the same by cuDNN's kernels with an epilogue."""
    how = (conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if then is None or conv.in_channels % 8:  # of three channels: no kernel with an epilogue
        y = nn.functional.conv2d(x, conv.weight, *how)
        y = y if plus is None else y.add_(plus)
        return y if then is None else y.relu_()
    if plus is None:
        return torch.cudnn_convolution_relu(x, conv.weight, *how)
    return torch.cudnn_convolution_add_relu(x, conv.weight, plus, 1.0, *how)


def captured(predict: Pass, pixels: Tensor) -> Pass:
    """Return a pass that replays a CUDA graph; its maps are valid until the next."""
    held = pixels.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            predict(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        maps = predict(held)

    def replay(fresh: Tensor) -> dict[str, Tensor]:
        held.copy_(fresh, non_blocking=True)
        graph.replay()
        return maps

    return replay


def variant_of(name: str, predictor: TorchPredictor, pixels: Tensor, stack: ExitStack) -> Pass:
    """Return the pass of a variant.

    Args:
        name: of :data:`VARIANTS`.
        predictor: whose network it is; changed.
        pixels: a batch on the device.
        stack: what is patched ends with it.
    """
    predict: Pass = predictor._compute
    compiler = partial(torch.compile, dynamic=False)
    if name == "added by cuDNN":
        stack.enter_context(mock.patch.object(blocks, "_fuses", return_value=True))
        stack.enter_context(mock.patch.object(blocks, "_fused", added_by_cudnn))
    elif name == "captured":
        predict = captured(predict, pixels)
    elif name == "compiled":
        predictor._network = compiler(predictor._network)
    elif name == "compiled, heads too":
        predictor._maps_of = compiler(predictor._maps_of)  # type: ignore[method-assign]
    elif name == "compiled, captured":
        predictor._maps_of = compiler(  # type: ignore[method-assign]
            predictor._maps_of, mode="reduce-overhead"
        )
    return predict


def measure(
    name: str, bundle: ModelBundle, device: str, tile: int, batch: int, rate: float, times: int
) -> dict[str, Any]:
    """Measure one variant at one tile size."""
    precision = VARIANTS[name]
    how = {"precision": precision, "tile_size": tile, "batch_size": batch}
    predictor = TorchPredictor.load(bundle, device=device, **how)
    side = tile + 2 * predictor.halo_px
    pixels = windows(batch, side).to(device)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as stack, torch.inference_mode():
        predict = variant_of(name, predictor, pixels, stack)
        begun = time.perf_counter()
        predict(pixels)
        wait_for(device)
        first = time.perf_counter() - begun
        seconds = (
            median_seconds(lambda: predict(pixels), device, repeats=times, warm_up=WARM_UP) / batch
        )
        maps = {key: map_[0].cpu().numpy() for key, map_ in predict(pixels).items()}
    result: dict[str, Any] = {
        "first_pass_s": first,
        "seconds_a_tile": seconds,
        "mpx_per_s": tile**2 / 1e6 / seconds,
        "useful_share": dense_flops(bundle.spec, [(tile, tile)]) / seconds / rate,
        "arithmetic_share": dense_flops(bundle.spec, [(side, side)], margin_px=predictor.margin_px)
        / seconds
        / rate,
        "batch": batch,
    }
    if device.startswith("cuda"):
        result["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    if tile <= 1024:
        result |= differences(maps, reference(bundle.path, tile))
    return result


def windows(count: int, side: int) -> Tensor:
    """Return windows of noise, the same in every call; the first does not depend on the count."""
    generator = torch.Generator().manual_seed(0)
    shape = (side, side, 3)
    made = [
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(count)
    ]
    return torch.stack(made)


@cache
def reference(bundle: Path, tile: int) -> dict[str, NDArray[np.uint8]]:
    """Return the maps of the first window as float32 on the CPU has them."""
    small = {"tile_size": tile, "batch_size": 1}
    right = TorchPredictor.load(open_bundle(bundle), device="cpu", precision="fp32", **small)
    with torch.inference_mode():
        found = right._compute(windows(1, tile + 2 * right.halo_px))
    return {key: map_[0].numpy() for key, map_ in found.items()}


def profile(bundle: ModelBundle, device: str, tile: int, batch: int, out: Path) -> str:
    """Write a table of kernels by time; return its name."""
    how = {"precision": "bf16", "tile_size": tile, "batch_size": batch}
    predictor = TorchPredictor.load(bundle, device=device, **how)
    side = tile + 2 * predictor.halo_px
    pixels = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8).to(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    predictor._compute(pixels)
    wait_for(device)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
        predictor._compute(pixels)
        wait_for(device)
    by = "cuda_time_total" if device.startswith("cuda") else "cpu_time_total"
    averages = found.key_averages(group_by_input_shape=True)
    path = out / f"gpu-profile-{tile}.txt"
    path.write_text(averages.table(sort_by=by, row_limit=60, max_name_column_width=80) + "\n")
    return path.name


def slides(model: str | Path, device: str, slide: Path, count: int) -> dict[str, Any]:
    """Run a slide under several names, after a small one; return the seconds of each by stage."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "slides" / f"s{number}.svs" for number in range(count)]
        paths[0].parent.mkdir()
        for path in paths:
            path.symlink_to(slide)
        small = Path(folder) / "small.svs"
        write_slide(small, width=1024, height=1024, mpp=0.25, seed=7, truth=False)
        wsi.run([small], Path(folder) / "warm", model=model, device=device)  # compiles the loops
        begun = time.perf_counter()
        reports = wsi.run(paths, Path(folder) / "out", model=model, device=device)
        seconds = time.perf_counter() - begun
        mm2 = sum(report.tissue_mm2 for report in reports)
        return {
            "seconds": seconds,
            "mm2": mm2,
            "mpx_per_s": 4 * mm2 / seconds,  # of tissue, at 0.5 um
            "busy": sum(report.device_busy_s or 0 for report in reports) / seconds,
            "stages_s": [report.seconds for report in reports],
            "counts": reports[0].counts,
            "not_done": [report.reason for report in reports if not report.done],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--tiles", type=int, nargs="+", default=[2048, 1024, 4096])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--slide-px", type=int, default=32768)
    parser.add_argument("--tiny", action="store_true", help="a narrow network, small tiles")
    args = parser.parse_args()
    widths, times, matrix, batch_px = [64, 128, 256, 512], TIMES, None, 8 * 2368**2
    if args.tiny:
        widths, times, matrix, batch_px = [8, 16, 16, 32], 2, 512, 2 * 576**2
        args.tiles, args.slide_px = [256], 2048
    device, ledger = args.device, Ledger(args.out, args.seconds)
    clock = time.perf_counter
    used = dict.fromkeys(VARIANTS.values())
    rates = {p: matrix_rate(device, p, clock=clock, side=matrix) for p in used}
    copied = memory_rate(device, clock=clock)
    ledger.try_("rates", lambda: {"matrix_flops": rates, "bytes_per_s": copied})
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder), widths)
        slide = Path(folder) / "slide.svs"
        write_repeated(slide, (args.slide_px, args.slide_px), mpp=0.25)

        def network(tile: int, names: Iterable[str]) -> None:
            batch = max(1, min(8, batch_px // (tile + 320) ** 2))
            for name in (name for name in names if name in args.variants):
                rate, count = rates[VARIANTS[name]], batch if name == "in batches" else 1
                work = partial(measure, name, bundle, device, tile, count, rate, times)
                ledger.try_(f"network {tile}: {name}", work)

        first, *others = args.tiles
        main_variant, *more = VARIANTS
        network(first, [main_variant])
        ledger.try_(f"profile {first}", partial(profile, bundle, device, first, 1, args.out))
        for model in (Path(folder) / "random", "cerberus-lite"):
            name = f"slides: {model if isinstance(model, str) else 'cerberus, random'}"
            work = partial(slides, model, device, slide, 2 if args.tiny else 5)
            ledger.try_(name, work)
        network(first, more)
        for tile in others:
            network(tile, [name for name in VARIANTS if "compiled" not in name])
            ledger.try_(f"profile {tile}", partial(profile, bundle, device, tile, 1, args.out))


if __name__ == "__main__":
    main()
