"""The preview picture: right things in right places, and never a failure."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.preview import (
    EMPTY,
    GUTTER_PX,
    HEADER_PX,
    KIND_COLOURS,
    PANEL_PX,
    TISSUE,
    VIRIDIS,
    draw_preview,
    write_preview,
)
from wsi_pipeline.tissue import TissueMask

MPP = (0.5, 0.5)
PINK = (225, 160, 195)
NO_POINTS = np.zeros((0, 2))


def scene(width=400, height=300, *, tissue=(50, 40, 350, 260), spacing=16.0):
    """A thumbnail at 8 um a pixel, pink where tissue is; grid; tissue mask."""
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(spacing, spacing), size=(width, height))
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = tissue
    mask[y0:y1, x0:x1] = True
    image = np.full((height, width, 3), 245, np.uint8)
    image[mask] = PINK
    return image, grid, TissueMask(mask=mask, grid=grid, source="detected")


def preview(image, grid, tissue, *, polygons=None, points=NO_POINTS, counts=None, title="slide"):
    return draw_preview(
        image,
        grid,
        tissue=tissue,
        polygons=polygons or {},
        points=points,
        pixel_size=MPP,
        title=title,
        counts=counts if counts is not None else {"nucleus": len(points)},
    )


def rectangle(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def near(pixel, colour, tolerance=40):
    return bool((np.abs(np.asarray(pixel, int) - colour) <= tolerance).all())


def slide_part(picture, thumbnail_x, thumbnail_y, scale=4):
    """The pixel of the page that shows a place of a 400 x 300 thumbnail."""
    return picture[round(HEADER_PX + thumbnail_y * scale), round(GUTTER_PX + thumbnail_x * scale)]


def crosses(picture, thumbnail_x, thumbnail_y, colour):
    """Is there a line of that colour within two pixels of a place?"""
    x, y = round(GUTTER_PX + thumbnail_x * 4), round(HEADER_PX + thumbnail_y * 4)
    around = picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
    return any(near(pixel, colour) for pixel in around)


def viridis(share):
    """Linear between the nine colours, written out."""
    place = min(max(share, 0.0), 1.0) * 8
    k = min(int(place), 7)
    low, high = np.array(VIRIDIS[k], float), np.array(VIRIDIS[k + 1], float)
    return low + (place - k) * (high - low)


def density_part(picture, width_px, height_px, *, kinds=1):
    """The density map alone, without its frame."""
    left = picture.shape[1] - GUTTER_PX - PANEL_PX
    top = HEADER_PX + 32 * (1 + kinds) + 52 + 36
    return picture[top + 2 : top + height_px - 2, left + 2 : left + width_px - 2]


def test_outlines_lie_where_the_objects_are_in_the_colour_of_their_kind():
    image, grid, tissue = scene()
    polygons = {
        "gland": [rectangle(1600, 1600, 3200, 2400)],
        "lumen": [rectangle(2000, 1840, 2400, 2000)],
    }
    picture = preview(image, grid, tissue, polygons=polygons)
    gland, lumen = KIND_COLOURS[:2]
    for x, y in [(150, 100), (150, 150), (100, 125), (200, 125)]:  # the middles of the sides
        assert near(slide_part(picture, x, y), gland)
    for x, y in [(137, 115), (137, 125), (125, 120), (150, 120)]:
        assert near(slide_part(picture, x, y), lumen)
    assert near(slide_part(picture, 180, 140), PINK, 4)
    assert near(slide_part(picture, 20, 20), (245, 245, 245), 4)


def test_a_grid_with_an_origin_of_its_own_moves_the_outlines():
    image, grid, tissue = scene()
    moved = PixelGrid(origin=(480.0, -320.0), spacing=(16.0, 16.0), size=grid.size)
    picture = preview(image, moved, tissue, polygons={"g": [rectangle(1600, 1600, 3200, 2400)]})
    assert near(slide_part(picture, 150 - 30, 100 + 20), KIND_COLOURS[0])
    assert near(slide_part(picture, 200 - 30, 125 + 20), KIND_COLOURS[0])
    # The tissue's left border, 50 on its own grid, is seen at 20; its top, 40, at 60.
    assert crosses(picture, 20, 150, TISSUE)
    assert crosses(picture, 150, 60, TISSUE)


def test_tissue_is_outlined_but_not_along_the_border_of_the_picture():
    image, grid, tissue = scene(tissue=(0, 40, 350, 300))
    picture = preview(image, grid, tissue)
    assert crosses(picture, 350, 150, TISSUE)
    assert crosses(picture, 150, 40, TISSUE)
    assert near(slide_part(picture, 0.25, 150), PINK, 8)
    assert near(slide_part(picture, 250, 298), PINK, 8)


def test_what_rounding_leaves_beyond_a_mask_has_no_border():
    image, grid, _ = scene(tissue=(0, 0, 400, 300))
    short = PixelGrid(origin=(0.0, 0.0), spacing=(128.0, 128.0), size=(49, 37))  # 1 px, half a px
    whole = TissueMask(mask=np.ones((37, 49), bool), grid=short, source="file")
    picture = preview(image, grid, whole)
    assert not any(crosses(picture, x, 150, TISSUE) for x in range(2, 399))
    assert not any(crosses(picture, 150, y, TISSUE) for y in range(2, 299))


def test_a_mask_of_a_part_of_the_slide_has_a_border():
    image, grid, _ = scene(tissue=(0, 0, 400, 300))
    part = PixelGrid(origin=(0.0, 0.0), spacing=(16.0, 16.0), size=(200, 300))
    picture = preview(
        image, grid, TissueMask(mask=np.ones((300, 200), bool), grid=part, source="file")
    )
    assert any(crosses(picture, x, 150, TISSUE) for x in (200, 201))
    assert near(slide_part(picture, 300, 150), PINK, 8)


def test_a_coarse_tissue_mask_from_a_file_is_drawn_in_place():
    image, grid, _ = scene()
    mask = np.zeros((30, 40), bool)
    mask[5:20, 10:30] = True
    coarse = PixelGrid(origin=(0.0, 0.0), spacing=(160.0, 160.0), size=(40, 30))
    picture = preview(image, grid, TissueMask(mask=mask, grid=coarse, source="file"))
    columns = [x / 4 for x in range(1600) if near(slide_part(picture, x / 4, 125), TISSUE, 60)]
    assert min(columns) == pytest.approx(100, abs=1.5)
    assert max(columns) == pytest.approx(300, abs=1.5)


def lattice(x0, y0, x1, y1, step):
    x, y = np.meshgrid(np.arange(x0, x1, step) + step / 2, np.arange(y0, y1, step) + step / 2)
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def test_density_is_points_per_square_millimetre_of_tissue():
    # A point every 12.5 um is 6,400 per mm2; the scale goes to the next round number, 10,000.
    # On the second half of the tissue every other point is missing.
    image, grid, tissue = scene(tissue=(0, 0, 300, 300))
    points = np.concatenate([lattice(0, 0, 2400, 4800, 25), lattice(2400, 0, 4800, 4800, 25)[::2]])
    colours = density_part(preview(image, grid, tissue, points=points), 460, 345).astype(int)
    width = colours.shape[1]
    assert np.abs(colours[:, : round(0.34 * width)] - viridis(0.64)).max() <= 2
    assert np.abs(colours[:, round(0.41 * width) : round(0.72 * width)] - viridis(0.32)).max() <= 2
    assert (colours[:, round(0.79 * width) :] == EMPTY).all()


def test_density_does_not_fade_at_the_border_of_the_tissue():
    image, grid, tissue = scene(tissue=(100, 75, 300, 225))
    points = lattice(1600, 1200, 4800, 3600, 25)
    colours = density_part(preview(image, grid, tissue, points=points), 460, 345)
    shown = (colours != EMPTY).any(axis=-1)
    assert 0.22 < shown.mean() < 0.3  # a quarter of the slide, and the bins that touch it
    assert np.abs(colours[shown] - viridis(0.64)).max() <= 2


def test_points_outside_the_slide_are_left_out():
    image, grid, tissue = scene(tissue=(0, 0, 400, 300))
    points = lattice(800, 640, 5600, 4160, 20)
    more = np.concatenate([points, [[-50.0, 100.0]] * 50, [[1e7, 1e7], [100.0, 4800.0]]])
    counts = {"nucleus": 5}
    assert np.array_equal(
        preview(image, grid, tissue, points=points, counts=counts),
        preview(image, grid, tissue, points=more, counts=counts),
    )


def test_equal_input_gives_equal_bytes(tmp_path):
    files = []
    for name in ("a.png", "b.png"):
        image, grid, tissue = scene()
        points = lattice(800, 640, 5600, 4160, 40)
        rings = [rectangle(1000 + 30 * k, 1000, 1020 + 30 * k, 1400) for k in range(50)]
        before = image.copy()
        picture = preview(image, grid, tissue, polygons={"gland": rings}, points=points)
        assert np.array_equal(image, before)
        write_preview(tmp_path / name, picture)
        files.append((tmp_path / name).read_bytes())
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), picture)
    assert files[0] == files[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_words_and_numbers_are_those_given():
    image, grid, tissue = scene()
    base = preview(image, grid, tissue, counts={"nucleus": 12})
    for other in (
        preview(image, grid, tissue, counts={"nucleus": 13}),
        preview(image, grid, tissue, counts={"cell": 12}),
        preview(image, grid, tissue, counts={"nucleus": 12}, title="other"),
    ):
        assert other.shape == base.shape
        assert not np.array_equal(other, base)


def test_the_density_map_is_titled_and_scaled():
    image, grid, tissue = scene()
    few, many = lattice(800, 640, 5600, 4160, 80), lattice(800, 640, 5600, 4160, 25)
    pictures = [
        preview(image, grid, tissue, points=points, counts=counts)[:, -GUTTER_PX - PANEL_PX :]
        for points, counts in ((few, {"a": 1}), (few, {"b": 1}), (many, {"a": 1}))
    ]
    title = slice(HEADER_PX + 32 * 2 + 52, HEADER_PX + 32 * 2 + 52 + 34)
    assert not np.array_equal(pictures[0][title], pictures[1][title])
    assert np.array_equal(pictures[0][title], pictures[2][title])
    below = slice(HEADER_PX + 32 * 2 + 52 + 36 + 345 + 18 + 20, None)
    assert np.array_equal(pictures[0][below], pictures[1][below])
    assert not np.array_equal(pictures[0][below], pictures[2][below])


@pytest.mark.parametrize(
    "size", [(1, 1), (24, 21), (4000, 15), (15, 4000), (2500, 2400), (1600, 1200)]
)
def test_the_picture_is_bounded_whatever_the_slide(size):
    width, height = size
    image, grid, tissue = scene(width, height, tissue=(0, 0, width, height))
    points = np.array([[width * 8.0, height * 8.0]])
    picture = preview(image, grid, tissue, points=points, title="a very long name of a slide " * 20)
    assert picture.dtype == np.uint8
    assert 500 < picture.shape[1] <= 2150
    assert 700 < picture.shape[0] <= 1370


def test_no_tissue_and_no_objects_give_a_picture():
    image, grid, tissue = scene(tissue=(0, 0, 0, 0))
    picture = preview(image, grid, tissue, polygons={"gland": [], "lumen": []}, counts={})
    assert (density_part(picture, 460, 345, kinds=2) == EMPTY).all()
    assert near(slide_part(picture, 200, 150), (245, 245, 245), 3)
    kinds = {"nucleus": 0, "gland": 0}
    assert preview(image, grid, tissue, polygons={"gland": []}, counts=kinds).shape == picture.shape


def test_tissue_without_objects_has_density_zero():
    image, grid, tissue = scene(tissue=(0, 0, 400, 300))
    assert (density_part(preview(image, grid, tissue), 460, 345) == VIRIDIS[0]).all()


def test_degenerate_rings_do_no_harm():
    image, grid, tissue = scene()
    rings = [np.zeros((0, 2)), np.array([[5.0, 5.0]]), rectangle(9, 9, 9, 9)]
    assert preview(image, grid, tissue, polygons={"gland": rings}).ndim == 3


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "previews" / "a.png"
    write_preview(path, np.zeros((4, 4, 3), np.uint8))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_preview(path, np.zeros((4, 4, 7), np.uint8))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
