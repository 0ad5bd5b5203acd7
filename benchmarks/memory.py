"""Whether peak memory grows with the slide, and what the full network needs.

    python -m benchmarks.memory [--sides 15000 60000] [--model NAME|DIR] [--keep FOLDER]
    python -m benchmarks.memory --full [--memory 3GiB] [--precision fp32] [--keep FOLDER]
    python -m benchmarks.memory --network [--tiles 512 1024]

The first writes synthetic slides, runs the main job on each in a process of its own, and prints
JSON: peak resident memory of each, and the largest over the smallest. The slides of the default
sides take some minutes to write; --keep leaves them there for the next time.

--full is a slide of 65,000 x 26,000 px at 0.25 um (one piece of tissue repeated all over) and
Cerberus at its full size with random weights. A mask lets the network see eight tiles spread over
the whole width: the rest of the slide would cost time and none of the network's memory.

--slides N runs each slide N times in one process, under other names; the peak is of all of them,
seconds of stages are the last one's.

--network measures ``PASS_VALUES`` of ``wsi_pipeline/memory.py``: what the networks hold at their
widest, in values of their precision a pixel that they see.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.gpu import make_bundle
from wsi_pipeline.geometry import Box
from wsi_pipeline.slide import Slide
from wsi_pipeline.synth import write_slide
from wsi_pipeline.synth.tiff import BigTiff, Page
from wsi_pipeline.synth.write import encode_jpeg

FULL_SIZE = 65_000, 26_000
FULL_WIDTHS = [64, 128, 256, 512]
_TILE, _PATTERN = 256, 4096
_SPOTS = [(x, y) for y in (0.3, 0.7) for x in (0.03, 0.2, 0.6, 0.96)]
_PARTS = [(32, 32), (20, 32), (32, 32), (32, 11), (32, 32), (26, 18), (32, 28), (32, 32)]
"""How much of its tile each covers, of 32 x 32: windows are fitted, and sizes change to and fro."""


def peak_of_run(
    slide: Path, scratch: Path, more: Sequence[str], *, times: int, mask: Path | str = ""
) -> dict[str, object]:
    """Run one slide, again and again, in a fresh process; return its peak memory and time."""
    out, listed = scratch / "out", scratch / "slides.csv"
    code = "from wsi_pipeline.cli import main_run; main_run()"
    names = [f"{slide.stem}-{number}" for number in range(times)]
    rows = [(slide.resolve(), name, mask and Path(mask).resolve()) for name in names]
    with listed.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "slide_id", "mask"), *rows])
    begun = time.perf_counter()
    command = [sys.executable, "-c", code, str(listed), "--out", str(out)]
    subprocess.run(
        [*command, "--no-progress", *more, "--overwrite", "--drop-maps"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    reports = [json.loads((out / "reports" / f"{name}.json").read_text()) for name in names]
    report = reports[-1]
    return {
        "peak_rss_mb": report["peak_rss_mb"],
        "network_s": [each["device_busy_s"] for each in reports],
        "seconds": round(time.perf_counter() - begun, 1),
        "stages_s": report["seconds"],
        "tissue_mm2": report["tissue_mm2"],
        "warnings": report["warnings"],
        **{f"n_{kind}": number for kind, number in report["counts"].items()},
    }


def compare_sides(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Run slides of several sides; return the facts of each and the ratio of their peaks."""
    result: dict[str, object] = {}
    peaks: list[float] = []
    for side in options.sides:
        slide = folder_of(options, scratch) / f"memory-{side}.svs"
        if not slide.exists():
            write_slide(slide, width=side, height=side, mpp=options.mpp, seed=1, truth=False)
        more = ["--model", options.model, *asked(options)]
        facts = peak_of_run(slide, scratch, more, times=options.slides)
        peaks.append(float(str(facts["peak_rss_mb"])))
        result[str(side)] = facts
    return result | {"ratio": round(max(peaks) / min(peaks), 3)}


