"""The synthetic slide: the same for ever, true to its truth, readable by others."""

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.geometry import Box
from wsi_pipeline.synth import write_slide
from wsi_pipeline.synth.fields import EDGE
from wsi_pipeline.synth.glands import SAMPLES, frame, gland_coordinates
from wsi_pipeline.synth.world import World

SIDE = 1536


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("synth") / "a.svs"
    truth = write_slide(path, width=SIDE, height=SIDE, mpp=0.5, seed=3, threads=2)
    assert truth == path.with_name("a.truth.parquet")
    return path


@pytest.fixture(scope="module")
def truth(slide):
    return read_truth(slide)


@pytest.fixture(scope="module")
def world():
    return World.make(seed=3, mpp=0.5, size=(SIDE, SIDE))


@pytest.fixture(scope="module")
def whole(world):
    box = Box(x=0, y=0, width=SIDE, height=SIDE)
    return world.draw(box, world.scene(box))


def read_truth(slide):
    table = pq.read_table(slide.with_suffix(".truth.parquet"))
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["geometry"] = shapely.from_wkb(columns["geometry"])
    columns["kind"] = np.array(columns["kind"])
    return columns


def read_pixels(slide):
    with openslide.OpenSlide(slide) as opened:
        return np.asarray(opened.read_region((0, 0), 0, opened.dimensions))[..., :3]


def paint_mask(polygons, size):
    """Pixels whose centre lies in one of the polygons, by an independent library."""
    x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    mask = np.zeros((size, size), bool)
    for polygon in polygons[~shapely.is_empty(polygons)]:
        x0, y0, x1, y1 = polygon.bounds
        cut = np.s_[max(int(y0), 0) : int(y1) + 1, max(int(x0), 0) : int(x1) + 1]
        mask[cut] |= shapely.contains_xy(polygon, x[cut], y[cut])
    return mask


def test_same_arguments_same_bytes_whatever_the_threads(slide, tmp_path):
    again = tmp_path / "again.svs"
    beside = write_slide(again, width=SIDE, height=SIDE, mpp=0.5, seed=3, threads=1)
    assert again.read_bytes() == slide.read_bytes()
    assert beside.read_bytes() == slide.with_suffix(".truth.parquet").read_bytes()


def test_another_seed_is_another_world(slide, tmp_path):
    other = tmp_path / "other.svs"
    write_slide(other, width=SIDE, height=SIDE, mpp=0.5, seed=4, truth=False)
    assert not other.with_suffix(".truth.parquet").exists()
    assert np.abs(read_pixels(other).astype(int) - read_pixels(slide)).mean() > 10


def test_opens_in_openslide_as_aperio(slide):
    with openslide.OpenSlide(slide) as opened:
        assert opened.properties[openslide.PROPERTY_NAME_VENDOR] == "aperio"
        assert float(opened.properties[openslide.PROPERTY_NAME_MPP_X]) == 0.5
        assert float(opened.properties[openslide.PROPERTY_NAME_OBJECTIVE_POWER]) == 20
        assert opened.level_dimensions == ((1536, 1536), (384, 384), (96, 96))
        assert opened.level_downsamples == (1, 4, 16)
        assert opened.associated_images["thumbnail"].size == (24, 24)


def test_lower_levels_are_averages_of_level_0(slide):
    full = read_pixels(slide).astype(float)
    with openslide.OpenSlide(slide) as opened:
        for level, factor in ((1, 4), (2, 16)):
            size = opened.level_dimensions[level]
            lower = np.asarray(opened.read_region((0, 0), level, size))[..., :3].astype(float)
            mean = full.reshape(size[1], factor, size[0], factor, 3).mean((1, 3))
            assert np.sqrt(((mean - lower) ** 2).mean()) < 6  # a shift by one pixel gives 25


def test_jpeg_components_are_tagged_rgb(slide, whole):
    """Two independent readers see the drawn colours: no hidden YCbCr."""
    with tifffile.TiffFile(slide) as file:
        assert file.is_bigtiff
        assert file.pages[0].photometric == tifffile.PHOTOMETRIC.RGB
        assert np.abs(file.pages[0].asarray().astype(int) - whole).mean() < 4
    assert np.abs(read_pixels(slide).astype(int) - whole).mean() < 4


