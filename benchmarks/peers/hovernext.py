"""Nuclei from finished maps in the manner of HoVer-NeXt: post-processing alone.

Overlapping tiles go to worker processes; in each the foreground falls into pieces, each piece
is a watershed of its own, and nuclei whose centroid lies in the tile's own part are kept. One
writer puts the labels of all tiles into one map and the nuclei into one list. HoVer-NeXt's own
tiling is 8 x 8 with 256 pixels of overlap for 16 processes; the overlap is kept here.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from benchmarks.peers.worker import Clock, parser, write_result

OVERLAP_PX = 256
TILE_PX = 2048
WORKERS = 2
THRESHOLD = 0.5
MIN_PX = 20


@dataclass(frozen=True)
class OverlapTile:
    """A tile: what it looks at, and the part of it whose nuclei are its own."""

    seen: tuple[slice, slice]
    own: tuple[slice, slice]


def overlapping(shape: tuple[int, int], tile_px: int = TILE_PX) -> list[OverlapTile]:
    """Cover a map of (rows, columns) with tiles whose own parts do not overlap."""
    tiles = []
    for corner in product(*(range(0, length, tile_px) for length in shape)):
        own = [
            slice(start, min(start + tile_px, length))
            for start, length in zip(corner, shape, strict=True)
        ]
        seen = [
            slice(max(side.start - OVERLAP_PX, 0), min(side.stop + OVERLAP_PX, length))
            for side, length in zip(own, shape, strict=True)
        ]
        tiles.append(OverlapTile(seen=(seen[0], seen[1]), own=(own[0], own[1])))
    return tiles


def label_pieces(inner: NDArray[np.float32], contour: NDArray[np.float32]) -> NDArray[np.int32]:
    """Label nuclei: a watershed in each connected piece of the foreground.

    Args:
        inner: interior probability (H, W).
        contour: contour probability.
    """
    foreground = (inner + contour) > THRESHOLD
    seeds, _ = ndimage.label(inner > THRESHOLD)
    labels = np.zeros(inner.shape, np.int32)
    pieces, _ = ndimage.label(foreground)
    for piece, box in enumerate(ndimage.find_objects(pieces), start=1):
        within = pieces[box] == piece
        found = watershed(-inner[box], markers=seeds[box] * within, mask=within)
        labels[box][within] = found[within]
    small = np.bincount(labels.ravel(), minlength=1) < MIN_PX
    labels[small[labels]] = 0
    return labels


def describe_own(
    labels: NDArray[np.int32], classes: NDArray[np.uint8], tile: OverlapTile
) -> list[dict[str, Any]]:
    """Return number, centroid, class and outline of the nuclei that are the tile's own."""
    corner = [tile.seen[1].start, tile.seen[0].start]
    nuclei = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        shape = labels[box] == number
        rows, columns = np.nonzero(shape)
        place = np.add(corner, [box[1].start, box[0].start])
        x, y = np.add(place, [columns.mean(), rows.mean()])
        if not (tile.own[0].start <= y < tile.own[0].stop):
            continue
        if not (tile.own[1].start <= x < tile.own[1].stop):
            continue
        ring = cv2.findContours(shape.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[
            0
        ][0][:, 0]
        votes = np.bincount(classes[box][shape])
        outline = (ring + place).tolist()
        nuclei.append(
            {"number": number, "centroid": [x, y], "class": int(votes.argmax()), "outline": outline}
        )
    return nuclei


def find_nuclei(path: Path, tile: OverlapTile) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    """Return a tile's labels and nuclei; labels that are not its own are 0."""
    maps = zarr.open_group(path, mode="r")
    probabilities = np.asarray(maps["nuclei/prob"][:, *tile.seen], np.float32) / 255
    classes = np.asarray(maps["nuclei-class/class"][tile.seen])
    labels = label_pieces(probabilities[0], probabilities[1])
    nuclei = describe_own(labels, classes, tile)
    own = np.zeros(labels.max() + 1, bool)
    own[[nucleus["number"] for nucleus in nuclei]] = True
    return labels * own[labels], nuclei


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--maps", type=Path, required=True, help="our maps of the slide (zarr)")
    args = made.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    shape = zarr.open_group(args.maps, mode="r")["nuclei/prob"].shape[1:]
    target = zarr.open_array(
        args.out / "labels.zarr", mode="w", shape=shape, chunks=(1024, 1024), dtype=np.int32
    )
    tiles = overlapping(shape, args.tile or TILE_PX)
    nuclei: list[dict[str, Any]] = []
    with ProcessPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(find_nuclei, args.maps, tile) for tile in tiles]
        for tile, future in zip(tiles, futures, strict=True):
            labels, found = future.result()
            before = target[tile.seen]
            target[tile.seen] = np.where(labels > 0, labels + len(nuclei), before)
            nuclei.extend(found)
    with clock.stage("write"):
        (args.out / "nuclei.json").write_text(json.dumps(nuclei))
    facts = {**clock.stop(), "units": len(tiles), "unit": f"tile of {args.tile or TILE_PX}"}
    write_result(args.result, **facts, objects={"nucleus": len(nuclei)}, beside="polygonize")


if __name__ == "__main__":
    main()
