"""Slides of every kind: the right pixels, the right size, the right error."""

import os
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from slide_fixtures import (
    KINDS,
    encode,
    mean_blocks,
    picture,
    psnr,
    retag,
    write_slide,
)

from wsi_pipeline.errors import SlideError, UnsupportedFormatError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.slide import PixelSize, Slide

DATA = Path(os.environ.get("WSI_DATA", Path(__file__).parents[1] / "../shared/data"))
IMAGE = picture(333, 277)


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the data kit has no {name} (set WSI_DATA)")
    return path


def read_all(slide, mpp):
    grid = slide.working_grid(mpp)
    return slide.read(grid, grid.box)


# formats -------------------------------------------------------------------------------


@pytest.mark.parametrize("description", ["aperio", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_by_the_fast_path(tmp_path, kind, description):
    options = {} if description == "aperio" else {"description": ""}
    path = write_slide(tmp_path / "a.svs", IMAGE, kind, **options)
    with Slide.open(path, mpp=0.25) as slide:
        assert slide.reader == "tiff"
        assert slide.vendor == ("aperio" if description == "aperio" else "generic-tiff")
        assert slide.size == (333, 277)
        assert [level.size for level in slide.levels] == [(333, 277), (84, 70)]
        full, half = read_all(slide, 0.25), read_all(slide, 0.5)
    if "jpeg" not in kind or kind == "jpeg2000-rgb":
        assert np.array_equal(full, IMAGE)
        assert np.abs(half - mean_blocks(IMAGE, 2)).max() <= 0.5
    assert psnr(full, IMAGE) > 45
    assert psnr(half, mean_blocks(IMAGE, 2)) > 45


@pytest.mark.parametrize("reduction", [2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["jpeg-rgb", "jpeg-ycc444", "raw"])
def test_reductions_are_area_averages_up_to_the_last_pixel(tmp_path, kind, reduction):
    # black padding, as some writers have it, must not darken the edge
    path = write_slide(tmp_path / "a.svs", IMAGE, kind, downsamples=(1,), fill="constant")
    with Slide.open(path) as slide:
        found = read_all(slide, 0.25 * reduction)
    expected = mean_blocks(IMAGE, reduction)
    assert found.shape == expected.shape
    assert psnr(found, expected) > 42
    assert psnr(found[-1], expected[-1]) > 38
    assert psnr(found[:, -1], expected[:, -1]) > 38


def test_a_big_tiff_is_read(tmp_path):
    path = write_slide(tmp_path / "a.tiff", IMAGE, "deflate", bigtiff=True)
    with Slide.open(path) as slide:
        assert slide.reader == "tiff"
        assert np.array_equal(read_all(slide, 0.25), IMAGE)


def test_horizontal_prediction_is_undone(tmp_path):
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, IMAGE, tile=(64, 64), compression="deflate", predictor=2,
                     photometric="rgb")  # fmt: skip
    with Slide.open(path, mpp=0.25) as slide:
        assert slide.reader == "tiff"
        assert np.array_equal(read_all(slide, 0.25), IMAGE)


def test_the_photometric_tag_overrules_a_jfif_marker(tmp_path):
    # RGB components behind a JFIF header, which decoders take for YCbCr
    rgb = encode(IMAGE[:64, :64], "jpeg-rgb")
    jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, iter([rgb[:2] + jfif + rgb[2:]]), shape=(64, 64, 3), dtype=np.uint8,
                     tile=(64, 64), compression=7, photometric="ycbcr")  # fmt: skip
    retag(path, "PhotometricInterpretation", 2)
    with Slide.open(path, mpp=0.25) as slide:
        assert psnr(read_all(slide, 0.25), IMAGE[:64, :64]) > 45


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_urls_are_read_by_tiffslide(tmp_path, scheme):
    path = write_slide(tmp_path / "a.svs", IMAGE, "deflate")
    url = path.as_uri()
    if scheme == "memory":
        import fsspec

        url = f"memory://{tmp_path.name}/a.svs"
        fsspec.filesystem("memory").pipe(url, path.read_bytes())
    with Slide.open(url) as slide:
        assert (slide.reader, slide.name) == ("tiffslide", "a.svs")
        assert slide.pixel_size == PixelSize(x=0.25, y=0.25, source="aperio.MPP")
        assert np.array_equal(read_all(slide, 0.25), IMAGE)


def test_an_untiled_tiff_is_read_by_tiffslide(tmp_path):
    tifffile.imwrite(tmp_path / "a.tiff", IMAGE, photometric="rgb")
    with Slide.open(tmp_path / "a.tiff", mpp=0.25) as slide:
        assert slide.reader == "tiffslide"
        assert np.array_equal(read_all(slide, 0.25), IMAGE)


def test_odd_tags_fall_back_to_openslide_and_clear_glass_is_white(tmp_path):
    alpha = np.full((277, 333, 1), 255, np.uint8)
    alpha[:100, :100] = 0
    rgba = np.concatenate([IMAGE * (alpha > 0), alpha], axis=-1)
    tifffile.imwrite(tmp_path / "a.tiff", rgba, tile=(64, 64), photometric="rgb",
                     compression="deflate", extrasamples=["unassalpha"])  # fmt: skip
    with Slide.open(tmp_path / "a.tiff", mpp=0.25) as slide:
        assert slide.reader == "openslide"
        found = read_all(slide, 0.25)
    assert (found[:100, :100] == 255).all()
    assert np.array_equal(found[100:, 100:], IMAGE[100:, 100:])


# grids ---------------------------------------------------------------------------------


def test_a_level_or_its_half_is_used_where_it_fits(tmp_path):
    path = write_slide(tmp_path / "a.svs", IMAGE, "raw")
    with Slide.open(path, mpp=0.2525) as slide:
        half = slide.working_grid(0.5)
        assert (half.spacing, half.size) == ((2.0, 2.0), (167, 139))
        coarse = slide.working_grid(1.0)
        assert (coarse.spacing, coarse.size) == ((333 / 84, 277 / 70), (84, 70))
        level = slide.read(coarse, coarse.box)
    assert np.array_equal(level, IMAGE[::4, ::4])


def test_otherwise_the_pixel_size_is_exact(tmp_path):
    path = write_slide(tmp_path / "a.svs", IMAGE, "raw")
    with Slide.open(path, mpp=0.263) as slide:
        grid = slide.working_grid(0.5)
    assert grid.spacing == pytest.approx((0.5 / 0.263,) * 2)
    assert grid.size == (176, 146)


def overlap_mean(image, spacing, size):
    """Area resampling by dense overlap matrices."""

    def matrix(cells, pixels, step):
        edges = np.arange(cells + 1)[:, None] * step
        low = np.maximum(edges[:-1], np.arange(pixels))
        high = np.minimum(edges[1:], np.arange(1, pixels + 1))
        share = np.maximum(high - low, 0)
        return share / share.sum(axis=1, keepdims=True)

    rows = matrix(size[1], image.shape[0], spacing[1])
    columns = matrix(size[0], image.shape[1], spacing[0])
    return np.einsum("ay,yxc,bx->abc", rows, image.astype(float), columns, optimize=True)


@pytest.mark.parametrize("mpp", [0.26, 0.37, 0.48])
def test_resampling_is_an_area_average(tmp_path, mpp):
    path = write_slide(tmp_path / "a.svs", IMAGE, "raw", downsamples=(1,))
    with Slide.open(path, mpp=0.25) as slide:
        spacing = (mpp / 0.25, mpp / 0.25)
        size = tuple(int(np.ceil(n / s)) for n, s in zip(slide.size, spacing, strict=True))
        grid = PixelGrid(origin=(0.0, 0.0), spacing=spacing, size=size)
        found = slide.read(grid, grid.box)
    assert np.abs(found - overlap_mean(IMAGE, spacing, size)).max() <= 1


def test_enlarging_interpolates(tmp_path):
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    path = write_slide(tmp_path / "a.svs", ramp, "raw", downsamples=(1,))
    with Slide.open(path) as slide:
        found = read_all(slide, 0.1)[5, 10:-10, 0]
    assert np.abs(found - ((np.arange(len(found)) + 10.5) * 0.4 - 0.5)).max() <= 0.51


def test_outside_the_slide_is_white(tmp_path):
    path = write_slide(tmp_path / "a.svs", IMAGE, "raw")
    for mpp in (0.25, 0.5, 0.37):
        with Slide.open(path) as slide:
            grid = slide.working_grid(mpp)
            whole = slide.read(grid, grid.box)
            wide = slide.read(grid, grid.box.pad(40))
            away = slide.read(grid, Box(x=-900, y=2000, width=30, height=20))
        inside = wide[40:-40, 40:-40]
        assert np.array_equal(inside, whole)
        wide[40:-40, 40:-40] = 255
        assert (wide == 255).all()
        assert away.shape == (20, 30, 3)
        assert (away == 255).all()


def test_a_grid_may_start_anywhere(tmp_path):
    path = write_slide(tmp_path / "a.svs", IMAGE, "raw")
    with Slide.open(path) as slide:
        grid = slide.working_grid(0.37)
        part = Box(x=31, y=17, width=50, height=40)
        window = grid.window(part)
        again = slide.read(window, window.box)
        assert np.abs(again.astype(int) - slide.read(grid, part)).max() <= 1


def test_a_thumbnail_covers_the_slide(tmp_path):
    path = write_slide(tmp_path / "a.svs", IMAGE, "raw", downsamples=(1,))
    with Slide.open(path) as slide:
        found, grid = slide.thumbnail(4.0)
    assert grid == PixelGrid(origin=(0.0, 0.0), spacing=(16.0, 16.0), size=(21, 18))
    assert np.abs(found - mean_blocks(IMAGE, 16)).max() <= 1


# holes and errors ----------------------------------------------------------------------


def test_an_undecodable_tile_is_a_white_hole_and_a_missing_one_is_glass(tmp_path, caplog):
    path = write_slide(tmp_path / "a.svs", IMAGE, "jpeg-rgb", skip={(1, 0)},
                       spoil={(2, 2), (5, 4)})  # fmt: skip
    hole, corner = Box(x=128, y=128, width=64, height=64), Box(x=320, y=256, width=13, height=21)
    caplog.set_level("INFO")
    with Slide.open(path) as slide:
        assert slide.holes == ()
        found = read_all(slide, 0.25)
        read_all(slide, 0.5)
        assert slide.holes == (hole, corner)
        grid = slide.working_grid(0.25)
        assert slide.unreadable_share(grid, hole) == 1
        assert slide.unreadable_share(grid, hole.shift(32, 0)) == 0.5
        assert slide.unreadable_share(grid, hole.shift(64, 0)) == 0
        # what one level has lost another may have
        assert (
            slide.unreadable_share(slide.working_grid(1.0), Box(x=0, y=0, width=9, height=9)) == 0
        )
    lines = [r for r in caplog.records if "cannot be decoded" in r.getMessage()]
    assert [r.levelname for r in lines] == ["WARNING", "INFO"]
    assert (found[hole.slices] == 255).all()
    assert (found[corner.slices] == 255).all()
    assert (found[:64, 64:128] == 255).all()
    assert psnr(found[:64, :64], IMAGE[:64, :64]) > 45


def test_a_disk_that_fails_is_an_error_and_no_hole(tmp_path, monkeypatch):
    path = write_slide(tmp_path / "a.svs", IMAGE, "jpeg-rgb")

    def fail(*_):
        raise OSError(5, "Input/output error")

    with Slide.open(path) as slide:
        monkeypatch.setattr("os.pread", fail)
        with pytest.raises(SlideError, match="try again"):
            read_all(slide, 0.25)
        assert slide.holes == ()


def test_holes_of_several_levels_are_disjoint(tmp_path):
    path = write_slide(tmp_path / "a.svs", IMAGE, "deflate", spoil={(0, 0), (3, 1)})
    with Slide.open(path) as slide:
        read_all(slide, 0.25)
        slide._report_hole(plane_of(slide, level=1), 0, 0, ValueError("made up"))
        holes = slide.holes
    covered = np.zeros((277, 333), int)
    for hole in holes:
        covered[hole.slices] += 1
    assert covered.max() == 1
    assert covered[:253, :254].all()
    assert covered.sum() == 254 * 253 + 2 * 64


def plane_of(slide, level):
    from wsi_pipeline.slide.planes import sampling_for

    spacing = slide.levels[level].downsample
    grid = PixelGrid(origin=(0.0, 0.0), spacing=spacing, size=slide.levels[level].size)
    return sampling_for(grid, slide._reader.levels, slide._downsamples).plane


@pytest.mark.parametrize("level", [0, 1])
def test_a_slide_of_which_nothing_decodes_is_refused(tmp_path, level, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.slide.outages.PAUSES_S", (0.0,))
    path = write_slide(tmp_path / "a.svs", IMAGE, "jpeg-rgb", spoil="all", spoil_level=level)
    with pytest.raises(SlideError, match=f"nothing of level {level} can be decoded") as caught:
        Slide.open(path)
    assert caught.value.code == "unreadable_slide"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("downsamples", [(1,), (1, 4)])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_a_truncated_file_is_refused(tmp_path, share, bigtiff, downsamples, capfd):
    # with one level, other readers would take what is left of it without a word
    image = np.tile(IMAGE, (4, 4, 1)) if len(downsamples) == 1 else IMAGE
    path = write_slide(
        tmp_path / "a.svs", image, "deflate", bigtiff=bigtiff, downsamples=downsamples
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlideError, match=r"a\.svs.*damaged") as caught:
        Slide.open(path)
    assert caught.value.code == "unreadable_slide"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.svs", b"nothing that anybody knows", "unreadable_slide"),
        ("a.svs", b"", "unreadable_slide"),
        ("a.tiff", b"II*\x00\x08\x00\x00\x00", "unreadable_slide"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(200), "unsupported_format"),
        ("a.dcm", bytes(128) + b"DICM" + bytes(200), "unsupported_format"),
        ("a.svs", None, "unreadable_slide"),
    ],
)
def test_what_is_no_slide_gets_its_code(tmp_path, name, content, code, capfd):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match="To proceed") as caught:
        Slide.open(tmp_path / name)
    assert caught.value.code == code
    assert capfd.readouterr() == ("", "")


