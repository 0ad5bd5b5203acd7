"""Measure reading: patches a second of overlapping windows, against openslide per patch.

The windows are those of the Cerberus paper: 448 pixels at 0.5 micrometres, every 144
pixels. Openslide reads each of them at level 0 and averages areas; we read the same
windows in one pass. CPU time of the process, decoding on one thread, both ways in turn,
median of the repeats.

    python benchmarks/reading.py --json
    python benchmarks/reading.py --slide FILE --mpp 0.25
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.slide import Slide

WINDOW_PX, STRIDE_PX, MPP = 448, 144, 0.5
TARGETS = {"jpeg-rgb": 25.0, "jpeg-ycc420": 25.0, "jpeg2000": 6.0}
TILE_PX = 256

Image = NDArray[np.uint8]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slide", type=Path, help="measure this slide, not synthetic ones")
    parser.add_argument("--mpp", type=float, help="pixel size of level 0 of --slide")
    parser.add_argument("--rows", type=int, default=24, help="rows of windows  [24]")
    parser.add_argument("--repeats", type=int, default=3, help="[3]")
    parser.add_argument("--width", type=int, default=12288, help="of the synthetic slides  [12288]")
    parser.add_argument("--height", type=int, default=6144, help="of the synthetic slides  [6144]")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    args = parser.parse_args()
    if args.repeats < 3:
        parser.error("a median needs at least 3 repeats")
    if args.slide:
        results = {args.slide.name: measure(args.slide, args.mpp, args.rows, args.repeats)}
    else:
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            for kind, target in TARGETS.items():
                path = Path(folder) / f"{kind}.svs"
                write_textured(path, kind, args.width, args.height)
                found = measure(path, None, args.rows, args.repeats)
                results[kind] = {**found, "target_ratio": target}
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        for name, found in results.items():
            print(
                f"{name:24} {found['windows']:5} windows  "
                f"openslide {found['openslide_patches_per_s']:8.1f}/s  "
                f"ours {found['ours_patches_per_s']:8.1f}/s  ratio {found['ratio']:.1f}"
            )
    missed = [n for n, found in results.items() if found["ratio"] < found.get("target_ratio", 0)]
    return 1 if missed else 0


def measure(path: Path, mpp: float | None, rows: int, repeats: int) -> dict[str, float]:
    """Time both ways of reading the same windows, in turn."""
    with Slide.open(path, mpp=mpp) as slide:
        grid = slide.working_grid(MPP)
        boxes = list(windows(grid, rows))
        ours_s, theirs_s, differences = [], [], []
        time_cpu(lambda: read_ours(slide, grid, boxes[:8]))  # compiles and warms up
        for _ in range(repeats):
            ours, seconds = time_cpu(lambda: read_ours(slide, grid, boxes))
            ours_s.append(seconds)
            theirs, seconds = time_cpu(lambda: read_openslide(path, grid, boxes))
            theirs_s.append(seconds)
            differences.append(float(np.abs(ours - theirs).mean()))
    ours_rate = len(boxes) / statistics.median(ours_s)
    theirs_rate = len(boxes) / statistics.median(theirs_s)
    return {
        "windows": len(boxes),
        "bytes_per_pixel": path.stat().st_size / (slide.size[0] * slide.size[1]),
        "openslide_patches_per_s": theirs_rate,
        "ours_patches_per_s": ours_rate,
        "ratio": ours_rate / theirs_rate,
        "mean_grey_level_difference": max(differences),
    }


def windows(grid: PixelGrid, rows: int) -> Iterator[Box]:
    """Yield whole rows of windows from the middle of the slide."""
    columns = (grid.size[0] - WINDOW_PX) // STRIDE_PX + 1
    fitting = (grid.size[1] - WINDOW_PX) // STRIDE_PX + 1
    first = max(0, (fitting - rows) // 2)
    for row, column in product(range(first, min(first + rows, fitting)), range(columns)):
        yield Box(x=column * STRIDE_PX, y=row * STRIDE_PX, width=WINDOW_PX, height=WINDOW_PX)


def read_ours(slide: Slide, grid: PixelGrid, boxes: list[Box]) -> Image:
    """Read in one pass; each window is copied into a batch, as a network needs it."""
    means = []
    batch = np.empty((64, WINDOW_PX, WINDOW_PX, 3), np.uint8)
    for index, window in enumerate(slide.read_windows(grid, boxes, threads=1)):
        batch[index % 64] = window
        means.append(batch[index % 64, ::37, ::37].mean())
    return np.array(means)


def read_openslide(path: Path, grid: PixelGrid, boxes: list[Box]) -> Image:
    """Read each window on its own from level 0 and average areas."""
    scale = round(grid.spacing[0])
    means = []
    with openslide.OpenSlide(path) as handle:
        for box in boxes:
            place = (round(box.x * grid.spacing[0]), round(box.y * grid.spacing[1]))
            rgba = handle.read_region(place, 0, (box.width * scale, box.height * scale))
            patch = np.asarray(rgba.convert("RGB").reduce(scale) if scale > 1 else rgba)
            means.append(patch[::37, ::37, :3].mean())
    return np.array(means)


def time_cpu(work: Callable[[], Image]) -> tuple[Image, float]:
    """Run something; return its result and the CPU seconds of all threads."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def write_textured(path: Path, kind: str, width: int, height: int) -> None:
    """Write an SVS file at 0.25 micrometres without background.

    Qualities are those of the scanners: JPEG/RGB Q=30 (Aperio ScanScope), YCbCr 4:2:0 at 70
    (GT 450), JPEG 2000 at some 0.2 bytes a pixel; the results state the bytes a pixel.
    """
    image = np.tile(texture(2048), (-(-height // 2048), -(-width // 2048), 1))[:height, :width]
    levels = [image, image[::4, ::4], image[::16, ::16]]
    compression = 33005 if kind == "jpeg2000" else 7
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for index, level in enumerate(levels):
            if index == 1:  # the second directory of an SVS file is its thumbnail, in strips
                tif.write(levels[2], photometric="rgb", metadata=None, subfiletype=1)
            tif.write(
                encoded_tiles(level, kind),
                shape=level.shape,
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                compression=compression,
                photometric="rgb" if kind == "jpeg2000" else "ycbcr",
                description="Aperio Image Library|AppMag = 40|MPP = 0.25",
                metadata=None,
            )
    if kind == "jpeg-rgb":
        # tifffile tags every JPEG as YCbCr; these tiles are RGB, as many scanners write them
        with tifffile.TiffFile(path, mode="r+b") as tif:
            for page in (page for page in tif.pages if page.is_tiled):
                page.tags["PhotometricInterpretation"].overwrite(2)


def encoded_tiles(image: Image, kind: str) -> Iterator[bytes]:
    """Yield the tiles of a level, compressed as scanners do."""
    rows, columns = -(-image.shape[0] // TILE_PX), -(-image.shape[1] // TILE_PX)
    for row, column in product(range(rows), range(columns)):
        part = image[row * TILE_PX :, column * TILE_PX :][:TILE_PX, :TILE_PX]
        short = (TILE_PX - part.shape[0], TILE_PX - part.shape[1])
        tile = np.pad(part, ((0, short[0]), (0, short[1]), (0, 0)), mode="edge")
        if kind == "jpeg2000":
            yield imagecodecs.jpeg2k_encode(tile, level=40, codecformat="j2k", reversible=False)
        elif kind == "jpeg-rgb":
            yield imagecodecs.jpeg8_encode(tile, level=30, colorspace="RGB", outcolorspace="RGB")
        else:
            yield imagecodecs.jpeg8_encode(tile, level=70, subsampling="420")


def texture(side: int) -> Image:
    """Return a seamless picture with detail at the scales and in the colours of H&E."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    stains = []
    for finest_px in (10.0, 24.0):
        noise = np.fft.rfft2(rng.standard_normal((side, side)))
        field = np.fft.irfft2(noise * np.exp(-((frequency * finest_px) ** 2)), (side, side))
        stains.append(np.clip(field / field.std() * 0.35 + 0.35, 0, 2)[..., None])
    # optical densities of haematoxylin and eosin: Ruifrok and Johnston 2001
    density = stains[0] * [0.65, 0.70, 0.29] + stains[1] * [0.07, 0.99, 0.11]
    return (240 * np.exp(-density)).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
