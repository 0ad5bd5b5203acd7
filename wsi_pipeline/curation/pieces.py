"""What happens to the outlines of a crop: they are put in, give way, and are cut.

Everything here is in level-0 pixels. An outline that is put in is clipped to the crop; of what
is left of it or of its neighbours, slivers go and pieces become objects of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.ops import split

from wsi_pipeline.curation.crops import MIN_AREA_UM2, Crop, Outline, rounded
from wsi_pipeline.errors import DatasetError

__all__ = ["Board", "bridged", "cut", "ellipse", "grown", "polygons_of", "smooth"]

_THIN_UM = 0.3
"""Pieces of a neighbour that are nowhere twice as thick as this are slivers."""
_BRIDGE_UM = 0.75
"""Objects that are to be merged may lie twice as far apart."""
_TOUCH_UM2 = 0.05
"""Objects that share less only touch."""
_REPLACED = 2 / 3
"""An object that loses more of its area to a new one was meant to be replaced by it."""
_STEPS = 8
"""Points of a curve between two that were given."""

Points = NDArray[np.float64]


class Board:
    """The outlines of a crop while they are corrected."""

    def __init__(self, crop: Crop, *, source: str) -> None:
        """Take the outlines of a crop.

        Args:
            crop: stays as it is.
            source: whose outline one is that had to give way: of who puts others in.
        """
        self.crop = crop
        self.source = source
        self.outlines = {outline.id: outline for outline in crop.outlines}
        self.next_id = crop.next_id
        self.notes: list[str] = []
        """What happened beside what was asked."""

    def done(self) -> Crop:
        """Return the crop with the outlines as they are now."""
        return self.crop.with_outlines(self.outlines.values(), next_id=self.next_id)

    def get(self, number: int) -> Outline:
        """Return an object.

        Raises:
            DatasetError: there is none of this id.
        """
        if number not in self.outlines:
            raise DatasetError(f"there is no object {number}")
        return self.outlines[number]

    def new_id(self) -> int:
        """Return an id that no object ever had."""
        self.next_id += 1
        return self.next_id - 1

    def neighbours(self, kind: str, but: Iterable[int]) -> list[Outline]:
        """Return the objects of a kind, without some."""
        skip = set(but)
        return [o for o in self.outlines.values() if o.kind == kind and o.id not in skip]

    def place(self, outline: Outline, shape: shapely.Geometry, *, wins: bool) -> None:
        """Put an object in, with a new shape.

        Args:
            outline: its id (which may be there already), kind and source.
            shape: clipped to the crop; all of it that is no sliver becomes objects, the
                largest piece under the outline's id.
            wins: True: neighbours of its kind give way; False: it ends where they begin.

        Raises:
            DatasetError: nothing is left of it.
        """
        shape = shape.intersection(self.crop.rectangle)
        others = self.neighbours(outline.kind, [outline.id]) if outline.kind != "ignore" else []
        met = [other for other in others if other.polygon.intersects(shape)]
        if not wins and met:
            shape = shape.difference(shapely.union_all([other.polygon for other in met]))
        pieces = self._pieces(shape)
        if not pieces:
            raise DatasetError(f"nothing of at least {MIN_AREA_UM2:g} um2 is left in the crop")
        self._settle(outline, pieces)
        if wins:
            for other in met:
                self._give_way(other, shapely.union_all(pieces))

    def _give_way(self, other: Outline, shape: shapely.Geometry) -> None:
        shared = other.polygon.intersection(shape).area
        if shared * self.crop.mpp**2 < _TOUCH_UM2:
            return
        left = other.polygon.difference(shape)
        thin = _THIN_UM / self.crop.mpp
        opened = left.buffer(-thin, join_style="mitre").buffer(thin, join_style="mitre")
        pieces = self._pieces(left.intersection(opened))
        if not pieces or left.area < (1 - _REPLACED) * other.polygon.area:
            del self.outlines[other.id]
            self.notes.append(f"object {other.id} was replaced: little of it was left uncovered")
            return
        self._settle(replace(other, source=self.source), pieces)

    def _settle(self, outline: Outline, pieces: Sequence[shapely.Polygon]) -> None:
        for number, piece in enumerate(pieces):
            own = outline.id if number == 0 else self.new_id()
            if number:
                self.notes.append(f"object {outline.id} fell apart; a piece of it is {own} now")
            self.outlines[own] = replace(outline, id=own, polygon=piece)

    def _pieces(self, shape: shapely.Geometry) -> list[shapely.Polygon]:
        """Return the pieces that are no slivers, the largest first."""
        least = MIN_AREA_UM2 / self.crop.mpp**2
        parts = polygons_of(rounded(shape))
        return sorted((p for p in parts if p.area >= least), key=lambda p: -p.area)


def polygons_of(shape: shapely.Geometry) -> list[shapely.Polygon]:
    """Return the polygons of any shape, without its lines and points."""
    parts: list[shapely.Polygon] = []
    for part in shapely.get_parts(shape):
        if part.geom_type == "Polygon":
            parts.append(part)
        elif part.geom_type == "MultiPolygon":
            parts.extend(part.geoms)
    return [part for part in parts if not part.is_empty]


def smooth(points: Points) -> shapely.Polygon:
    """Return the closed centripetal Catmull-Rom curve through points as a polygon.

    Barry and Goldman's pyramid with knots at the square roots of the distances (Yuksel et al.
    2011): it passes through every point and has no loops of its own between two.

    Args:
        points: (N, 2), three or more, in their order along the outline.

    Raises:
        DatasetError: fewer than three different points, or an outline that crosses itself.
    """
    points = points[np.any(points != np.roll(points, 1, axis=0), axis=1)]
    if len(points) < 3:
        raise DatasetError(f"an outline needs 3 different points or more, not {len(points)}")
    p0, p1, p2, p3 = (np.roll(points, shift, axis=0)[:, None] for shift in (1, 0, -1, -2))
    t1, t2, t3 = np.cumsum(
        [np.sqrt(np.linalg.norm(b - a, axis=2)) for a, b in ((p0, p1), (p1, p2), (p2, p3))], axis=0
    )[..., None]
    t = t1 + (t2 - t1) * (np.arange(_STEPS) / _STEPS)[None, :, None]
    a1 = ((t1 - t) * p0 + t * p1) / t1
    a2 = ((t2 - t) * p1 + (t - t1) * p2) / (t2 - t1)
    a3 = ((t3 - t) * p2 + (t - t2) * p3) / (t3 - t2)
    b1 = ((t2 - t) * a1 + t * a2) / t2
    b2 = ((t3 - t) * a2 + (t - t1) * a3) / (t3 - t1)
    curve = ((t2 - t) * b1 + (t - t1) * b2) / (t2 - t1)
    polygon = shapely.Polygon(curve.reshape(-1, 2))
    if not polygon.is_valid:
        polygon = shapely.Polygon(points)
    if not polygon.is_valid:
        raise DatasetError("the outline crosses itself: give the points in their order along it")
    return polygon


def ellipse(centre: Points, axes: tuple[float, float], angle_deg: float) -> shapely.Polygon:
    """Return an ellipse as a polygon of 48 points.

    Args:
        centre: (2,) x, y.
        axes: full lengths, the one along the angle first.
        angle_deg: of the first axis, counter-clockwise on the screen from the x axis, which
            points right; y points down.
    """
    turn, angle = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.deg2rad(angle_deg)
    along, across = axes[0] / 2 * np.cos(turn), axes[1] / 2 * np.sin(turn)
    x = along * np.cos(angle) + across * np.sin(angle)
    y = -along * np.sin(angle) + across * np.cos(angle)
    return shapely.Polygon(centre + np.stack([x, y], axis=1))


def cut(polygon: shapely.Polygon, points: Points, least: float) -> list[shapely.Polygon]:
    """Cut a polygon along a line.

    Args:
        polygon: what to cut.
        points: (N, 2), two or more; the line goes straight on beyond its ends.
        least: pieces of a smaller area stay with the piece they share the longest edge with.

    Returns:
        The pieces, the largest first; one where the line misses.
    """
    far = 2 * polygon.hausdorff_distance(shapely.MultiPoint(points)) + polygon.length
    ends = [points[0] + far * _direction(points[1], points[0])]
    ends.append(points[-1] + far * _direction(points[-2], points[-1]))
    line = shapely.LineString([ends[0], *points, ends[1]])
    if not line.is_simple:
        raise DatasetError("the line of the cut crosses itself")
    pieces = sorted(polygons_of(split(polygon, line)), key=lambda piece: -piece.area)
    large = [piece for piece in pieces if piece.area >= least] or pieces[:1]
    for small in pieces[len(large) :]:
        shared = [small.intersection(piece).length for piece in large]
        best = int(np.argmax(shared))
        large[best] = large[best].union(small)
    return sorted(large, key=lambda piece: -piece.area)


def bridged(polygons: Sequence[shapely.Polygon], mpp: float) -> shapely.Polygon:
    """Join polygons that touch or all but touch.

    Raises:
        DatasetError: there is more than 1.5 um between them.
    """
    reach = _BRIDGE_UM / mpp
    joined = shapely.union_all(list(polygons))
    # slits and pinholes between them go too
    joined = joined.union(joined.buffer(reach).buffer(-reach))
    if joined.geom_type != "Polygon":
        raise DatasetError(f"they are more than {2 * _BRIDGE_UM:g} um apart: draw one outline")
    return joined


def grown(polygon: shapely.Polygon, by: float, room: shapely.Polygon) -> shapely.Geometry:
    """Push an outline out, or pull it in.

    Args:
        polygon: inside the room.
        by: how far; negative: in. An edge of the room is no outline and stays where it is.
        room: the crop.
    """
    if by >= 0:
        return polygon.buffer(by, quad_segs=4)
    near = shapely.box(*polygon.bounds).buffer(-2 * by, join_style="mitre").intersection(room)
    return polygon.difference(near.difference(polygon).buffer(-by, quad_segs=4))


def _direction(start: Points, end: Points) -> Points:
    length = float(np.linalg.norm(end - start))
    if not length:
        raise DatasetError("two points of the line are the same")
    unit: Points = (end - start) / length
    return unit
