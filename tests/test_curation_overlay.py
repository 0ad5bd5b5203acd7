"""Crops as pictures: what is where, and that nothing else is changed."""

import numpy as np
import pytest
import shapely
from crop_fixtures import make_crop, outline, square
from PIL import Image
from slide_fixtures import picture, write_slide

from wsi_pipeline.curation.overlay import COLOURS, Look, draw_crop
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.geometry import Box

LEFT, TOP = 34, 56
"""Where the first pixel of a panel is."""


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slides") / "s.svs", picture(512, 384), "raw")


def crop():
    return make_crop(
        outline(1, square(120, 80)),
        outline(2, square(200, 150), "gland"),
        outline(3, shapely.box(240, 100, 300, 140), "ignore"),
        labels=("nuclei", "gland"),
    )


def drawn(tmp_path, slide, own=None, **look):
    draw_crop(own or crop(), slide, tmp_path / "o.png", Look(**look))
    return np.asarray(Image.open(tmp_path / "o.png"))


def panel(image, width, height, number=0):
    left = LEFT + number * (width + LEFT)
    return image[TOP : TOP + height, left : left + width]


def painted(image, kind):
    """Pixels of a kind's colour as (N, 2) x, y."""
    y, x = np.nonzero((image == COLOURS[kind]).all(axis=2))
    return np.stack([x, y], axis=1)


def test_pixels_are_those_of_the_slide(tmp_path, slide):
    # 2 screen px a ruler px are level 0 as it is
    image = drawn(tmp_path, slide, zoom=2, context=0, plain="alone")
    assert (panel(image, 200, 160) == picture(512, 384)[60:220, 100:300]).all()
    assert image.shape[1] < 200 + 3 * LEFT
    # beyond the slide it is white
    edge = make_crop(box=Box.from_edges(0, 0, 100, 80))
    image = panel(drawn(tmp_path, slide, edge, zoom=2, context=10, plain="alone"), 140, 120)
    assert (image[:18] == 255).all()
    assert (image[:, :18] == 255).all()
    assert np.abs(image[20:110, 20:130].astype(int) - picture(512, 384)[:90, :110]).max() == 0


def test_coarser_pictures_are_averages(tmp_path, slide):
    image = panel(drawn(tmp_path, slide, zoom=1, context=0, plain="alone"), 100, 80)
    mean = picture(512, 384)[60:220, 100:300].reshape(80, 2, 100, 2, 3).mean(axis=(1, 3))
    assert np.abs(image - mean).max() <= 1


def test_outlines_are_thin_and_where_the_polygons_are(tmp_path, slide):
    image = panel(drawn(tmp_path, slide, zoom=4, context=0, ids=False, grid=False), 400, 320)
    for kind, x0, y0, x1, y1 in [("nucleus", 10, 10, 20, 20), ("gland", 50, 45, 60, 55)]:
        places = painted(image, kind)
        ring = shapely.box(4 * x0, 4 * y0, 4 * x1, 4 * y1).exterior
        away = [ring.distance(shapely.Point(x + 0.5, y + 0.5)) for x, y in places]
        assert max(away) <= 1
        assert len(places) == pytest.approx(160, abs=8)  # one pixel wide
    hatched = painted(image, "ignore")
    assert hatched.min(axis=0).tolist() == pytest.approx([280, 80], abs=1)
    assert len(hatched) > 2 * (120 + 80)  # its edge, and lines across


def test_pixels_beside_outlines_are_left_alone(tmp_path, slide):
    look = {"zoom": 4, "context": 5}
    plain = panel(drawn(tmp_path, slide, plain="alone", **look), 440, 360)
    both = drawn(tmp_path, slide, plain="beside", **look)
    assert (panel(both, 440, 360) == plain).all()
    bare = drawn(tmp_path, slide, make_crop(labels=("nuclei",)), ids=True, grid=False, **look)
    changed = (panel(bare, 440, 360) != plain).any(axis=2)
    assert changed.sum() <= 2 * (400 + 320) + 4  # the crop's edge
    second = panel(both, 440, 360, 1)
    assert (second != plain).any()


