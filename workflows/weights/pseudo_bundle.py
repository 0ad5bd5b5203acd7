r"""Crops with the objects that a bundle is sure of, for another network to learn from.

Windows lie at random over the tissue, away from crops that are for validation. An object counts
if its mean probability is high. What the bundle doubts is to be ignored: other objects, and pixels
away from any object that might still belong to one. The rest is background. With --flips, the
probabilities are means over the eight ways to turn and mirror a window.

::

    python -m workflows.weights.pseudo_bundle BUNDLE SLIDES/*.svs SLIDES/*.tiff --out TAUGHT/crops \
        --windows 300 --flips --avoid annotations/crops --mpp SLIDE_WITHOUT_PIXEL_SIZE.tiff=0.37

The files are a function of the bundle, the device, the slides, the crops to avoid and the options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from workflows.weights.pseudo_crops import (
    Plan,
    empty_crop,
    outlines_of,
    window_options,
    write_crops,
)
from wsi_pipeline.bundle import ModelBundle, find_bundle
from wsi_pipeline.command import plain_errors
from wsi_pipeline.curation.crops import HEADS, RULER_MPP, Crop, Outline
from wsi_pipeline.device import choose_device, choose_precision
from wsi_pipeline.geometry import Box
from wsi_pipeline.network import INPUT_MULTIPLE
from wsi_pipeline.slide import Slide
from wsi_pipeline.spec import HeadSpec, ModelSpec, RunRules
from wsi_pipeline.training.predicted import ImageMaps, ImagePredictor, find_objects
from wsi_pipeline.training.raster import fill_polygons

VIEWS = tuple((turns, mirror) for mirror in (False, True) for turns in range(4))
"""Quarter turns, and whether it is mirrored afterwards; the first leaves a window as it is."""

Predict = Callable[[NDArray[np.uint8]], ImageMaps]


@dataclass(frozen=True, kw_only=True, slots=True)
class Confidence:
    """What a bundle is believed."""

    sure: float = 0.8
    """An object's mean probability is at least this."""
    doubt: float = 0.2
    """Pixels of background are less probable than this to belong to an object."""

    def __post_init__(self) -> None:
        if not 0 < self.doubt <= self.sure <= 1:
            raise ValueError(f"0 < doubt <= sure <= 1 is wanted, not {self.doubt} and {self.sure}")


def averaged(predict: Predict, image: NDArray[np.uint8], views: int) -> ImageMaps:
    """Return the maps of a window, the mean of several views of it.

    Args:
        predict: the network.
        image: ``(S, S, 3)``, S a multiple of every head's stride.
        views: how many of ``VIEWS``. Class maps are those of the first.
    """
    first = predict(image)
    sums = {key: map_.astype(np.float32) for key, map_ in first.arrays.items()}
    for turns, mirror in VIEWS[1:views]:
        found = predict(np.ascontiguousarray(_turned(image, turns, mirror, axes=(0, 1))))
        for key, map_ in found.arrays.items():
            sums[key] += _turned_back(map_, turns, mirror, axes=(-2, -1))
    means = {
        key: first.arrays[key]
        if key.endswith("/class")
        else np.rint(total / views).astype(np.uint8)
        for key, total in sums.items()
    }
    return replace(first, arrays=means)


def _turned(array: Any, turns: int, mirror: bool, axes: tuple[int, int]) -> Any:  # noqa: ANN401
    turned = np.rot90(array, turns, axes)
    return np.flip(turned, axes[1]) if mirror else turned


def _turned_back(array: Any, turns: int, mirror: bool, axes: tuple[int, int]) -> Any:  # noqa: ANN401
    return np.rot90(np.flip(array, axes[1]) if mirror else array, -turns, axes)


def probabilities(maps: ImageMaps, head: HeadSpec) -> NDArray[np.float32]:
    """Return for each pixel of the image how probable an object is there, contours included."""
    stored = maps.arrays[f"{head.name}/prob"].astype(np.float32).sum(axis=0) / 255
    width, height = maps.size
    whole: NDArray[np.float32] = stored.repeat(head.stride, axis=0).repeat(head.stride, axis=1)
    return whole[:height, :width].clip(max=1)


