"""Corrections of a crop: a text, one verb a line, that turns one round into the next.

Places are ``x,y`` in the crop's own frame: pixels of 0.5 um from the crop's top-left corner,
decimals allowed, as the ruler of the drawn crop shows them. They may lie outside the crop, and
what is drawn there is clipped. ``#`` begins a comment. The verbs::

    delete ID...                          take objects away
    delete-in x0 y0 x1 y1 [KIND]          ... those whose centre lies in a rectangle
    add KIND x,y x,y x,y ...              a new object: the smooth closed curve through points
    ellipse KIND x,y MAJOR MINOR DEGREES  ... an ellipse: centre, full axes, angle of the major
                                          one, counter-clockwise on screen, 0 to the right
    redraw ID x,y x,y x,y ...             another outline for an object: the curve through points
    split ID x,y x,y ...                  cut along a line, which goes on beyond its ends
    merge ID ID ...                       one of several; the first gives its id
    grow ID... PX                         push the outline out; a negative number pulls it in
    kind ID... KIND                       another kind; ``ignore`` makes a region of unknown
    ignore x0 y0 x1 y1 [LABEL]            a rectangle where nobody knows (for one head, or all)
    ignore-polygon x,y x,y x,y ... [LABEL]    a polygon of it, with straight edges

Where a new outline (add, ellipse, redraw, kind) covers others of its kind, those give way, and
one of which little is left goes. An outline that grows stops at its neighbours. Whatever got
another outline is from then on by ``hand``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import shapely
from numpy.typing import NDArray

from wsi_pipeline.curation.crops import HEADS, IGNORE, MIN_AREA_UM2, Crop, Outline, Round
from wsi_pipeline.curation.pieces import Board, bridged, cut, ellipse, grown, smooth
from wsi_pipeline.errors import DatasetError

__all__ = ["Corrected", "apply_corrections"]

_HAND = "hand"
_FARTHEST = 1e6
"""Larger numbers are slips, and polygons of such a size break."""
_LONGEST_ID = 9
"""Digits."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_POINT = re.compile(rf"({_NUMBER.pattern}),({_NUMBER.pattern})")

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """A crop after a round."""

    crop: Crop
    """With the round in its history."""
    counts: dict[str, int]
    """Lines applied, by verb."""
    notes: tuple[str, ...]
    """What happened beside what was asked, with the number of the line."""


def apply_corrections(crop: Crop, text: str, *, by: str) -> Corrected:
    """Apply a text of corrections to a crop.

    Args:
        crop: stays as it is.
        text: as the module says.
        by: who corrected.

    Raises:
        DatasetError: lines that cannot be applied, each with its number and reason; then
            nothing is applied.
    """
    board, counts = Board(crop, source=_HAND), dict.fromkeys(_VERBS, 0)
    wrong: list[str] = []
    notes: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            if words[0] not in _VERBS:
                raise DatasetError(f"unknown verb {words[0]!r}; there are {', '.join(_VERBS)}")
            _VERBS[words[0]](board, words[1:])
        except DatasetError as error:
            wrong.append(f"line {number} ({line.strip()[:60]}): {error}")
            continue
        counts[words[0]] += 1
        notes += [f"line {number}: {note}" for note in board.notes]
        board.notes.clear()
    if wrong:
        raise DatasetError("nothing was applied:\n  " + "\n  ".join(wrong))
    done = {verb: count for verb, count in counts.items() if count}
    how = "corrected by hand: " + (
        ", ".join(f"{n} {verb}" for verb, n in done.items()) or "nothing"
    )
    step = Round(round=len(crop.history), by=by, how=how)
    after = replace(board.done(), history=(*crop.history, step))
    return Corrected(crop=after, counts=done, notes=tuple(notes))


def _delete(board: Board, words: Sequence[str]) -> None:
    for number in _distinct_ids(words, least=1):
        board.get(number)
        del board.outlines[number]


def _delete_in(board: Board, words: Sequence[str]) -> None:
    if len(words) not in (4, 5):
        raise DatasetError("wanted: x0 y0 x1 y1, and a kind if not all")
    kinds = [_kind(board, words[4])] if len(words) == 5 else board.crop.kinds
    place = _rectangle(board, words[:4])
    found = [
        outline.id
        for outline in board.outlines.values()
        if outline.kind in kinds and place.covers(outline.polygon.centroid)
    ]
    if not found:
        raise DatasetError("no object has its centre in there")
    for number in found:
        del board.outlines[number]


def _add(board: Board, words: Sequence[str]) -> None:
    if len(words) < 4:
        raise DatasetError("wanted: a kind and 3 points or more")
    _put_new(board, _kind(board, words[0]), smooth(_points(board, words[1:])))


def _ellipse(board: Board, words: Sequence[str]) -> None:
    if len(words) != 5:
        raise DatasetError("wanted: a kind, the centre x,y, two full axes and an angle")
    kind, scale = _kind(board, words[0]), board.crop.scale
    major, minor, angle = (_number(word) for word in words[2:])
    if min(major, minor) <= 0:
        raise DatasetError("the axes must be longer than 0")
    centre = _points(board, words[1:2])[0]
    _put_new(board, kind, ellipse(centre, (major * scale, minor * scale), angle))


def _redraw(board: Board, words: Sequence[str]) -> None:
    if len(words) < 4:
        raise DatasetError("wanted: an id and 3 points or more")
    outline = board.get(_id(words[0]))
    shape = smooth(_points(board, words[1:]))
    board.place(replace(outline, source=_HAND), shape, wins=True)


