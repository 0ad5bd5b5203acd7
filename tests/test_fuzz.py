"""Hostile inputs: a campaign with a fixed seed, and one case of everything it has ever found."""

import json
import os
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from slide_fixtures import picture, write_slide

from benchmarks.fuzz import inputs, models, results, slides
from benchmarks.fuzz.executor import Case, Limits, run_cases
from benchmarks.fuzz.targets import TARGETS
from benchmarks.fuzz.tiffs import scan
from benchmarks.fuzz.trees import write_tree
from wsi_pipeline.attempt import Attempt
from wsi_pipeline.batch import collect_slides, read_run
from wsi_pipeline.bundle import open_bundle
from wsi_pipeline.checkpoint import load_pickled
from wsi_pipeline.errors import (
    JobError,
    MaskError,
    ModelBundleError,
    SlideError,
    StoreError,
    TableError,
)
from wsi_pipeline.geometry import Box
from wsi_pipeline.job import RunReport, SlideJob, read_report
from wsi_pipeline.slide import Slide
from wsi_pipeline.slide import slide as slide_module
from wsi_pipeline.slide.reader import TileError
from wsi_pipeline.slide.regions import OpenSlideReader
from wsi_pipeline.slide.streams import check_stream, picture_size
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.table import count_rows, read_centroids, read_objects, read_rings
from wsi_pipeline.tissue import read_mask