def test_an_unknown_compression_is_not_supported(tmp_path, capfd):
    path = write_slide(tmp_path / "a.svs", IMAGE, "raw")
    retag(path, "Compression", 52479)
    with pytest.raises(UnsupportedFormatError, match=r"seems whole.*compression 52479") as caught:
        Slide.open(path)
    assert caught.value.code == "unsupported_format"
    assert capfd.readouterr() == ("", "")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(SlideError, match="is a folder"):
        Slide.open(tmp_path)


def test_an_unknown_url_is_refused():
    with pytest.raises(SlideError, match="check the URL"):
        Slide.open("memory://no/such/slide.svs")


# real slides ---------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "mpp", "source", "power"),
    [
        ("CMU-1-Small-Region.svs", 0.499, "aperio.MPP", 20),
        ("crohn_colon_biopsy_HE4_crop.svs", 0.263018, "aperio.MPP", 40),
        ("acute_appendicitis_HE_crop.tiff", 0.504, "tiff.XResolution", None),
        ("colon_submucosal_lipoma_HE_nompp.tiff", "missing_mpp", None, None),
        ("TCGA-CR-7395-01A-01-TS1.svs", "missing_mpp", None, None),
        ("BRACS_1640_N_3_cropped.tiff", "implausible_mpp", None, None),
    ],
)
def test_real_pixel_sizes(name, mpp, source, power):
    path = real(f"slides/{name}")
    if source is None:
        with pytest.raises(SlideError, match="--mpp") as caught:
            Slide.open(path)
        assert caught.value.code == mpp
    with Slide.open(path, mpp=0.4) as slide:
        assert slide.reader == "tiff"
        assert slide.thumbnail(8.0)[0].std() > 1
        assert not slide.holes
    if source is not None:
        with Slide.open(path) as slide:
            size = slide.pixel_size
            assert (size.x, size.y) == pytest.approx((mpp, mpp))
            assert (size.source, slide.objective_power) == (source, power)


