"""Windows in rows, rows in panels, and the tiles of the file under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wsi_pipeline.geometry import Box
from wsi_pipeline.slide.planes import Sampling

__all__ = ["Row", "canvas_box", "plan_rows", "touched"]

_PANEL_PX = 20480
"""Rows of windows that together are wider than this are not put on one canvas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Windows side by side, at about one height."""

    boxes: tuple[Box, ...]
    """Grid pixels."""
    span: Box
    """The rows that these windows have together, the columns of their whole panel; grid pixels."""
    canvas: Box
    """The whole tiles that cover the span; plane pixels."""
    until: int
    """One past the last line that a window of the panel needs; grid pixels."""


def plan_rows(sampling: Sampling, boxes: Sequence[Box]) -> list[Row]:
    """Group windows into rows and rows into panels, and lay out their canvases."""
    widest, highest = (max((box.size[axis] for box in boxes), default=0) for axis in (0, 1))
    lines: list[list[Box]] = []
    spans: list[Box] = []
    for box in boxes:
        # Windows that are fitted to the tissue are of other heights than those beside them.
        span = _around([spans[-1], box]) if spans else box
        is_beside = (
            bool(spans)
            and box.x >= lines[-1][-1].x
            and span.height <= highest
            # the next panel may begin at the same height
            and span.width <= max(_PANEL_PX, box.width)
        )
        if is_beside:
            lines[-1].append(box)
            spans[-1] = span
        else:
            lines.append([box])
            spans.append(box)
    panel: list[int] = []
    edges = (0, 0)
    rows: list[Row] = []

    def finish() -> None:
        until = max((spans[index].y1 for index in panel), default=0)
        for index in panel:
            span = Box.from_edges(edges[0], spans[index].y, edges[1], spans[index].y1)
            canvas = canvas_box(sampling, span)
            rows.append(Row(boxes=tuple(lines[index]), span=span, canvas=canvas, until=until))

    for index, span in enumerate(spans):
        wider = min(edges[0], span.x), max(edges[1], span.x1)
        if panel and (span.y <= spans[panel[-1]].y or wider[1] - wider[0] > max(_PANEL_PX, widest)):
            finish()
            panel = []
        edges = wider if panel else (span.x, span.x1)
        panel.append(index)
    finish()
    return rows


def touched(sampling: Sampling, boxes: Sequence[Box]) -> set[tuple[int, int]]:
    """Return ``(column, row)`` of the tiles that some boxes need."""
    tiles: set[tuple[int, int]] = set()
    for box in boxes:
        tiles |= sampling.tiles(box)
    return tiles


def canvas_box(sampling: Sampling, span: Box) -> Box:
    """Return the whole tiles, inside the plane or not, that cover the pixels of a span."""
    width, height = sampling.plane.raster.tile_size
    # where grid and plane agree, windows are views: the canvas must reach as far as they do
    shift = sampling.shift
    need = span.shift(*shift) if shift is not None else sampling.source(span)
    return Box.from_edges(
        need.x // width * width,
        need.y // height * height,
        -(-need.x1 // width) * width,
        -(-need.y1 // height) * height,
    )


def _around(boxes: Sequence[Box]) -> Box:
    return Box.from_edges(
        min(box.x for box in boxes),
        min(box.y for box in boxes),
        max(box.x1 for box in boxes),
        max(box.y1 for box in boxes),
    )
