"""``wsi info --redact`` says nothing that is not from its own lists of words, or a number."""

import logging

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from slide_fixtures import picture, write_slide

from wsi_pipeline import deidentified
from wsi_pipeline.cli import wsi
from wsi_pipeline.describe import describe_file
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.table import OBJECT_SCHEMA, ObjectWriter
from wsi_pipeline.tiling import TileGrid

SECRET = "Ophelia1953"
FIELDS = ("Filename", "Patient", "Barcode", "User", "Date", "Time", "Title", "ScanScope ID",
          "Time Zone", "ImageID", SECRET)  # fmt: skip


def aperio(**more: str) -> str:
    texts = {name: f"{SECRET} {name}" for name in FIELDS} | more
    fields = "|".join(f"{key} = {value}" for key, value in texts.items())
    return f"Aperio Image Library v11 {SECRET}\r\n{SECRET} 640x512|AppMag = 40|MPP = 0.25|{fields}"


def write_with_pictures(path, image=None, **more):
    """Write an SVS whose every text holds the secret, with a label and a macro image beside it."""
    write_slide(path, picture(640, 512) if image is None else image, description=aperio(**more))
    rng = np.random.default_rng(5)
    with tifffile.TiffWriter(path, append=True) as tif:
        for name, size, kind in (("label", (90, 120), 1), ("macro", (80, 300), 9)):
            pixels = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
            tif.write(
                pixels, photometric="rgb", metadata=None, subfiletype=kind, rowsperstrip=16,
                description=f"Aperio {SECRET}\r\n{name} {size[1]}x{size[0]} {SECRET}",
            )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"Hospital {SECRET}")
    return write_with_pictures(folder / f"{SECRET}.svs")


def info(*arguments):
    return CliRunner().invoke(wsi, ["info", *map(str, arguments)])


def test_info_names_the_pictures_beside_a_slide_and_the_day(slide):
    output = info(slide).output
    assert f"scanned    {SECRET} Date" in output
    assert (
        "beside it  label 120 x 90, macro 300 x 80, thumbnail 160 x 128 (label and macro may"
        in (output)
    )
    assert SECRET in output


def test_a_redacted_slide(slide):
    result = info(slide, "--redact")
    assert result.exit_code == 0
    assert SECRET not in result.output
    assert result.output.splitlines()[:4] == [
        "slide      aperio, read by tiff",
        "size       640 x 512 px, 0.16 x 0.13 mm",
        "mpp        0.25 x 0.25 um, from aperio.MPP",
        "objective  40",
    ]
    assert "beside it  label 120 x 90, macro 300 x 80, thumbnail 160 x 128" in result.output
    assert "scanned" not in result.output


def test_the_general_reader_tells_no_more(slide, monkeypatch):
    from wsi_pipeline.slide import opening

    monkeypatch.setattr(opening, "_openers", lambda path: [opening.OpenSlideReader.open])
    result = info(slide, "--redact")
    assert "read by openslide" in result.output
    assert "label 120 x 90, macro 300 x 80" in result.output
    assert SECRET not in result.output


def test_words_and_numbers_of_a_slide_are_from_lists(slide, monkeypatch):
    from wsi_pipeline.slide import Slide

    monkeypatch.setattr(Slide, "vendor", SECRET)
    monkeypatch.setattr(Slide, "reader", SECRET)
    monkeypatch.setattr(Slide, "associated", {SECRET: (3, 4)})
    monkeypatch.setattr(Slide, "objective_power", 19530214.0)
    lines = describe_file(str(slide), redact=True)
    assert SECRET not in "\n".join(lines)
    assert lines[0] == "slide      other, read by other"
    assert "objective  other" in lines
    assert "beside it  other 3 x 4 (label and macro may show names; nothing here copies them)" in (
        lines
    )


def secret_table(path, **changes):
    metadata = {
        "slide": {
            "name": f"{SECRET}.svs",
            "slide_id": SECRET,
            "width": 640,
            "height": 512,
            "mpp": {"x": 0.25, "y": 0.25, "source": "aperio.MPP"},
            SECRET: SECRET,
        },
        "model": {"name": SECRET, "sha256": "ab" * 32, "classes": {SECRET: [SECRET]}},
        "options": {"device": "cuda:1", "precision": "bf16", "tile_px": 256, "mask": "detected"},
        "versions": {"numpy": "2.4.6", "torch": "2.9.1+cpu", SECRET: SECRET},
        SECRET: SECRET,
        **changes,
    }
    with ObjectWriter(path, metadata=metadata, pixel_size=(0.25, 0.25)) as writer:
        writer.write(OBJECT_SCHEMA.empty_table())
    return path


