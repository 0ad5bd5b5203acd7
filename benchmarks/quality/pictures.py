"""Good and bad cases side by side: image, truth, prediction.

Only sets that may be shown are drawn. Small objects are shown in windows cut out of their
images, the best and the worst ones; large objects in whole images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quality.judging import Judged, see
from benchmarks.quality.measures import CalledArea, Measure, Objects, OneGland
from wsi_pipeline.bundle import ModelBundle
from wsi_pipeline.device import choose_precision
from wsi_pipeline.metrics import compare, panoptic_counts
from wsi_pipeline.training.annotation import InstanceLabel
from wsi_pipeline.training.judges import Seen
from wsi_pipeline.training.pictures import Panel, draw_examples
from wsi_pipeline.training.predicted import ImagePredictor

__all__ = ["draw_cases", "draw_page"]

WINDOW_PX = 160
"""Side of a window of small objects, at the model's pixel size."""
MIN_OBJECTS = 8
"""True objects that a window must show to be drawn."""
GOOD, BAD = 2, 4
"""Cases in a picture."""
WIDTH_PX = 1200
QUALITY = 82
RANKED_BY = {Objects: "pq", OneGland: "best_dice", CalledArea: "called_share"}
"""By kind of measure, the score that makes an image a good case; of areas, a bad one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    score: float
    panel: Panel


def draw_cases(
    bundle: ModelBundle, judged: Sequence[Judged], folder: Path, *, device: str
) -> list[Path]:
    """Draw a JPEG for each set that may be shown and each of its measures.

    Returns:
        The files, named after set and measure.
    """
    precision = choose_precision("auto", device, architecture=bundle.spec.architecture)
    predictor = ImagePredictor(
        bundle.spec, bundle.load_network(), device=device, precision=precision
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for own in judged:
        if own.set.plan.shown is None:
            continue
        for name, measure in own.measures.items():
            if name == "whole gland":
                continue
            path = folder / f"{own.set.plan.name}-{name.replace(' ', '-')}.jpg"
            panels = _panels(predictor, own, name, measure)
            if panels:
                draw_page(panels, path, title=f"{name}: {own.set.plan.shown}")
                written.append(path)
    return written


def _panels(predictor: ImagePredictor, own: Judged, name: str, measure: Measure) -> list[Panel]:
    ranked = _ranked(measure)
    head = {"one gland": "gland", "gland area": "gland"}.get(name, name)
    numbers = list(dict.fromkeys([*ranked[:GOOD], *ranked[GOOD:][-BAD:]]))
    looks = [(number, see(predictor, own.set.images[measure.images[number]])) for number in numbers]
    if head == "nuclei":
        return _windows([seen for _, seen in looks], head)
    panels = []
    for row, seen in looks:
        value = measure.scores(np.array([row]))[RANKED_BY[type(measure)]]
        group = own.set.images[measure.images[row]].item.group
        panels.append(_panel(seen, head, f"{seen.image.name} {group or ''} {value:.2f}"))
    return panels


def _ranked(measure: Measure) -> list[int]:
    """Return places in the measure's images, the best first; those without a score are left out."""
    kind = type(measure)
    scores = [
        measure.scores(np.array([row]))[RANKED_BY[kind]] for row in range(len(measure.images))
    ]
    rows = [row for row, score in enumerate(scores) if np.isfinite(score)]
    return sorted(rows, key=lambda row: scores[row], reverse=kind is not CalledArea)


def _windows(looks: Sequence[Seen], head: str) -> list[Panel]:
    """Return the best windows of the best images and the worst of the worst."""
    best: list[_Case] = []
    worst: list[_Case] = []
    for place, seen in enumerate(looks):
        cases = sorted(_cases(seen, head), key=lambda case: case.score)
        if cases:
            (best if place < GOOD else worst).append(cases[-1] if place < GOOD else cases[0])
    return [case.panel for case in (*best, *worst)]


def _cases(seen: Seen, head: str) -> list[_Case]:
    label, found = seen.image.labels[head], seen.drawn(head)
    assert isinstance(label, InstanceLabel)
    height, width = found.shape
    side = WINDOW_PX
    cases = []
    for y in range(0, max(1, height - side + 1), side // 2):
        for x in range(0, max(1, width - side + 1), side // 2):
            cut = slice(y, y + side), slice(x, x + side)
            truth = label.ids[cut]
            if np.unique(truth[truth > 0]).size < MIN_OBJECTS:
                continue
            pq = panoptic_counts(compare(truth, found[cut])).pq
            if np.isfinite(pq):
                panel = Panel(
                    image=seen.image.image[cut],
                    truth={head: truth},
                    found={head: found[cut]},
                    caption=f"{seen.image.name[:18]} PQ {pq:.2f}",
                )
                cases.append(_Case(score=pq, panel=panel))
    return cases


def _panel(seen: Seen, head: str, caption: str) -> Panel:
    label = seen.image.labels[head]
    assert isinstance(label, InstanceLabel)
    truth: Mapping[str, np.ndarray] = {head: label.ids}
    return Panel(
        image=seen.image.image, truth=truth, found={head: seen.drawn(head)}, caption=caption
    )


def draw_page(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Draw panels as a page, a JPEG of moderate size."""
    page = path.with_suffix(".png")
    draw_examples(panels, page, title=title)
    with Image.open(page) as image:
        height = round(image.height * WIDTH_PX / image.width)
        small = image.convert("RGB").resize((WIDTH_PX, height), Image.Resampling.LANCZOS)
    page.unlink()
    small.save(path, quality=QUALITY)
