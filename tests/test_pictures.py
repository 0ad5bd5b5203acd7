"""Pictures of a training run: right things in right places, and never a failure."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.preview import TEXT
from wsi_pipeline.training import pictures
from wsi_pipeline.training.pictures import (
    COLOURS,
    PAGE_PX,
    TILE_GAP_PX,
    TILE_PX,
    LogRow,
    Panel,
    draw_curves,
    draw_examples,
)
from wsi_pipeline.training.plot import Axes, curve_of, legend_lines, points_of

MARGIN = 28


def run(steps=300, heads=("nuclei", "gland"), *, scale=1.0):
    rows = []
    for step in range(1, steps + 1):
        losses = {h: scale * (n + 1) * math.exp(-step / 100) + 0.1 for n, h in enumerate(heads)}
        rows.append(
            LogRow(step=step, loss=sum(losses.values()), losses=losses, learning_rate=1e-3 / step)
        )
        if step % 50 == 0:
            rows.append(
                LogRow(step=step, scores={h: n / 2 + step / 1000 for n, h in enumerate(heads)})
            )
    return rows


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


def count(pixels, colour):
    return int((np.abs(pixels.astype(int) - colour).max(axis=-1) <= 12).sum())


def test_curves_have_their_colours_in_their_plots(tmp_path):
    draw_curves(run(), tmp_path / "c.png")
    page = picture(tmp_path / "c.png")
    assert page.shape[1::-1] == PAGE_PX
    left, right = page[130:, : PAGE_PX[0] // 2], page[130:, PAGE_PX[0] // 2 :]
    for colour in COLOURS[:2]:
        assert count(left, colour) > 200
        assert count(right, colour) > 200
    assert count(left, TEXT) > 200  # the total
    assert count(page, COLOURS[2]) == 0


def test_without_scores_the_loss_has_the_whole_width(tmp_path):
    rows = [LogRow(step=n, losses={"a": 1.0 + 1 / (n + 1)}) for n in range(40)]
    draw_curves(rows, tmp_path / "c.png")
    right = picture(tmp_path / "c.png")[130:, PAGE_PX[0] // 2 :]
    assert count(right, COLOURS[0]) > 200


def test_a_single_heads_loss_is_not_drawn_twice(tmp_path):
    draw_curves(run(heads=("only",)), tmp_path / "c.png")
    plot = picture(tmp_path / "c.png")[130:550, 95 : PAGE_PX[0] // 2]
    assert count(plot, COLOURS[0]) > 200
    assert count(plot, TEXT) == 0
    assert [curve.name for curve in pictures._losses(run(heads=("only",)))] == ["only"]
    assert [curve.name for curve in pictures._losses(run())] == ["total", "nuclei", "gland"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [LogRow(step=0)],
        [LogRow(step=5, loss=2.0)],
        [LogRow(step=5, loss=0.0), LogRow(step=6, loss=0.0)],
        [LogRow(step=1, loss=math.nan), LogRow(step=2, loss=math.inf, losses={"a": math.nan})],
        [LogRow(step=n, loss=-1.0 * n) for n in range(60)],
        [LogRow(step=n, learning_rate=0.0) for n in range(3)],
        [LogRow(step=3, scores={"gland": 0.5})],
        [LogRow(step=n, losses={f"head {k}": 10.0**k for k in range(12)}) for n in range(60)],
        [LogRow(step=2, losses={"a name that is longer than the plot is wide " * 4: 1.0})],
        run(60, scale=1e12),
        run(60, scale=1e-12),
    ],
)
def test_any_log_can_be_drawn(rows, tmp_path):
    draw_curves(rows, tmp_path / "c.png", title="x" * 30)
    assert picture(tmp_path / "c.png").shape[1::-1] == PAGE_PX


def test_equal_logs_in_any_order_give_equal_bytes(tmp_path):
    rows = run(80)
    draw_curves(rows, tmp_path / "a.png")
    draw_curves(rows[::-1], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw_curves(run(80, scale=1.5), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_axes_put_values_where_the_numbers_are():
    linear = Axes(box=(100, 20, 300, 120), steps=(0.0, 50.0), values=(0.0, 2.0))
    assert np.allclose(
        linear.place(np.array([[0, 0.0], [25, 1.0], [50, 9.0]])),
        [
            [100, 120],
            [200, 70],
            [300, 20],
        ],
    )
    log = Axes(box=(0, 0, 100, 100), steps=(0.0, 1.0), values=(0.01, 100.0), is_log=True)
    assert np.allclose(log.place(np.array([[0, 0.1], [1, 1.0]]))[:, 1], [75, 50])


def test_smoothing_is_a_running_mean_and_drops_what_is_not_finite():
    values = [float(n % 7) for n in range(100)]
    points = points_of([*enumerate(values), (100, None), (101, math.nan)])
    assert points.shape == (100, 2)
    smoothed = curve_of("a", (0, 0, 0), points, smooth=True).smoothed
    wanted = [np.mean(values[max(0, n - 2) : n + 3]) for n in range(100)]
    assert np.allclose(smoothed[:, 1], wanted)


def test_legends_break_into_lines_that_fit():
    entries = [(f"head number {n}", COLOURS[0]) for n in range(9)]
    lines = legend_lines(entries, 400)
    assert [entry for line in lines for entry in line] == entries
    assert len(lines) > 2
    assert legend_lines(entries[:1], 400) == [entries[:1]]
    assert legend_lines([], 400) == []
    ((shortened, _),) = legend_lines([("w" * 90, COLOURS[0])], 200)[0]
    assert "…" in shortened


def tiles_of(page, top):
    """The three pictures of the first panel."""
    lefts = [MARGIN + n * (TILE_PX + TILE_GAP_PX) for n in range(3)]
    return [page[top : top + TILE_PX, left : left + TILE_PX] for left in lefts]


def first_tile_row(page):
    """Top of the first tile: tests use tiles of one flat colour."""
    return int(np.argmax((page == (150, 90, 160)).all(axis=2).any(axis=1)))


@pytest.mark.parametrize("side", [40, 320, 900])
def test_outlines_lie_inside_their_objects_at_any_size(side, tmp_path):
    image = np.full((side, side, 3), (150, 90, 160), np.uint8)
    ids = np.zeros((side, side), np.int32)
    low, high = side // 4, side // 2
    ids[low:high, low:high] = 3
    box = np.array([[side / 2, side / 2, side * 3 / 4, side * 3 / 4], [np.nan] * 4], np.float32)
    panel = Panel(image=image, truth={"gland": ids}, found={"gland": ids * 0, "cell": box})
    draw_examples([panel], tmp_path / "e.png")
    page = picture(tmp_path / "e.png")
    plain, truth, found = tiles_of(page, first_tile_row(page))
    assert (plain == (150, 90, 160)).all()
    drawn = (truth == COLOURS[0]).all(axis=2)
    rows, columns = np.nonzero(drawn)
    edge, far = round(TILE_PX / 4), round(TILE_PX / 2)
    assert abs(rows.min() - edge) <= 2
    assert abs(columns.max() + 1 - far) <= 2
    assert not drawn[edge + 6 : far - 6, edge + 6 : far - 6].any()
    assert drawn[(edge + far) // 2].sum() == 4  # two lines of two pixels
    boxed = (found == COLOURS[1]).all(axis=2)
    rows, columns = np.nonzero(boxed)
    assert (rows.min(), columns.min()) == (far, far)
    assert (rows.max(), columns.max()) == (TILE_PX * 3 // 4 - 1,) * 2
    assert count(found, COLOURS[0]) == 0


def test_touching_objects_are_both_outlined_and_the_unknown_is_greyed(tmp_path):
    image = np.full((TILE_PX, TILE_PX, 3), (150, 90, 160), np.uint8)
    ids = np.zeros((TILE_PX, TILE_PX), np.int32)
    ids[:200, 50:100], ids[:200, 100:150] = 1, 2
    ids[250:] = -1
    draw_examples([Panel(image=image, truth={"a": ids}, found={})], tmp_path / "e.png")
    page = picture(tmp_path / "e.png")
    _, truth, _ = tiles_of(page, first_tile_row(page))
    drawn = (truth == COLOURS[0]).all(axis=2)
    assert np.flatnonzero(drawn[100]).tolist() == [50, 51, 98, 99, 100, 101, 148, 149]
    assert not drawn[0, 60:90].any()  # an object that goes on beyond the tile has no edge there
    grey = truth[260, 10].astype(int)
    assert (np.abs(grey - 128) < np.abs(np.array((150, 90, 160)) - 128)).all()


def test_pages_hold_every_panel_and_are_the_same_bytes_again(tmp_path):
    rng = np.random.default_rng(0)
    panels = [
        Panel(
            image=rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
            truth={"nuclei": rng.integers(0, 5, (h, w))},
            found={},
            caption="tissue: true tumour, found stroma " * 5,
        )
        for h, w in ((30, 50), (300, 200), (1, 1), (700, 10), (64, 64))
    ]
    for name in ("a", "b"):
        draw_examples(panels, tmp_path / f"{name}.png", title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw_examples(panels[:4], tmp_path / "b.png")
    assert picture(tmp_path / "a.png").shape[0] > picture(tmp_path / "b.png").shape[0]
    draw_examples([], tmp_path / "none.png")
    assert picture(tmp_path / "none.png").size