ROOT = Path(__file__).parent.parent
CASES = 5000


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """All cases, in a process of its own: it forks, and must have one thread."""
    path = tmp_path_factory.mktemp("fuzz") / "outcomes.json"
    command = [sys.executable, "-m", "benchmarks.fuzz", "--cases", str(CASES), "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert path.exists(), done.stderr
    return done, json.loads(path.read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_no_hostile_input_crashes_hangs_or_grows(campaign, target):
    _, report = campaign
    own = [outcome for outcome in report["outcomes"] if outcome["target"] == target]
    assert len(own) >= CASES // 200
    dirty = [o for o in own if o["how"] not in ("fine", "refused")]
    assert not dirty, dirty[:3]
    # not all are refused, and not all are accepted: the changes are neither too coarse nor idle
    hows = {outcome["how"] for outcome in own}
    assert hows == {"fine"} if target == "job" else hows == {"fine", "refused"}


def test_one_command_prints_the_number(campaign):
    done, report = campaign
    assert report["clean"] == CASES
    assert f"{CASES} of {CASES} clean" in done.stdout
    assert done.returncode == 0


# --- the harness finds what it is there for


def hold(mib):
    np.zeros(mib << 20, np.uint8)


def touch(mib):
    np.ones(mib << 20, np.uint8)


def spin():
    while True:
        pass


@pytest.mark.parametrize(
    ("use", "how"),
    [
        (lambda folder: None, "fine"),
        (lambda folder: (_ for _ in ()).throw(SlideError("no")), "refused"),
        (lambda folder: {}["x"], "accident"),
        (lambda folder: hold(300), "accident"),
        (lambda folder: hold(10), "fine"),
        (lambda folder: os.abort(), "killed"),
        (lambda folder: spin(), "hang"),
        (lambda folder: time.sleep(60), "hang"),
        (lambda folder: os._exit(0), "killed"),
    ],
)
def test_the_harness_tells_how_a_case_ends(use, how):
    limits = Limits(memory_mib=100, cpu_s=1, wall_s=5.0)
    case = Case(target="x", number=0, make=lambda folder: "nothing", use=use)
    (outcome,) = run_cases([case], limits=limits, jobs=1)
    assert (outcome.how, outcome.is_clean) == (how, how in ("fine", "refused"))


def test_cases_of_one_process_do_not_answer_for_each_other():
    uses = [
        *(lambda folder: None, lambda folder: touch(90), lambda folder: hold(90)),
        *(lambda folder: {}["x"], lambda folder: None, lambda folder: os.abort()),
        *(lambda folder: time.sleep(60), lambda folder: hold(300), lambda folder: None),
    ]
    cases = [
        Case(target="x", number=number, make=lambda folder: folder.name, use=use)
        for number, use in enumerate(uses)
    ]
    limits = Limits(memory_mib=100, cpu_s=1, wall_s=3.0)
    found = list(run_cases(cases, limits=limits, jobs=1, together=20))
    fine, accident = "fine", "accident"
    hows = [fine, fine, fine, accident, fine, "killed", "hang", accident, fine]
    assert [(o.number, o.how) for o in found] == list(enumerate(hows))
    # one process as long as all is well, then another
    assert [o.done for o in found] == ["0", "1", "2", "3", "0", "1", "0", "0", "0"]
    assert found[1].memory_mib > 80
    assert found[4].memory_mib < 20


def test_a_case_is_made_again_by_its_number(tmp_path):
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        inputs.break_mask(tmp_path / name, np.random.default_rng(7))
        made.append((tmp_path / name / "mask.png").read_bytes())
    assert made[0] == made[1]
    assert slides.break_slide(np.random.default_rng(3)) == slides.break_slide(
        np.random.default_rng(3)
    )
    assert models.bundles.__wrapped__() == models.bundles.__wrapped__()  # by another process, say


# --- slides


def changed(path, change, kind="jpeg-ycc420", **options):
    """Write a good slide and change its bytes."""
    write_slide(path, picture(150, 130), kind, **options)
    data = bytearray(path.read_bytes())
    change(data, scan(bytes(data)))
    path.write_bytes(data)
    return path


def set_all(tag, *values, level=None):
    def change(data, layout):
        for entry in layout.find(tag, level):
            layout.set(data, entry, *values)

    return change


def one_tile(width, height):
    """Let level 0 be one tile of that size, with all that belongs to it."""

    def change(data, layout):
        for tag, value in ((322, width), (323, height), (256, width), (257, height)):
            layout.set(data, layout.find(tag, 0)[0], value)
        for tag in (324, 325):
            (entry,) = layout.find(tag, 0)
            layout.set(data, entry, layout.values(bytes(data), entry)[0])

    return change


def chain_to(directory):
    def change(data, layout):
        layout.point(data, len(layout.links) - 1, layout.directories[directory])

    return change


def many_directories(data, layout):
    while not slides._long_chain(data, layout, np.random.default_rng(len(data))).startswith("5000"):
        pass


def payload(what, directory=0):
    """Let all tiles of a level hold the same bytes, or a bomb by its name."""

    def change(data, layout):
        bomb, at = what if isinstance(what, bytes) else slides._bomb(what), len(data)
        data += bomb
        for tag, value in ((324, at), (325, len(bomb))):
            (entry,) = layout.find(tag, directory)
            layout.set(data, entry, *[value] * entry.count)

    return change


def describe(text):
    def change(data, layout):
        layout.replace(data, layout.find(270, 0)[0], 2, text)

    return change


OME = (
    b'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image>'
    b'<Pixels DimensionOrder="XYCZT" SizeC="3" SizeT="1000000000" SizeX="64" SizeY="64" SizeZ="9"'
    b' Type="uint8"/></Image></OME>\0'
)
FOUND = {
    # what: (change, kind, code, part of the message)
    "tiles of 65488 x 65488": (one_tile(65_488, 65_488), "jpeg-ycc420",
        "unsupported_format", "too large"),
    "tiles of 1e9 x 64": (one_tile(10**9, 64), "deflate", "unreadable_slide", "1,000,000,000 x 64"),
    "a tile of 4e6 x 64": (one_tile(4_000_000, 64), "raw",
        "unsupported_format", "tiles of 4,000,000"),
    "1e9 pixels wide": (set_all(256, 10**9), "jpeg-ycc420", "unreadable_slide", "1,000,000,000"),
    "no width": (set_all(256, 0), "lzw", "unreadable_slide", "0 x 130"),
    "tiles without width": (set_all(322, 0), "jpeg-rgb", "unreadable_slide", "tiles of 0 x 64"),
    "tiles without height": (set_all(323, 0), "raw", "unreadable_slide", "tiles of 64 x 0"),
    "more tiles than offsets": (set_all(256, 6000), "raw",
        "unreadable_slide", "9 tile offsets for 282"),
    "offsets past the end": (set_all(324, *[2**31] * 9, level=0), "raw",
        "unreadable_slide", "truncated"),
    "tiles of 2e9 bytes": (
        set_all(325, *[2**31] * 9, level=0), "lzw", "unreadable_slide", "has 2147"),
    "a directory that is its own next": (chain_to(2), "jpeg-ycc420",
        "unreadable_slide", "one of those"),
    "a ring of directories": (chain_to(0), "jpeg2000-rgb", "unreadable_slide", "one of those"),
    "5000 directories": (many_directories, "jpeg-ycc420", "unsupported_format", "a stack"),
    "JPEG of 65500 x 65500": (payload("jpeg 65500"), "jpeg-ycc420",
        "unreadable_slide", "65500 x 65500"),
    "JPEG of 5000 scans": (payload("jpeg scans"), "jpeg-ycc420", "unreadable_slide", "scans"),
    "JPEG 2000 of 2e9 x 2e9": (payload("j2k 2e9"), "jpeg2000-rgb",
        "unreadable_slide", "2000000000"),
    "JPEG 2000 of 60000": (payload("j2k 60000"), "jpeg2000-ycc", "unreadable_slide", "60000"),
    "a deflate bomb": (payload("deflate bomb"), "deflate", None, ""),
    "an LZW bomb": (payload("lzw bomb"), "lzw", None, ""),
    "a thousand million planes": (describe(OME), "jpeg-ycc420", "unreadable_slide", "planes"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_hostile_slides_get_a_code(tmp_path, name):
    change, kind, code, message = FOUND[name]
    path = changed(tmp_path / "a.svs", change, kind)
    if code is None:
        with Slide.open(path) as slide:
            slide.thumbnail(8.0)
        return
    for opened in (path, path.as_uri()):  # by the other readers, too
        with pytest.raises(SlideError, match="To proceed") as caught:
            Slide.open(opened)
        if opened == path:
            assert caught.value.code == code
            assert message in str(caught.value)


def test_offsets_of_64_bits_do_not_overflow(tmp_path):
    def change(data, layout):
        layout.set(data, layout.find(324, 0)[0], *[2**63] * 9)

    path = changed(tmp_path / "a.svs", change, bigtiff=True)
    with pytest.raises(SlideError, match="To proceed"):
        Slide.open(path)


def test_directories_within_a_directory_are_followed(tmp_path):
    def change(data, layout):
        entry = layout.find(305, 0)[0]
        layout.retag(data, entry, 330)
        layout.set(data, entry, layout.directories[0])

    path = changed(tmp_path / "a.svs", change)
    with pytest.raises(SlideError, match="one of those before it"):
        Slide.open(path)


def test_a_slide_larger_than_any_glass_is_refused(tmp_path):
    def change(data, layout):
        one_tile(400_000, 16)(data, layout)
        payload(zlib.compress(bytes(400_000 * 16 * 3)))(data, scan(bytes(data)))

    path = changed(tmp_path / "a.svs", change, "deflate")
    with pytest.raises(SlideError, match="400 x 0 mm of glass") as caught:
        Slide.open(path, mpp=1.0)
    assert caught.value.code == "implausible_mpp"


def test_an_error_in_one_place_does_not_spoil_openslide_for_others(tmp_path):
    path = write_slide(tmp_path / "a.svs", picture(1200, 100), spoil={(0, 0)})
    reader = OpenSlideReader.open(str(path))
    with pytest.raises(TileError):
        reader.tile(0, 0, 0, 1)
    with pytest.raises(TileError):  # and it still says so, rather than anything else
        reader.tile(0, 0, 0, 1)
    assert reader.tile(0, 1, 0, 1).shape == (100, 512, 3)
    reader.close()


def test_thumbnails_and_strips_are_bounded_and_show_the_same(tmp_path, monkeypatch):
    path = write_slide(tmp_path / "a.svs", picture(700, 500), downsamples=(1,), tile=48)
    with Slide.open(path) as slide:
        grid = slide.working_grid(0.6)
        whole = slide.read(grid, grid.box)
        monkeypatch.setattr(slide_module, "_STRIP_BYTES", 60_000)
        assert slide._strip_size(grid, grid.box)[0] < grid.size[0]
        np.testing.assert_array_equal(slide.read(grid, grid.box), whole)
        monkeypatch.setattr(slide_module, "_THUMBNAIL_PX", 2000)
        image, coarse = slide.thumbnail(0.6)
        assert image.shape[:2] == coarse.size[::-1]
        assert 1000 < image.shape[0] * image.shape[1] < 2100


@pytest.mark.parametrize(
    ("compression", "encode"),
    [
        (7, "jpeg8_encode"),
        (34712, "jpeg2k_encode"),
        (50001, "webp_encode"),
        (34933, "png_encode"),
    ],
)
def test_pictures_state_their_size(compression, encode):
    import imagecodecs

    data = bytes(getattr(imagecodecs, encode)(picture(70, 50)))
    assert picture_size(compression, data) == (70, 50)
    check_stream(compression, data, 3500)
    with pytest.raises(ValueError, match="70 x 50"):
        check_stream(compression, data, 3499)
    with pytest.raises(ValueError, match=r"picture|stream"):
        picture_size(compression, data[:9])
    with pytest.raises(ValueError, match="not known beforehand"):
        check_stream(50002, data, 10**6)  # JPEG XL


# --- masks and lists


def test_masks_are_pictures_and_no_programs(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (15, 13), 255).save(path, "EPS")
    with pytest.raises(MaskError, match="cannot be read"):
        read_mask(path, (1500, 1300))


def test_masks_of_many_lines_are_judged_as_shown(tmp_path):
    pixels = np.zeros((2500, 20, 4), np.uint8)
    pixels[1200:, 5:, 0] = 9
    pixels[1100:2100, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mask = read_mask(tmp_path / "a.png", (20, 2500)).mask
    expected = np.zeros((2500, 20), bool)
    expected[1200:2100, 5:] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    "text", ["path\nx\0y.svs\n", f'path\n"{"a" * 200_000}"\n', f"path,{'a' * 200_000}\n"]
)
def test_lists_that_are_no_tables_are_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(JobError, match=r"a\.csv"):
        collect_slides([str(tmp_path / "a.csv")])


# --- bundles and checkpoints


@pytest.fixture
def bundle(tmp_path):
    write_tree(tmp_path / "b", models.bundles()[0])
    return tmp_path / "b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["heads"][2].update(classes=[1.5, "x"]), "classes cannot be"),
        (lambda spec: spec["heads"][0].update(name="../../x"), "a name is letters"),
        (lambda spec: spec["heads"][0].update(name=[]), "name cannot be"),
        (lambda spec: spec["heads"][0]["rules"].update(by=[]), "rules.by"),
        (lambda spec: spec["heads"][0]["rules"].update(grow_um=1e9), "more than 10000 micrometres"),
        (lambda spec: spec["heads"][0]["rules"].update(inner_threshold="x"), "inner_threshold"),
        (lambda spec: spec["heads"][0].update(stride=2**53), "stride must be"),
        (lambda spec: spec.update(options=[1]), "options cannot be"),
        (lambda spec: spec.update(halo_px=16 * 10**9), "halo_px"),
        (lambda spec: spec.update(mpp=10**400), "mpp cannot be"),
    ],
)
def test_specs_of_wrong_values_are_refused(bundle, change, message):
    spec = json.loads((bundle / "spec.json").read_text())
    change(spec)
    (bundle / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(ModelBundleError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize("text", [b"[" * 200_000, b"\xff\xfe{}", b'{"heads": 3}'])
def test_specs_that_are_no_json_are_refused(bundle, text):
    (bundle / "spec.json").write_bytes(text)
    with pytest.raises(ModelBundleError):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [2**53, 1, 1, 1]}, "numbers up to 4096"),
        ({"widths": [4096] * 4}, "larger network than the weights"),
        ({"widths": [-4, 4, 4, 4]}, "options or head names"),
    ],
)
def test_no_network_is_larger_than_its_weights(bundle, options, message):
    spec = json.loads((bundle / "spec.json").read_text())
    spec["options"].update(options)
    (bundle / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(ModelBundleError, match=message):
        open_bundle(bundle).load_network()


def test_compressed_and_torn_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    torch.save({"x": torch.zeros(3)}, path)
    assert load_pickled(path)["x"].shape == (3,)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(ModelBundleError, match="compressed"):
        load_pickled(path)
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    for cut in (1, 13, 25):  # struct.error, AssertionError and the like
        (tmp_path / "b.tar").write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(ModelBundleError, match="cannot be read"):
            load_pickled(tmp_path / "b.tar")


# --- tables


@pytest.fixture
def table(tmp_path):
    (tmp_path / "a.parquet").write_bytes(results.tables()[0])
    return tmp_path / "a.parquet"


def rewrite(path, change, **keys):
    old = pq.read_table(path)
    known = {**old.schema.metadata, **{key.encode(): value for key, value in keys.items()}}
    pq.write_table(change(old).replace_schema_metadata(known), path)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda t: t.drop_columns("centroid_x"), {}),
        (lambda t: t.drop_columns("geometry"), {}),
        (lambda t: t.drop_columns("bbox").append_column("bbox", pa.nulls(len(t))), {}),
        (lambda t: t.drop_columns("kind").append_column("kind", pa.nulls(len(t), pa.int8())), {}),
        (
            lambda t: t.drop_columns("geometry").append_column(
                "geometry", pa.array([b"\1"] * len(t))
            ),
            {},
        ),
        (lambda t: t, {"geo": b'{"columns": {"geometry": {}}}'}),
        (lambda t: t, {"geo": b'{"columns": {"geometry": {"crs": {"type": 1}}}}'}),
        (lambda t: t, {"geo": b"[" * 100_000}),
        (lambda t: t, {"geo": b"[]"}),
    ],
)
def test_tables_that_contradict_themselves_are_refused(table, change, keys):
    rewrite(table, change, **keys)

    def read():
        read_centroids(table, kind="n")
        read_rings(table, kind="n")
        read_objects(table, kind="n", bbox=(0, 0, 10, 10))

    with pytest.raises(TableError, match=r"a\.parquet"):
        read()


