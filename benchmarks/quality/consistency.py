"""The same tissue twice: with other tiles, and with another precision.

On a region of a real slide objects are found from tiles of several sizes, with the model's own
halo and real tissue around, as ``wsi-run`` does; then at full and at half precision. Two sets of
objects are compared as if one were the truth: PQ, which has no side. It is 1 where they are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.judging import judge_set
from benchmarks.quality.sets import ImageSet
from wsi_pipeline.bundle import ModelBundle
from wsi_pipeline.device import half_pays
from wsi_pipeline.geometry import Box
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.metrics import compare, panoptic_counts
from wsi_pipeline.slide.slide import Slide
from wsi_pipeline.tiling import TileGrid
from wsi_pipeline.training.predicted import ImageMaps, ImagePredictor, find_objects
from wsi_pipeline.training.raster import fill_polygons

__all__ = ["compare_maps", "precision_scores", "region_maps", "tile_and_precision"]

SLIDE = "crohn_colon_biopsy_HE4_crop.svs"
"""Colon with crypts, a lymph follicle, and glass."""
CORNER_UM = (2120.0, 1360.0)
"""Upper left of the region."""


def tile_and_precision(
    bundle: ModelBundle, slides: Path, *, device: str, side_px: int, tiles: Sequence[int]
) -> dict[str, Any]:
    """Compare maps and objects of a region between tile sizes and between precisions.

    Args:
        bundle: the model.
        slides: the folder of the slide.
        device: where it runs.
        side_px: side of the region at the model's pixel size.
        tiles: sides of the tiles to compare; the largest is used for the precisions.
    """
    spec = bundle.spec
    corner = [round(at / spec.mpp / 16) * 16 for at in CORNER_UM]
    box = Box(x=corner[0], y=corner[1], width=side_px, height=side_px)
    half = half_pays(spec.architecture)
    first = "bf16" if half else "fp32"
    with Slide.open(slides / SLIDE) as slide:
        maps = {
            tile: region_maps(bundle, slide, box, tile_px=tile, device=device, precision=first)
            for tile in tiles
        }
        full = (
            region_maps(bundle, slide, box, tile_px=max(tiles), device=device, precision="fp32")
            if half
            else None
        )
    result: dict[str, Any] = {
        "slide": SLIDE,
        "region_px": side_px,
        "mpp": spec.mpp,
        "precision": first,
        "tiles": {
            f"{a} and {b}": compare_maps(maps[a], maps[b]) for a, b in combinations(tiles, 2)
        },
    }
    if full is not None:
        result["fp32 and bf16"] = compare_maps(full, maps[max(tiles)])
    return result


def region_maps(
    bundle: ModelBundle, slide: Slide, box: Box, *, tile_px: int, device: str, precision: str
) -> ImageMaps:
    """Predict a box of a slide's working grid with tiles of one size."""
    predictor = TorchPredictor.load(
        bundle, device=device, precision=precision, tile_size=tile_px, batch_size=1, workers=1
    )
    spec = bundle.spec
    grid = slide.working_grid(spec.mpp).window(box)
    tiles = TileGrid.cover(grid, tile_px=tile_px, halo_px=predictor.halo_px)
    arrays: dict[str, NDArray[np.uint8]] = {}
    for block in predictor.predict(slide, tiles):
        for key, part in block.arrays.items():
            stride = spec.maps[key].stride
            width, height = grid.coarsen(stride).size
            own = arrays.setdefault(key, np.zeros((*part.shape[:-2], height, width), np.uint8))
            own[(..., *block.tile.write.coarsen(stride).slices)] = part
    return ImageMaps(spec=spec, size=box.size, arrays=arrays)


def compare_maps(first: ImageMaps, second: ImageMaps) -> dict[str, Any]:
    """Return by head: PQ of one's objects against the other's, and how far the maps differ."""
    found = find_objects(first), find_objects(second)
    shape = first.size[::-1]
    result = {}
    for head in first.spec.instance_heads:
        drawn = [fill_polygons(own[head.name].polygons, shape) for own in found]
        counts = panoptic_counts(compare(drawn[0], drawn[1]))
        key = f"{head.name}/prob"
        gap = np.abs(first.arrays[key].astype(np.int16) - second.arrays[key])
        result[head.name] = {
            "pq": round(counts.pq, 4) if counts.tp + counts.fp + counts.fn else None,
            "objects": [len(own[head.name].polygons) for own in found],
            "matched": counts.tp,
            "mean_difference": round(float(gap.mean()) / 255, 5),
            "largest_difference": round(float(gap.max(initial=0)) / 255, 3),
        }
    return result


def precision_scores(
    bundle: ModelBundle, sets: Sequence[ImageSet], *, device: str
) -> dict[str, Mapping[str, Any]]:
    """Return PQ of annotated images at both precisions: what half precision costs.

    Args:
        bundle: the model.
        sets: images to judge, few of them.
        device: where it runs.
    """
    values: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "bf16"):
        network = bundle.load_network()
        predictor = ImagePredictor(bundle.spec, network, device=device, precision=precision)
        for own in sets:
            judged = judge_set(predictor, own)
            for name, measure in judged.measures.items():
                scores = measure.scores(np.arange(len(measure.images)))
                if "pq" in scores:
                    row = values.setdefault(f"{own.plan.name}: {name}", {})
                    row[precision] = round(scores["pq"], 4)
    for row in values.values():
        row["difference"] = round(row["bf16"] - row["fp32"], 4)
    return values
