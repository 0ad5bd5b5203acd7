"""One measurement from beginning to end."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsi_pipeline.bench.advice import Circumstances, advise
from wsi_pipeline.bench.rates import dense_flops, describe_device, matrix_rate, memory_rate
from wsi_pipeline.bench.result import BenchResult
from wsi_pipeline.bench.stages import stages_of
from wsi_pipeline.bench.subject import BenchOptions, Subject, prepared
from wsi_pipeline.bench.timing import Clock, measure
from wsi_pipeline.bench.whole import Whole
from wsi_pipeline.device import half_pays, why_no_int8
from wsi_pipeline.job import versions
from wsi_pipeline.machine import available_cpus, peak_rss_mb, total_memory

__all__ = ["BenchOptions", "bench"]


def bench(
    options: BenchOptions,
    folder: Path,
    *,
    clock: Clock = time.perf_counter,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Measure every stage and the whole on one slide.

    Args:
        options: what is asked.
        folder: empty scratch space, on the disk that is to be measured.
        clock: what time it is.
        stop: asked between measurements, and while the whole runs.
        say: told how far it is.

    Raises:
        WsiPipelineError: the slide, the model or an option is not usable, or there is no
            tissue.
        Interrupted: ``stop`` said so.
    """
    with prepared(options, folder, stop=stop, say=say) as subject:
        whole = Whole(subject=subject, stop=stop)
        *stages, total = measure(
            [*stages_of(subject), whole.stage()], options.repeat, clock=clock, stop=stop, say=say
        )
        predictor = subject.predictor
        where = Circumstances(
            device=predictor.device,
            precision=predictor.precision,
            half_pays=half_pays(subject.bundle.spec.architecture),
            int8_runs=why_no_int8(predictor.device, subject.bundle.spec.architecture) is None,
            decoders=predictor.workers,
            cpus=available_cpus(),
        )
        return BenchResult(
            facts=_facts(subject, options, clock),
            mpx=subject.mpx,
            mm2=subject.mm2,
            stages=stages,
            whole=total,
            whole_stages=whole.stage_seconds,
            device_busy=whole.device_busy,
            peak_rss_mb=peak_rss_mb(),
            advice=advise(stages, total, where),
        )


def _facts(subject: Subject, options: BenchOptions, clock: Clock) -> dict[str, dict[str, Any]]:
    """Say what was measured with what; names of files only, no folders, no host."""
    slide, tiles, predictor = subject.slide, subject.tiles, subject.predictor
    read, whole = [tile.read.size for tile in tiles.tiles], len(tiles.tiles) * tiles.tile_px**2
    rate = matrix_rate(predictor.device, predictor.precision, clock=clock)
    done = dense_flops(predictor.spec, read, margin_px=predictor.margin_px)
    wanted = dense_flops(predictor.spec, [tile.computed.size for tile in tiles.tiles])
    pixels = tiles.read_px**2
    return {
        "machine": {
            "device": describe_device(predictor.device),
            "cpus": available_cpus(),
            "memory_gib": round(total_memory() / 2**30, 1),
            "system": platform.system(),
        },
        "slide": {
            "name": slide.name,
            "synthetic": subject.synthetic,
            "width": slide.size[0],
            "height": slide.size[1],
            "mpp": slide.pixel_size.x,
            "reader": slide.reader,
        },
        "model": {
            "name": subject.bundle.name,
            "sha256": subject.bundle.digest,
            "architecture": subject.bundle.spec.architecture,
            "flops_per_px": dense_flops(predictor.spec, [(tiles.read_px,) * 2]) / pixels,
        },
        "options": {
            "device": predictor.device,
            "precision": predictor.precision,
            "tiles": len(tiles.tiles),
            "tile_px": tiles.tile_px,
            "halo_px": tiles.halo_px,
            "computed_share": sum(tile.computed.area for tile in tiles.tiles) / whole,
            "redundancy": sum(tile.read.area for tile in tiles.tiles) / (subject.mpx * 1e6),
            "flops_redundancy": done / wanted if wanted else 1.0,
            "batch_size": predictor.batch_size,
            "decode_threads": predictor.workers,
            "object_threads": subject.workers,
            "repeat": options.repeat,
        },
        "rates": {
            "matrix_tflops": rate / 1e12,
            "memory_gb_per_s": memory_rate(predictor.device, clock=clock) / 1e9,
        },
        "versions": versions(),
    }