def believed(
    labels: NDArray[np.int32],
    probability: NDArray[np.float32],
    confidence: Confidence,
    *,
    rim_px: float,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tell sure objects from doubtful pixels.

    Args:
        labels: ``(H, W)`` objects, 1 and up.
        probability: ``(H, W)`` of an object.
        confidence: where the limits are.
        rim_px: how far the probability of an object may reach beyond its outline.

    Returns:
        The sure objects, ``(H, W)`` as before, and the doubtful pixels.
    """
    count = int(labels.max(initial=0))
    means = np.zeros(count + 1)
    if count:
        means[1:] = ndimage.mean(probability, labels, np.arange(1, count + 1))
    sure = np.where(means[labels] >= confidence.sure, labels, 0)
    near = ndimage.distance_transform_edt(sure == 0) <= rim_px if sure.any() else sure > 0
    doubtful = (probability >= confidence.doubt) & ~near
    return sure, (doubtful | (labels > 0)) & (sure == 0)


def rim_um(head: HeadSpec) -> float:
    """Return how far beyond its outline an object's contour is learnt: as far as cores grow."""
    if isinstance(head.rules, RunRules):
        return head.rules.grow_um / 2  # the element's diameter
    return float(getattr(head.rules, "grow_um", 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A bundle that says what is in a window."""

    spec: ModelSpec
    """Of the bundle."""
    source: str
    """Of its outlines."""
    predict: Predict
    """Its network."""
    views: int
    """How many views of a window are averaged."""
    confidence: Confidence
    """How far it is believed."""

    @classmethod
    def load(
        cls, bundle: ModelBundle, *, device: str, precision: str, views: int, confidence: Confidence
    ) -> Teacher:
        """Load a bundle's network.

        Raises:
            UsageError: its pixels are not those that crops are drawn at, or it has no head that
                crops are annotated for.
        """
        spec = bundle.spec
        if not math.isclose(spec.mpp, RULER_MPP):
            msg = f"{bundle.name} sees {spec.mpp} um a pixel; crops are drawn at {RULER_MPP}"
            raise click.UsageError(msg)
        device = choose_device(device)
        precision = choose_precision(precision, device, architecture=spec.architecture)
        network = bundle.load_network()
        predictor = ImagePredictor(spec, network, device=device, precision=precision)
        teacher = cls(
            spec=spec,
            source=f"model {bundle.name} {bundle.digest[:12]}",
            predict=predictor.predict,
            views=views,
            confidence=confidence,
        )
        if not teacher.heads:
            raise click.UsageError(f"{bundle.name} has none of the heads {', '.join(HEADS)}")
        return teacher

    @property
    def heads(self) -> tuple[HeadSpec, ...]:
        """The heads whose objects are taken."""
        return tuple(
            head
            for head in self.spec.object_heads
            if head.kind == "instance" and HEADS.get(head.name) == head.object_kind
        )

    def label_slide(self, plan: Plan, count: int) -> Iterator[Crop]:
        """Yield the crops of a slide, in the order of its plan."""
        how = (
            f"{self.source}, {self.views} views, objects from {self.confidence.sure:g}, "
            f"background below {self.confidence.doubt:g}"
        )
        with Slide.open(plan.path, mpp=plan.mpp) as slide:
            for index in range(count):
                crop = empty_crop(
                    plan,
                    index,
                    labels=[head.name for head in self.heads],
                    mark="t",
                    note="found by a network alone; not looked at",
                    by="pseudo_bundle",
                    how=how,
                )
                yield self.label_window(slide.read(crop.grid, self._window(crop)), crop)

    def label_window(self, rgb: NDArray[np.uint8], crop: Crop) -> Crop:
        """Return a crop with what is found in the window that was read for it.

        Args:
            rgb: ``(S, S, 3)`` on the crop's grid, from a halo above and left of it on.
            crop: without objects.
        """
        maps = averaged(self.predict, rgb, self.views)
        objects = find_objects(maps)
        halo, (width, height) = self.spec.halo_px, crop.grid.size
        inner = slice(halo, halo + height), slice(halo, halo + width)
        found: list[Outline] = []
        for head in self.heads:
            labels, doubtful = believed(
                fill_polygons(objects[head.name].polygons, rgb.shape),
                probabilities(maps, head),
                self.confidence,
                rim_px=max(rim_um(head) / self.spec.mpp, head.stride),
            )
            found += outlines_of(
                labels[inner],
                doubtful[inner],
                crop,
                head=head.name,
                source=self.source,
                first_id=len(found) + 1,
            )
        return crop.with_outlines(found, next_id=len(found) + 1)

    def _window(self, crop: Crop) -> Box:
        # Square, and whole cells of every map, so that turned maps fall on one another.
        halo = self.spec.halo_px
        step = math.lcm(INPUT_MULTIPLE, *(head.stride for head in self.spec.heads))
        side = -(-(max(crop.grid.size) + 2 * halo) // step) * step
        return Box(x=-halo, y=-halo, width=side, height=side)


@click.command(help=__doc__.split("\n\n")[1])
@click.argument("bundle")
@window_options
@click.option("--flips", is_flag=True, help="Average over eight views of each window.")
@click.option("--sure", default=Confidence().sure, show_default=True, help="Mean of an object.")
@click.option(
    "--doubt", default=Confidence().doubt, show_default=True, help="Of background, at most."
)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
def main(
    bundle: str,
    flips: bool,
    sure: float,
    doubt: float,
    device: str,
    precision: str,
    **options: Any,  # noqa: ANN401 - those of write_crops, checked by click
) -> None:
    """Write crops."""
    with plain_errors():
        teacher = Teacher.load(
            find_bundle(bundle),
            device=device,
            precision=precision,
            views=len(VIEWS) if flips else 1,
            confidence=Confidence(sure=sure, doubt=doubt),
        )
        write_crops(teacher.label_slide, **options)


if __name__ == "__main__":
    main()
