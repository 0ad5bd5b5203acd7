"""What is read runs nothing, what is written stays inside, and labels are never copied."""

import ast
import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numcodecs.pickles
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hostile import Bomb, bomb_bytes, goes_off
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from slide_fixtures import picture
from test_bundle import SPEC as BUNDLE_SPEC
from test_deidentified import SECRET, aperio, write_with_pictures
from test_pipeline import StubPredictor, go
from test_store import fill, make

from wsi_pipeline.batch import collect_slides, read_run
from wsi_pipeline.bundle import import_cerberus, open_bundle, save_bundle
from wsi_pipeline.checkpoint import load_pickled, read_torchvision
from wsi_pipeline.cohort import slide_states
from wsi_pipeline.errors import (
    DatasetError,
    JobError,
    MaskError,
    ModelBundleError,
    RecipeError,
    SlideError,
    StoreError,
    TableError,
    WsiPipelineError,
)
from wsi_pipeline.golden import read_golden
from wsi_pipeline.job import SlideJob, read_report
from wsi_pipeline.network import build_network
from wsi_pipeline.plain_pickle import read_plain_pickle
from wsi_pipeline.release import read_metrics, release_bundle
from wsi_pipeline.slide import Slide
from wsi_pipeline.spec import HeadSpec, ModelSpec
from wsi_pipeline.store import PredictionStore, open_maps
from wsi_pipeline.table import read_metadata, read_objects
from wsi_pipeline.tissue import read_mask
from wsi_pipeline.training.layouts import pannuke, plain
from wsi_pipeline.training.layouts.reading import read_ids, read_mat, read_rgb, read_xml
from wsi_pipeline.training.recipe import read_recipe
from wsi_pipeline.training.simclr import _Run
from wsi_pipeline.training.transfer import _read_encoder
from wsi_pipeline.training.workplace import Workplace

PACKAGE = Path(__file__).parents[1] / "wsi_pipeline"

# --- The package's own code -------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal",
              "pickletools", "yaml", "jsonpickle"}  # fmt: skip
