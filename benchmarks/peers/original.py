"""Cerberus' own whole-slide flow, written anew from its description, for a CPU.

A patch of 448 pixels is read for each 144 that are kept. Everything predicted is held, then
averaged into memory maps over the whole slide; nuclei are found in four sets of tiles by worker
processes that are handed all earlier nuclei with each tile; glands and lumina in each piece of
tissue at half resolution. ``--crop-first`` crops before the softmax instead of after it.

Batch and workers suit two processors; the original's are 30, 12 and 6.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from openslide import OpenSlide
from scipy import ndimage
from torch import Tensor, nn

from benchmarks.peers.cerberus_objects import (
    GLAND,
    LUMEN,
    Labels,
    Record,
    describe,
    label_regions,
)
from benchmarks.peers.networks import make_network, patch_class, patch_logits
from benchmarks.peers.patches import (
    KEPT_PX,
    MARGIN_PX,
    MPP,
    PATCH_PX,
    Mask,
    read_mask,
    tissue_mm2,
    wanted_patches,
)
from benchmarks.peers.seams import find_nuclei, tile_sets
from benchmarks.peers.worker import Clock, parser, set_threads, write_result

CHANNELS = {
    "nuclei": 2, "nuclei-class": 1, "gland": 2, "gland-class": 1, "lumen": 2, "tissue": 1,
}  # fmt: skip
HELD_PX = 14976
"""Side of the area whose predictions are held before they are merged."""
BATCH, WORKERS = 8, 2


class Patches(torch.utils.data.Dataset):
    """The slide's patches at 0.5 micrometres a pixel, each read on its own; black outside."""

    def __init__(self, path: Path, boxes: NDArray[np.int64]) -> None:
        self.path, self.boxes = path, boxes
        self.slide: OpenSlide | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        if self.slide is None:  # in the worker that reads
            self.slide = OpenSlide(self.path)
        x, y = self.boxes[index, :2] - MARGIN_PX
        return _read(self.slide, int(x), int(y)), self.boxes[index]


def _read(slide: OpenSlide, x: int, y: int) -> NDArray[np.uint8]:
    scale = MPP / float(slide.properties["openslide.mpp-x"])
    level = slide.get_best_level_for_downsample(scale + 1e-3)
    side = round(PATCH_PX * scale / slide.level_downsamples[level])
    corner = (round(x * scale), round(y * scale))
    rgba = np.asarray(slide.read_region(corner, level, (side, side)))
    rgb = rgba[..., :3] * (rgba[..., 3:] > 0)
    if side == PATCH_PX:
        return rgb
    how = cv2.INTER_AREA if side > PATCH_PX else cv2.INTER_CUBIC
    return cv2.resize(rgb, (PATCH_PX, PATCH_PX), interpolation=how)


def predict(network: nn.Module, pixels: Tensor, *, crop_first: bool) -> list[NDArray[Any]]:
    """Return the maps of the kept part of each patch, (B, H, W, C) float32.

    Args:
        network: of the comparison.
        pixels: (B, H, W, 3) uint8.
        crop_first: crop the logits; else the softmax sees the whole patch, as in the original.
    """
    first, size = (MARGIN_PX, KEPT_PX) if crop_first else (0, PATCH_PX)
    kept = slice(MARGIN_PX - first, MARGIN_PX - first + KEPT_PX)
    maps = []
    with torch.inference_mode():
        logits = network(pixels.permute(0, 3, 1, 2).float().contiguous())
        for name in CHANNELS:
            if name == "tissue":
                tissue = patch_class(logits[name]).float()[:, None, None, None]
                maps.append(tissue.expand(-1, KEPT_PX, KEPT_PX, 1).numpy())
                continue
            part_BCHW = patch_logits(logits[name], first=first, size=size)
            probabilities = part_BCHW.permute(0, 2, 3, 1).contiguous().softmax(-1)
            if name.endswith("-class"):
                chosen = probabilities.argmax(-1, keepdim=True).float()
            else:
                chosen = probabilities[..., 1:]
            maps.append(chosen[:, kept, kept].numpy().copy())
    return maps


