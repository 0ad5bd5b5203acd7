"""How well a model finds the objects of synthetic slides whose truth is known.

    python benchmarks/accuracy.py [--mpp 0.25 0.37 0.5] [--side-um 1500] [--model NAME|DIR]

Prints JSON, one entry a pixel size and kind: F1 at IoU 0.5 over all objects and over those
with a centre within 10 micrometres of a tile border, the bias of the centroids, and how many
found objects overlap.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import shapely

import wsi_pipeline as wsi
from wsi_pipeline.synth import write_slide
from wsi_pipeline.table import read_metadata, read_objects

KINDS = ("nucleus", "gland", "lumen")
NEAR_UM = 10.0


def match(truth: np.ndarray, found: np.ndarray, iou: float = 0.5) -> np.ndarray:
    """Pair polygons that overlap by more than an IoU.

    Args:
        truth: (N,) shapely polygons.
        found: (M,) shapely polygons.
        iou: at least 0.5, so that no polygon is paired twice among disjoint ones.

    Returns:
        (P, 2) indices into truth and found.
    """
    left, right = shapely.STRtree(found).query(truth, predicate="intersects")
    common = shapely.area(shapely.intersection(truth[left], found[right]))
    union = shapely.area(truth[left]) + shapely.area(found[right]) - common
    good = common > iou * union
    return np.stack([left[good], right[good]], axis=1)


def f1(pairs: int, truth: int, found: int) -> float:
    """Return the harmonic mean of precision and recall."""
    return 2 * pairs / (truth + found) if truth + found else 1.0


def near_lattice(xy: np.ndarray, step: float, distance: float) -> np.ndarray:
    """Tell which points lie within a distance of a line of a square lattice."""
    offset = np.abs((xy + step / 2) % step - step / 2)
    return (offset < distance).any(axis=1)


def score(slide: Path, objects: Path, mpp: float, kind: str = "nucleus") -> dict[str, float]:
    """Compare a table with the truth beside its slide."""
    truth = read_objects_of_truth(slide, kind)
    found = np.asarray(read_objects(objects, kind=kind).geometry.values)
    pairs = match(truth, found)
    options = read_metadata(objects)["options"]
    step = options["tile_px"] * options["working_mpp"][0] / mpp
    centre_t, centre_f = (shapely.get_coordinates(shapely.centroid(g)) for g in (truth, found))
    near_t, near_f = (near_lattice(c, step, NEAR_UM / mpp) for c in (centre_t, centre_f))
    offset = (centre_f[pairs[:, 1]] - centre_t[pairs[:, 0]]) * mpp
    left, right = shapely.STRtree(found).query(found, predicate="overlaps")
    # Neighbours share borders, which float coordinates turn into slivers; those do not count.
    common = shapely.area(shapely.intersection(found[left], found[right]))
    doubled = common > 0.01 * np.minimum(shapely.area(found[left]), shapely.area(found[right]))
    return {
        "truth": len(truth),
        "found": len(found),
        "f1": f1(len(pairs), len(truth), len(found)),
        "truth_at_borders": int(near_t.sum()),
        "f1_at_borders": f1(int(near_t[pairs[:, 0]].sum()), int(near_t.sum()), int(near_f.sum())),
        "bias_x_um": float(offset[:, 0].mean()),
        "bias_y_um": float(offset[:, 1].mean()),
        "median_distance_um": float(np.median(np.hypot(*offset.T))),
        "overlapping_pairs": int(doubled.sum()) // 2,
    }


def read_objects_of_truth(slide: Path, kind: str) -> np.ndarray:
    """Return the true polygons of one kind."""
    import pyarrow.parquet as pq

    table = pq.read_table(slide.with_suffix(".truth.parquet"), columns=["kind", "geometry"])
    kinds = np.asarray(table["kind"].to_pylist())
    return shapely.from_wkb(np.asarray(table["geometry"].to_pylist(), object)[kinds == kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mpp", type=float, nargs="+", default=[0.25, 0.37, 0.5])
    parser.add_argument("--side-um", type=float, default=1500.0)
    parser.add_argument("--tile-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--model", default="stain-baseline", help="NAME or DIR")
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    options = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for mpp in options.mpp:
            slide = Path(folder) / f"s{mpp}.svs"
            side = round(options.side_um / mpp)
            write_slide(slide, width=side, height=side, mpp=mpp, seed=options.seed)
            (report,) = wsi.run(
                [slide], Path(folder) / "out", model=options.model, tile_size=options.tile_size
            )
            if not report.done:
                raise SystemExit(report.reason)
            table = Path(folder) / "out" / "objects" / f"{slide.stem}.parquet"
            result[str(mpp)] = {kind: score(slide, table, mpp, kind) for kind in KINDS}
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
