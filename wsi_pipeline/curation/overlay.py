"""A crop as a picture for a careful eye: pixels, thin outlines, ids, and a ruler.

The ruler counts pixels of 0.5 um from the crop's top-left corner: the frame of corrections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsi_pipeline.curation.crops import IGNORE, Crop, Outline
from wsi_pipeline.durable import durable_file
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.lettering import PAPER, QUIET, TEXT, Rgb, font, shorten, write
from wsi_pipeline.slide import Slide

__all__ = ["COLOURS", "Look", "draw_crop", "find_slide"]

COLOURS: dict[str, Rgb] = {
    "nucleus": (60, 255, 60),
    "gland": (255, 230, 0),
    "lumen": (0, 225, 255),
    IGNORE: (255, 70, 0),
}
"""Of outlines: none of them is a colour of haematoxylin or eosin."""

_LONG_SIDE_PX = 1400
_TITLE_PX, _RULER_PX, _GAP_PX = 22, 34, 12
_TICK_PX, _LONG_TICK_PX = 4, 9
_LETTERS_PX = 12
_MIN_TICK_PX = 5
"""Closer ticks are left out."""
_MOST_PX = 6000
_ZOOMS = (0.1, 100.0)
_EDGE: Rgb = (0, 0, 0)
_GRID_SHARE = 0.25
_HATCH_PX = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How a crop is drawn."""

    zoom: float | None = None
    """Screen pixels a pixel of 0.5 um; None: so that the picture is about 1400 px long."""
    region: tuple[float, float, float, float] | None = None
    """x0, y0, x1, y1 in the crop's frame; None: all of it and ``context``."""
    context: float = 10.0
    """What is shown around the crop, in pixels of its frame."""
    plain: Literal["no", "beside", "alone"] = "no"
    """Whether the pixels without outlines are drawn too, or alone."""
    ids: bool = True
    """Whether the objects bear their numbers."""
    grid: bool = True
    """Whether there is a faint line every 50 px."""