def _split(board: Board, words: Sequence[str]) -> None:
    if len(words) < 3:
        raise DatasetError("wanted: an id and 2 points or more")
    outline = board.get(_id(words[0]))
    least = MIN_AREA_UM2 / board.crop.mpp**2
    pieces = cut(outline.polygon, _points(board, words[1:]), least)
    if len(pieces) < 2:
        raise DatasetError(f"the line cuts nothing of {MIN_AREA_UM2:g} um2 off object {outline.id}")
    for number, piece in enumerate(pieces):
        own = outline.id if number == 0 else board.new_id()
        board.place(replace(outline, id=own, source=_HAND), piece, wins=False)
        if number:
            board.notes.append(f"a piece of object {outline.id} is object {own} now")


def _merge(board: Board, words: Sequence[str]) -> None:
    own = [board.get(number) for number in _distinct_ids(words, least=2)]
    if len({(outline.kind, outline.label) for outline in own}) > 1:
        raise DatasetError("they are of different kinds")
    shape = bridged([outline.polygon for outline in own], board.crop.mpp)
    for outline in own[1:]:
        del board.outlines[outline.id]
    board.place(replace(own[0], source=_HAND), shape, wins=False)


def _grow(board: Board, words: Sequence[str]) -> None:
    if len(words) < 2:
        raise DatasetError("wanted: ids, and by how many pixels")
    by = _number(words[-1])
    if not by or abs(by) > 100:
        raise DatasetError(f"by how many pixels? {words[-1]} is 0 or more than 100 of them")
    for number in _distinct_ids(words[:-1], least=1):
        outline = board.get(number)
        shape = grown(outline.polygon, by * board.crop.scale, board.crop.rectangle)
        try:
            board.place(replace(outline, source=_HAND), shape, wins=False)
        except DatasetError as error:
            raise DatasetError(f"object {number}: {error}") from error


def _change_kind(board: Board, words: Sequence[str]) -> None:
    if len(words) < 2:
        raise DatasetError("wanted: ids and a kind")
    kind = words[-1] if words[-1] == IGNORE else _kind(board, words[-1])
    for number in _distinct_ids(words[:-1], least=1):
        outline = board.get(number)
        label = _head(outline.kind) if kind == IGNORE else None
        changed = replace(outline, kind=kind, label=label)
        board.place(changed, outline.polygon, wins=True)


def _ignore(board: Board, words: Sequence[str]) -> None:
    if len(words) not in (4, 5):
        raise DatasetError("wanted: x0 y0 x1 y1, and a label if not all")
    label = _label(board, words[4]) if len(words) == 5 else None
    _put_new(board, IGNORE, _rectangle(board, words[:4]), label)


def _ignore_polygon(board: Board, words: Sequence[str]) -> None:
    label = None
    if words and not _POINT.fullmatch(words[-1]):
        words, label = words[:-1], _label(board, words[-1])
    if len(words) < 3:
        raise DatasetError("wanted: 3 points or more, and a label if not all")
    shape = shapely.Polygon(_points(board, words))
    if not shape.is_valid:
        raise DatasetError("the outline crosses itself: give the points in their order along it")
    _put_new(board, IGNORE, shape, label)


_VERBS: dict[str, Callable[[Board, Sequence[str]], None]] = {
    "delete": _delete,
    "delete-in": _delete_in,
    "add": _add,
    "ellipse": _ellipse,
    "redraw": _redraw,
    "split": _split,
    "merge": _merge,
    "grow": _grow,
    "kind": _change_kind,
    "ignore": _ignore,
    "ignore-polygon": _ignore_polygon,
}


def _put_new(board: Board, kind: str, shape: shapely.Polygon, label: str | None = None) -> None:
    outline = Outline(id=board.new_id(), kind=kind, polygon=shape, source=_HAND, label=label)
    board.place(outline, shape, wins=True)


def _number(word: str) -> float:
    if not _NUMBER.fullmatch(word):
        raise DatasetError(f"{word!r} is no number")
    if abs(float(word)) > _FARTHEST:
        raise DatasetError(f"{word[:20]} is a larger number than {_FARTHEST:,.0f}")
    return float(word)


def _id(word: str) -> int:
    if not word.isdecimal() or len(word) > _LONGEST_ID:
        raise DatasetError(f"{word[:20]!r} is no id")
    return int(word)


def _distinct_ids(words: Sequence[str], *, least: int) -> list[int]:
    ids = [_id(word) for word in words]
    if len(ids) < least or len(set(ids)) < len(ids):
        raise DatasetError(f"{least} or more ids are wanted, each once")
    return ids


def _kind(board: Board, word: str) -> str:
    if word not in board.crop.kinds:
        raise DatasetError(f"{word!r} is no kind of this crop, which has {board.crop.kinds}")
    return word


def _label(board: Board, word: str) -> str:
    if word not in board.crop.labels:
        raise DatasetError(f"{word!r} is no label of this crop, which has {board.crop.labels}")
    return word


def _head(kind: str) -> str | None:
    return next((head for head, own in HEADS.items() if own == kind), None)


def _points(board: Board, words: Sequence[str]) -> Points:
    """Return (N, 2) level-0 points."""
    found = []
    for word in words:
        if not _POINT.fullmatch(word):
            raise DatasetError(f"{word!r} is no point; one is written x,y without a space")
        found.append([_number(part) for part in word.split(",")])
    return board.crop.grid.to_level0(np.array(found, np.float64).reshape(-1, 2))


def _rectangle(board: Board, words: Sequence[str]) -> shapely.Polygon:
    x0, y0, x1, y1 = (_number(word) for word in words)
    if x0 >= x1 or y0 >= y1:
        raise DatasetError("wanted: x0 y0 x1 y1 with x0 < x1 and y0 < y1")
    corners = board.crop.grid.to_level0(np.array([[x0, y0], [x1, y1]]))
    return shapely.box(*corners.ravel())
