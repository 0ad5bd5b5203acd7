"""What is written of a slide whose maps are complete: provenance, tissue table, preview.

The objects themselves come from the draft, see :mod:`wsi_pipeline.drafting`.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.attempt import Attempt
from wsi_pipeline.drafting import Draft
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances import outline_polygons
from wsi_pipeline.job import versions
from wsi_pipeline.preview import draw_preview, write_preview
from wsi_pipeline.slide import PixelSize
from wsi_pipeline.spec import AnchorRules, PeakRules
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.table import read_centroids, read_rings, write_tissue
from wsi_pipeline.tissue import TissueMask

__all__ = ["Picture", "Predicted", "provenance", "save_preview", "save_tissue"]

Picture = tuple[NDArray[np.uint8], PixelGrid]
"""``(H, W, 3)``, and where its pixels lie."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A slide whose maps are complete, and what the tables need to know of it."""

    store: PredictionStore
    """The maps; sealed already, if an earlier try came as far."""
    draft: Draft
    """Its objects, as far as they could be drawn while the maps were made."""
    tissue: TissueMask
    """Where the tissue is."""
    picture: Picture
    """The whole slide, for the preview."""
    size: tuple[int, int]
    """Width and height of level 0."""
    pixel_size: PixelSize
    """Micrometres per level-0 pixel."""

    def seal(self) -> None:
        """Give the maps their final name without making tables of them."""
        with closing(self.draft):
            self.store.seal()


def provenance(attempt: Attempt, predicted: Predicted) -> dict[str, Any]:
    """Return the provenance kept inside the tables: no times, no hosts, no folders."""
    job, store = attempt.job, predicted.store
    size = predicted.pixel_size
    return {
        "slide": {
            "name": Path(job.path).name,
            "slide_id": job.slide_id,
            "width": predicted.size[0],
            "height": predicted.size[1],
            "mpp": {"x": size.x, "y": size.y, "source": size.source},
        },
        "model": {
            "name": job.model_name,
            "sha256": job.model_digest,
            "classes": {head.name: list(head.classes) for head in store.spec.heads if head.classes},
        },
        "options": {
            # Which of several alike it was makes no difference.
            "device": (attempt.report.device or "").partition(":")[0],
            "precision": attempt.report.precision,
            "tile_px": store.tile_px,
            "working_mpp": [
                spacing * mpp
                for spacing, mpp in zip(store.grid.spacing, store.pixel_size, strict=True)
            ],
            "mask": predicted.tissue.source,
        },
        "versions": versions(),
    }


def save_tissue(
    attempt: Attempt, predicted: Predicted, store: PredictionStore, metadata: dict[str, Any]
) -> None:
    """Write the tissue table: the outline, and the regions by class where a head tells them.

    Args:
        attempt: the try at the slide.
        predicted: the slide.
        store: its maps, sealed.
        metadata: the provenance.
    """
    job, tissue = attempt.job, predicted.tissue
    regions: list[tuple[str, bytes, float]] = []
    head = store.spec.patch_head
    if head is not None:
        grid = store.head_grid(head.name)
        classes = store.read(f"{head.name}/class", grid.box)
        inside = tissue.window(grid, grid.box)
        labels = np.where(inside, classes.astype(np.int32) + 1, 0)
        regions = [
            (head.classes[value - 1], wkb, pixels * _pixel_um2(grid, store))
            for value, wkb, pixels in outline_polygons(labels, grid)
        ]
    write_tissue(
        job.tissue_path,
        slide_id=job.slide_id,
        outline=[
            (wkb, pixels * _pixel_um2(tissue.grid, store))
            for _, wkb, pixels in outline_polygons(tissue.mask, tissue.grid)
        ],
        regions=regions,
        pixel_size=store.pixel_size,
        metadata=metadata,
    )


def _pixel_um2(grid: PixelGrid, store: PredictionStore) -> float:
    return grid.spacing[0] * grid.spacing[1] * store.pixel_size[0] * store.pixel_size[1]


def save_preview(attempt: Attempt, predicted: Predicted) -> None:
    """Draw large objects as outlines and the small ones as a density, from the table."""
    job, heads = attempt.job, predicted.store.spec.object_heads
    # Boxes are few beside nuclei, and better drawn one by one; alone they are the density.
    by_rules = {type(h.rules): h.object_kind for h in reversed(heads)}
    small = by_rules.get(AnchorRules) or by_rules.get(PeakRules)
    large = [h.object_kind for h in heads if h.object_kind and h.object_kind != small]
    points = np.zeros((0, 2))
    if small is not None:
        points = read_centroids(job.objects_path, kind=small)
    image = draw_preview(
        *predicted.picture,
        tissue=predicted.tissue,
        polygons={kind: read_rings(job.objects_path, kind=kind) for kind in large},
        points=points,
        pixel_size=predicted.store.pixel_size,
        title=job.slide_id,
        counts=attempt.report.counts,
    )
    write_preview(job.preview_path, image)