def run_full(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Run the large slide with the full network on the CPU."""
    folder = folder_of(options, scratch)
    slide, mask, model = folder / "full.svs", folder / "full.png", folder / "random"
    if not slide.exists():
        write_repeated(slide, FULL_SIZE, mpp=0.25)
    if not model.exists():
        make_bundle(folder, FULL_WIDTHS)
    write_spots(mask, FULL_SIZE)
    more = ["--model", str(model), "--device", "cpu", *asked(options)]
    return peak_of_run(slide, scratch, more, times=options.slides, mask=mask)


def asked(options: argparse.Namespace) -> list[str]:
    """Return the options that are passed on."""
    pairs = {"--memory": options.memory, "--precision": options.precision}
    return [word for name, value in pairs.items() if value for word in (name, value)]


def folder_of(options: argparse.Namespace, scratch: Path) -> Path:
    """Return where slides are written, and make it."""
    folder: Path = options.keep or scratch
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_repeated(path: Path, size: tuple[int, int], *, mpp: float) -> None:
    """Write a slide of any size at once: all tiles of a level are one pattern's, over and over."""
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "pattern.svs"
        write_slide(small, width=_PATTERN, height=_PATTERN, mpp=mpp, seed=1, truth=False)
        with Slide.open(str(small)) as slide:
            grid = slide.working_grid(mpp)
            box = Box(x=0, y=0, width=_PATTERN, height=_PATTERN)
            (window,) = slide.read_windows(grid, [box], threads=1)
            pattern = window.copy()
    pages = []
    with path.open("wb") as stream:
        file = BigTiff(stream)
        for factor in (1, 4, 16):
            width, height = size[0] // factor, size[1] // factor
            text = f"Aperio\r\n{width}x{height} ({_TILE}x{_TILE}) JPEG/RGB|AppMag = 40|MPP = {mpp}"
            page = Page(size=(width, height), tile_px=_TILE, compression=7, description=text)
            repeat(file, page, reduced(pattern, factor))
            pages.append(page)
        file.finish(pages)


def repeat(file: BigTiff, page: Page, pattern: NDArray[np.uint8]) -> None:
    """Write the tiles of a pattern once, and let all tiles of a page point at them."""
    columns, rows = page.tiles
    across = pattern.shape[0] // _TILE
    first: dict[tuple[int, int], int] = {}
    for index in range(columns * rows):
        row, column = index // columns % across, index % columns % across
        if (row, column) not in first:
            y, x = row * _TILE, column * _TILE
            tile = np.ascontiguousarray(pattern[y : y + _TILE, x : x + _TILE])
            file.append(page, index, encode_jpeg(tile))
            first[row, column] = index
        same = first[row, column]
        page.offsets[index], page.lengths[index] = page.offsets[same], page.lengths[same]


def reduced(pattern: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average squares of pixels."""
    side = pattern.shape[0] // factor
    cells = pattern.reshape(side, factor, side, factor, 3)
    return cells.mean((1, 3)).round().astype(np.uint8)


def write_spots(path: Path, size: tuple[int, int]) -> None:
    """Write a mask of some spots, a tile or less, spread over a slide."""
    width, height = size[0] // 64, size[1] // 64
    mask = np.zeros((height, width), np.uint8)
    for (x, y), (wide, high) in zip(_SPOTS, _PARTS, strict=True):
        # A tile of 1024 px at 0.5 um is 32 pixels of this mask.
        left, top = int(x * width) // 32 * 32, int(y * height) // 32 * 32
        mask[top : top + high, left : left + wide] = 255
    Image.fromarray(mask).save(path)


def measure_networks(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Measure each network on each tile size, in processes of their own."""
    make_bundle(scratch, FULL_WIDTHS)
    result: dict[str, object] = {}
    for model in (str(scratch / "random"), "cerberus-lite", "stain-baseline"):
        for precision in ["fp32"] if model == "stain-baseline" else ["fp32", "bf16"]:
            for tile in options.tiles:
                command = [sys.executable, "-m", "benchmarks.memory", "--one"]
                found = subprocess.check_output([*command, model, precision, str(tile)])
                result[f"{Path(model).name} {precision} {tile}"] = json.loads(found)
    return result


def measure_pass(model: str, precision: str, tile: int) -> dict[str, float]:
    """Compute two tiles, and return what that held beside everything that was there before."""
    import torch

    from wsi_pipeline.bundle import find_bundle
    from wsi_pipeline.device import DTYPES
    from wsi_pipeline.inference import TorchPredictor

    how = {"device": "cpu", "precision": precision, "tile_size": tile}
    predictor = TorchPredictor.load(find_bundle(model), **how)
    side = tile + 2 * predictor.halo_px
    pixels = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew (Linux)
    for _ in range(2):
        predictor._compute(pixels)
    held = resident("VmHWM") - before
    values = held / side**2 / DTYPES[precision].itemsize
    return {"before_mib": before >> 20, "pass_mib": held >> 20, "values_a_px": round(values)}


def resident(name: str) -> int:
    """Return a figure of this process's memory in bytes, by its name in ``/proc``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the large slide, the full network")
    parser.add_argument("--network", action="store_true", help="the networks alone")
    parser.add_argument("--one", nargs=3, metavar="X", help="model, precision, tile of --network")
    parser.add_argument("--sides", type=int, nargs="+", default=[15000, 60000])
    parser.add_argument("--tiles", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--mpp", type=float, default=0.25)
    parser.add_argument("--model", default="stain-baseline", help="NAME or DIR")
    parser.add_argument("--memory", help="of wsi-run")
    parser.add_argument("--precision", help="of wsi-run")
    parser.add_argument("--slides", type=int, default=1, help="how often each slide is run")
    parser.add_argument("--keep", type=Path, help="folder for the slides")
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.one:
            model, precision, tile = options.one
            result: object = measure_pass(model, precision, int(tile))
        else:
            how = run_full if options.full else compare_sides
            result = (measure_networks if options.network else how)(options, Path(scratch))
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