UNPACKERS = {"extractall", "extract", "unpack_archive"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


def unsafe(source: str) -> list[str]:
    """List what in a module could run, or unpack anywhere, what a stranger wrote."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in UNPICKLERS]
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if (node.module or "").partition(".")[0] in UNPICKLERS:
                found.append(f"from {node.module}")
            if node.module == "torch" and "load" in names:
                found.append("from torch import load")
            if node.module == "numpy" and "load" in names:
                found.append("from numpy import load")
        if isinstance(node, ast.Call):
            found += _unsafe_call(node)
    return found


def _unsafe_call(node: ast.Call) -> list[str]:
    given_by = {
        keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else "unknown"
        for keyword in node.keywords
    }
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if name in RUNNERS or last in UNPACKERS or last in ("Unpickler", "_Unpickler"):
        return [name]
    if name == "torch.load" and given_by.get("weights_only") is not True:
        return ["torch.load without weights_only=True"]
    if name in ("np.load", "numpy.load") and given_by.get("allow_pickle", False) is not False:
        return ["np.load with allow_pickle"]
    if name in ("np.load", "numpy.load") and len(node.args) > 2:
        return ["np.load with positions"]
    if name.startswith("zarr.open") and given_by.get("zarr_format") != 3:
        return ["zarr.open of any format"]
    return []


def test_no_module_unpickles_or_unpacks():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        own = unsafe(path.read_text())
        if own:
            found[str(path.relative_to(PACKAGE))] = own
    assert found == {}
    assert len(list(PACKAGE.rglob("*.py"))) > 150


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "from torch import load",
        "np.load(p, allow_pickle=True)",
        "numpy.load(p, allow_pickle=flag)",
        "np.load(p, None, True)",
        "import pickle",
        "from joblib import load",
        "import yaml",
        "class A(pickle.Unpickler): pass\nA(f)\npickle.Unpickler(f)",
        "eval(text)",
        "zipfile.ZipFile(p).extractall(q)",
        "zarr.open_group(p)",
        "zarr.open(p, mode='r', zarr_format=2)",
    ],
)
def test_the_search_finds_unsafe_code(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p, weights_only=True)",
        "np.load(p)",
        "np.load(p, mmap_mode='r', allow_pickle=False)",
        "network.eval()",
        "re.compile(x)",
        "zarr.open_group(p, mode='r', zarr_format=3)",
    ],
)
def test_the_search_lets_safe_code_pass(source):
    assert not unsafe(source)


# --- Hostile files ----------------------------------------------------------------------------


def as_bytes(path, marker):
    path.write_bytes(bomb_bytes(marker))


def as_checkpoint(path, marker):
    torch.save({"desc": {"x": Bomb(marker)}, "course": {"step": 1}}, path)


def as_array_file(path, marker):
    np.save(path.with_suffix(".npy"), np.array([[Bomb(marker)]], object), allow_pickle=True)
    path.with_suffix(".npy").rename(path)


def bundle_with(name):
    def read(path):
        folder = path.with_name("bundle")
        network = build_network(BUNDLE_SPEC)
        if not folder.exists():
            save_bundle(folder, BUNDLE_SPEC, network, card="a card")
        shutil.copyfile(path, folder / name)
        bundle = open_bundle(folder)
        bundle.load_network()
        read_golden(bundle)

    return read


def bundle_with_shard(path):
    folder = path.with_name("sharded")
    folder.mkdir(exist_ok=True)
    (folder / "spec.json").write_text(BUNDLE_SPEC.to_json())
    shutil.copyfile(path, folder / "a.safetensors")
    index = {"weight_map": {"project.weight": "a.safetensors"}}
    (folder / "weights.safetensors.index.json").write_text(json.dumps(index))
    open_bundle(folder).load_network()


def training_state(path):
    out = path.with_name("model")
    place = Workplace.open(
        out, "recipe", restart=True, first=True, on_row=lambda row: None
    )  # fmt: skip
    shutil.copyfile(path, place.folder / "checkpoint.pt")
    place.load_checkpoint()


def best_weights(path):
    place = Workplace.open(
        path.with_name("model"), "recipe", restart=True, first=True, on_row=lambda row: None
    )
    shutil.copyfile(path, place.folder / "best.safetensors")
    place.load_best()


def run_json(path):
    shutil.copyfile(path, path.with_name("run.json"))
    read_run(path.parent)


def slide_list(path):
    shutil.copyfile(path, path.with_name("list.csv"))
    collect_slides([str(path.with_name("list.csv"))])


READERS = {
    "checkpoint": (lambda p: import_cerberus(p, p.with_name("new")), ModelBundleError),
    "torchvision": (read_torchvision, ModelBundleError),
    "pickled": (load_pickled, ModelBundleError),
    "weights": (bundle_with("weights.safetensors"), ModelBundleError),
    "shard": (bundle_with_shard, ModelBundleError),
    "spec": (bundle_with("spec.json"), ModelBundleError),
    "golden": (bundle_with("golden.json"), ModelBundleError),
    "metrics": (read_metrics, ModelBundleError),
    "training state": (training_state, RecipeError),
    "best weights": (best_weights, WsiPipelineError),
    "simclr state": (lambda p: _Run.resume(object.__new__(_Run), p), ModelBundleError),
    "encoder": (_read_encoder, ModelBundleError),
    "recipe": (read_recipe, RecipeError),
    "npy mask": (lambda p: plain._read_mask(p.rename(p.with_suffix(".npy"))), DatasetError),
    "npy images": (lambda p: pannuke._open(p, (-1,)), DatasetError),
    "mat": (lambda p: read_mat(p, "inst_map"), DatasetError),
    "image": (read_rgb, DatasetError),
    "ids": (read_ids, DatasetError),
    "xml": (read_xml, DatasetError),
    "table": (read_metadata, TableError),
    "objects": (read_objects, TableError),
    "result file": (read_plain_pickle, TableError),
    "tissue mask": (lambda p: read_mask(p, (100, 100)), MaskError),
    "slide": (Slide.open, SlideError),
    "maps": (open_maps, StoreError),
    "run": (run_json, JobError),
    "list": (slide_list, JobError),
}


@pytest.mark.parametrize("write", [as_bytes, as_checkpoint, as_array_file])
@pytest.mark.parametrize("what", READERS)
def test_a_hostile_pickle_in_the_place_of_any_file_runs_nothing(tmp_path, what, write):
    marker, path = tmp_path / "marker", tmp_path / "file.dat"
    write(path, marker)
    assert not marker.exists()
    read, kind = READERS[what]
    with pytest.raises(kind) as caught:
        read(path)
    assert not marker.exists()
    assert isinstance(caught.value.code, str)


def test_the_hostile_pickles_are_hostile(tmp_path):
    marker = tmp_path / "marker"
    assert goes_off(bomb_bytes(marker), marker)
    for write, read in (
        (as_checkpoint, lambda p: torch.load(p, weights_only=False)),
        (as_array_file, lambda p: np.load(p, allow_pickle=True)),
    ):
        write(tmp_path / "x.dat", marker)
        read(tmp_path / "x.dat")
        assert marker.exists()
        marker.unlink()


def test_a_report_that_is_a_pickle_is_no_report(tmp_path):
    as_bytes(tmp_path / "r.json", tmp_path / "marker")
    assert read_report(tmp_path / "r.json") is None
    assert not (tmp_path / "marker").exists()


# --- Stores of maps ---------------------------------------------------------------------------


@pytest.fixture
def maps(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    fill(store, tiles)
    return store.seal().path


def test_older_zarr_with_a_codec_that_unpickles_is_not_opened(tmp_path, maps, monkeypatch):
    # Newer numcodecs refuse this themselves unless told otherwise; older ones do not.
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    marker, old = tmp_path / "marker", tmp_path / "old.zarr"
    attributes = json.loads((maps / "zarr.json").read_text())["attributes"]
    array = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": "",
        "compressor": {"id": "pickle", "protocol": 4}, "order": "C",
        "filters": [{"id": "vlen-utf8"}],
    }  # fmt: skip
    for key in ("blocks", *open_maps(maps)):
        (old / key).mkdir(parents=True)
        (old / key / ".zarray").write_text(json.dumps(array))
        (old / key / "0").write_bytes(bomb_bytes(marker))
    for group in (old, *(old / key.partition("/")[0] for key in open_maps(maps))):
        (group / ".zgroup").write_text('{"zarr_format": 2}')
    (old / ".zattrs").write_text(json.dumps(attributes))
    with pytest.raises(StoreError):
        open_maps(old)
    assert not marker.exists()
    with suppress(Exception):  # the store is what this test says it is
        zarr.open_group(old, mode="r")["blocks"][:]
    assert marker.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["codecs"].append({"name": "numcodecs.pickle"}), None),
        (lambda m: m["codecs"].insert(1, {"name": "crc32c"}), "packed by"),
        (lambda m: m["codecs"].__setitem__(1, {"name": "gzip", "configuration": {"level": 5}}),
         "packed by"),
        (lambda m: m.update(storage_transformers=[{"name": "x", "configuration": {}}]), None),
        (lambda m: m.update(chunk_key_encoding={"name": "v2", "configuration": {"separator": "/"}}),
         "another way"),
        (lambda m: m.update(chunk_key_encoding={"name": "default",
                                                "configuration": {"separator": "/../../"}}), None),
        (lambda m: m.update(shape=[2, 1 << 40, 1 << 40]), "is (2, 1099511627776, 1099511627776)"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[2, 1 << 20, 1 << 20]),
         "in chunks of (2, 1048576, 1048576)"),
        (lambda m: m.update(data_type="float64"), "holds float64"),
        (lambda m: m.update(data_type="string"), None),
        (lambda m: m.update(data_type="variable_length_bytes", fill_value=""), None),
        (lambda m: m.update(data_type={"name": "numpy.object"}), None),
    ],
)  # fmt: skip
def test_stores_whose_metadata_want_anything_else_are_not_opened(maps, change, says, caplog):
    file = maps / "cells" / "prob" / "zarr.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    with pytest.raises(StoreError):
        open_maps(maps)
    if says:
        assert says in caplog.text


def test_reading_a_store_changes_nothing_in_it(maps):
    store = PredictionStore.open(maps)
    with pytest.raises(Exception, match="read-only"):
        store._arrays["cells/prob"][:, :64, :64] = 0


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        "blocks",
        ".hidden",
        "_private",
        "a\nb",
        "x" * 200,
    ],
)
def test_heads_that_would_lie_elsewhere_are_refused(name):
    with pytest.raises(ModelBundleError, match="becomes a folder of the maps"):
        HeadSpec(name=name, kind="patch", classes=("a", "b"))
    # As a stranger's spec.json, or the copy of it in a store of maps, would say it.
    spec = ModelSpec(
        name="m", architecture="none", mpp=0.5, halo_px=0, options={},
        heads=(HeadSpec(name="placeholder", kind="patch", classes=("a", "b")),),
    )  # fmt: skip
    text = spec.to_json().replace('"placeholder"', json.dumps(name))
    with pytest.raises(ModelBundleError, match="becomes a folder"):
        ModelSpec.from_json(text)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", "a\nb", "\x1b[2J"])
def test_models_that_are_named_like_paths_are_refused(name):
    with pytest.raises(ModelBundleError, match="without slashes"):
        replace(BUNDLE_SPEC, name=name)


def test_a_store_with_a_head_that_leads_out_is_not_opened(maps):
    text = (maps / "zarr.json").read_text()
    (maps / "zarr.json").write_text(text.replace('\\"cells\\"', '\\"../cells\\"'))
    assert "../cells" in (maps / "zarr.json").read_text()
    with pytest.raises(StoreError):
        open_maps(maps)


# --- Bundles ----------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    network = build_network(BUNDLE_SPEC)
    return save_bundle(tmp_path / "bundle", BUNDLE_SPEC, network, card="a card").path


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", ".", "", "sub/a"])
def test_an_index_names_files_of_the_bundle_alone(bundle, file):
    save_file({"a": torch.zeros(1)}, bundle.parent / "secret.safetensors")
    index = bundle / "weights.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ModelBundleError, match="no file of the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("indexed", [False, True])
def test_weights_that_are_links_out_of_the_bundle_are_refused(bundle, indexed):
    elsewhere = bundle.parent / "elsewhere.safetensors"
    (bundle / "weights.safetensors").rename(elsewhere)
    (bundle / "weights.safetensors").symlink_to(elsewhere)
    if indexed:
        index = {"weight_map": {"project.weight": "weights.safetensors"}}
        (bundle / "weights.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelBundleError, match="link out of the bundle"):
        open_bundle(bundle)
    # A link within the bundle is fine, and so is one to the bundle.
    (bundle / "weights.safetensors").unlink()
    elsewhere.rename(bundle / "w.safetensors")
    (bundle / "weights.safetensors").symlink_to("w.safetensors")
    (bundle.parent / "link").symlink_to(bundle)
    if not indexed:
        assert open_bundle(bundle.parent / "link").load_network() is not None


def test_a_release_gives_away_no_file_that_a_picture_links_to(bundle, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (bundle / "card.md").write_text("![x](x.png)")
    (bundle / "x.png").symlink_to("../secret.png")
    with pytest.raises(ModelBundleError, match="link out of its folder"):
        release_bundle(open_bundle(bundle), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Where results go -------------------------------------------------------------------------

NAMES = ("objects_path", "tissue_path", "maps_path", "preview_path", "report_path", "log_path")


@settings(deadline=None, max_examples=300)
@given(slide_id=st.text(max_size=200) | st.from_regex(r"[./\\a-z\0~]{1,12}", fullmatch=True))
@example("..")
@example("../../etc/passwd")
@example("a/../b")
@example("/etc/passwd")
@example("a\0b")
@example("\ud800")
@example("a/")
@example(" ")
def test_any_slide_id_of_a_list_is_refused_or_stays_inside(tmp_path_factory, slide_id):
    folder = tmp_path_factory.getbasetemp() / "lists"
    folder.mkdir(exist_ok=True)
    out = folder / "out"
    quoted = slide_id.replace('"', '""')
    try:
        (folder / "list.csv").write_text(f'path,slide_id\nx.svs,"{quoted}"\n', encoding="utf-8")
        entries = collect_slides([str(folder / "list.csv")])
    except (JobError, UnicodeEncodeError):
        entries = ()
    for entry in entries:
        job = SlideJob(
            path="x.svs", slide_id=entry.slide_id, out=out, model_name="", model_digest=""
        )
        for name in NAMES:
            path = Path(os.path.abspath(getattr(job, name)))
            assert path.parent.parent == Path(os.path.abspath(out)), (name, path)
    # Whatever way an id comes in.
    try:
        job = SlideJob(path="x.svs", slide_id=slide_id, out=out, model_name="", model_digest="")
    except JobError:
        return
    for name in NAMES:
        path = Path(os.path.abspath(getattr(job, name)))
        assert path.parent.parent == Path(os.path.abspath(out)), (name, path)


def test_a_hostile_record_of_a_run_leads_nowhere(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    content = {"slides": [{"slide_id": "../../secret"}], "options": {},
               "model": {"name": "m", "sha256": "0"}}  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps(content))
    with pytest.raises(JobError, match="no path"):
        slide_states(tmp_path / "out")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A slide with a label and a macro image, every text of it secret."""
    path = tmp_path_factory.mktemp("in") / "a.svs"
    return write_with_pictures(path, tissue())


def tissue():
    image = np.full((512, 640, 3), 240, np.uint8)
    image[60:450, 80:560] = picture(480, 390) // 2 + np.array([60, 0, 70], np.uint8)
    return image


def small():
    return StubPredictor(tile_px=256)


def test_result_files_that_are_links_are_replaced_not_written_through(labelled, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("untouched")
    for name in ("objects/a.parquet", "tissue/a.parquet", "previews/a.png", "reports/a.json",
                 "logs/a.jsonl", "objects/.a.parquet.partial"):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(victim)
    report = go(labelled, out, small())
    assert report.status == "done"
    assert victim.read_text() == "untouched"
    assert not (out / "objects" / "a.parquet").is_symlink()
    assert (out / "logs" / "a.jsonl").is_symlink(), "nothing was logged rather than elsewhere"


def test_a_folder_of_results_may_be_a_link_of_the_users(labelled, tmp_path):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    out.mkdir()
    (out / "maps").symlink_to(scratch)
    assert go(labelled, out, small()).status == "done"
    assert (scratch / "a.zarr" / "zarr.json").is_file()
    assert (out / "maps").is_symlink()


def test_a_store_that_is_a_link_is_never_emptied(labelled, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("untouched")
    (out / "maps").mkdir(parents=True)
    (out / "maps" / "a.zarr").symlink_to(victim)
    (out / "maps" / ".a.zarr.partial").symlink_to(victim)
    go(labelled, out, small())
    assert (victim / "file").read_text() == "untouched"
    assert {p.name for p in victim.iterdir()} == {"file"}


# --- Labels, macro images and what scanners write down ----------------------------------------


def contents(out):
    """All result files by name, decoded where they are packed; without times, hosts and ids."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".parquet":
            found[name] = (pq.read_table(path).to_pylist(), pq.read_metadata(path).metadata)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                found[name] = (np.asarray(image).tobytes(), dict(image.info))
        elif path.name == "zarr.json":
            found[name] = "".join(
                part for part in path.read_text().splitlines() if '"job"' not in part
            )
        elif path.suffix not in (".json", ".jsonl"):
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_results_do_not_depend_on_label_macro_or_remarks(labelled, tmp_path, monkeypatch, reader):
    from slide_fixtures import write_slide

    from wsi_pipeline.slide import opening

    if reader == "openslide":
        monkeypatch.setattr(opening, "_openers", lambda path: [opening.OpenSlideReader.open])
    bare = tmp_path / "in" / "a.svs"
    bare.parent.mkdir()
    write_slide(bare, tissue())
    with Slide.open(labelled) as one, Slide.open(bare) as other:
        assert {"label", "macro"} <= set(one.associated)
        assert not {"label", "macro"} & set(other.associated)
        assert one.reader == other.reader == reader
    with_label, without = tmp_path / "with", tmp_path / "without"
    assert go(labelled, with_label, small()).status == "done"
    assert go(bare, without, small()).status == "done"
    found, wanted = contents(with_label), contents(without)
    assert len([name for name in found if "maps/" in name]) > 5
    assert {"previews/a.png", "objects/a.parquet", "tissue/a.parquet"} <= set(found)
    assert found == wanted
    for path in (p for p in with_label.rglob("*") if p.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
        assert SECRET not in str(path)


@pytest.mark.parametrize("fault", ["mpp", "absurd", "torn", "tiles", "not one"])
def test_errors_repeat_nothing_that_a_scanner_wrote_down(labelled, tmp_path, fault, caplog):
    slide = tmp_path / "a.svs"
    data = labelled.read_bytes()
    if fault == "mpp":
        data = data.replace(b"AppMag", b"AppXxx").replace(b"MPP = 0.25", b"MPP = %b" % b"Ophe")
    elif fault == "absurd":
        data = data.replace(b"MPP = 0.25", b"MPP = 9999")
    elif fault == "torn":
        data = data[: len(data) // 2]
    elif fault == "tiles":
        at = data.index(b"\xff\xd8\xff")
        data = data[:at] + bytes(4000) + data[at + 4000 :]
    else:
        data = aperio().encode() * 20
    assert data != labelled.read_bytes()
    slide.write_bytes(data)
    out = tmp_path / "out"
    report = go(slide, out, small())
    assert report.status == "failed" or fault == "tiles"
    texts = [caplog.text, *(p.read_text() for p in out.rglob("*.json*"))]
    assert not any(SECRET in text for text in texts), texts


def test_no_picture_beside_a_slide_is_ever_asked_for(labelled, tmp_path, monkeypatch):
    import openslide

    def refuse(self):
        raise AssertionError("a label or macro image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    assert go(labelled, tmp_path / "out", small()).status == "done"