class SlideMaps:
    """A running average of each head over the whole slide, in files."""

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        self.size = size
        self.paths = {name: folder / f"{name}.npy" for name in CHANNELS}
        self._counts = [folder / f"{name}.count.npy" for name in CHANNELS]
        shape = (size[1], size[0])
        self.values = [
            np.lib.format.open_memmap(path, "w+", np.float32, (*shape, CHANNELS[name]))
            for name, path in self.paths.items()
        ]
        self.counts = [
            np.lib.format.open_memmap(path, "w+", np.uint8, shape) for path in self._counts
        ]

    def add(self, box: NDArray[np.int64], maps: list[NDArray[Any]]) -> None:
        """Average a patch in."""
        x0, y0, x1, y1 = box[0], box[1], *np.minimum(box[2:], self.size)
        place = np.s_[y0:y1, x0:x1]
        for values, counts, map_ in zip(self.values, self.counts, maps, strict=True):
            before = counts[place][..., None].astype(np.float32)
            inside = map_[: y1 - y0, : x1 - x0]
            values[place] = (values[place] * before + inside) / (before + 1)
            counts[place] += 1

    def remove(self) -> None:
        """Write what is pending, then delete the files."""
        for array in (*self.values, *self.counts):
            array.flush()
        for path in (*self.paths.values(), *self._counts):
            path.unlink()


def batches(
    slide: Path, boxes: NDArray[np.int64], network: nn.Module, *, crop_first: bool
) -> Iterator[list[tuple[NDArray[np.int64], list[NDArray[Any]]]]]:
    """Yield the boxes and maps of a batch of patches."""
    loader = torch.utils.data.DataLoader(Patches(slide, boxes), BATCH, num_workers=WORKERS)
    for pixels, where in loader:
        maps = predict(network, pixels, crop_first=crop_first)
        rows = [[map_[index] for map_ in maps] for index in range(len(where))]
        yield list(zip(where.numpy(), rows, strict=True))


def fill_maps(
    maps: SlideMaps, slide: Path, boxes: NDArray[np.int64], network: nn.Module, clock: Clock,
    *, crop_first: bool,
) -> int:  # fmt: skip
    """Predict the slide, area by area, and return how many patches that took."""
    done = 0
    for y0 in range(0, maps.size[1], HELD_PX):
        for x0 in range(0, maps.size[0], HELD_PX):
            near = (boxes[:, :2] <= (x0 + HELD_PX, y0 + HELD_PX)).all(1)
            near &= (boxes[:, 2:] >= (x0, y0)).all(1)  # touching counts, as in the original
            if not near.any():
                continue
            with clock.stage("inference"):
                held = list(batches(slide, boxes[near], network, crop_first=crop_first))
            with clock.stage("merge"):
                for where, rows in (patch for batch in held for patch in batch):
                    maps.add(where, rows)
            done += int(near.sum())
    return done


def all_nuclei(maps: SlideMaps) -> dict[str, Record]:
    """Find the nuclei, set of tiles by set of tiles."""
    known: dict[str, Record] = {}
    paths = (maps.paths["nuclei"], maps.paths["nuclei-class"])
    with ProcessPoolExecutor(WORKERS) as pool:
        for tiles in tile_sets(maps.size):
            futures = [pool.submit(find_nuclei, paths, tile, known) for tile in tiles]
            for future in futures:
                found, replaced = future.result()
                known = {**known, **found}
                for key in replaced:
                    known.pop(key, None)
    return known


