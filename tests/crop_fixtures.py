"""A small slide with a crop on it, for the tests of what annotates and learns."""

import shapely

from wsi_pipeline.curation.crops import Crop, Outline, Round
from wsi_pipeline.geometry import Box

SLIDE_SIZE = (512, 384)
"""Of ``slide_fixtures.picture(512, 384)``, at 0.25 um a pixel."""


def outline(number, shape, kind="nucleus", **more):
    return Outline(**{"id": number, "kind": kind, "polygon": shapely.normalize(shape),
                      "source": "model m", **more})  # fmt: skip


def make_crop(*outlines, **changes):
    """A crop of level-0 pixels (100, 60) to (300, 220): 100 x 80 pixels of its ruler."""
    facts = {
        "id": "c",
        "slide": "s.svs",
        "slide_size": SLIDE_SIZE,
        "mpp": 0.25,
        "box": Box.from_edges(100, 60, 300, 220),
        "labels": ("nuclei",),
        "part": "train",
        "history": (Round(round=0, by="t", how="made"),),
        "next_id": 1 + max((o.id for o in outlines), default=0),
    }
    return Crop(**{**facts, **changes}, outlines=tuple(sorted(outlines, key=lambda o: o.id)))


def square(x, y, side=20.0):
    """A square in level-0 pixels."""
    return shapely.box(x, y, x + side, y + side)
