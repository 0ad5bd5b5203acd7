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
    assert "ends in .geojson" in begin(tmp_path / "c.json", slides, ok=False)
    assert "labels must be some of" in begin(
        tmp_path / "e.geojson", slides, "--label", "x", ok=False
    )
    (tmp_path / "none").mkdir()
    said = invoke("draw", path, tmp_path / "o.png", "--slides", tmp_path / "none", ok=False)
    assert "s.svs, which is not in" in said
