"""This package with the networks of the comparison, through the engine that ``wsi-run`` drives.

Tile, readers and threads are those that ``wsi-run`` chooses by itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.peers.networks import make_network, make_spec
from benchmarks.peers.worker import Clock, parser, write_result
from wsi_pipeline.command import collect_seldom
from wsi_pipeline.engines import Silent, run_slides
from wsi_pipeline.filling import lay_tiles
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.job import SlideJob
from wsi_pipeline.machine import available_cpus, keep_freed_memory
from wsi_pipeline.slide import Slide
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.tiling import TileGrid
from wsi_pipeline.tissue import read_mask

NO_DIGEST = "0" * 64


@dataclass
class Bundle:
    """A network of the comparison in the place of a bundle."""

    name: str
    network: str

    @property
    def spec(self) -> ModelSpec:
        """What the network promises."""
        return make_spec(self.network)

    def load_network(self) -> nn.Module:
        """Build the network."""
        return make_network(self.network)


def load(network: str, precision: str, tile: int | None) -> TorchPredictor:
    """Return the predictor that the command line would make."""
    return TorchPredictor.load(
        Bundle(name=f"peers-{network}", network=network),
        device="cpu",
        precision=precision,
        tile_size=tile or "auto",
    )


def run_whole(slide: Path, mask: Path, out: Path, predictor: TorchPredictor) -> dict[str, Any]:
    """Run a slide from pixels to tables.

    Raises:
        SystemExit: the slide failed.
    """
    job = SlideJob(
        path=str(slide),
        slide_id=slide.stem,
        out=out,
        model_name=predictor.spec.name,
        model_digest=NO_DIGEST,
        mask=mask,
    )
    [report] = run_slides(
        [job], predictor, watcher=Silent(), stop=lambda: False, workers=available_cpus(),
        overwrite=True,
    )  # fmt: skip
    if not report.done:
        raise SystemExit(f"{slide}: {report.error}")
    return {
        "objects": report.counts,
        "stages_s": report.seconds,
        "tissue_mm2": report.tissue_mm2,
    }


def tiles_of(slide: Path, mask: Path, predictor: TorchPredictor) -> TileGrid:
    """Return the tiles that hold tissue."""
    with Slide.open(str(slide)) as opened:
        return lay_tiles(opened, read_mask(mask, opened.size), predictor)


def time_tiles(slide: Path, mask: Path, predictor: TorchPredictor, limit: int) -> dict[str, Any]:
    """Measure the first so many tiles after one that warms up; return seconds for a mean one.

    Windows are fitted to the tissue, so seconds are taken to go with the pixels that are seen.
    """
    tiles = tiles_of(slide, mask, predictor)
    some = replace(tiles, tiles=tiles.tiles[: limit + 1])
    with Slide.open(str(slide)) as opened:
        blocks = predictor.predict(opened, some)
        next(blocks)
        begun = time.perf_counter()
        timed = sum(block.tile.read.area for block in blocks)
        seconds = time.perf_counter() - begun
    if not timed:
        raise SystemExit(f"{slide} has {len(tiles.tiles)} tiles of tissue: too few to time any")
    mean = sum(tile.read.area for tile in tiles.tiles) / len(tiles.tiles)
    return {"timed_units": round(timed / mean, 1), "seconds_a_unit": seconds / timed * mean}


def main() -> None:
    args = parser(__doc__).parse_args()
    collect_seldom()  # both as wsi-run does
    keep_freed_memory()
    clock = Clock()
    predictor = load(args.network, args.precision, args.tile)
    if args.limit:
        facts = time_tiles(args.slide, args.mask, predictor, args.limit)
    else:
        facts = run_whole(args.slide, args.mask, args.out, predictor)
    facts = {**clock.stop(), **facts}
    facts["units"] = len(tiles_of(args.slide, args.mask, predictor).tiles)
    unit = f"tile of {predictor.tile_px}"
    write_result(args.result, **facts, unit=unit, precision=predictor.precision)


if __name__ == "__main__":
    main()