def test_damaged_tables_are_refused(table):
    data = bytearray(table.read_bytes())
    data[4:2000] = bytes(1996)  # pages, not the footer
    table.write_bytes(data)
    with pytest.raises(TableError, match="--overwrite"):
        read_objects(table)
    table.write_bytes(b"PAR1")
    with pytest.raises(TableError):
        count_rows(table)


# --- maps


@pytest.fixture
def maps(tmp_path):
    write_tree(tmp_path / "a.zarr", results.maps())
    assert PredictionStore.open(tmp_path / "a.zarr").keys
    return tmp_path / "a.zarr"


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(shape=[2, {}, 64]),
        lambda record: record.update(shape=[2, 10**9, 10**9]),
        lambda record: record["chunk_grid"].update(configuration=3),
        lambda record: record.update(codecs=[{"name": "bytes"}]),
        lambda record: record["codecs"][1]["configuration"].update(more=1),
        lambda record: record.update(data_type="float64", fill_value=0.0),
        lambda record: record.update(dimension_names=[[]]),
    ],
)
def test_maps_of_another_layout_do_not_open(maps, change):
    path = maps / "cells" / "prob" / "zarr.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError):
        PredictionStore.open(maps)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tile_px", "64"),
        ("tile_px", 0),
        ("grid", {"origin": [0, 0], "spacing": [1, 1], "size": 3}),
        ("grid", {"origin": [0, 0], "spacing": [1, 1], "size": [10**9, 10**9]}),
        ("grid", {"origin": [0, 0], "spacing": [0, 1], "size": [200, 90]}),
        ("mpp", [None, 1]),
        ("spec", "3"),
    ],
)
def test_maps_that_say_nonsense_of_themselves_do_not_open(maps, key, value):
    record = json.loads((maps / "zarr.json").read_text())
    record["attributes"]["wsi_pipeline"][key] = value
    (maps / "zarr.json").write_text(json.dumps(record))
    with pytest.raises(StoreError):
        PredictionStore.open(maps)


