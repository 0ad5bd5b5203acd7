"""Pictures for a card that anyone may show: what a bundle finds on windows of the demo's slide.

    python -m benchmarks.card_pictures BUNDLE --out FILE.jpg

The slide of ``make demo`` is drawn in windows of 512 px, far enough apart to be different places.
Shown are the windows in which the bundle is best and worst at glands, beside the exact truth:
real images look otherwise, so good and bad here say little about scores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from benchmarks.quality.pictures import draw_page
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.device import choose_precision
from wsi_pipeline.geometry import Box
from wsi_pipeline.metrics import compare, panoptic_counts
from wsi_pipeline.synth.truth import make_truth
from wsi_pipeline.synth.world import World
from wsi_pipeline.training.pictures import Panel
from wsi_pipeline.training.predicted import ImagePredictor, find_objects
from wsi_pipeline.training.raster import fill_polygons

SIZE, SEED = (8192, 6144), 7
"""Of the demo's slide, at 0.5 um a pixel."""
MPP = 0.5
WINDOW_PX, CONTEXT_PX, STEP_PX = 512, 128, 1024
GOOD, BAD = 2, 2
HEADS = {"nuclei": "nucleus", "gland": "gland", "lumen": "lumen"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A window, and how well its glands were found."""

    score: float
    panel: Panel


def look(predictor: ImagePredictor, world: World, window: Box) -> Case | None:
    """Show a window to the network; None where there is no gland and none is found."""
    wide = window.pad(CONTEXT_PX)
    scene = world.scene(wide)
    if scene is None:
        return None
    image = world.draw(wide, scene)
    truth = make_truth(world, scene, wide, SIZE)
    kinds = np.array(truth.kind)
    found = find_objects(predictor.predict(image))
    inner = window.relative_to(wide).slices
    true, drawn = {}, {}
    for head, kind in HEADS.items():
        own = _moved(truth.geometry[kinds == kind], wide)
        true[head] = fill_polygons(own, image.shape)[inner]
        drawn[head] = fill_polygons(found[head].polygons, image.shape)[inner]
    score = panoptic_counts(compare(true["gland"], drawn["gland"])).pq
    if not np.isfinite(score):
        return None
    caption = f"glands: PQ {score:.2f}"
    panel = Panel(image=image[inner], truth=true, found=drawn, caption=caption)
    return Case(score=score, panel=panel)


def _moved(polygons: NDArray[np.object_], box: Box) -> NDArray[np.object_]:
    moved: NDArray[np.object_] = shapely.transform(polygons, lambda xy: xy - (box.x, box.y))
    return moved


def main() -> None:
    """Draw the best and the worst windows."""
    parser = argparse.ArgumentParser(prog="card_pictures", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="a name of the zoo, or a folder")
    parser.add_argument("--out", type=Path, required=True, help="the JPEG")
    options = parser.parse_args()
    bundle = find_bundle(options.bundle)
    precision = choose_precision("auto", "cpu", architecture=bundle.spec.architecture)
    predictor = ImagePredictor(
        bundle.spec, bundle.load_network(), device="cpu", precision=precision
    )
    world = World.make(seed=SEED, mpp=MPP, size=SIZE)
    windows = [
        Box(x=x, y=y, width=WINDOW_PX, height=WINDOW_PX)
        for y in range(STEP_PX // 2, SIZE[1] - WINDOW_PX, STEP_PX)
        for x in range(STEP_PX // 2, SIZE[0] - WINDOW_PX, STEP_PX)
    ]
    looks = [look(predictor, world, window) for window in windows]
    cases = sorted((case for case in looks if case), key=lambda case: case.score, reverse=True)
    shown = [*cases[:GOOD], *cases[GOOD:][-BAD:]]
    draw_page([case.panel for case in shown], options.out, title=f"{bundle.name}, synthetic slide")
    print(f"{options.out}: {len(shown)} of {len(cases)} windows")


if __name__ == "__main__":
    main()
