"""``wsi annotate`` as a user meets it."""

import pytest
from click.testing import CliRunner
from PIL import Image
from slide_fixtures import picture, write_slide

from wsi_pipeline.cli import wsi
from wsi_pipeline.curation.crops import read_crop


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "s.svs", picture(512, 384))
    return folder


def invoke(*arguments, ok=True):
    done = CliRunner().invoke(wsi, ["annotate", *(str(argument) for argument in arguments)])
    assert (done.exit_code == 0) is ok, done.output
    assert done.exit_code in (0, 1, 2)
    assert "Traceback" not in done.output
    return done.output


def begin(path, slides, *more, ok=True):
    return invoke(
        "new", path, "--slide", slides / "s.svs", "--at", 200, 150, "--side-um", 40,
        "--label", "nuclei", "--by", "me", *more, ok=ok,
    )  # fmt: skip


def test_a_crop_is_begun_drawn_corrected_and_checked(tmp_path, slides):
    path = tmp_path / "crops" / "c.geojson"
    said = begin(path, slides, "--part", "validation", "--tissue", "crypts", "--label", "gland")
    assert said == f"{path}: round 0, 0 nucleus, 0 gland, 0 ignore\n"
    crop = read_crop(path)
    assert (crop.part, crop.tissue, crop.labels, crop.mpp) == (
        "validation", "crypts", ("nuclei", "gland"), 0.25,
    )  # fmt: skip
    assert (crop.box.x, crop.box.y, crop.box.size) == (120, 70, (160, 160))

    text = tmp_path / "one.txt"
    text.write_text("ellipse nucleus 20,20 10 8 30\nignore 50 50 70 70\n", encoding="utf-8")
    said = invoke("apply", path, text, "--by", "you")
    assert said == f"{path}: round 1, 1 nucleus, 0 gland, 1 ignore\n"
    entry = read_crop(path).history[-1]
    assert (entry.by, entry.how) == ("you", "corrected by hand: 1 ellipse, 1 ignore")

    invoke("draw", path, tmp_path / "o.png", "--slides", slides, "--plain", "beside",
           "--part", 0, 0, 30, 20, "--zoom", 10, "--no-ids", "--no-grid")  # fmt: skip
    with Image.open(tmp_path / "o.png") as drawn:
        assert drawn.width > 600
        assert 200 < drawn.height < 320

    said = invoke("check", tmp_path / "crops", "--slides", slides)
    assert "validation: 1 nucleus in 1 crops of 1 slides" in said


def test_apply_may_write_beside_and_bears_the_new_name(tmp_path, slides):
    begin(tmp_path / "c.geojson", slides)
    before = (tmp_path / "c.geojson").read_bytes()
    text = tmp_path / "one.txt"
    text.write_text("add nucleus 10,10 20,10 20,20\n", encoding="utf-8")
    invoke("apply", tmp_path / "c.geojson", text, "--by", "you", "-o", tmp_path / "d.geojson")
    assert (tmp_path / "c.geojson").read_bytes() == before
    assert read_crop(tmp_path / "d.geojson").id == "d"


def test_apply_leaves_other_crops_alone(tmp_path, slides):
    begin(tmp_path / "c.geojson", slides)
    begin(tmp_path / "d.geojson", slides, "--tissue", "another")
    before = (tmp_path / "d.geojson").read_bytes()
    text = tmp_path / "one.txt"
    text.write_text("add nucleus 10,10 20,10 20,20\n", encoding="utf-8")
    wanted = ("apply", tmp_path / "c.geojson", text, "--by", "you", "-o", tmp_path / "d.geojson")
    assert "d.geojson is there already; --overwrite" in invoke(*wanted, ok=False)
    assert (tmp_path / "d.geojson").read_bytes() == before
    invoke(*wanted, "--overwrite")
    assert read_crop(tmp_path / "d.geojson").tissue == ""
    # its own file is no other crop
    (tmp_path / "sub").mkdir()
    same = tmp_path / "sub" / ".." / "c.geojson"
    invoke("apply", tmp_path / "c.geojson", text, "--by", "you", "-o", same)
    assert len(read_crop(tmp_path / "c.geojson").history) == 2


def test_corrections_may_begin_with_a_byte_order_mark(tmp_path, slides):
    begin(tmp_path / "c.geojson", slides)
    text = tmp_path / "one.txt"
    text.write_text("add nucleus 10,10 20,10 20,20\n", encoding="utf-8-sig")
    assert "round 1, 1 nucleus" in invoke("apply", tmp_path / "c.geojson", text, "--by", "you")