def test_a_chunk_that_would_unpack_to_more_is_refused(maps):
    from numcodecs.zstd import Zstd

    chunk = next(p for p in sorted((maps / "cells" / "prob" / "c").rglob("*")) if p.is_file())
    store, box = PredictionStore.open(maps), Box(x=0, y=0, width=64, height=64)
    assert store.read("cells/prob", box).any()
    for content in (bytes(Zstd(level=1).encode(bytes(8 << 20))), b"", b"\x28\xb5\x2f\xfd\x00\x00"):
        chunk.write_bytes(content)
        with pytest.raises(StoreError, match="is damaged"):
            PredictionStore.open(maps).read("cells/prob", box)


# --- records of runs


@pytest.fixture
def out(tmp_path):
    files = {name: text.encode() for name, text in results.records().items()}
    write_tree(tmp_path / "out", files)
    return tmp_path / "out"


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.update(slides="x"),
        lambda run: run.update(slides=[3]),
        lambda run: run.update(slides=[{}]),
        lambda run: run.update(model={"name": 3, "sha256": "x"}),
        lambda run: run.update(options=None),
    ],
)
def test_records_of_no_run_are_refused(out, change):
    run = json.loads((out / "run.json").read_text())
    change(run)
    (out / "run.json").write_text(json.dumps(run))
    with pytest.raises(JobError, match="use another --out"):
        read_run(out)
    (out / "run.json").write_text("[" * 200_000)
    with pytest.raises(JobError, match="nested too deeply"):
        read_run(out)


@pytest.mark.parametrize(
    "change",
    [{"status": "ok"}, {"error": {"code": 3}}, {"outputs": {"a": 3}}, {"restarts": "x"},
     {"peak_rss_mb": 10**400}],
)  # fmt: skip
def test_reports_of_wrong_values_count_as_none(out, change):
    path = out / "reports" / "a.json"
    assert isinstance(read_report(path), RunReport)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert read_report(path) is None
    path.write_text('{"a":' * 100_000)
    assert read_report(path) is None


def test_a_log_of_torn_letters_is_read_as_far_as_it_goes(out):
    path = out / "logs" / "a.jsonl"
    job = SlideJob(path="", slide_id="a", out=out, model_name="m", model_digest="0" * 64)
    line = json.dumps({"event": "start", "job_id": job.job_id}).encode() + b"\n"
    path.write_bytes(line + b"\xff\xfe" + line + b"[" * 100_000 + b"\n" + line)
    attempt = Attempt(job)
    assert attempt.report.restarts == 2
    attempt.close("interrupted")
