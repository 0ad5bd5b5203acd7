"""Maps to table: this package against the plain way, on the same synthetic maps; or real maps.

    python -m benchmarks.objects --size 4096 [--json]
    python -m benchmarks.objects --maps results/maps/*.zarr [--json]

The plain way is what most scripts do: ``scipy.ndimage.label``, ``skimage`` watershed and
``regionprops`` for the same columns, ``findContours`` on each object's crop, one shapely
``Polygon`` each, ``GeoDataFrame.to_parquet``. Both run on one thread, in turns, with freed memory
kept as ``wsi-run`` does; medians of processor seconds, which other programs disturb less than the
clock's.

With ``--maps``: stores that a run has left. Seconds of one thread from maps in memory to the rows
of the table, which is what finding objects costs, and from the store's files to the table's, by
turns; million pixels a second of what was predicted, and of the maps' whole area.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import geopandas as gpd
import numpy as np
import shapely
from scipy import ndimage as ndi
from skimage.measure import regionprops
from skimage.segmentation import watershed

from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.instances import extract_objects
from wsi_pipeline.instances.regions import element_offsets
from wsi_pipeline.machine import keep_freed_memory
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.table import ObjectWriter, read_objects

PIXEL_SIZE = (0.25, 0.25)
CLASSES = ("none", "a", "b", "c", "d", "e", "f")
SPEC = ModelSpec(
    name="synthetic",
    architecture="none",
    mpp=0.5,
    halo_px=0,
    options={},
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="type", kind="class", classes=CLASSES, classifies="nuclei"),
        HeadSpec(
            name="gland", kind="instance", stride=2, object_kind="gland",
            rules=RunRules(inner_threshold=0.55, min_core_um2=250, grow_um=5),
        ),
    ),
)  # fmt: skip


@dataclass
class Maps:
    """Maps in memory, with the members of a prediction store."""

    grid: PixelGrid
    arrays: dict[str, np.ndarray]
    spec: ModelSpec = SPEC
    pixel_size: tuple[float, float] = PIXEL_SIZE

    @classmethod
    def of(cls, store: PredictionStore):
        """Read the maps of a store."""
        boxes = {key: store.head_grid(head.name).box for key, head in store.spec.maps.items()}
        return cls(
            grid=store.grid,
            arrays={key: store.read(key, box) for key, box in boxes.items()},
            spec=store.spec,
            pixel_size=store.pixel_size,
        )

    def head_grid(self, name):
        """Return the grid of a head's maps."""
        return self.grid.coarsen(self.spec.head(name).stride)

    def read(self, key, box):
        """Return a box of a map, 0 outside."""
        array = self.arrays[key]
        whole = Box(x=0, y=0, width=array.shape[-1], height=array.shape[-2])
        out = np.zeros((*array.shape[:-2], box.height, box.width), np.uint8)
        part = box.intersect(whole)
        out[(..., *part.relative_to(box).slices)] = array[(..., *part.slices)]
        return out


def discs(rng, side, count, radius):
    """Inner and contour maps of noisy ellipses, wrapped around, (2, side, side) uint8."""
    depth = np.full((side, side), -9.0, np.float32)
    for _ in range(count):
        r, stretch, angle = rng.uniform(*radius), rng.uniform(1, 1.6), rng.uniform(0, np.pi)
        reach = int(2 * r + 5)
        v, u = np.mgrid[-reach:reach, -reach:reach]
        a, b = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        y, x = rng.integers(0, side, 2)
        place = np.ix_((y + v[:, 0]) % side, (x + u[0]) % side)
        own = r - np.hypot(a / stretch, b * stretch)
        # Objects meet in a valley, as the contour channel makes them.
        depth[place] = np.where((own > -2) & (depth[place] > -2), np.abs(own - depth[place]) - 2,
                                np.maximum(own, depth[place]))  # fmt: skip
    depth += ndi.gaussian_filter(rng.standard_normal(depth.shape), 2, mode="wrap") * 2
    inner = 1 / (1 + np.exp(1.5 - depth))
    ground = 1 / (1 + np.exp(-2 * depth - 2))
    return (np.stack([inner, np.clip(ground - inner, 0, 1)]) * 255 + 0.5).astype(np.uint8)


