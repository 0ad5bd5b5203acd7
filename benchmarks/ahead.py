"""How busy a device is over a run of several slides, with the next slide made ready and without.

    python -m benchmarks.ahead [--slides 5] [--size 16384 12288] [--seconds 0.1] [--rounds 3]

The device is pretended: it takes a fixed time for each tile, in which it leaves the processor
alone, and its maps are blank. So what is measured is everything around it: opening, tissue, tiles,
the store, the first windows, writing. The slides are one piece of synthetic tissue repeated all
over, so that they are written at once. Both ways take turns, round by round. The share is the
seconds in which the device was at work over those of the whole run, its first slide and its last
tables included; a pause is from the last tile of a slide to the first of the next.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.memory import write_repeated
from benchmarks.standin import SPEC, StandIn
from wsi_pipeline.engines import Silent, run_slides
from wsi_pipeline.feeding import Feeder
from wsi_pipeline.job import SlideJob
from wsi_pipeline.machine import available_cpus
from wsi_pipeline.slide import Slide
from wsi_pipeline.store import PredictionBlock
from wsi_pipeline.tiling import Tile, TileGrid


class Sleeper(StandIn):
    """A device that sleeps for each tile, fed as the real one is."""

    extractors = 1

    def __init__(self, *, tile_px: int, seconds: float) -> None:
        super().__init__(tile_px=tile_px, device="pretended")
        self.seconds = seconds
        self.busy_s = 0.0
        self.spans: list[list[float]] = []
        """When the first tile of each slide was begun, and its last one ended."""

    def begin(self, slide: Slide, tiles: TileGrid) -> Feeder:
        """Begin to read windows; see :class:`wsi_pipeline.filling.Predictor`."""
        return Feeder(slide, tiles, 1, available_cpus(), pin=False).start()

    def predict(
        self,
        slide: Slide,
        tiles: TileGrid,
        *,
        stop: Callable[[], bool],
        warn: Callable[[str, str], None],
        feed: Feeder | None,
    ) -> Iterator[PredictionBlock]:
        """Yield blank blocks; see :class:`wsi_pipeline.filling.Predictor`."""
        span: list[float] = []
        self.spans.append(span)
        with feed or self.begin(slide, tiles) as batches:
            for batch in batches:
                begun = time.perf_counter()
                time.sleep(self.seconds)
                ended = time.perf_counter()
                self.busy_s += ended - begun
                span[:] = [span[0] if span else begun, ended]
                yield PredictionBlock(tile=batch.tiles[0], arrays=_blank(batch.tiles[0]))


def _blank(tile: Tile) -> dict[str, NDArray[np.uint8]]:
    arrays = {}
    for key, head in SPEC.maps.items():
        box = tile.write.coarsen(head.stride)
        shape = (box.height, box.width)
        channels = (len(head.prob_channels),) if key.endswith("/prob") else ()
        arrays[key] = np.zeros(channels + shape, np.uint8)
    return arrays


def measure(slides: list[Path], out: Path, sleeper: Sleeper, *, ahead: bool) -> dict[str, float]:
    """Run the slides; return the seconds, the share in which the device worked, and its pause."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    jobs = [
        SlideJob(path=str(path), slide_id=path.stem, out=out, model_name="", model_digest="0" * 64)
        for path in slides
    ]
    sleeper.spans = []
    begun = time.perf_counter()
    reports = run_slides(jobs, sleeper, watcher=Silent(), stop=lambda: False, ahead=ahead)
    seconds = time.perf_counter() - begun
    failed = [report.reason for report in reports if not report.done]
    if failed:
        raise SystemExit(f"a slide failed: {failed[0]}")
    busy = sum(report.device_busy_s or 0.0 for report in reports)
    pauses = [after[0] - before[1] for before, after in pairwise(sleeper.spans)]
    return {
        "seconds": round(seconds, 2),
        "busy_share": round(busy / seconds, 3),
        "pause_s": round(statistics.median(pauses), 3) if pauses else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=[16384, 12288], help="0.25 um pixels")
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.1, help="of the device, for a tile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    options = parser.parse_args()
    sleeper = Sleeper(tile_px=options.tile, seconds=options.seconds)
    rounds: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "slide-1.svs"
        write_repeated(first, tuple(options.size), mpp=0.25)
        slides = [first]
        for number in range(2, options.slides + 1):
            slides.append(Path(shutil.copy(first, first.with_name(f"slide-{number}.svs"))))
        measure(slides[:1], Path(scratch) / "out", sleeper, ahead=False)  # warms up
        for _ in range(options.rounds):
            for name, found in rounds.items():
                found.append(measure(slides, Path(scratch) / "out", sleeper, ahead=name == "with"))
    pairs = zip(rounds["without"], rounds["with"], strict=True)
    medians = {
        f"{what}_{name}": statistics.median(one[what] for one in found)
        for what in ("busy_share", "pause_s")
        for name, found in rounds.items()
    }
    result = {
        **rounds,
        **medians,
        "times_as_fast": round(statistics.median(b["seconds"] / a["seconds"] for b, a in pairs), 3),
    }
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