def all_regions(maps: SlideMaps, mask: Mask) -> tuple[dict[str, Record], dict[str, Record]]:
    """Find glands and lumina in each piece of tissue."""
    glands: dict[str, Record] = {}
    lumina: dict[str, Record] = {}
    pieces, number = ndimage.label(mask)
    per_y, per_x = maps.size[1] / mask.shape[0], maps.size[0] / mask.shape[1]
    for piece, (rows, columns) in enumerate(ndimage.find_objects(pieces, number), start=1):
        y0, y1 = int(rows.start * per_y), min(int(rows.stop * per_y), maps.size[1])
        x0, x1 = int(columns.start * per_x), min(int(columns.stop * per_x), maps.size[0])
        if min(y1 - y0, x1 - x0) < 4:
            continue
        within = cv2.resize(
            (pieces[rows, columns] == piece).astype(np.uint8), (x1 - x0, y1 - y0),
            interpolation=cv2.INTER_NEAREST,
        )  # fmt: skip
        half = ((x1 - x0) // 2, (y1 - y0) // 2)
        gland, types, lumen = (
            cv2.resize(np.array(values[y0:y1, x0:x1]) * within[..., None], half)
            for values in maps.values[2:5]
        )
        labels = label_regions(gland[..., 0], gland[..., 1], GLAND, scale=0.5)
        glands |= _on_slide(labels, types.astype(np.int32), (x0, y0))
        spaces = label_regions(lumen[..., 0], lumen[..., 1], LUMEN, scale=0.5) * (labels > 0)
        lumina |= _on_slide(spaces, None, (x0, y0))
    return glands, lumina


def _on_slide(
    labels: Labels, types: NDArray[np.int32] | None, corner: tuple[int, int]
) -> dict[str, Record]:
    moved = {}
    for record in describe(labels, types).values():
        record["box"] = record["box"] * 2 + np.tile(corner, 2)
        record["centroid"] = record["centroid"] * 2 + corner
        record["contour"] = record["contour"] * 2 + corner
        moved[uuid.uuid4().hex] = record
    return moved


def time_patches(
    slide: Path, boxes: NDArray[np.int64], network: nn.Module, limit: int, *, crop_first: bool
) -> dict[str, Any]:
    """Measure seconds a patch on the first so many after a batch that warms up.

    Raises:
        SystemExit: the slide has too few patches.
    """
    run = batches(slide, boxes[: BATCH + limit], network, crop_first=crop_first)
    next(run)
    begun = time.perf_counter()
    timed = sum(len(batch) for batch in run)
    seconds = time.perf_counter() - begun
    if not timed:
        raise SystemExit(f"{slide} has {len(boxes)} patches: too few to time any")
    return {"units": len(boxes), "timed_units": timed, "seconds_a_unit": seconds / timed}


def run_whole(
    slide: Path, mask: Mask, maps: SlideMaps, boxes: NDArray[np.int64], network: nn.Module,
    clock: Clock, *, crop_first: bool,
) -> dict[str, Any]:  # fmt: skip
    """Run a slide from pixels to the file of objects."""
    done = fill_maps(maps, slide, boxes, network, clock, crop_first=crop_first)
    with clock.stage("nuclei"):
        nuclei = all_nuclei(maps)
    with clock.stage("regions"):
        glands, lumina = all_regions(maps, mask)
    with clock.stage("write"):
        tissue = cv2.resize(
            np.array(maps.values[-1][..., 0]), None, fx=0.25, fy=0.25,
            interpolation=cv2.INTER_NEAREST,
        )  # fmt: skip
        folder = maps.paths["nuclei"].parent
        np.save(folder / "tissue.quarter.npy", tissue)
        joblib.dump({"Nuclei": nuclei, "Gland": glands, "Lumen": lumina}, folder / "objects.dat")
    objects = {"nucleus": len(nuclei), "gland": len(glands), "lumen": len(lumina)}
    return {"units": done, "objects": objects}


def main() -> None:
    args = parser(__doc__).parse_args()
    set_threads(args.threads, args.network)
    args.out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    network = make_network(args.network)
    with OpenSlide(args.slide) as slide:
        scale = float(slide.properties["openslide.mpp-x"]) / MPP
        size = (round(slide.dimensions[0] * scale), round(slide.dimensions[1] * scale))
    mask = read_mask(args.mask)
    boxes = wanted_patches(mask, size)
    if args.limit:
        facts = time_patches(args.slide, boxes, network, args.limit, crop_first=args.crop_first)
        facts |= clock.stop()
    else:
        maps = SlideMaps(args.out, size)
        facts = run_whole(args.slide, mask, maps, boxes, network, clock, crop_first=args.crop_first)
        facts |= clock.stop()  # taking the maps away again is not counted
        maps.remove()
    write_result(args.result, **facts, unit="patch of 448", tissue_mm2=tissue_mm2(mask, size))


if __name__ == "__main__":
    main()