@pytest.mark.real
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("CMU-1-Small-Region.svs", (1900, 2500)),  # reaches over the last column and row
        ("crohn_colon_biopsy_HE4_crop.svs", (7000, 5000)),
        ("acute_appendicitis_HE_crop.tiff", (9700, 9700)),
        ("TCGA-CR-7395-01A-01-TS1.svs", (4000, 3200)),
        ("BRACS_1640_N_3_cropped.tiff", (200, 300)),
    ],
)
def test_the_fast_path_agrees_with_openslide(name, place, factor):
    path = real(f"slides/{name}")
    with openslide.OpenSlide(path) as handle:
        edge = [min(p + 600, n) for p, n in zip(place, handle.dimensions, strict=True)]
        region = handle.read_region(place, 0, (edge[0] - place[0], edge[1] - place[1]))
        theirs = mean_blocks(np.asarray(region)[..., :3], factor)
    with Slide.open(path, mpp=0.25) as slide:
        cells = tuple(-(-n // factor) for n in slide.size)
        grid = PixelGrid(origin=(0.0, 0.0), spacing=(float(factor),) * 2, size=cells)
        box = Box(x=place[0] // factor, y=place[1] // factor, width=theirs.shape[1],
                  height=theirs.shape[0])  # fmt: skip
        # the halves of level 0, not a level that happens to have this spacing
        slide._downsamples = slide._downsamples[:1]
        ours = slide.read(grid, box)
    assert psnr(ours, theirs) > 45
    if "TCGA" in name or "BRACS" in name:
        assert np.abs(ours - theirs).max() <= 0.5


@pytest.mark.real
@pytest.mark.parametrize("kind", ["openslide", "tiffslide"])
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_the_general_readers_agree_with_the_fast_path(name, kind):
    from wsi_pipeline.slide.regions import OpenSlideReader, TiffSlideReader

    path = str(real(f"slides/{name}"))
    general = {"openslide": OpenSlideReader, "tiffslide": TiffSlideReader}[kind].open(path)
    size = PixelSize(x=0.3, y=0.3, source="argument")
    box = Box(x=900, y=1200, width=400, height=300)
    with Slide.open(path, mpp=0.3) as fast, Slide(path, general, size) as slow:
        assert slow.reader == kind
        grid = fast.working_grid(0.5)
        assert psnr(fast.read(grid, box), slow.read(grid, box)) > 45


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("boxes.tiff", "implausible_mpp"),
        ("histolab_broken.svs", "unreadable_slide"),
        ("unopenable.tiff", "unsupported_format"),
        ("unreadable.svs", "unreadable_slide"),
        ("small.svs", None),  # 16 x 16 pixels, but whole
        ("boxes_0.dcm", None),
    ],
)
def test_broken_files_get_their_code_in_silence(name, code, capfd, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.slide.outages.PAUSES_S", (0.0,))
    path = real(f"slides_broken/{name}")
    if code is None:
        with Slide.open(path) as slide:
            assert slide.size == (16, 16)
            assert slide.thumbnail(8.0)[0].shape == (1, 1, 3)
    else:
        with pytest.raises(SlideError, match="To proceed") as caught:
            Slide.open(path)
        assert caught.value.code == code
    assert capfd.readouterr() == ("", "")
