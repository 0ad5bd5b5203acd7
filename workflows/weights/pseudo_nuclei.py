r"""Crops with nuclei that were found by stain alone, for training: nobody has looked at them.

Windows lie at random over the tissue, the more often the more stain there is. What is sure is a
nucleus, what is doubtful is to be ignored, the rest is background; see ``stained_nuclei``. No
window comes within 20 micrometres of a crop that is for validation.

::

    python -m workflows.weights.pseudo_nuclei SLIDES/*.svs SLIDES/*.tiff --out PSEUDO/crops \
        --windows 300 --avoid annotations/crops --mpp SLIDE_WITHOUT_PIXEL_SIZE.tiff=0.37

The files are a function of the slides, the crops to avoid, the options and these modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from workflows.weights.pseudo_crops import (
    Plan,
    empty_crop,
    outlines_of,
    window_options,
    write_crops,
)
from workflows.weights.slide_stain import Stain, fit_stain
from workflows.weights.stained_nuclei import find_nuclei
from wsi_pipeline.curation.crops import Crop
from wsi_pipeline.slide import Slide

HALO_PX = 32
"""Read around a window, since nuclei at its edge depend on what lies beyond."""
FITTED_WINDOWS = 16
"""Windows of a slide that its stain is fitted to."""
SOURCE = "model stain-watershed"


def read_window(slide: Slide, crop: Crop) -> NDArray[np.uint8]:
    """Read a crop and its halo, ``(H, W, 3)`` on the crop's grid."""
    return slide.read(crop.grid, crop.grid.box.pad(HALO_PX))


def label_window(rgb: NDArray[np.uint8], stain: Stain, crop: Crop) -> Crop:
    """Return a crop with what is found in the window that was read for it."""
    labels, doubtful = find_nuclei(rgb, stain)
    inner = slice(HALO_PX, -HALO_PX)
    found = list(
        outlines_of(
            labels[inner, inner], doubtful[inner, inner], crop, head="nuclei", source=SOURCE
        )
    )
    return crop.with_outlines(found, next_id=len(found) + 1)


def label_slide(plan: Plan, count: int) -> Iterator[Crop]:
    """Yield the crops of a slide, in the order of its plan."""
    with Slide.open(plan.path, mpp=plan.mpp) as slide:
        crops = [_empty(plan, k) for k in range(len(plan.boxes))]
        stain = fit_stain([read_window(slide, crop) for crop in crops[:FITTED_WINDOWS]])
        for crop in crops[:count]:
            yield label_window(read_window(slide, crop), stain, crop)


def _empty(plan: Plan, index: int) -> Crop:
    return empty_crop(
        plan,
        index,
        labels=("nuclei",),
        mark="p",
        note="found by stain alone; not looked at",
        by="pseudo_nuclei",
        how="stain threshold and watershed",
    )


@click.command(help=__doc__.split("\n\n")[1])
@window_options
def main(**options: Any) -> None:  # noqa: ANN401 - those of write_crops, checked by click
    """Write crops."""
    write_crops(label_slide, **options)


if __name__ == "__main__":
    main()