def test_ids_and_the_grid_can_be_left_out(tmp_path, slide):
    look = {"zoom": 4, "context": 0}
    bare = panel(drawn(tmp_path, slide, ids=False, grid=False, **look), 400, 320)
    ids = panel(drawn(tmp_path, slide, ids=True, grid=False, **look), 400, 320)
    rows, columns = np.nonzero((ids != bare).any(axis=2))
    middles = [(60, 60), (220, 200), (680 / 2, 240 / 2)]  # of the three objects
    far = [
        min(np.hypot(x - a, y - b) for a, b in middles) for x, y in zip(columns, rows, strict=True)
    ]
    assert len(far) > 30
    assert max(far) < 30
    grid = panel(drawn(tmp_path, slide, ids=False, grid=True, **look), 400, 320)
    rows, columns = np.nonzero((grid != bare).any(axis=2))
    assert set(columns[rows == 100]) <= {0, 200}
    assert set(rows[columns == 100]) <= {0, 200}
    assert 200 in columns[rows == 100]


def test_a_part_has_the_same_coordinates(tmp_path, slide):
    look = {"zoom": 4, "ids": False, "grid": False}
    whole = panel(drawn(tmp_path, slide, context=0, **look), 400, 320)
    part = panel(drawn(tmp_path, slide, region=(5, 10, 65, 60), **look), 240, 200)
    assert (part[1:-1, 1:-1] == whole[41:239, 21:259]).mean() > 0.98  # but for pixels at lines
    assert (painted(part, "nucleus") + np.array([20, 40]) == painted(whole, "nucleus")).all()


def ticks(line):
    """Positions of dark pixels along a line of the ruler."""
    return np.nonzero((line < 60).all(axis=1))[0]


def test_the_ruler_counts_ruler_pixels_from_the_corner(tmp_path, slide):
    image = drawn(tmp_path, slide, zoom=6, region=(-4, 3, 46, 33))
    above = ticks(image[TOP - 1, LEFT : LEFT + 301])
    assert above.tolist() == [6 * n for n in range(51)]
    tens = ticks(image[TOP - 8, LEFT : LEFT + 301])
    assert tens.tolist() == [24, 84, 144, 204, 264]  # 0, 10, ... 40
    side = ticks(image[TOP : TOP + 181, LEFT - 8])
    assert side.tolist() == [42, 102, 162]  # 10, 20, 30
    begun = drawn(tmp_path, slide, zoom=1, region=(3, 0, 103, 80))
    assert ticks(begun[TOP - 1]).tolist() == [LEFT + 2 + 5 * n for n in range(20)]
    coarse = drawn(tmp_path, slide, zoom=1, context=0)
    assert ticks(coarse[TOP - 1, LEFT : LEFT + 101]).tolist() == [5 * n for n in range(21)]


def test_pictures_are_about_1400_long_and_never_huge(tmp_path, slide):
    for look in ({}, {"plain": "beside"}, {"region": (0.0, 0.0, 10.0, 40.0)}):
        assert 1300 < max(drawn(tmp_path, slide, **look).shape) < 1500
    with pytest.raises(DatasetError, match="too large to look at; lower the zoom"):
        drawn(tmp_path, slide, zoom=100)
    with pytest.raises(DatasetError, match="x0 < x1"):
        drawn(tmp_path, slide, region=(10.0, 0.0, 10.0, 40.0))


def test_a_crop_of_another_slide_is_refused(tmp_path, slide):
    other = make_crop(slide_size=(600, 384))
    with pytest.raises(DatasetError, match=r"s\.svs is 512 x 384 px, but the crop was drawn on"):
        drawn(tmp_path, slide, other)
    assert not (tmp_path / "o.png").exists()