def synthetic(size: int, per_mpx: int = 750) -> Maps:
    """Maps of about ``per_mpx`` nuclei and 2 glands per million pixels of the working grid."""
    rng = np.random.default_rng(0)
    side = 1024
    repeats = -(-size // side)

    def whole(tile, extent):
        return np.tile(tile, (*[1] * (tile.ndim - 2), repeats, repeats))[
            ..., :extent, :extent
        ].copy()

    patches = rng.integers(0, len(CLASSES), (side // 16, side // 16)).astype(np.uint8)
    return Maps(
        grid=PixelGrid(origin=(0.0, 0.0), spacing=(2.0, 2.0), size=(size, size)),
        arrays={
            "nuclei/prob": whole(discs(rng, side, per_mpx, (4, 8)), size),
            "type/class": whole(np.kron(patches, np.ones((16, 16), np.uint8)), size),
            "gland/prob": whole(discs(rng, side // 2, 2, (50, 90)), (size + 1) // 2),
        },
    )


def ours(maps: Maps, path: Path) -> int:
    extraction = extract_objects(maps, slide_id="s")
    with ObjectWriter(path, metadata={}, pixel_size=maps.pixel_size) as writer:
        for batch in extraction.batches:
            writer.write(batch)
    return sum(writer.counts.values())


def plain(maps: Maps, path: Path) -> int:
    rows = [*plain_nuclei(maps), *plain_glands(maps)]
    frame = gpd.GeoDataFrame(rows, geometry="geometry")
    frame.to_parquet(path, compression="zstd", write_covering_bbox=True, schema_version="1.1.0")
    return len(rows)


def plain_nuclei(maps: Maps):
    inner, contour = maps.arrays["nuclei/prob"].astype(np.float32) / 255
    mask = ndi.binary_erosion(inner + contour > 0.5, border_value=1)
    markers, _ = ndi.label(mask & (inner > 0.5))
    size = np.bincount(markers.ravel())
    markers[size[markers] < 4] = 0
    labels = watershed(-inner, markers, mask=mask)
    types = maps.arrays["type/class"]
    for props in regionprops(labels, inner):
        if props.area < 8:
            continue
        votes = np.bincount(types[props.slice][props.image], minlength=len(CLASSES))
        best = votes.argmax()
        if best == 0 and votes[1:].any():
            best = 1 + votes[1:].argmax()
        yield row(props, 0.5, "nucleus", CLASSES[best], votes[best] / props.area)


def plain_glands(maps: Maps):
    inner, contour = maps.arrays["gland/prob"].astype(np.float32) / 255
    labels, _ = ndi.label((inner > 0.55) & ~(contour > 0.5))
    size = np.bincount(labels.ravel())
    labels[size[labels] < 250] = 0
    element = np.zeros((5, 5), np.uint8)
    for dx, dy in element_offsets(5):
        element[dy + 2, dx + 2] = 1
    out = np.zeros_like(labels)
    for i, place in enumerate(ndi.find_objects(labels), 1):
        if place is None:
            continue
        rows, columns = (slice(max(0, s.start - 6), s.stop + 6) for s in place)
        grown = cv2.dilate((labels[rows, columns] == i).astype(np.uint8), element)
        out[rows, columns][ndi.binary_fill_holes(grown)] = i
    for props in regionprops(out, inner):
        yield row(props, 1.0, "gland", None, None)


def row(props, mpp: float, kind: str, name, prob) -> dict:
    image = np.pad(props.image.astype(np.uint8), 1)
    found, _ = cv2.findContours(image, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    y0, x0 = props.bbox[:2]
    ring = max(found, key=len)[:, 0] + [x0 - 0.5, y0 - 0.5]
    scale = mpp / PIXEL_SIZE[0]
    polygon = shapely.Polygon(ring * scale) if len(ring) >= 3 else shapely.Polygon()
    y, x = props.centroid
    return {
        "slide_id": "s",
        "object_id": props.label,
        "kind": kind,
        "class": name,
        "class_prob": prob,
        "score": props.intensity_mean,
        "area_um2": props.area * mpp**2,
        "perimeter_um": props.perimeter * mpp,
        "major_axis_um": props.axis_major_length * mpp,
        "minor_axis_um": props.axis_minor_length * mpp,
        "solidity": props.solidity,
        "centroid_x": (x + 0.5) * scale,
        "centroid_y": (y + 0.5) * scale,
        "geometry": polygon,
    }


def rows_of(maps) -> int:
    return sum(batch.num_rows for batch in extract_objects(maps, slide_id="s").batches)


def from_files(folder: Path, path: Path) -> int:
    return ours(PredictionStore.open(folder), path)


def seconds_by_turns(ways, rounds: int) -> dict[str, float]:
    """Return the median of the processor seconds of each way, called in turns."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measured(folder: Path, path: Path, rounds: int) -> dict:
    """Measure a store of real maps."""
    store = PredictionStore.open(folder)
    maps = Maps.of(store)
    ways = {
        "memory to rows": partial(rows_of, maps),
        "files to table": partial(from_files, folder, path),
    }
    count = rows_of(maps)  # compiles what is not yet
    area, predicted = maps.grid.box.area / 1e6, store.meta["predicted_px"] / 1e6
    seconds = seconds_by_turns(ways, rounds)
    return {
        "objects": count,
        "mpx": {"predicted": round(predicted, 1), "all": round(area, 1)},
        "objects_per_predicted_mpx": round(count / predicted),
        "seconds": {way: round(s, 4) for way, s in seconds.items()},
        "predicted_mpx_per_s": {way: round(predicted / s, 1) for way, s in seconds.items()},
        "mpx_per_s": {way: round(area / s, 1) for way, s in seconds.items()},
        "objects_per_s": {way: round(count / s) for way, s in seconds.items()},
    }


def beside_the_plain_way(size: int, path: Path, rounds: int) -> dict:
    """Measure synthetic maps."""
    maps = synthetic(size)
    ours(synthetic(256), path)  # compiles
    counts = {"ours": ours(maps, path), "plain": plain(maps, path)}
    ways = {"ours": partial(ours, maps, path), "plain": partial(plain, maps, path)}
    seconds = seconds_by_turns(ways, rounds)
    ours(maps, path)
    return {
        "size_px": size,
        "objects": counts,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "mpx_per_s": {n: round(size**2 / 1e6 / s, 1) for n, s in seconds.items()},
        "objects_per_s": {n: round(counts[n] / s) for n, s in seconds.items()},
        "ratio": round(seconds["plain"] / seconds["ours"], 1),
        "target_ratio": 20,
        "valid_fraction": float(read_objects(path).is_valid.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="side of the synthetic maps, pixels")
    parser.add_argument("--maps", type=Path, nargs="+", help="stores of real maps instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "objects.parquet"
        if options.maps:
            results = {store.stem: measured(store, path, options.rounds) for store in options.maps}
        else:
            size = options.size
            results = {"synthetic": beside_the_plain_way(size, path, options.rounds)}
    if options.json:
        print(json.dumps(results if options.maps else results["synthetic"]))
        return
    for name, result in results.items():
        print(name)
        print("\n".join(f"{key:>26}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
