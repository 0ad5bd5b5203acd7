"""Windows of annotated images, as a network's training takes them.

::

    Item.load -> AnnotatedImage -> conform (model's mpp, heads, classes) -> Window -> Batch
                                            kept in memory while there is room

A window is twice as wide as the crop that augmentation cuts out of its middle, so that a
crop that was turned or scaled still has pixels in its corners.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_pipeline.errors import DatasetError, RecipeError
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.annotation import (
    IGNORE_CLASS,
    IGNORE_ID,
    AnnotatedImage,
    BoxLabel,
    ClassLabel,
    Dataset,
    InstanceLabel,
    Item,
    Label,
    PatchLabel,
)
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.conform import label_rules, resampled
from wsi_pipeline.training.raster import mirrored

__all__ = ["ImageCache", "Source", "Window", "collate"]

DEFAULT_CACHE_BYTES = 2 << 30
"""What a cache keeps, unless told otherwise."""

T = TypeVar("T", np.int32, np.uint8, np.bool_)
Mask = NDArray[np.int32] | NDArray[np.uint8]
Places = NDArray[np.float32]
"""(N, 2) x, y of the middles of objects, in pixels of their image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A square of an image with its labels."""

    pixels: NDArray[np.uint8]
    """(S, S, 3) RGB; mirrored beyond the image."""
    labels: Mapping[str, NDArray[np.float32] | Mask | int]
    """By head, labelled heads only: instance (S, S) int32, class (S, S) uint8, patch int,
    detect (N, 4) float32 boxes in pixels of the window, which may reach beyond it."""
    unknown: Mapping[str, NDArray[np.bool_]]
    """By detect head: (S, S), True where nobody annotated."""


class Source:
    """A part of a dataset as the network sees it: at its mpp, with its heads and class ids.

    Reading is safe from several threads; two that want one image at once may both decode it.
    """

    name: str
    """Of the dataset, for messages and tables."""
    task: str
    """What its windows are drawn for."""
    heads: tuple[str, ...]
    """The model's heads that it labels, in the model's order."""
    items: tuple[Item, ...]
    """Its images, not yet read."""
    scales: tuple[float, float] | None
    """Smallest and largest magnification of its crops; None: as ``[augment]`` says."""

    def __init__(
        self,
        dataset: Dataset,
        items: Sequence[Item],
        spec: ModelSpec,
        *,
        name: str | None = None,
        task: str | None = None,
        heads: Mapping[str, str] | None = None,
        class_map: Mapping[str, Mapping[str, str]] | None = None,
        object_share: float = 0.5,
        scales: tuple[float, float] | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            dataset: whose labels are meant.
            items: the images of it that are used.
            spec: the model.
            name: default the dataset's.
            task: default the heads' names joined by ``+``.
            heads: the dataset's label and the model's head, where the names differ; ``""``
                leaves a label out.
            class_map: by the dataset's label: its class and the model's, where the names
                differ; ``"ignore"`` (or ``""``) makes those pixels unknown.
            object_share: share of the windows that are placed on an object.
            scales: smallest and largest magnification that augmentation gives its windows;
                None: as ``[augment]`` says.
            cache: keeps decoded images, of this and of other sources; None: one of its own.

        Raises:
            DatasetError: no items.
            RecipeError: labels and heads, or their classes, do not fit together.
        """
        self.name = name or dataset.name
        if not items:
            raise DatasetError(f"{self.name} ({dataset.path}): no image is left to use")
        if not 0 <= object_share <= 1:
            raise RecipeError(f"object_share must be 0 to 1, not {object_share}")
        try:
            self._rules = label_rules(
                dataset.labels, spec, heads=heads or {}, classes=class_map or {}
            )
        except RecipeError as error:
            raise RecipeError(f"{self.name} ({dataset.path}): {error}") from error
        self.heads = tuple(rule.head.name for rule in self._rules)
        self.task = task or "+".join(self.heads)
        self.items = tuple(items)
        self.scales = scales
        self._spec = spec
        self._object_share = object_share
        self._cache = cache if cache is not None else ImageCache()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.items)

    def image(self, index: int) -> AnnotatedImage:
        """Read an image at the model's mpp; its labels bear the names of the model's heads.

        Raises:
            DatasetError: the files cannot be read or contradict each other.
            RecipeError: a label is of another kind than its head.
        """
        item = self.items[index]
        try:
            loaded = item.load()
            labels = {}
            for rule in self._rules:
                if rule.label in loaded.labels:
                    label = rule.apply(loaded.labels[rule.label])
                    if label is not None:
                        labels[rule.head.name] = label
        except RecipeError as error:
            raise RecipeError(f"{self.name}, {item.name}: {error}") from error
        renamed = AnnotatedImage(
            name=loaded.name, image=loaded.image, mpp=loaded.mpp, labels=labels
        )
        return resampled(renamed, self._spec.mpp)

    def window(self, index: int, rng: np.random.Generator, side_px: int) -> Window:
        """Cut a window out of an image, at a random place.

        Args:
            index: of the image.
            rng: decides on the place.
            side_px: side of the window in pixels of the model's mpp.

        Raises:
            DatasetError: as :meth:`image`.
            RecipeError: as :meth:`image`.
        """
        held = self._cache.get((self, index), lambda: self._hold(index))
        on_object = bool(held.places) and rng.random() < self._object_share
        size = held.image.image.shape[1], held.image.image.shape[0]
        x, y = _on_object(held.places, rng, side_px) if on_object else _anywhere(size, rng, side_px)
        return _cut(held.image, (round(x - side_px / 2), round(y - side_px / 2)), side_px)

    def _hold(self, index: int) -> _Held:
        image = self.image(index)
        return _Held(image=image, places=_object_places(image, self._spec))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """An image and where its objects are."""

    image: AnnotatedImage
    places: tuple[Places, ...]
    """One array for each category of object that is there."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        arrays: list[NDArray[np.generic]] = [self.image.image, *self.places]
        for label in self.image.labels.values():
            if isinstance(label, InstanceLabel | ClassLabel):
                arrays.append(label.ids)
            elif isinstance(label, BoxLabel) and label.ignore is not None:
                arrays.append(label.ignore)
        return sum(array.nbytes for array in arrays)


class ImageCache:
    """The decoded images used last, of one or more sources, up to a number of bytes."""

    def __init__(self, limit: int = DEFAULT_CACHE_BYTES) -> None:
        """Keep images up to ``limit`` bytes in all; 0: none."""
        self._limit = limit
        self._bytes = 0
        self._held: OrderedDict[tuple[Source, int], _Held] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Source, int], make: Callable[[], _Held]) -> _Held:
        """Return what is kept for a source and the number of its image, or make it."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()  # not under the lock: others may read meanwhile
        with self._lock:
            if key not in self._held and made.nbytes <= self._limit:
                self._held[key] = made
                self._bytes += made.nbytes
                while self._bytes > self._limit:
                    self._bytes -= self._held.popitem(last=False)[1].nbytes
        return made