def test_a_redacted_table(tmp_path):
    result = info(secret_table(tmp_path / f"{SECRET}.parquet"), "--redact")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "table      0 rows",
        "slide      640 x 512 px",
        "mpp        0.25 x 0.25 um, from aperio.MPP",
        f"model      {'ab' * 32}",
        "options    cuda, bf16, tile 256 px, mask detected",
        "versions   numpy 2.4.6, torch 2.9.1+cpu",
    ]


def test_texts_in_the_place_of_numbers_and_words_are_not_shown(tmp_path):
    everywhere = secret_table(
        tmp_path / "t.parquet",
        slide={
            "width": SECRET,
            "height": [SECRET],
            "mpp": {"x": SECRET, "y": {}, "source": SECRET},
        },
        model={"sha256": SECRET},
        options={"device": SECRET, "precision": SECRET, "tile_px": SECRET, "mask": SECRET},
        versions={"numpy": SECRET, "torch": f"2.0+{SECRET}"},
    )
    output = info(everywhere, "--redact").output
    assert SECRET not in output
    assert "slide      other x other px" in output
    assert "versions   numpy other, torch other" in output
    nothing = secret_table(
        tmp_path / "u.parquet", slide=SECRET, model=None, options=[1], versions=0
    )
    assert info(nothing, "--redact").exit_code == 0


def test_redacted_maps(tmp_path):
    spec = ModelSpec(
        name=SECRET, architecture="none", mpp=0.5, halo_px=16, options={}, description=SECRET,
        heads=(
            HeadSpec(name="nuclei", kind="instance", object_kind=SECRET, rules=AnchorRules()),
            HeadSpec(name=SECRET, kind="patch", classes=(SECRET,), stride=16),
        ),
    )  # fmt: skip
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(2.0, 2.0), size=(64, 64))
    tiles = TileGrid.cover(grid, tile_px=64, halo_px=16)
    path = tmp_path / f"{SECRET}.zarr"
    PredictionStore.create(
        path, spec=spec, tiles=tiles, pixel_size=(0.25, 0.25), made={"job": SECRET}
    ).seal()
    output = info(path, "--redact").output
    assert SECRET in info(path).output
    assert SECRET not in output
    assert "nuclei/prob: 64 x 64 at 0.5 um" in output
    assert "other/class: 4 x 4 at 8 um" in output


@pytest.mark.parametrize(
    "case", ["missing", "damaged", "text.parquet", "no mpp", "folder", "crash"]
)
def test_errors_show_the_code_alone(tmp_path, slide, case, monkeypatch):
    path = tmp_path / f"{SECRET}.svs"
    code = "unreadable_slide"
    if case == "damaged":
        path.write_bytes(slide.read_bytes()[:3000])
    elif case == "text.parquet":
        path, code = tmp_path / f"{SECRET}.parquet", "internal"
        path.write_text(SECRET)
    elif case == "no mpp":
        code = "missing_mpp"
        unsized = aperio().replace("MPP", "M").replace("AppMag", "A")
        write_slide(path, picture(64, 64), description=unsized)
    elif case == "folder":
        path, code = tmp_path, "internal"
    elif case == "crash":
        path, code = slide, "internal"
        monkeypatch.setattr(deidentified, "_word", lambda *_: {}[SECRET])
    result = info(path, "--redact")
    assert result.exit_code == 2
    assert result.output == f"Error: {code} (without --redact the message says more)\n"
    assert not logging.root.manager.disable, "only while the command runs"


def test_a_bundle_has_nothing_to_hide():
    assert info("stain-baseline", "--redact").output == info("stain-baseline").output


def test_texts_of_files_do_nothing_to_a_terminal(tmp_path):
    path = write_with_pictures(tmp_path / "a.svs", Date="\x1b[2J1953")
    output = "\n".join(describe_file(str(path)))
    assert "\x1b" not in output
    assert "?[2J1953" in output
