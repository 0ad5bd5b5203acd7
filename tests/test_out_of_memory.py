"""Memory that runs out anywhere: the code, the other slides go on, and so does this one later."""

import errno
import pkgutil
import shutil
import threading

import pytest

from benchmarks.standin import StandIn
from wsi_pipeline import pipeline
from wsi_pipeline.attempt import Attempt
from wsi_pipeline.engines import Silent, run_slides
from wsi_pipeline.job import SlideJob
from wsi_pipeline.synth import write_slide

pytestmark = pytest.mark.usefixtures("small_pictures")

PLACES = {
    "a tile is decoded": "wsi_pipeline.slide.tiff.TiffReader.tile",
    "the tissue is found": "wsi_pipeline.pipeline.detect_tissue",
    "a block is predicted": "benchmarks.standin._arrays",
    "a block is written": "wsi_pipeline.store.PredictionStore._write_chunks",
    "rows are put aside": "wsi_pipeline.instances.spool.Spool.put",
    "polygons are traced": "wsi_pipeline.results.outline_polygons",
    "rows are written": "wsi_pipeline.table.ObjectWriter.write",
    "the picture is drawn": "wsi_pipeline.results.draw_preview",
}
"""What may ask for more memory than there is."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "a.svs", width=900, height=700, mpp=0.5, seed=3, truth=False)
    shutil.copy(folder / "a.svs", folder / "b.svs")
    return folder


def go(slides, out, names="ab", predictor=None):
    jobs = [
        SlideJob(
            path=str(slides / f"{name}.svs"),
            slide_id=name,
            out=out,
            model_name="stand-in",
            model_digest="0" * 64,
        )
        for name in names
    ]
    return run_slides(jobs, predictor or StandIn(), watcher=Silent(), stop=lambda: False)


def files(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for name in ("objects", "tissue", "maps", "previews")
        for path in (out / name).rglob("*")
        if path.is_file()
    }


def hidden(out):
    return {name: data for name, data in files(out).items() if "/." in name}


@pytest.fixture(scope="module")
def wanted(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    go(slides, out)
    return files(out)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_the_slide_fails_with_the_code_and_the_others_go_on(
    slides, wanted, tmp_path, monkeypatch, place
):
    failed = threading.Event()
    module, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(module)
    whole = getattr(owner, name)

    def scarce(*args, **kwargs):
        if not failed.is_set():
            failed.set()
            raise MemoryError
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, scarce)
    first, second = go(slides, tmp_path)
    assert failed.is_set()
    assert (first.status, first.error["code"]) == ("failed", "out_of_memory")
    assert second.done
    assert files(tmp_path).items() <= {**wanted, **hidden(tmp_path)}.items(), "half a file"
    assert all(report.done for report in go(slides, tmp_path))
    assert files(tmp_path) == wanted


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_every_name_of_it_has_the_same_code(slides, tmp_path, monkeypatch, error):
    def scarce(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(pipeline, "detect_tissue", scarce)
    (report,) = go(slides, tmp_path, "a")
    assert report.error["code"] == "out_of_memory"
    assert str(error) in report.error["message"]
    assert "--memory" in report.error["message"]


def test_a_tile_that_cannot_be_decoded_for_lack_of_memory_is_no_hole(slides, tmp_path, monkeypatch):
    from wsi_pipeline.slide import tiff

    def insufficient(*_args, **_kwargs):
        raise ValueError("Insufficient memory (case 4)")

    monkeypatch.setattr(tiff.simplejpeg, "decode_jpeg", insufficient)
    (report,) = go(slides, tmp_path, "a")
    assert report.error["code"] == "out_of_memory"


def test_smaller_batches_and_pieces_are_in_the_report(slides, tmp_path):
    class Short(StandIn):
        def predict(self, slide, tiles, *, warn, **how):
            warn("out_of_memory", "one tile at once")
            yield from super().predict(slide, tiles, warn=warn, **how)

    (report,) = go(slides, tmp_path, "a", Short())
    assert report.done
    warning = {"code": "out_of_memory", "stage": "predict", "message": "one tile at once"}
    assert report.warnings == [warning]
    assert report.error == warning


def test_no_memory_to_begin_a_slide_ends_the_slide_not_the_batch(slides, tmp_path, monkeypatch):
    def scarce(_self, *_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr(Attempt, "__init__", scarce)
    (report,) = go(slides, tmp_path, "a")
    assert report.error["code"] == "out_of_memory"