def collate(windows: Sequence[Window], spec: ModelSpec) -> Batch:
    """Join windows of one size into a batch.

    Args:
        windows: at least one.
        spec: gives the heads and their order.

    Returns:
        The batch, on the CPU; a head that no window is labelled for is absent.
    """
    rows: dict[str, torch.Tensor] = {}
    labels: dict[str, torch.Tensor] = {}
    unknown: dict[str, torch.Tensor] = {}
    for head in spec.heads:
        own = [i for i, window in enumerate(windows) if head.name in window.labels]
        if not own:
            continue
        rows[head.name] = torch.tensor(own, dtype=torch.int64)
        values = [windows[i].labels[head.name] for i in own]
        if head.kind == "patch":
            labels[head.name] = torch.tensor([int(value) for value in values], dtype=torch.int64)
        elif head.kind == "detect":
            labels[head.name] = torch.from_numpy(_padded([np.asarray(v) for v in values]))
            masks = [windows[i].unknown[head.name] for i in own]
            unknown[head.name] = torch.from_numpy(np.stack(masks))
        else:
            labels[head.name] = torch.from_numpy(np.stack([np.asarray(v) for v in values]))
    pixels = torch.from_numpy(np.stack([window.pixels for window in windows]))
    return Batch(pixels=pixels, rows=rows, labels=labels, unknown=unknown)


