"""Tissue masks: what counts as tissue, and what must not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from wsi_pipeline.errors import MaskError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.tissue import TissueMask, detect_tissue, read_mask

DATA = Path(os.environ.get("WSI_DATA", Path(__file__).parents[2] / "shared" / "data"))

MPP = (0.5, 0.5)
GLASS = (243, 242, 244)
PINK = (222, 150, 190)
PURPLE = (120, 70, 150)


def grid_of(image: np.ndarray, um: float = 8.0) -> PixelGrid:
    return PixelGrid(origin=(0.0, 0.0), spacing=(um / MPP[0], um / MPP[1]), size=image.shape[1::-1])


def glass(width=400, height=300, *, colour=GLASS, noise=2.5, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.array(colour) + rng.normal(0, noise, (height, width, 3))
    return image.round().clip(0, 255).astype(np.uint8)


def add_tissue(image: np.ndarray, box: tuple[int, int, int, int], seed=1) -> np.ndarray:
    """Paint a textured H&E rectangle (x0, y0, x1, y1) and return where it is."""
    rng = np.random.default_rng(seed)
    where = np.zeros(image.shape[:2], bool)
    x0, y0, x1, y1 = box
    where[y0:y1, x0:x1] = True
    share = rng.random((image.shape[0], image.shape[1], 1)) ** 2
    stain = np.array(PINK) * (1 - share) + np.array(PURPLE) * share
    image[where] = stain[where].astype(np.uint8)
    return where


def draw(image: np.ndarray, paint) -> None:
    canvas = Image.fromarray(image)
    paint(ImageDraw.Draw(canvas))
    image[:] = np.asarray(canvas)


def detect(image: np.ndarray, um: float = 8.0) -> np.ndarray:
    return detect_tissue(image, grid_of(image, um), MPP).mask


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


# --- what is tissue -----------------------------------------------------------------------


def test_finds_a_piece_on_glass():
    image = glass()
    where = add_tissue(image, (100, 80, 260, 220))
    found = detect_tissue(image, grid_of(image), MPP)
    assert found.source == "detected"
    assert iou(found.mask, where) > 0.94


@pytest.mark.parametrize("noise", [0.0, 2.5, 6.0])
@pytest.mark.parametrize(
    "colour", [GLASS, (255, 255, 255), (238, 232, 214), (226, 230, 240), (205, 203, 206)]
)
def test_bare_glass_is_empty_whatever_its_tint_and_grain(colour, noise):
    assert not detect(glass(colour=colour, noise=noise)).any()


def test_shaded_and_stitched_glass_is_empty():
    image = glass().astype(np.float64)
    image *= np.linspace(0.93, 1.04, image.shape[1])[None, :, None]
    image[:, 200:] *= (0.99, 0.975, 0.985)
    assert not detect(image.clip(0, 255).astype(np.uint8)).any()


def test_dust_and_coloured_grain_are_left_out():
    image = glass()
    rng = np.random.default_rng(2)
    for _ in range(150):
        x, y, r = rng.integers(5, 390), rng.integers(5, 290), rng.integers(0, 3)
        colour = tuple(int(c) for c in rng.integers(40, 200, 3))
        draw(image, lambda pen, x=x, y=y, r=r, c=colour: pen.ellipse((x, y, x + r, y + r), fill=c))
    assert not detect(image).any()


def test_dust_beside_tissue_adds_nothing():
    image = glass()
    where = add_tissue(image, (100, 80, 260, 220))
    image[20:23, 30:33] = (90, 60, 140)
    image[250:254, 350:353] = (200, 60, 60)
    found = detect(image)
    assert iou(found, where) > 0.94
    assert not found[:60].any()
    assert not found[240:].any()


@pytest.mark.parametrize(
    "ink",
    [(30, 60, 170), (20, 120, 70), (215, 30, 45), (25, 24, 28)],
    ids=["blue", "green", "red", "black"],
)
@pytest.mark.parametrize("blur", [0, 4])
def test_marker_strokes_on_glass_are_left_out(ink, blur):
    image = glass(noise=0)
    draw(image, lambda pen: pen.line((20, 30, 380, 60, 380, 270), fill=ink, width=22))
    image = soften(image, blur)
    where = add_tissue(image, (80, 100, 260, 260))
    found = detect(image)
    assert iou(found, where) > 0.94
    assert not found[:75].any()
    assert not found[:, 300:].any()


def soften(image: np.ndarray, radius: float) -> np.ndarray:
    """Blur: a stroke on the cover slip is out of focus."""
    from PIL import ImageFilter

    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


@pytest.mark.parametrize("ink", [(30, 60, 170), (20, 120, 70), (215, 30, 45), (25, 24, 28)])
def test_a_slide_with_nothing_but_a_stroke_is_empty(ink):
    image = glass()
    draw(image, lambda pen: pen.ellipse((60, 40, 340, 260), outline=ink, width=18))
    assert not detect(image).any()


def test_blood_is_tissue():
    image = glass()
    where = add_tissue(image, (100, 80, 260, 220))
    image[120:180, 140:260] = (200, 60, 70)
    assert iou(detect(image), where) > 0.94


def test_a_faint_haze_on_glass_is_no_tissue():
    image = glass(noise=1)
    image[80:220, 100:260] = (243, 229, 238)  # saturation 0.054
    assert not detect(image).any()


def test_debris_is_left_out_and_a_small_biopsy_is_not():
    image = glass(noise=1)
    image[50:65, 50:65] = PINK  # 120 x 120 um
    assert not detect(image).any()
    image[50:80, 50:80] = PINK
    assert detect(image).any()


def test_a_small_ink_coloured_spot_at_the_border_of_tissue_is_pigment():
    image = glass()
    where = add_tissue(image, (100, 80, 260, 220))
    image[130:160, 100:108] = (30, 60, 170)  # 240 x 64 um
    assert detect(image)[where].mean() > 0.99


@pytest.mark.parametrize("seed", [1, 2])
def test_an_image_full_of_tissue_is_kept_whole(seed):
    image = glass(300, 200)
    add_tissue(image, (0, 0, 300, 200), seed)
    assert detect(image).all()


def test_two_kinds_of_tissue_without_glass_are_both_kept():
    image = np.empty((200, 300, 3), np.uint8)
    image[:, :150] = (225, 180, 205)
    image[:, 150:] = (95, 45, 130)
    assert detect(image).all()


def test_pale_tissue_beside_dark_tissue_is_kept():
    image = glass()
    where = add_tissue(image, (60, 80, 200, 220))
    image[80:220, 200:330] = (234, 208, 224)
    where[80:220, 200:330] = True
    assert iou(detect(image), where) > 0.94


def test_a_lumen_is_part_of_the_tissue_and_a_cavity_is_not():
    image = glass()
    where = add_tissue(image, (40, 40, 360, 260))
    image[60:90, 60:110] = GLASS  # 400 x 240 um
    image[110:230, 150:330] = GLASS  # 1.44 x 0.96 mm
    found = detect(image)
    assert found[60:90, 60:110].all()
    assert not found[125:215, 165:315].any()
    assert where[60, 60]


@pytest.mark.parametrize("end", [360, 320], ids=["whole walls", "broken walls"])
def test_fat_is_part_of_the_tissue(end):
    image = glass(noise=1)
    add_tissue(image, (20, 20, 380, 280))
    image[50:250, 60:340] = GLASS
    draw(
        image,
        lambda pen: [
            pen.arc((x, y, x + 12, y + 12), 0, end, fill=(228, 205, 219))
            for x in range(60, 330, 12)
            for y in range(50, 240, 12)
        ],
    )
    assert detect(image)[40:260, 40:360].mean() > 0.99


@pytest.mark.parametrize("outside", [(255, 255, 255), (0, 0, 0)])
def test_areas_outside_the_scan_are_no_tissue(outside):
    image = glass()
    where = add_tissue(image, (150, 80, 330, 220))
    image[:, :100] = outside
    image[:40] = outside
    found = detect(image)
    assert iou(found, where) > 0.94
    assert not found[:, :120].any()


def test_noise_in_black_areas_is_no_tissue():
    rng = np.random.default_rng(0)
    image = glass()
    image[:, :150] = rng.integers(0, 6, (300, 150, 3))
    assert not detect(image).any()


def test_small_images_may_hold_small_pieces():
    tile = glass(24, 21)
    add_tissue(tile, (0, 0, 24, 21))
    assert detect(tile).all()
    half = glass(24, 21)
    where = add_tissue(half, (0, 0, 12, 21))
    assert iou(detect(half), where) > 0.8


def test_physical_limits_do_not_depend_on_the_resolution():
    areas = []
    for um, scale in ((8.0, 1), (4.0, 2)):
        image = glass(300 * scale, 200 * scale, noise=0)
        add_tissue(image, (50 * scale, 40 * scale, 200 * scale, 150 * scale))
        image[170 * scale : 179 * scale, 250 * scale : 259 * scale] = PURPLE  # 72 um: dust
        areas.append(detect_tissue(image, grid_of(image, um), MPP).area_mm2(MPP))
    assert areas[0] == pytest.approx(150 * 110 * 64e-6, rel=0.04)
    assert areas[1] == pytest.approx(areas[0], rel=0.04)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_images_are_empty(value):
    assert not detect(np.full((50, 60, 3), value, np.uint8)).any()


def test_one_pixel_does_not_fail():
    assert detect(np.full((1, 1, 3), 250, np.uint8)).shape == (1, 1)


# --- the mask itself ----------------------------------------------------------------------


@st.composite
def masks(draw):
    width, height = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    bits = draw(st.lists(st.booleans(), min_size=width * height, max_size=width * height))
    places = st.floats(-20, 20, allow_nan=False)
    sizes = st.floats(0.3, 9)
    return TissueMask(
        mask=np.array(bits).reshape(height, width),
        grid=PixelGrid(
            origin=(draw(places), draw(places)),
            spacing=(draw(sizes), draw(sizes)),
            size=(width, height),
        ),
        source="file",
    )


@st.composite
def looks(draw):
    """A box on some other grid."""
    grid = PixelGrid(
        origin=(draw(st.floats(-20, 20)), draw(st.floats(-20, 20))),
        spacing=(draw(st.floats(0.3, 5)), draw(st.floats(0.3, 5))),
        size=(40, 40),
    )
    size = st.integers(0, 12)
    place = st.integers(-10, 50)
    return grid, Box(x=draw(place), y=draw(place), width=draw(size), height=draw(size))


@given(masks(), looks())
def test_touches_agrees_with_looking_at_every_pixel(tissue, look):
    grid, box = look
    x0, y0 = (o + s * b for o, s, b in zip(grid.origin, grid.spacing, (box.x, box.y), strict=True))
    x1, y1 = x0 + box.width * grid.spacing[0], y0 + box.height * grid.spacing[1]
    (ox, oy), (sx, sy) = tissue.grid.origin, tissue.grid.spacing

    def met(margin):
        """Any tissue pixel that overlaps the box grown by a share of a mask pixel?"""
        return any(
            ox + c * sx < x1 + margin * sx
            and ox + (c + 1) * sx > x0 - margin * sx
            and oy + r * sy < y1 + margin * sy
            and oy + (r + 1) * sy > y0 - margin * sy
            for r, c in np.argwhere(tissue.mask)
        )

    answer = tissue.touches(grid, box)
    if box.area == 0:
        assert not answer
    elif met(1e-5) == met(-1e-5):  # otherwise they only share an edge, up to rounding
        assert answer == met(0)


@given(masks(), looks())
def test_extent_covers_the_tissue_of_a_box_and_no_more(tissue, look):
    grid, box = look
    extent = tissue.extent(grid, box)
    assert box.contains(extent)
    rows, columns = tissue.window(grid, box).nonzero()
    for row, column in zip(rows, columns, strict=True):
        assert extent.contains(Box(x=box.x + column, y=box.y + row, width=1, height=1))
    if not tissue.touches(grid, box):
        assert extent.area == 0
    if extent.area:  # every line at its edges meets tissue
        for edge in (
            Box.from_edges(extent.x, extent.y, extent.x1, extent.y + 1),
            Box.from_edges(extent.x, extent.y1 - 1, extent.x1, extent.y1),
            Box.from_edges(extent.x, extent.y, extent.x + 1, extent.y1),
            Box.from_edges(extent.x1 - 1, extent.y, extent.x1, extent.y1),
        ):
            assert tissue.touches(grid, edge)


def test_touches_agrees_with_every_box_of_its_own_grid():
    mask = np.random.default_rng(0).random((9, 11)) < 0.08
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(7.3, 6.1), size=(11, 9))
    tissue = TissueMask(mask=mask, grid=grid, source="file")
    for y0, x0 in np.ndindex(9, 11):
        for y1, x1 in np.ndindex(10, 12):
            box = Box.from_edges(x0, y0, x1, y1)
            assert tissue.touches(grid, box) == mask[y0:y1, x0:x1].any()


@given(masks(), looks())
def test_window_takes_the_mask_pixel_at_each_centre(tissue, look):
    grid, box = look
    seen = tissue.window(grid, box)
    assert seen.shape == (box.height, box.width)
    (ox, oy), (sx, sy) = tissue.grid.origin, tissue.grid.spacing
    for row, column in np.ndindex(seen.shape):
        x = (grid.origin[0] + (box.x + column + 0.5) * grid.spacing[0] - ox) / sx
        y = (grid.origin[1] + (box.y + row + 0.5) * grid.spacing[1] - oy) / sy
        if min(abs(x - round(x)), abs(y - round(y))) < 1e-9:
            continue  # on an edge: either neighbour will do
        there = 0 <= x < tissue.grid.size[0] and 0 <= y < tissue.grid.size[1]
        assert seen[row, column] == (there and tissue.mask[int(y), int(x)])
    assert tissue.touches(grid, box) or not seen.any()


def test_a_window_beyond_the_mask_is_no_tissue():
    mask = np.ones((3, 4), bool)
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(5.0, 5.0), size=(4, 3))
    seen = TissueMask(mask=mask, grid=grid, source="file").window(
        grid, Box(x=-2, y=-1, width=9, height=6)
    )
    assert np.array_equal(seen, np.pad(mask, ((1, 2), (2, 3))))


@given(masks(), st.floats(0.05, 5), st.floats(0.05, 5))
def test_area_is_a_plain_count(tissue, mpp_x, mpp_y):
    count = sum(bool(value) for value in tissue.mask.flat)
    (sx, sy) = tissue.grid.spacing
    assert tissue.area_mm2((mpp_x, mpp_y)) == pytest.approx(
        count * (sx * mpp_x / 1000) * (sy * mpp_y / 1000), abs=1e-15
    )


def test_digest_names_the_mask_and_its_place():
    mask = np.zeros((6, 9), bool)
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(4.0, 4.0), size=(9, 6))
    one = TissueMask(mask=mask, grid=grid, source="file").digest
    assert one == TissueMask(mask=mask.copy(), grid=grid, source="detected").digest
    assert len(one) == 64
    other = mask.copy()
    other[3, 3] = True
    moved = PixelGrid(origin=(0.0, 1.0), spacing=(4.0, 4.0), size=(9, 6))
    turned = PixelGrid(origin=(0.0, 0.0), spacing=(4.0, 4.0), size=(6, 9))
    others = {
        TissueMask(mask=other, grid=grid, source="file").digest,
        TissueMask(mask=mask, grid=moved, source="file").digest,
        TissueMask(mask=mask.T, grid=turned, source="file").digest,
    }
    assert one not in others
    assert len(others) == 3


def test_a_mask_must_fit_its_grid():
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(4.0, 4.0), size=(9, 6))
    with pytest.raises(ValueError, match="its grid's size"):
        TissueMask(mask=np.zeros((9, 6), bool), grid=grid, source="file")
    with pytest.raises(ValueError, match="bool"):
        TissueMask(mask=np.zeros((6, 9), np.uint8), grid=grid, source="file")


# --- masks from files ---------------------------------------------------------------------

BITS = np.zeros((60, 100), bool)
BITS[10:30, 20:70] = True


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(BITS),
        Image.fromarray(BITS.astype(np.uint8)),
        Image.fromarray(BITS.astype(np.uint8) * 255),
        Image.fromarray(BITS.astype(np.uint16) * 700),
        Image.fromarray(np.stack([BITS * 0, BITS * 9, BITS * 0], -1).astype(np.uint8)),
        Image.fromarray(np.stack([BITS * 0 + 255] * 3 + [BITS * 255], -1).astype(np.uint8)),
        Image.fromarray(BITS.astype(np.uint8) * 255).convert("P"),
    ],
    ids=["1 bit", "0/1", "0/255", "16 bit", "rgb", "alpha", "palette"],
)
def test_reads_any_kind_of_image(tmp_path, image):
    image.save(tmp_path / "m.png")
    tissue = read_mask(tmp_path / "m.png", (4000, 2400))
    assert tissue.source == "file"
    assert tissue.grid == PixelGrid(origin=(0.0, 0.0), spacing=(40.0, 40.0), size=(100, 60))
    assert np.array_equal(tissue.mask, BITS)


def test_reads_other_formats(tmp_path):
    Image.fromarray(BITS).save(tmp_path / "m.tiff")
    assert np.array_equal(read_mask(tmp_path / "m.tiff", (1000, 600)).mask, BITS)


def test_a_fine_mask_is_reduced_without_losing_tissue(tmp_path):
    fine = np.zeros((3001, 5000), bool)
    fine[[0, 1500, 3000], [4999, 17, 2]] = True
    Image.fromarray(fine).save(tmp_path / "m.png")
    tissue = read_mask(tmp_path / "m.png", (50_000, 30_010))
    assert tissue.mask.shape == (1501, 2500)
    assert np.argwhere(tissue.mask).tolist() == [[0, 2499], [750, 8], [1500, 1]]
    assert tissue.grid.spacing == (20.0, 20.0)
    level0 = PixelGrid.level0((50_000, 30_010))
    assert tissue.touches(level0, Box(x=170, y=15_000, width=10, height=10))


@pytest.mark.parametrize(
    ("size", "slide", "fits"),
    [
        ((100, 60), (4000, 2400), True),
        ((100, 61), (4000, 2400), True),  # one pixel: rounding
        ((100, 62), (4000, 2400), False),
        ((1000, 611), (4000, 2400), True),  # under 2 %
        ((1000, 625), (4000, 2400), False),
        ((60, 100), (4000, 2400), False),  # turned
        ((10, 300), (100, 3070), True),  # a thin slide: one pixel of the short side
        ((10, 300), (100, 3700), False),
    ],
)
def test_the_shape_must_be_that_of_the_slide(tmp_path, size, slide, fits):
    Image.new("L", size, 1).save(tmp_path / "m.png")
    if fits:
        assert read_mask(tmp_path / "m.png", slide).mask.all()
        return
    with pytest.raises(MaskError) as caught:
        read_mask(tmp_path / "m.png", slide)
    text = str(caught.value)
    assert caught.value.code == "mask_mismatch"
    assert f"{slide[0]} x {slide[1]}" in text
    assert f"{size[0]} x {size[1]}" in text
    assert "check that it belongs to this slide" in text


def test_missing_and_unreadable_masks_are_errors(tmp_path):
    with pytest.raises(MaskError, match="no such file"):
        read_mask(tmp_path / "absent.png", (10, 10))
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(MaskError, match="cannot be read"):
        read_mask(tmp_path / "text.png", (10, 10))
    Image.fromarray(BITS).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MaskError, match="cannot be read"):
        read_mask(tmp_path / "cut.png", (1000, 600))
    with pytest.raises(MaskError, match="cannot be read"):
        read_mask(tmp_path, (10, 10))


# --- real slides --------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "mpp", "low", "high"),
    [
        # By eye on the thumbnails: outer outline of the tissue, large cavities left out.
        ("BRACS_1640_N_3_cropped.tiff", 0.25, 0.99, 1.0),
        ("CMU-1-Small-Region.svs", None, 0.37, 0.45),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.62, 0.69),
        ("acute_appendicitis_HE_crop.tiff", None, 0.93, 0.97),
        ("colon_submucosal_lipoma_HE_nompp.tiff", 0.37, 0.46, 0.51),
        ("crohn_colon_biopsy_HE4_crop.svs", None, 0.56, 0.62),
    ],
)
def test_real_slides_have_a_plausible_share_of_tissue(name, mpp, low, high):
    path = DATA / "slides" / name
    if not path.exists():
        pytest.skip(f"{path} is not there: set WSI_DATA to the data kit")
    from wsi_pipeline.slide import Slide

    with Slide.open(path, mpp=mpp) as slide:
        image, grid = slide.thumbnail(8.0)
        size = slide.pixel_size
        mask = detect_tissue(image, grid, (size.x, size.y)).mask
    assert low <= mask.mean() <= high
