"""Maps to make objects from, and a store in memory that serves them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage as ndi

from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules

NUCLEI = HeadSpec(
    name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules(), parent="gland"
)
GLAND = HeadSpec(
    name="gland", kind="instance", stride=2, object_kind="gland", rules=RunRules(grow_um=5)
)
LUMEN = HeadSpec(
    name="lumen",
    kind="instance",
    stride=2,
    object_kind="lumen",
    rules=RunRules(min_core_um2=10, grow_um=3),
    parent="gland",
    inside_parent=True,
)
TYPE = HeadSpec(
    name="type",
    kind="class",
    classes=("none", "epithelial", "immune", "stromal"),
    classifies="nuclei",
)
TISSUE = HeadSpec(name="tissue", kind="patch", stride=16, classes=("glass", "mucosa", "muscle"))


def model(*heads: HeadSpec, mpp: float = 0.5) -> ModelSpec:
    return ModelSpec(name="t", architecture="t", mpp=mpp, halo_px=0, heads=heads, options={})


@dataclass
class MemoryStore:
    """The members of a prediction store that objects are made from."""

    spec: ModelSpec
    size: tuple[int, int]
    arrays: dict[str, np.ndarray]
    spacing: tuple[float, float] = (2.0, 2.0)
    pixel_size: tuple[float, float] = (0.25, 0.25)
    reads: list = field(default_factory=list)

    @property
    def grid(self) -> PixelGrid:
        return PixelGrid(origin=(0.0, 0.0), spacing=self.spacing, size=self.size)

    def head_grid(self, name: str) -> PixelGrid:
        return self.grid.coarsen(self.spec.head(name).stride)

    def read(self, key: str, box: Box) -> np.ndarray:
        array = self.arrays[key]
        self.reads.append((key, box))
        whole = Box(x=0, y=0, width=array.shape[-1], height=array.shape[-2])
        out = np.zeros((*array.shape[:-2], box.height, box.width), np.uint8)
        part = box.intersect(whole)
        if part.area:
            out[(..., *part.relative_to(box).slices)] = array[(..., *part.slices)]
        return out


def blobs(rng, shape, n, radius, *, rim=2.0):
    """Smooth round objects: inner, contour (2, H, W) uint8, a little noisy, some touching."""
    field_ = np.full(shape, -9.0, np.float32)
    second = field_.copy()
    for _ in range(n):
        cy, cx = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        r = rng.uniform(*radius)
        stretch, angle = rng.uniform(1, 1.8), rng.uniform(0, np.pi)
        reach = int(r * 2 + 4)
        y0, y1 = max(0, int(cy) - reach), min(shape[0], int(cy) + reach)
        x0, x1 = max(0, int(cx) - reach), min(shape[1], int(cx) + reach)
        yy, xx = np.mgrid[y0:y1, x0:x1]
        u = (xx - cx) * np.cos(angle) + (yy - cy) * np.sin(angle)
        v = -(xx - cx) * np.sin(angle) + (yy - cy) * np.cos(angle)
        depth = r - np.hypot(u / stretch, v * stretch)
        old = field_[y0:y1, x0:x1]
        second[y0:y1, x0:x1] = np.maximum(second[y0:y1, x0:x1], np.minimum(old, depth))
        field_[y0:y1, x0:x1] = np.maximum(old, depth)
    noise = ndi.gaussian_filter(rng.standard_normal(shape), 1.0).astype(np.float32)
    depth = field_ - np.maximum(second + 1.5, 0) * 0.8 + noise
    inner = 1 / (1 + np.exp(-(depth - rim)))
    ground = 1 / (1 + np.exp(-2 * depth))
    contour = np.clip(ground - inner, 0, 1)
    return (np.stack([inner, contour]) * 255 + 0.5).astype(np.uint8)


def half(prob):
    """Average 2 x 2 pixels."""
    c, h, w = prob.shape
    padded = np.pad(prob, ((0, 0), (0, h % 2), (0, w % 2)), mode="edge").astype(np.uint16)
    return ((padded.reshape(c, (h + 1) // 2, 2, (w + 1) // 2, 2).sum((2, 4)) + 2) // 4).astype(
        np.uint8
    )


def one_hot(ids: np.ndarray) -> np.ndarray:
    """Certain probabilities of the three tissue classes."""
    prob = np.stack([255 * (ids == value).astype(np.uint8) for value in range(3)])
    prob[:, :3] = 0  # as where nothing was predicted
    return prob


def tissue_like(seed: int, size: tuple[int, int] = (700, 620)) -> MemoryStore:
    """A believable slide: nuclei with types, glands with holes and lumina, tissue."""
    rng = np.random.default_rng(seed)
    w, h = size
    area = w * h
    nuclei = blobs(rng, (h, w), area // 700, (4, 9))
    small = ((h + 1) // 2, (w + 1) // 2)
    gland = blobs(rng, small, max(2, area // 30000), (15, 60), rim=1.0)
    holes = blobs(rng, small, max(2, area // 12000), (3, 9), rim=0.5)
    lumen = blobs(rng, small, max(2, area // 9000), (4, 14), rim=0.5)
    gland[0] = np.where(holes[0] > 128, 20, gland[0])
    type_ = (ndi.zoom(rng.integers(0, 4, (h // 12 + 2, w // 12 + 2)), 12, order=0)[:h, :w]).astype(
        np.uint8
    )
    tissue = rng.integers(0, 3, (-(-h // 16), -(-w // 16))).astype(np.uint8)
    return MemoryStore(
        spec=model(NUCLEI, TYPE, GLAND, LUMEN, TISSUE),
        size=size,
        arrays={
            "nuclei/prob": nuclei,
            "type/class": type_,
            "gland/prob": gland,
            "lumen/prob": lumen,
            "tissue/class": tissue,
            "tissue/prob": one_hot(tissue),
        },
    )


def noise(seed: int, size: tuple[int, int] = (150, 130), *, level: float = 0.5) -> MemoryStore:
    """Random maps with few values (many ties); from specks to percolating networks."""
    rng = np.random.default_rng(seed)

    def maps(shape, gaps):
        inner = rng.choice([0, 60, 128, 160, 200], shape, p=[1 - level, *[level / 4] * 4])
        contour = 190 - inner if gaps else rng.choice([0, 40, 55], shape)
        contour = np.where(rng.random(shape) < gaps, 0, np.maximum(contour, 0))
        return np.stack([inner, contour]).astype(np.uint8)

    w, h = size
    small = ((h + 1) // 2, (w + 1) // 2)
    rules = AnchorRules(
        min_core_um2=float(rng.integers(1, 8)) / 4, max_diameter_um=float(rng.choice([12, 25, 200]))
    )
    spec = model(
        HeadSpec(
            name="nuclei", kind="instance", object_kind="nucleus", rules=rules, parent="gland"
        ),
        TYPE,
        HeadSpec(
            name="gland",
            kind="instance",
            stride=2,
            object_kind="gland",
            rules=RunRules(min_core_um2=3, grow_um=float(rng.integers(1, 5)), fill_holes_um2=9),
        ),
        LUMEN,
        TISSUE,
    )
    arrays = {
        "nuclei/prob": maps((h, w), float(rng.choice([0.004, 0.02, 0.06]))),
        "type/class": rng.integers(0, 4, (h, w)).astype(np.uint8),
        "gland/prob": maps(small, 0),
        "lumen/prob": maps(small, 0),
        "tissue/class": rng.integers(0, 3, (-(-h // 16), -(-w // 16))).astype(np.uint8),
    }
    arrays["tissue/prob"] = one_hot(arrays["tissue/class"])
    return MemoryStore(spec=spec, size=size, arrays=arrays)