def test_jpeg2000_variant_shows_the_same(slide, tmp_path):
    path = tmp_path / "j2k.svs"
    write_slide(path, width=SIDE, height=700, mpp=0.5, seed=3, compression="jpeg2000", truth=False)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].compression == 33005
    with openslide.OpenSlide(path) as opened:
        assert opened.properties[openslide.PROPERTY_NAME_VENDOR] == "aperio"
        assert opened.level_dimensions == ((1536, 700), (384, 175), (96, 43))
    # The pen is placed by the slide's size, so the part above both strokes is compared.
    top = np.s_[:380]
    assert np.abs(read_pixels(path)[top].astype(int) - read_pixels(slide)[top]).mean() < 4


def test_no_tile_is_missing(slide):
    with tifffile.TiffFile(slide) as file:
        for page in file.pages:
            assert min(page.databytecounts) > 0


@settings(max_examples=12, deadline=None)
@given(x=st.integers(0, 1200), y=st.integers(0, 1200), w=st.integers(1, 300), h=st.integers(1, 300))
def test_any_region_drawn_alone_equals_the_same_part_of_the_whole(world, whole, x, y, w, h):
    box = Box(x=x, y=y, width=w, height=h)
    assert np.array_equal(world.draw(box, world.scene(box)), whole[box.slices])


def test_truth_is_valid_unique_and_inside_the_slide(truth):
    geometry = truth["geometry"]
    assert shapely.is_valid(geometry).all()
    assert set(shapely.get_type_id(geometry)) == {3}
    bounds = shapely.total_bounds(geometry)
    assert bounds.min() >= 0
    assert bounds.max() <= SIDE
    assert truth["id"] == list(range(1, len(geometry) + 1))
    for kind, least in (("nucleus", 1000), ("gland", 15), ("lumen", 15)):
        assert (truth["kind"] == kind).sum() > least


def test_nuclei_keep_a_gap(truth):
    nuclei = truth["geometry"][truth["kind"] == "nucleus"]
    grown = shapely.buffer(nuclei, 0.29 / 0.5)
    first, second = shapely.STRtree(grown).query(grown, predicate="intersects")
    assert (first == second).all()


def test_nuclei_have_the_size_of_nuclei(truth):
    area_um2 = shapely.area(truth["geometry"][truth["kind"] == "nucleus"]) * 0.25
    assert 15 < np.median(area_um2) < 45
    assert area_um2.max() < 80


def test_glands_are_apart_and_hold_their_children(truth):
    geometry, kind = truth["geometry"], truth["kind"]
    glands = geometry[kind == "gland"]
    first, second = shapely.STRtree(glands).query(glands, predicate="intersects")
    assert (first == second).all()
    nuclei_of_lumen = shapely.STRtree(geometry[kind == "lumen"]).query(
        geometry[kind == "nucleus"], predicate="intersects"
    )
    assert nuclei_of_lumen.size == 0
    for shape, what, parent, name in zip(
        geometry, kind, truth["parent_id"], truth["class"], strict=True
    ):
        if parent is not None:
            assert kind[parent - 1] == "gland"
            assert shapely.covers(shapely.buffer(geometry[parent - 1], 1e-6), shape)
        elif what == "nucleus" and name != "epithelial":
            assert not shapely.intersects(shape, glands).any()


def test_nuclei_are_drawn_where_the_truth_has_them(slide, truth):
    nuclei = truth["geometry"][truth["kind"] == "nucleus"]
    inside = paint_mask(shapely.buffer(nuclei, -0.6), SIDE)
    around = paint_mask(shapely.buffer(nuclei, 4), SIDE) & ~paint_mask(
        shapely.buffer(nuclei, 1), SIDE
    )
    red = -np.log10((read_pixels(slide)[..., 0] + 1.0) / 246)
    # Red light tells haematoxylin: eosin hardly absorbs it. The pen is left out.
    clear = np.arange(SIDE)[None, :] > 200
    assert np.percentile(red[inside & clear], 5) > np.percentile(red[around & clear], 95) - 0.05
    assert red[inside & clear].mean() > 2.5 * red[around & clear].mean()