def _padded(boxes: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    # At least one place, so that no reduction over boxes meets an empty axis.
    most = max(1, *(len(own) for own in boxes)) if boxes else 1
    joined = np.full((len(boxes), most, 4), np.nan, np.float32)
    for row, own in zip(joined, boxes, strict=True):
        row[: len(own)] = own
    return joined


def _anywhere(size: tuple[int, int], rng: np.random.Generator, side_px: int) -> tuple[float, float]:
    """Draw a centre so that at most a quarter of the crop's side lies outside the image.

    The crop is the middle half of the window. Every pixel can come to lie in it, and a crop
    as large as the image is mostly image, which a centre at the very corner would not be.
    """
    inset = side_px / 8
    x, y = (
        float(rng.uniform(inset, length - inset)) if length > 2 * inset else length / 2
        for length in size
    )
    return x, y


def _on_object(
    places: Sequence[Places], rng: np.random.Generator, side_px: int
) -> tuple[float, float]:
    """Draw a centre near an object of a category drawn evenly, so that rare ones are seen."""
    category = places[int(rng.integers(len(places)))]
    x, y = category[int(rng.integers(len(category)))]
    # objects are not always in the middle of what the network will see
    dx, dy = rng.uniform(-side_px / 8, side_px / 8, 2)
    return float(x + dx), float(y + dy)


def _cut(image: AnnotatedImage, corner: tuple[int, int], side_px: int) -> Window:
    labels: dict[str, NDArray[np.float32] | Mask | int] = {}
    unknown: dict[str, NDArray[np.bool_]] = {}
    for head, label in image.labels.items():
        if isinstance(label, PatchLabel):
            labels[head] = label.id
        elif isinstance(label, InstanceLabel):
            labels[head] = _filled(label.ids, corner, side_px, np.int32(IGNORE_ID))
        elif isinstance(label, ClassLabel):
            labels[head] = _filled(label.ids, corner, side_px, np.uint8(IGNORE_CLASS))
        else:
            labels[head] = _shifted(label.boxes, corner, side_px)
            everywhere = np.zeros(image.image.shape[:2], np.bool_)
            ignore = everywhere if label.ignore is None else label.ignore
            unknown[head] = _filled(ignore, corner, side_px, np.True_)
    pixels = _mirrored(image.image, corner, side_px)
    return Window(pixels=pixels, labels=labels, unknown=unknown)


def _mirrored(
    pixels: NDArray[np.uint8], corner: tuple[int, int], side_px: int
) -> NDArray[np.uint8]:
    """Cut a square; beyond the image, the image is mirrored at its edges, again and again."""
    (x, y), (height, width) = corner, pixels.shape[:2]
    if min(x, y) >= 0 and x + side_px <= width and y + side_px <= height:
        return pixels[y : y + side_px, x : x + side_px]
    columns, rows = (
        mirrored(np.arange(start, start + side_px), length)
        for start, length in zip(corner, pixels.shape[1::-1], strict=True)
    )
    return pixels.take(rows, axis=0).take(columns, axis=1)


def _filled(mask: NDArray[T], corner: tuple[int, int], side_px: int, fill: T) -> NDArray[T]:
    """Cut a square; beyond the mask is ``fill``."""
    (x, y), (height, width) = corner, mask.shape
    cut = np.full((side_px, side_px), fill, mask.dtype)
    left, top = max(0, x), max(0, y)
    right, bottom = min(width, x + side_px), min(height, y + side_px)
    if left < right and top < bottom:
        cut[top - y : bottom - y, left - x : right - x] = mask[top:bottom, left:right]
    return cut


def _shifted(
    boxes: NDArray[np.float32], corner: tuple[int, int], side_px: int
) -> NDArray[np.float32]:
    """Return the boxes that meet the window, in its pixels."""
    moved = boxes - np.array([*corner, *corner], np.float32)
    meets = (moved[:, :2] < side_px).all(axis=1) & (moved[:, 2:] > 0).all(axis=1)
    return moved[meets]


def _object_places(image: AnnotatedImage, spec: ModelSpec) -> tuple[Places, ...]:
    """Return where the objects are, apart by head and, where they are classified, by class."""
    places: list[Places] = []
    for head, label in image.labels.items():
        if isinstance(label, BoxLabel):
            middles: Places = (label.boxes[:, :2] + label.boxes[:, 2:]) / np.float32(2)
            places.append(middles)
        elif isinstance(label, InstanceLabel):
            classifier = spec.class_head(head)
            classes = image.labels.get(classifier.name) if classifier else None
            places.extend(_instance_places(label.ids, classes))
    return tuple(own for own in places if len(own))


def _instance_places(ids: NDArray[np.int32], classes: Label | None) -> list[Places]:
    pixels = np.flatnonzero(ids > 0)
    _, owner, counts = np.unique(ids.ravel()[pixels], return_inverse=True, return_counts=True)
    y, x = np.divmod(pixels, ids.shape[1])
    sums = [np.bincount(owner, along + 0.5, minlength=len(counts)) for along in (x, y)]
    middles: Places = (np.stack(sums, axis=1) / counts[:, None]).astype(np.float32)
    if not isinstance(classes, ClassLabel):
        return [middles]
    votes = np.zeros((len(counts), 256), np.int32)
    np.add.at(votes, (owner, classes.ids.ravel()[pixels]), 1)
    winner = votes.argmax(axis=1)
    return [middles[winner == i] for i in np.unique(winner)]
