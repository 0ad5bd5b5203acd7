"""What windows save that are fitted to the tissue in their tiles, and what they change.

    python -m benchmarks.fitted SLIDES... [--mpp 0.25] [--run] [--rounds 3] [--json FILE]

By slide, tile size and halo: tiles, different sizes of window, and the pixels that are read over
those of whole tiles. With ``--run``: seconds of ``wsi-run`` with the default model, fitted and
whole by turns, the median of their ratios, and how maps and objects of the two differ (as
``benchmarks.parity`` says it).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import wsi_pipeline as wsi
from benchmarks.parity import compare_maps, compare_objects
from wsi_pipeline.pipeline import TISSUE_MPP
from wsi_pipeline.slide import Slide
from wsi_pipeline.tiling import TileGrid
from wsi_pipeline.tissue import TissueMask, detect_tissue

MODEL_MPP = 0.5
TILES = 1024, 2048
HALOS = 96, 160


def shares(path: Path, mpp: float | None) -> dict[str, dict[str, float]]:
    """Return what is read of a slide, by ``tile + halo``."""
    result = {}
    with Slide.open(str(path), mpp=mpp) as slide:
        pixel_size = slide.pixel_size.x, slide.pixel_size.y
        tissue = detect_tissue(*slide.thumbnail(TISSUE_MPP), pixel_size)
        grid = slide.working_grid(MODEL_MPP)
        for tile_px in TILES:
            for halo_px in HALOS:
                tiles = TileGrid.cover(
                    grid,
                    tile_px=tile_px,
                    halo_px=halo_px,
                    wanted=lambda box: tissue.touches(grid, box),
                    extent=lambda box: tissue.extent(grid, box),
                )
                read = sum(tile.read.area for tile in tiles.tiles)
                result[f"{tile_px} + {halo_px}"] = {
                    "tiles": len(tiles.tiles),
                    "sizes": len({tile.read.size for tile in tiles.tiles}),
                    "read_share": round(read / (len(tiles.tiles) * tiles.read_px**2), 3),
                }
    return result


def run(path: Path, mpp: float | None, rounds: int) -> dict[str, Any]:
    """Run a slide both ways by turns; return seconds, their ratio, and what differs."""
    seconds: dict[str, list[float]] = {"fitted": [], "whole": []}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in seconds}
        for number in range(rounds + 1):
            for name, folder in folders.items():
                whole = patch.object(TissueMask, "extent", lambda _tissue, _grid, box: box)
                begun = time.perf_counter()
                with whole if name == "whole" else nullcontext():
                    (report,) = wsi.run([path], folder, mpp=mpp, overwrite=True)
                if not report.done:
                    raise SystemExit(f"{path}: {report.reason}")
                if number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - begun)
        maps = [folder / "maps" / f"{path.stem}.zarr" for folder in folders.values()]
        tables = [folder / "objects" for folder in folders.values()]
        return {
            "seconds": {name: round(statistics.median(each), 2) for name, each in seconds.items()},
            "ratio": round(statistics.median(map(_ratio, *seconds.values())), 3),
            "maps": compare_maps(*maps),
            "objects": compare_objects(*tables),
        }


def _ratio(fitted: float, whole: float) -> float:
    return fitted / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--mpp", type=float, help="of slides that do not say it")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for path in args.slides:
        found[path.name] = {"read": shares(path, args.mpp)}
        if args.run:
            found[path.name] |= run(path, args.mpp, args.rounds)
    text = json.dumps(found, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