def test_lumina_are_bright_and_nuclei_stay_out_of_glass(slide, truth, world):
    pixels = read_pixels(slide)
    lumen = paint_mask(shapely.buffer(truth["geometry"][truth["kind"] == "lumen"], -2), SIDE)
    assert np.median(pixels[lumen].min(1)) > 225
    scene = world.scene(Box(x=0, y=0, width=SIDE, height=SIDE))
    nodes, (i0, j0) = scene.fields.nodes, scene.fields.origin
    centres = scene.nuclei[:, :2]
    index = np.rint(centres / 8).astype(int)
    assert nodes[index[:, 1] - j0, index[:, 0] - i0, EDGE].min() > 0


@pytest.mark.parametrize("mpp", [0.37, 0.25])
def test_another_pixel_size_shows_the_same_world(truth, tmp_path, mpp):
    side = round(300 / mpp)
    path = tmp_path / "b.svs"
    write_slide(path, width=side, height=side, mpp=mpp, seed=3)
    other = read_truth(path)
    inner = shapely.box(100, 100, 290, 290)

    def inside_um(columns, spacing):
        shapes = shapely.transform(columns["geometry"], lambda xy: xy * spacing)
        shapes = shapes[shapely.covers(inner, shapes)]
        return shapes[np.lexsort(np.array([(g.centroid.x, g.centroid.y) for g in shapes]).T)]

    mine, theirs = inside_um(truth, 0.5), inside_um(other, mpp)
    assert len(mine) > 50
    assert len(mine) == len(theirs)
    assert shapely.equals_exact(mine, theirs, tolerance=1e-6).all()


def test_threads_and_blocks_leave_no_seam_in_the_truth(tmp_path):
    """A slide of one block and a wider one of several own the same objects."""
    write_slide(tmp_path / "small.svs", width=1024, height=512, mpp=0.5, seed=5)
    write_slide(tmp_path / "large.svs", width=2300, height=512, mpp=0.5, seed=5)
    small, large = read_truth(tmp_path / "small.svs"), read_truth(tmp_path / "large.svs")
    inner = shapely.box(0, 0, 1023, 512)
    a = {g.wkb for g in small["geometry"] if inner.covers(g)}
    b = [g.wkb for g in large["geometry"] if inner.covers(g)]
    assert len(b) == len(set(b))
    assert a == set(b)
    # Clipped at the right border of one, whole in the other.
    cut = [g for g in small["geometry"] if g.bounds[2] > 1023]
    tree = shapely.STRtree(large["geometry"])
    assert cut
    assert all(tree.query(g.buffer(-0.01), predicate="within").size for g in cut)


def test_bare_glass_is_one_tile_stored_over_and_over(world):
    far = Box(x=0, y=-5000, width=256, height=256)
    assert world.scene(far) is None
    assert world.is_bare(far, None)
    glass = world.draw(far, None)
    assert glass.min() > 235
    assert np.array_equal(glass, world.draw(far.shift(512, 256 * 4), None))


def test_the_pen_hides_tissue_and_says_so(tmp_path):
    path = tmp_path / "pen.svs"
    write_slide(path, width=2048, height=3072, mpp=0.5, seed=1)
    found = read_truth(path)
    hidden = np.array(found["obscured"])
    pixels = read_pixels(path)
    assert 0 < hidden.mean() < 0.05
    x, y = shapely.get_coordinates(shapely.centroid(found["geometry"][hidden])).T.astype(int)
    assert pixels[y, x].max(1).mean() < 150


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"width": 255}, "at least 256"),
        ({"height": 0}, "at least 256"),
        ({"mpp": 0.04}, "0.05-5"),
        ({"mpp": 6.0}, "0.05-5"),
        ({"mpp": float("nan")}, "0.05-5"),
        ({"seed": -1}, "seed"),
        ({"compression": "webp"}, "jpeg, jpeg2000"),
        ({"threads": 0}, "thread"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_nothing(tmp_path, wrong, words):
    arguments = {"width": 256, "height": 256, **wrong}
    with pytest.raises(ValueError, match=words):
        write_slide(tmp_path / "x.svs", **arguments)
    assert not list(tmp_path.iterdir())


def test_the_crypt_frame_and_its_inverse_agree():
    site = np.array([10.0, -5.0, 0.6, 0.8, 40.0, 38.0, 1.0])
    for k in range(SAMPLES):
        px, py, nx, ny = frame(site, k / SAMPLES)
        distance, s = gland_coordinates(site, px + 20 * nx, py + 20 * ny)
        assert distance == pytest.approx(20)
        assert (s - k / SAMPLES + 0.5) % 1 == pytest.approx(0.5, abs=1e-9)
