"""Do the answers depend on how they are computed? Tile sizes and precisions on one slide.

    python -m benchmarks.parity SLIDE [--model cerberus-lite] [--tiles 512 1024 2048 4096]
        [--precisions fp32 bf16] [--size 1024] [--mpp 0.5] [--json FILE]

The slide is run in float32 at every tile size, and in every other precision at ``--size``. Compared
with float32 at that size: by map the share of its predicted values that differ by more than 1/255,
and the largest difference; by kind of object the panoptic quality of one table against the other
(pairs are those with an IoU above a half), and how many objects both have.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import shapely

import wsi_pipeline as wsi
from benchmarks.accuracy import match
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.table import read_objects

ROWS = 1024
"""Of the maps, compared at a time."""


def variants(tiles: Iterable[int], precisions: Iterable[str], size: int) -> list[tuple[str, int]]:
    """Return what is run, as ``(precision, tile size)``; the first judges the others."""
    others = [("fp32", tile) for tile in tiles if tile != size]
    return [("fp32", size), *others, *((name, size) for name in precisions if name != "fp32")]


def panoptic_quality(found: np.ndarray, other: np.ndarray) -> float:
    """Return the panoptic quality of two sets of disjoint polygons; 1 where both are empty."""
    if not len(found) and not len(other):
        return 1.0
    pairs = match(found, other)
    common = shapely.area(shapely.intersection(found[pairs[:, 0]], other[pairs[:, 1]]))
    union = shapely.area(found[pairs[:, 0]]) + shapely.area(other[pairs[:, 1]]) - common
    return float((common / union).sum() / ((len(found) + len(other)) / 2))


def compare_maps(path: Path, reference: Path) -> dict[str, dict[str, float]]:
    """Compare the probability maps of two runs of a slide, in steps of 1/255."""
    store, expected = PredictionStore.open(path), PredictionStore.open(reference)
    result = {}
    for key in (key for key in store.keys if key.endswith("/prob")):
        whole = store.head_grid(key.partition("/")[0]).box
        values, beyond, largest = 0, 0, 0
        for y in range(0, whole.height, ROWS):
            rows = whole.shift(0, y).intersect(whole)
            rows = rows.intersect(rows.shift(0, ROWS - rows.height))
            a, b = (s.read(key, rows).astype(np.int16) for s in (store, expected))
            difference = np.abs(a - b)[(a > 0) | (b > 0)]
            values += difference.size
            beyond += int((difference > 1).sum())
            largest = max(largest, int(difference.max(initial=0)))
        result[key] = {"share_beyond_1": beyond / max(values, 1), "largest": largest}
    return result


def compare_objects(table: Path, reference: Path) -> dict[str, dict[str, float]]:
    """Compare the tables of two runs of a slide, kind by kind."""
    found, expected = (read_objects(path) for path in (table, reference))
    result = {}
    for kind in sorted({*found["kind"], *expected["kind"]}):
        a, b = (np.asarray(t[t["kind"] == kind].geometry) for t in (found, expected))
        result[kind] = {"pq": panoptic_quality(a, b), "objects": len(a), "of_fp32": len(b)}
    return result


def run(
    slide: Path, out: Path, model: str, precision: str, tile: int, mpp: float | None = None
) -> Path:
    """Run the slide; return the folder of results."""
    folder = out / f"{precision}-{tile}"
    how = {"precision": precision, "tile_size": tile, "mpp": mpp}
    (report,) = wsi.run([slide], folder, model=model, **how)
    if not report.done:
        raise SystemExit(f"{folder.name}: {report.reason}")
    return folder


def compare(
    slide: Path, out: Path, model: str, plan: list[tuple[str, int]], mpp: float | None = None
) -> dict[str, Any]:
    """Run all variants; compare each with the first.

    Args:
        slide: the slide.
        out: folder of the results.
        model: name or folder.
        plan: see :func:`variants`.
        mpp: pixel size of a slide that does not say it.
    """
    result: dict[str, Any] = {}
    reference = None
    for precision, tile in plan:
        folder = run(slide, out, model, precision, tile, mpp)
        maps, table = folder / "maps" / f"{slide.stem}.zarr", folder / "objects"
        if reference is None:
            reference = maps, table
            continue
        result[folder.name] = {
            "maps": compare_maps(maps, reference[0]),
            "objects": compare_objects(table, reference[1]),
        }
        print(folder.name, json.dumps(result[folder.name]["objects"]), file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("slide", type=Path)
    parser.add_argument("--model", default="cerberus-lite")
    parser.add_argument("--tiles", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--mpp", type=float, help="of a slide that does not say it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plan = variants(args.tiles, args.precisions, args.size)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args.slide, Path(folder), args.model, plan, args.mpp)
    text = json.dumps({"slide": args.slide.name, "model": args.model, "runs": found}, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