@dataclass(slots=True)
class _View:
    """A part of a crop's frame on the screen."""

    x0: float
    y0: float
    x1: float
    y1: float
    zoom: float
    size: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.size = (
            max(1, round((self.x1 - self.x0) * self.zoom)),
            max(1, round((self.y1 - self.y0) * self.zoom)),
        )
        if max(self.size) > _MOST_PX:
            msg = f"a picture of {self.size[0]} x {self.size[1]} px is too large to look at"
            raise DatasetError(f"{msg}; lower the zoom, or draw a part")

    def screen(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map (N, 2) points of the crop's frame to the screen."""
        on_screen: NDArray[np.float64] = (xy - (self.x0, self.y0)) * self.zoom
        return on_screen


def find_slide(crop: Crop, slides: Path) -> Path:
    """Return where a crop's slide is.

    Raises:
        DatasetError: it is not in the folder.
    """
    path = slides / crop.slide
    if not path.is_file():
        msg = f"crop {crop.id} is of the slide {crop.slide}, which is not in {slides}"
        raise DatasetError(f"{msg}; name the folder where it is")
    return path


def draw_crop(crop: Crop, slide_path: Path, out: Path, look: Look | None = None) -> None:
    """Draw a crop as a PNG.

    Args:
        crop: what to draw.
        slide_path: its slide.
        out: the picture.
        look: how.

    Raises:
        DatasetError: another slide than the crop's, or a picture that would be empty or huge.
        SlideError: the slide cannot be read.
    """
    look = look or Look()
    view = _view(crop, look)
    raw = _pixels(crop, slide_path, view)
    panels = [raw] if look.plain in ("beside", "alone") else []
    if look.plain != "alone":
        panels.append(_outlined(crop, raw.copy(), view, look))
    picture = _framed(crop, panels, view)
    with durable_file(out) as beside:
        picture.save(beside, format="png")


def _view(crop: Crop, look: Look) -> _View:
    width, height = crop.box.width / crop.scale, crop.box.height / crop.scale
    around = (-look.context, -look.context, width + look.context, height + look.context)
    if not 0 <= look.context < math.inf:
        raise DatasetError(f"the context must be 0 pixels or more, not {look.context}")
    if look.zoom is not None and not _ZOOMS[0] <= look.zoom <= _ZOOMS[1]:
        raise DatasetError(f"the zoom must be from {_ZOOMS[0]:g} to {_ZOOMS[1]:g}, not {look.zoom}")
    x0, y0, x1, y1 = look.region or around
    if not (-math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf):
        raise DatasetError(f"a part is x0 y0 x1 y1 with x0 < x1 and y0 < y1, not {look.region}")
    panels = 2 if look.plain == "beside" else 1
    room = _LONG_SIDE_PX - 2 * _RULER_PX
    zoom = look.zoom or max(0.5, min(room / panels / (x1 - x0), room / (y1 - y0)))
    return _View(x0, y0, x1, y1, zoom)


def _pixels(crop: Crop, slide_path: Path, view: _View) -> Image.Image:
    """Read what is seen: never finer than level 0, and white beyond the slide."""
    step = max(1.0, crop.scale / view.zoom)
    with Slide.open(slide_path, mpp=crop.mpp) as slide:
        crop.check_slide(slide.size)
        # whole level-0 pixels, so that nothing is resampled twice
        origin = crop.grid.to_level0(np.array([[view.x0, view.y0], [view.x1, view.y1]]))
        left, top = np.floor(origin[0])
        grid = PixelGrid(origin=(float(left), float(top)), spacing=(step, step), size=(1, 1))
        first, last = grid.from_level0(origin)
        width, height = (math.ceil(length) for length in last)
        pixels = slide.read(grid, Box(x=0, y=0, width=width, height=height))
    place = (*first.tolist(), *last.tolist())
    return Image.fromarray(pixels).resize(view.size, Image.Resampling.BICUBIC, box=place)


def _outlined(crop: Crop, picture: Image.Image, view: _View, look: Look) -> Image.Image:
    if look.grid:
        picture = _with_grid(picture, view)
    pen = ImageDraw.Draw(picture)
    edge = np.array(crop.rectangle.exterior.coords)
    pen.line(_flat(view.screen(crop.grid.from_level0(edge))), fill=_EDGE)
    # regions first, lest they lie over nuclei
    drawn = sorted(crop.outlines, key=lambda outline: -outline.polygon.area)
    for outline in drawn:
        _trace(pen, crop, outline, view)
    if look.ids:
        for outline in drawn:
            _number(pen, crop, outline, view)
    return picture


def _trace(pen: ImageDraw.ImageDraw, crop: Crop, outline: Outline, view: _View) -> None:
    colour = COLOURS[outline.kind]
    on_screen = shapely.transform(
        outline.polygon, lambda xy: view.screen(crop.grid.from_level0(xy))
    )
    for ring in (on_screen.exterior, *on_screen.interiors):
        pen.line(_flat(np.asarray(ring.coords)), fill=colour, width=1)
    if outline.kind == IGNORE:
        for line in _hatching(on_screen):
            pen.line(_flat(line), fill=colour, width=1)


def _hatching(polygon: shapely.Polygon) -> Iterator[NDArray[np.float64]]:
    x0, y0, x1, y1 = polygon.bounds
    starts = np.arange(x0 - (y1 - y0), x1, _HATCH_PX)
    lines = [shapely.LineString([(x, y1), (x + y1 - y0, y0)]) for x in starts]
    for part in shapely.get_parts(shapely.intersection(lines, polygon)):
        if part.geom_type == "LineString":
            yield np.asarray(part.coords)


def _number(pen: ImageDraw.ImageDraw, crop: Crop, outline: Outline, view: _View) -> None:
    seen = _seen(crop, view).intersection(outline.polygon)
    if seen.is_empty:
        return
    spot = seen.representative_point() if outline.kind == IGNORE else seen.centroid
    if outline.kind == "gland":
        # near its upper edge: in the middle is the lumen's
        left, top, right, bottom = seen.bounds
        top = min(top + _LETTERS_PX * crop.scale / view.zoom, (top + bottom) / 2)
        spot = shapely.LineString([(left, top), (right, top)]).intersection(seen).centroid
    if not seen.contains(spot):
        spot = seen.representative_point()
    x, y = view.screen(crop.grid.from_level0(np.array([[spot.x, spot.y]])))[0]
    pen.text(
        (round(x), round(y)), str(outline.id), fill=COLOURS[outline.kind], font=font(_LETTERS_PX),
        anchor="mm", stroke_width=1, stroke_fill=(0, 0, 0),
    )  # fmt: skip


def _seen(crop: Crop, view: _View) -> shapely.Polygon:
    corners = np.array([[view.x0, view.y0], [view.x1, view.y1]])
    return shapely.box(*crop.grid.to_level0(corners).ravel())


def _with_grid(picture: Image.Image, view: _View) -> Image.Image:
    lines = picture.copy()
    pen = ImageDraw.Draw(lines)
    width, height = view.size
    for _, x in _marks(view.x0, view.x1, view.zoom, 50):
        pen.line([(x, 0), (x, height)], fill=_EDGE)
    for _, y in _marks(view.y0, view.y1, view.zoom, 50):
        pen.line([(0, y), (width, y)], fill=_EDGE)
    return Image.blend(picture, lines, _GRID_SHARE)


def _marks(start: float, end: float, zoom: float, every: int) -> Iterator[tuple[int, int]]:
    """Yield the multiples of ``every`` from start to end, and where they are on the screen."""
    for value in range(math.ceil(start / every) * every, math.floor(end) + 1, every):
        yield value, round((value - start) * zoom)


def _framed(crop: Crop, panels: list[Image.Image], view: _View) -> Image.Image:
    """Put panels beside each other, with a title and a ruler at every edge."""
    width, height = view.size
    across = _RULER_PX + width
    canvas = Image.new(
        "RGB",
        (len(panels) * across + _RULER_PX + _GAP_PX, _TITLE_PX + 2 * _RULER_PX + height),
        PAPER,
    )
    pen = ImageDraw.Draw(canvas)
    rounds = crop.history[-1].round if crop.history else 0
    title = (
        f"{crop.id}   {crop.part}, {'+'.join(crop.labels)}, round {rounds}   {crop.tissue}   "
        f"ruler: px of 0.5 um   zoom {view.zoom:.3g}"
    )
    write(pen, (6, 4), shorten(title, canvas.width - 12, 13), 13)
    for number, panel in enumerate(panels):
        corner = (_RULER_PX + number * across, _TITLE_PX + _RULER_PX)
        canvas.paste(panel, corner)
        _rule(pen, view, corner, right=number == len(panels) - 1)
    return canvas


def _rule(pen: ImageDraw.ImageDraw, view: _View, corner: tuple[int, int], *, right: bool) -> None:
    (left, top), (width, height) = corner, view.size
    minor = next((n for n in (1, 5, 10) if n * view.zoom >= _MIN_TICK_PX), 50)
    labelled = next((n for n in (10, 50) if n * view.zoom >= 3 * _LETTERS_PX), 100)
    for value, at in _marks(view.x0, view.x1, view.zoom, minor):
        long = _LONG_TICK_PX if value % 10 == 0 else _TICK_PX
        x, below = left + at, top + height
        pen.line([(x, top - long), (x, top - 1)], fill=TEXT)
        pen.line([(x, below), (x, below + long)], fill=TEXT)
        if value % labelled == 0:
            write(pen, (x, top - long - 14), str(value), _LETTERS_PX, QUIET, "ma")
            write(pen, (x, below + long + 2), str(value), _LETTERS_PX, QUIET, "ma")
    for value, at in _marks(view.y0, view.y1, view.zoom, minor):
        long = _LONG_TICK_PX if value % 10 == 0 else _TICK_PX
        y, beyond = top + at, left + width
        pen.line([(left - long, y), (left - 1, y)], fill=TEXT)
        if right:
            pen.line([(beyond, y), (beyond + long, y)], fill=TEXT)
        if value % labelled == 0:
            write(pen, (left - long - 2, y), str(value), _LETTERS_PX, QUIET, "rm")
            if right:
                write(pen, (beyond + long + 2, y), str(value), _LETTERS_PX, QUIET, "lm")


def _flat(points: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the pixels that hold points; Pillow itself would round towards 0."""
    return [(int(x), int(y)) for x, y in np.floor(points)]