def test_pictures_are_png_and_never_a_crop(tmp_path, slides):
    path = tmp_path / "c.geojson"
    begin(path, slides)
    before = path.read_bytes()
    for out in (path, tmp_path / "x.jpg", tmp_path / "x"):
        said = invoke("draw", path, out, "--slides", slides, ok=False)
        assert f"a picture's file ends in .png, not {out.name}" in said
    (tmp_path / "link.png").symlink_to(path)
    said = invoke("draw", path, tmp_path / "link.png", "--slides", slides, ok=False)
    assert "is the crop itself" in said
    assert path.read_bytes() == before
    assert (tmp_path / "link.png").is_symlink()
    assert {own.name for own in tmp_path.iterdir()} == {"c.geojson", "link.png"}
    invoke("draw", path, tmp_path / "x.PNG", "--slides", slides)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--zoom", "-1"), "the zoom must be from 0.1 to 100"),
        (("--zoom", "0"), "the zoom must be from"),
        (("--zoom", "0.0001"), "the zoom must be from"),
        (("--zoom", "nan"), "the zoom must be from"),
        (("--context", "nan"), "the context must be 0 pixels or more"),
        (("--context", "-200"), "the context must be 0 pixels or more"),
        (("--part", "0", "0", "inf", "9"), "a part is x0 y0 x1 y1"),
        (("--part", "0", "nan", "9", "9"), "a part is x0 y0 x1 y1"),
    ],
)
def test_looks_that_make_no_sense_are_refused(tmp_path, slides, options, words):
    begin(tmp_path / "c.geojson", slides)
    out = tmp_path / "o.png"
    said = invoke("draw", tmp_path / "c.geojson", out, "--slides", slides, *options, ok=False)
    assert words in said
    assert not out.exists()


@pytest.mark.parametrize(
    "wrong", [("--side-um", "inf"), ("--side-um", "nan"), ("--side-um", "-9"), ("--at", "inf", "9")]
)
def test_squares_that_are_none_are_refused(tmp_path, slides, wrong):
    assert "there is no square of" in begin(tmp_path / "c.geojson", slides, *wrong, ok=False)


def test_check_compares_pixel_sizes_unless_told_the_slide_is_wrong(tmp_path, slides):
    crops = tmp_path / "crops"
    begin(crops / "c.geojson", slides, "--mpp", "0.5")
    said = invoke("check", crops, "--slides", slides, ok=False)
    assert "crop c says 0.5 um a pixel, but s.svs has 0.25 x 0.25 according to aperio.MPP" in said
    assert "--mpp s.svs=0.5" in said
    invoke("check", crops, "--slides", slides, "--mpp", "s.svs=0.5")
    invoke("check", crops, "--slides", slides, "--mpp", "s.svs=0.4", ok=False)
    said = invoke("check", crops, "--slides", slides, "--mpp", "t.svs=0.5", ok=False)
    assert "no crop of the slides ['t.svs']" in said
    assert "SLIDE=UM" in invoke("check", crops, "--slides", slides, "--mpp", "0.5", ok=False)
    assert "--slides" in invoke("check", crops, "--mpp", "s.svs=0.5", ok=False)


def test_corrections_that_fail_leave_the_file_as_it_was(tmp_path, slides):
    begin(tmp_path / "c.geojson", slides)
    before = (tmp_path / "c.geojson").read_bytes()
    text = tmp_path / "one.txt"
    text.write_text("add nucleus 10,10 20,10 20,20\ndelete 7\n", encoding="utf-8")
    said = invoke("apply", tmp_path / "c.geojson", text, "--by", "you", ok=False)
    assert "line 2 (delete 7): there is no object 7" in said
    assert (tmp_path / "c.geojson").read_bytes() == before


def test_crops_are_not_lost_and_have_names(tmp_path, slides):
    path = tmp_path / "c.geojson"
    begin(path, slides)
    before = path.read_bytes()
    assert "--overwrite" in begin(path, slides, "--tissue", "x", ok=False)
    assert path.read_bytes() == before
    begin(path, slides, "--tissue", "x", "--overwrite")
    assert read_crop(path).tissue == "x"
    for name in ("c.json", ".geojson"):
        said = begin(tmp_path / name, slides, ok=False)
        assert f"is named NAME.geojson, not {name}" in said
    assert "labels must be some of" in begin(
        tmp_path / "e.geojson", slides, "--label", "x", ok=False
    )
    (tmp_path / "none").mkdir()
    said = invoke("draw", path, tmp_path / "o.png", "--slides", tmp_path / "none", ok=False)
    assert "s.svs, which is not in" in said
