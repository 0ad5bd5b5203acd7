"""The whole job with a small stand-in for the network: resume, faults, and the same bytes."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
import zarr
from PIL import Image
from scipy import ndimage

from wsi_pipeline import pipeline
from wsi_pipeline.attempt import take_lease
from wsi_pipeline.durable import partial_path
from wsi_pipeline.engines import run_slides
from wsi_pipeline.errors import DiskFullError, OutOfMemoryError
from wsi_pipeline.history import deaths
from wsi_pipeline.job import SlideJob, read_report
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.store import PredictionBlock, PredictionStore, open_maps
from wsi_pipeline.synth import write_slide
from wsi_pipeline.table import read_metadata, read_objects

pytestmark = pytest.mark.usefixtures("small_pictures")

SPEC = ModelSpec(
    name="stub",
    architecture="none",
    mpp=0.5,
    halo_px=32,
    options={},
    heads=(
        HeadSpec(
            name="cells",
            kind="instance",
            object_kind="cell",
            rules=AnchorRules(),
            parent="dark",
        ),
        HeadSpec(name="dark", kind="instance", object_kind="dark", rules=RunRules(), stride=2),
        HeadSpec(name="area", kind="patch", classes=("pale", "deep"), stride=16),
    ),
)


class StubPredictor:
    """Calls dark pixels cells, and dark neighbourhoods areas; stops or fails when told."""

    spec = SPEC
    name = "stub"
    digest = "0" * 64
    device = "cpu"
    precision = "fp32"
    halo_px = 32
    is_fitting = False
    canvas_bytes = 1 << 28
    extractors = 2

    def __init__(self, tile_px: int = 256, fail_at: int | None = None, error=RuntimeError):
        self.tile_px = tile_px
        self.fail_at = fail_at
        self.error = error
        self.seen: list[tuple[int, int]] = []

    def begin(self, slide, tiles):
        """Read nothing ahead."""

    def predict(self, slide, tiles, *, stop, warn, feed):
        for number, tile in enumerate(tiles.tiles):
            if stop():
                return
            if number == self.fail_at:
                raise self.error("the stub fails as told")
            self.seen.append((tile.row, tile.column))
            dark = 255 - slide.read(tiles.grid, tile.write).mean(axis=2)
            yield PredictionBlock(tile=tile, arrays=self.arrays(tile, dark))

    def arrays(self, tile, dark):
        inner = np.where(dark > 130, 255, 0).astype(np.uint8)
        coarse = tile.write.coarsen(2)
        padded = np.pad(dark, ((0, dark.shape[0] % 2), (0, dark.shape[1] % 2)), mode="edge")
        half = padded.reshape(coarse.height, 2, coarse.width, 2).mean((1, 3))
        wide = np.where(half > 75, 255, 0).astype(np.uint8)
        patch = tile.write.coarsen(16)
        stripes = np.arange(patch.x, patch.x1) // 8 % 2
        deep = np.tile(stripes.astype(np.uint8), (patch.height, 1))
        return {
            "cells/prob": np.stack([inner, np.zeros_like(inner)]),
            "dark/prob": np.stack([wide, np.zeros_like(wide)]),
            "area/prob": np.stack([255 * (1 - deep), 255 * deep]),
            "area/class": deep,
        }


class Watcher:
    """Remembers how slides ended, and may ask to stop."""

    def __init__(self, stop_after: int | None = None, stage: str = "predict"):
        self.stop_after = stop_after
        self.stage = stage
        self.stopped = False
        self.ended: list[tuple[str, str, bool]] = []

    def start(self, job):
        pass

    def advance(self, job, stage, done, total):
        if self.stop_after is not None and stage == self.stage and done >= self.stop_after:
            self.stopped = True

    def finish(self, job, report, *, skipped):
        self.ended.append((job.slide_id, report.status, skipped))


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_slide(path, width=1500, height=1300, mpp=0.5, seed=3, truth=False)
    return path


def job(slide: Path, out: Path, **changes) -> SlideJob:
    facts = {"path": str(slide), "slide_id": slide.stem, "model_name": "stub"}
    return SlideJob(**{**facts, "out": out, "model_digest": "0" * 64, **changes})


def go(slide, out, predictor=None, watcher=None, **changes):
    watcher = watcher or Watcher()
    how = {
        k: changes.pop(k) for k in ("only", "overwrite", "retry_failed", "workers") if k in changes
    }
    (report,) = run_slides(
        [job(slide, out, **changes)],
        predictor or StubPredictor(),
        watcher=watcher,
        stop=lambda: watcher.stopped,
        **how,
    )
    return report


def results(out: Path) -> dict[str, bytes]:
    """All result files except what holds times."""
    files = (
        p for name in ("objects", "tissue", "maps", "previews") for p in out.glob(f"{name}/**/*")
    )
    return {str(p.relative_to(out)): p.read_bytes() for p in files if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(slide, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, go(slide, out)


def test_a_slide_gets_all_its_files(undisturbed, slide):
    out, report = undisturbed
    assert report.status == "done"
    assert report.error is None
    assert report.counts["cell"] > 50
    assert report.counts["dark"] > 3
    assert set(report.outputs) == {
        "objects/a.parquet",
        "tissue/a.parquet",
        "maps/a.zarr",
        "previews/a.png",
    }
    on_disk = json.loads((out / "reports" / "a.json").read_text())
    assert on_disk["counts"] == report.counts
    assert on_disk["mpp"] == {"x": 0.5, "y": 0.5, "source": "aperio.MPP"}
    assert set(on_disk["seconds"]) == {"open", "tissue", "predict", "polygonize", "write", "total"}
    assert on_disk["throughput"]["mm2_per_s"] > 0
    assert on_disk["bottleneck"] in on_disk["seconds"]
    assert not [p for p in out.rglob("*") if p.name.endswith(".partial")]


def test_table_report_and_maps_tell_one_story(undisturbed):
    out, report = undisturbed
    table = pd.read_parquet(out / "objects")
    assert table.kind.value_counts().to_dict() == report.counts
    assert table.object_id.is_unique
    cells = read_objects(out / "objects" / "a.parquet", kind="cell")
    maps = open_maps(out / "maps" / "a.zarr")
    inner = maps["cells/prob"][0].compute() > 127
    # Without a contour channel a cell is its interior less one pixel all around.
    eroded = ndimage.binary_erosion(inner, border_value=1)
    labels, _ = ndimage.label(eroded)
    areas = np.bincount(labels.ravel())[1:]
    sides = np.array([[s.stop - s.start for s in box] for box in ndimage.find_objects(labels)])
    cell = (areas >= 8) & (sides.max(axis=1) <= 256)
    assert len(cells) == cell.sum()
    assert cells.area_um2.sum() / 0.25 == pytest.approx(areas[cell].sum(), rel=0.05)
    dark = set(table[table.kind == "dark"].object_id)
    parents = set(cells.parent_id.dropna())
    assert parents
    assert parents <= dark
    assert set(table.tissue.dropna().unique()) <= {"pale", "deep"}
    assert table.tissue.notna().mean() > 0.9
    metadata = read_metadata(out / "objects" / "a.parquet")
    assert metadata["slide"]["name"] == "a.svs"
    assert metadata["model"]["sha256"] == "0" * 64
    tissue = pd.read_parquet(out / "tissue" / "a.parquet")
    outline = tissue[tissue.kind == "outline"]
    assert outline.area_um2.sum() / 1e6 == pytest.approx(report.tissue_mm2, rel=1e-3)
    assert set(tissue["class"].dropna()) == {"pale", "deep"}


def test_nothing_is_predicted_beyond_the_tissue(undisturbed, slide, tmp_path):
    mask = np.zeros((13, 15), np.uint8)
    mask[3:9, 4:11] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    report = go(slide, tmp_path / "out", mask=tmp_path / "a.png")
    assert report.tissue_mm2 == pytest.approx(6 * 7 * 0.05**2)
    whole = open_maps(undisturbed[0] / "maps" / "a.zarr")["cells/prob"].compute()
    inside = np.kron(mask > 0, np.ones((100, 100), bool))
    masked = open_maps(tmp_path / "out" / "maps" / "a.zarr")["cells/prob"].compute()
    np.testing.assert_array_equal(masked, whole * inside)


@pytest.mark.parametrize(("stage", "after"), [("predict", 1), ("predict", 5), ("polygonize", 1)])
def test_an_interrupted_slide_goes_on_to_the_same_bytes(slide, undisturbed, tmp_path, stage, after):
    first = StubPredictor()
    report = go(slide, tmp_path, first, Watcher(after, stage))
    assert report.status == "interrupted"
    assert not (tmp_path / "objects" / "a.parquet").exists()
    second = StubPredictor()
    assert go(slide, tmp_path, second).status == "done"
    assert not set(first.seen) & set(second.seen)
    assert results(tmp_path) == results(undisturbed[0])


class Killed(BaseException):
    """Caught by nobody, so nothing is reported; a real SIGKILL is sent further below."""


@pytest.mark.parametrize(
    "place",
    [
        "wsi_pipeline.store.PredictionStore._write_chunks",
        "wsi_pipeline.pyramid.Pyramid.update",
        "wsi_pipeline.pyramid.Pyramid.finish",
        "wsi_pipeline.store.publish_directory",
        "wsi_pipeline.pipeline.extract_objects",
        "wsi_pipeline.results.write_tissue",
        "wsi_pipeline.results.write_preview",
        "wsi_pipeline.job.RunReport.write",
    ],
)
def test_killed_anywhere_the_slide_ends_with_the_same_bytes(
    slide, undisturbed, tmp_path, monkeypatch, place
):
    def kill(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(Killed):
            go(slide, tmp_path)
    assert not (tmp_path / "reports" / "a.json").exists()
    assert go(slide, tmp_path).status == "done"
    assert results(tmp_path) == results(undisturbed[0])


def test_killed_while_maps_are_removed_they_do_not_pass_for_whole(
    slide, undisturbed, tmp_path, monkeypatch
):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    out = tmp_path / "out"

    def half(path, **_):
        shutil_rmtree(Path(path) / "cells")
        raise Killed

    shutil_rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            go(slide, out, overwrite=True)
    again = StubPredictor()
    assert go(slide, out, again).status == "done"
    assert again.seen
    assert results(out) == results(undisturbed[0])


def test_a_redo_that_fails_takes_the_old_tables_away(slide, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    assert go(slide, tmp_path / "out", mpp=9.0).error["code"] == "implausible_mpp"
    assert not (tmp_path / "out" / "objects" / "a.parquet").exists()


def test_an_interrupted_overwrite_goes_on(slide, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    first, second = StubPredictor(), StubPredictor()
    assert go(slide, tmp_path / "out", first, Watcher(2), overwrite=True).status == "interrupted"
    assert go(slide, tmp_path / "out", second, overwrite=True).status == "done"
    assert first.seen
    assert not set(first.seen) & set(second.seen)


def test_maps_that_were_dropped_are_no_work_that_is_left(slide, tmp_path):
    go(slide, tmp_path, keep_maps=False)
    watcher = Watcher()
    assert go(slide, tmp_path, watcher=watcher).status == "done"
    assert go(slide, tmp_path, watcher=watcher, only="objects").status == "done"
    assert watcher.ended == [("a", "done", True)] * 2
    assert (tmp_path / "objects" / "a.parquet").exists()
    assert go(slide, tmp_path, overwrite=True).status == "done"  # for who wants them back
    assert (tmp_path / "maps" / "a.zarr").is_dir()
    watcher = Watcher()
    go(slide, tmp_path, watcher=watcher, keep_maps=False)
    assert watcher.ended == [("a", "done", True)]
    assert not (tmp_path / "maps" / "a.zarr").exists()


def test_done_tables_outlive_a_mask_that_is_out_of_reach(slide, tmp_path):
    mask = tmp_path / "a.png"
    Image.fromarray(np.full((13, 15), 255, np.uint8)).save(mask)
    out = tmp_path / "out"
    assert go(slide, out, mask=mask).status == "done"
    mask.rename(tmp_path / "away.png")
    report = go(slide, out, mask=mask)
    assert report.status == "failed"
    assert "a.png is not there" in report.error["message"]
    assert (out / "objects" / "a.parquet").exists()
    (tmp_path / "away.png").rename(mask)
    watcher = Watcher()
    go(slide, out, watcher=watcher, mask=mask)
    assert watcher.ended == [("a", "done", True)]


@pytest.mark.parametrize("damage", ["blocks/c/0/0", "zarr.json", "cells/zarr.json"])
def test_a_torn_unfinished_store_starts_again(slide, undisturbed, tmp_path, damage):
    go(slide, tmp_path, watcher=Watcher(3))
    (partial_path(tmp_path / "maps" / "a.zarr") / damage).write_bytes(b"torn")
    assert go(slide, tmp_path).status == "done"
    assert results(tmp_path) == results(undisturbed[0])


def test_maps_of_another_version_are_made_again(slide, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    group = zarr.open_group(tmp_path / "out" / "maps" / "a.zarr", mode="r+")
    meta = dict(group.attrs["wsi_pipeline"])
    meta["spec"] = meta["spec"].replace('"options"', '"new_key": 1, "options"')
    group.attrs["wsi_pipeline"] = meta
    (tmp_path / "out" / "reports" / "a.json").unlink()
    assert go(slide, tmp_path / "out").status == "done"
    assert results(tmp_path / "out") == results(undisturbed[0])


def test_a_damaged_overview_counts_as_tissue(slide, tmp_path, monkeypatch):
    from wsi_pipeline.geometry import Box

    hole = Box(x=0, y=0, width=300, height=300)
    monkeypatch.setattr("wsi_pipeline.slide.Slide.holes", (hole,))
    report = go(slide, tmp_path)
    assert [w["code"] for w in report.warnings] == ["corrupt_region"]
    tissue = read_objects(tmp_path / "tissue" / "a.parquet", kind="outline").union_all()
    assert tissue.contains(shapely.box(20, 20, 280, 280))


def test_a_results_folder_of_no_use_fails_its_slides_not_the_batch(slide, tmp_path):
    (tmp_path / "reports").write_text("a file where a folder should be")
    report = go(slide, tmp_path)
    assert report.status == "failed"
    assert report.error["stage"] in ("begin", "write", "polygonize")


def test_a_failed_slide_is_a_report_and_is_tried_again(slide, tmp_path):
    report = go(slide, tmp_path, StubPredictor(fail_at=2))
    assert report.status == "failed"
    assert report.error == {
        "code": "internal",
        "stage": "predict",
        "message": "RuntimeError: the stub fails as told",
    }
    again = StubPredictor()
    assert go(slide, tmp_path, again, retry_failed=False).status == "failed"
    assert not again.seen
    assert go(slide, tmp_path, again).status == "done"
    log = [json.loads(line) for line in (tmp_path / "logs" / "a.jsonl").read_text().splitlines()]
    assert "RuntimeError" in next(x for x in log if x["event"] == "error")["traceback"]


def test_known_errors_keep_their_code(slide, tmp_path):
    report = go(slide, tmp_path, StubPredictor(fail_at=0, error=OutOfMemoryError))
    assert report.error["code"] == "out_of_memory"
    report = go(tmp_path / "absent.svs", tmp_path)
    assert report.error["code"] == "unreadable_slide"
    assert report.error["stage"] == "open"


def test_done_slides_are_skipped_unless_something_changed(slide, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    out = tmp_path / "out"

    def again(**changes):
        predictor, watcher = StubPredictor(), Watcher()
        report = go(slide, out, predictor, watcher, **changes)
        assert report.status == "done"
        return watcher.ended[0][2], bool(predictor.seen)

    assert again() == (True, False)
    (out / "objects" / "a.parquet").write_bytes(b"short")
    assert again() == (False, False)  # maps are good, so no network is run
    assert results(out) == results(undisturbed[0])
    assert again(overwrite=True) == (False, True)
    assert again(mpp=0.45) == (False, True)
    assert again(model_digest="1" * 64) == (False, True)


def test_a_slurm_task_that_is_started_again_overwrites_each_slide_once(
    slide, undisturbed, tmp_path, monkeypatch
):
    shutil.copytree(undisturbed[0], tmp_path / "out")

    def predicts(restart):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        predictor = StubPredictor()
        assert go(slide, tmp_path / "out", predictor, overwrite=True).done
        return bool(predictor.seen)

    monkeypatch.setenv("SLURM_JOB_ID", "8")
    # Its first start may have ended before it came to the slide.
    assert predicts("1")
    assert not predicts("2")
    assert predicts("0")  # somebody asks anew, in a job that was never started again
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert predicts("1")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_slide_that_cannot_be_seen_keeps_what_was_made_of_it(slide, tmp_path, overwrite):
    own = tmp_path / "slides" / slide.name
    own.parent.mkdir()
    shutil.copy(slide, own)
    assert go(own, tmp_path).done
    before = results(tmp_path)
    own.parent.rename(tmp_path / "unmounted")
    report = go(own, tmp_path, overwrite=overwrite)
    assert report.error["code"] == "unreadable_slide"
    assert "they stay as they are" in report.error["message"]
    assert results(tmp_path) == before
    (tmp_path / "unmounted").rename(own.parent)
    predictor = StubPredictor()
    assert go(own, tmp_path, predictor).done
    assert predictor.seen == []


def test_dropped_maps_leave_the_tables(slide, undisturbed, tmp_path):
    report = go(slide, tmp_path, keep_maps=False)
    assert not (tmp_path / "maps" / "a.zarr").exists()
    assert "maps/a.zarr" not in report.outputs
    assert (tmp_path / "objects" / "a.parquet").read_bytes() == (
        undisturbed[0] / "objects" / "a.parquet"
    ).read_bytes()
    watcher = Watcher()
    go(slide, tmp_path, watcher=watcher, keep_maps=False)
    assert watcher.ended == [("a", "done", True)]


def test_tables_do_not_depend_on_the_tile_size_or_workers(slide, undisturbed, tmp_path):
    """The stub sees no halo, so its maps are the same whatever the tiles."""
    watcher = Watcher()
    run_slides(
        [job(slide, tmp_path)],
        StubPredictor(tile_px=512),
        watcher=watcher,
        stop=lambda: False,
        workers=3,
    )
    ours = pd.read_parquet(tmp_path / "objects" / "a.parquet")
    pd.testing.assert_frame_equal(ours, pd.read_parquet(undisturbed[0] / "objects" / "a.parquet"))


def test_glass_is_done_with_a_warning_and_an_empty_table(tmp_path, undisturbed):
    from wsi_pipeline.slide import Slide

    Image.fromarray(np.zeros((13, 15), np.uint8)).save(tmp_path / "a.png")
    source = Path(json.loads((undisturbed[0] / "reports" / "a.json").read_text())["path"])
    report = go(source, tmp_path, mask=tmp_path / "a.png")
    assert report.status == "done"
    assert [w["code"] for w in report.warnings] == ["no_tissue"]
    assert report.error == report.warnings[0]
    table = pd.read_parquet(tmp_path / "objects" / "a.parquet")
    assert len(table) == 0
    full = pd.read_parquet(undisturbed[0] / "objects" / "a.parquet")
    assert list(table.columns) == list(full.columns)
    with Slide.open(source) as slide:
        grid = slide.working_grid(0.5)
    assert open_maps(tmp_path / "maps" / "a.zarr")["cells/prob"].shape == (2, *grid.size[::-1])


def test_one_bad_slide_does_not_end_the_batch(slide, tmp_path):
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"II*\0 this is no slide")
    watcher = Watcher()
    jobs = [job(bad, tmp_path / "out"), job(slide, tmp_path / "out")]
    reports = run_slides(jobs, StubPredictor(), watcher=watcher, stop=lambda: False)
    assert [r.status for r in reports] == ["failed", "done"]
    reports = run_slides(jobs, StubPredictor(), watcher=watcher, stop=lambda: False, fail_fast=True)
    assert [r.status for r in reports] == ["failed"]


class OpenStores(StubPredictor):
    """Notes the slides whose maps are in memory when it begins one."""

    def __init__(self, device, stores):
        super().__init__()
        self.device = device
        self.stores = stores
        self.open: list[list[str]] = []

    def predict(self, slide, tiles, **how):
        for _ in range(100):  # the thread that made the last tables may still put its tools away
            names = sorted({store.path.name.strip(".")[0] for store in self.stores})
            if len(names) == 1:
                break
            time.sleep(0.01)
        self.open.append(names)
        yield from super().predict(slide, tiles, **how)


def noted_stores(monkeypatch):
    """Return the stores that there are, now and later."""
    stores: weakref.WeakSet[PredictionStore] = weakref.WeakSet()
    begin = PredictionStore.__init__

    def noted(store, *args):
        begin(store, *args)
        stores.add(store)

    monkeypatch.setattr(PredictionStore, "__init__", noted)
    return stores


@pytest.fixture
def uncollected():
    """Cycles are not looked for: what is in one stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", [["a"], ["b"], ["c"]]),
        # on a device of its own, the tables of a slide may be made beside the network of the next
        ("fake", [["a"], ["a", "b"], ["b", "c"]]),
    ],
)
def test_slides_that_are_done_are_let_go(slide, tmp_path, monkeypatch, device, expected):
    stores = noted_stores(monkeypatch)
    jobs = [job(slide, tmp_path, slide_id=name) for name in "abc"]
    predictor = OpenStores(device, stores)
    run_slides(jobs, predictor, watcher=Watcher(), stop=lambda: False, ahead=False)
    for number, names in enumerate(predictor.open):
        assert names in (expected[number], expected[number][-1:])


@pytest.mark.usefixtures("uncollected")
def test_slides_that_failed_are_let_go(slide, tmp_path, monkeypatch):
    stores = noted_stores(monkeypatch)
    jobs = [job(slide, tmp_path, slide_id=name) for name in "abc"]
    predictor = OpenStores("cpu", stores)
    predictor.fail_at = 1
    reports = run_slides(jobs, predictor, watcher=Watcher(), stop=lambda: False)
    assert [report.status for report in reports] == ["failed"] * 3
    assert predictor.open == [["a"], ["b"], ["c"]]


def test_a_device_that_is_lost_takes_no_further_slide_down(slide, tmp_path):
    class Losing(StubPredictor):
        is_lost = False

        def predict(self, slide, tiles, **how):
            self.is_lost = True
            raise RuntimeError("CUDA error: unspecified launch failure")
            yield

    jobs = [job(slide, tmp_path, slide_id=name) for name in "abc"]
    reports = run_slides(jobs, Losing(), watcher=Watcher(), stop=lambda: False)
    assert [(report.slide_id, report.status) for report in reports] == [("a", "failed")]
    reports = run_slides(jobs, StubPredictor(), watcher=Watcher(), stop=lambda: False)
    assert [report.status for report in reports] == ["done"] * 3


def test_on_another_device_tables_are_made_beside_the_next_slide(slide, tmp_path):
    other = tmp_path / "b.svs"
    shutil.copy(slide, other)
    predictor = StubPredictor()
    predictor.device = "cuda:0"
    jobs = [job(slide, tmp_path / "out"), job(other, tmp_path / "out")]
    reports = run_slides(jobs, predictor, watcher=Watcher(), stop=lambda: False)
    assert [r.status for r in reports] == ["done", "done"]
    a, b = (pd.read_parquet(tmp_path / "out" / "objects" / f"{n}.parquet") for n in "ab")
    pd.testing.assert_frame_equal(a.drop(columns="slide_id"), b.drop(columns="slide_id"))


@pytest.fixture
def at_work(tmp_path):
    """Another process that holds slide a."""
    code = f"""if True:
        import time
        from pathlib import Path
        from wsi_pipeline.attempt import Attempt
        from wsi_pipeline.job import SlideJob
        held = Attempt(SlideJob(
            path='', slide_id='a', out=Path({str(tmp_path)!r}), model_name='', model_digest=''
        ))
        print('held', flush=True)
        time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    yield other
    other.kill()
    other.wait()


class Waiting(Watcher):
    """Does something when a slide waits for another process."""

    def __init__(self, then):
        super().__init__()
        self.then = then

    def advance(self, job, stage, done, total):
        if stage.startswith("waiting"):
            self.then()


def test_two_processes_do_not_work_on_one_slide(slide, tmp_path, at_work):
    watcher = Waiting(lambda: setattr(watcher, "stopped", True))
    report = go(slide, tmp_path, watcher=watcher)
    assert "another process is at work" in report.error["message"]
    assert not (tmp_path / "reports" / "a.json").exists()


def test_a_slide_of_another_process_comes_last_once_it_is_free(slide, tmp_path, at_work):
    other = tmp_path / "b.svs"
    shutil.copy(slide, other)
    watcher = Waiting(at_work.kill)
    jobs = [job(slide, tmp_path), job(other, tmp_path)]
    reports = run_slides(jobs, StubPredictor(), watcher=watcher, stop=lambda: False)
    assert [r.status for r in reports] == ["done", "done"]
    assert [name for name, *_ in watcher.ended] == ["b", "a"]
    assert set(os.listdir(tmp_path / "logs")) == {"a.jsonl", "b.jsonl"}


def test_a_log_that_cannot_be_written_is_said_once(slide, tmp_path, caplog):
    (tmp_path / "logs" / "a.jsonl").mkdir(parents=True)
    assert go(slide, tmp_path).status == "done"
    assert len([r for r in caplog.records if "no line could be logged" in r.getMessage()]) == 1


def damage(store):
    """Take the content of a chunk away."""
    chunks = (store / "cells" / "prob" / "c").rglob("*")
    min(path for path in chunks if path.is_file()).write_bytes(b"")


@pytest.mark.parametrize("what", ["gone", "damaged", "of another pixel size"])
def test_tables_that_cannot_be_made_again_are_not_taken_back(slide, tmp_path, what):
    go(slide, tmp_path, keep_maps=what != "gone")
    if what == "damaged":
        (tmp_path / "maps" / "a.zarr" / "zarr.json").write_text("{}")
    other = {"mpp": 0.51} if what == "of another pixel size" else {}
    before = results(tmp_path)
    report = go(slide, tmp_path, only="objects", overwrite=True, **other)
    assert report.status == "failed"
    assert "stay as they are" in report.error["message"]
    assert results(tmp_path) == before
    assert read_report(tmp_path / "reports" / "a.json").done


def test_a_damaged_chunk_takes_no_table_and_overwrite_repairs_it(slide, undisturbed, tmp_path):
    go(slide, tmp_path)
    damage(tmp_path / "maps" / "a.zarr")
    table = tmp_path / "objects" / "a.parquet"
    before = table.read_bytes()
    for _ in range(2):
        report = go(slide, tmp_path, only="objects", overwrite=True)
        assert "run the slide again with --overwrite" in report.error["message"]
        assert table.read_bytes() == before
    assert go(slide, tmp_path).status == "failed"
    assert go(slide, tmp_path, overwrite=True).status == "done"
    assert results(tmp_path) == results(undisturbed[0])


def test_a_damaged_chunk_of_an_unfinished_store_is_repaired_by_overwrite(
    slide, undisturbed, tmp_path
):
    watcher = Watcher(stop_after=5)
    assert go(slide, tmp_path, watcher=watcher).status == "interrupted"
    damage(partial_path(tmp_path / "maps" / "a.zarr"))
    assert "--overwrite" in go(slide, tmp_path).error["message"]
    assert go(slide, tmp_path, overwrite=True).status == "done"
    assert results(tmp_path) == results(undisturbed[0])


def test_what_lacked_room_goes_on_under_overwrite(slide, tmp_path, monkeypatch):
    def full(*_args, **_how):
        raise DiskFullError("no space is left")

    go(slide, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.results.write_tissue", full)
        assert go(slide, tmp_path, overwrite=True).error["code"] == "disk_full"
    again = StubPredictor()
    assert go(slide, tmp_path, again, overwrite=True).status == "done"
    assert not again.seen, "its maps were good"


@pytest.mark.parametrize("it_was_done", [True, False])
def test_of_two_that_overwrite_one_takes_what_the_other_did(slide, tmp_path, it_was_done):
    before = go(slide, tmp_path)
    held = take_lease(job(slide, tmp_path))

    def end():
        if it_was_done:
            replace(before, started="2999-01-01T00:00:00Z").write(job(slide, tmp_path).report_path)
        held.release()

    watcher, predictor = Waiting(end), StubPredictor()
    assert go(slide, tmp_path, predictor, watcher, overwrite=True).status == "done"
    assert watcher.ended == [("a", "done", it_was_done)]
    assert bool(predictor.seen) != it_was_done


def test_what_another_process_has_just_done_is_not_done_again(slide, undisturbed, tmp_path):
    """It ends between the first look at the report and the lease."""
    out, taken = tmp_path / "out", []

    def late(job):
        if not taken:
            taken.append(1)
            shutil.copytree(undisturbed[0], out, dirs_exist_ok=True)
        return take_lease(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsi_pipeline.engines.here.take_lease", late)
        watcher, predictor = Watcher(), StubPredictor()
        assert go(slide, out, predictor, watcher).status == "done"
    assert watcher.ended == [("a", "done", True)]
    assert not predictor.seen
    assert not list(out.rglob("*.lease"))
    assert deaths(job(slide, out)) == 0


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_folder_that_is_gone_is_not_made_anew_by_the_next_slide(
    slide, tmp_path, monkeypatch, comes_back
):
    other, out = tmp_path / "b.svs", tmp_path / "out"
    shutil.copy(slide, other)
    out.mkdir()
    (out / "run.json").write_text("{}")

    class Unmounting(Watcher):
        def finish(self, job, report, *, skipped):
            super().finish(job, report, skipped=skipped)
            if job.slide_id == "a":
                out.rename(tmp_path / "away")
                out.mkdir()  # the mount point

        def advance(self, job, stage, done, total):
            if comes_back and stage == "waiting for the results folder":
                out.rmdir()
                (tmp_path / "away").rename(out)

    monkeypatch.setattr("wsi_pipeline.engines.folders.ASK_AGAIN_S", 0.01)
    monkeypatch.setattr("wsi_pipeline.engines.folders.PATIENCE_S", 0.05)
    jobs = [job(slide, out), job(other, out)]
    reports = run_slides(jobs, StubPredictor(), watcher=Unmounting(), stop=lambda: False)
    if comes_back:
        assert [r.status for r in reports] == ["done", "done"]
        return
    assert [r.status for r in reports] == ["done", "interrupted"]
    assert "is gone" in reports[1].error["message"]
    assert not list(out.iterdir())


def test_slides_wait_for_their_folder(slide, tmp_path, monkeypatch):
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in "ab":
        shutil.copy(slide, folder / f"{name}.svs")

    class Unmounting(Watcher):
        def finish(self, job, report, *, skipped):
            super().finish(job, report, skipped=skipped)
            if job.slide_id == "a":
                folder.rename(tmp_path / "away")

        def advance(self, job, stage, done, total):
            if stage == "waiting for the folder of slides":
                (tmp_path / "away").rename(folder)

    monkeypatch.setattr("wsi_pipeline.engines.here.ASK_AGAIN_S", 0.01)
    jobs = [job(folder / f"{name}.svs", tmp_path / "out") for name in "ab"]
    reports = run_slides(jobs, StubPredictor(), watcher=Unmounting(), stop=lambda: False)
    assert [r.status for r in reports] == ["done", "done"]


def test_who_lost_its_slide_publishes_nothing(slide, tmp_path):
    class Slow(StubPredictor):
        def predict(self, slide, tiles, **how):
            for block in super().predict(slide, tiles, **how):
                yield block
                # Meanwhile another process thinks that this one is dead, and takes over.
                (tmp_path / "logs" / "a.lease").write_text("{}")
                os.replace(tmp_path / "logs" / "a.lease", tmp_path / "moved")
                (tmp_path / "logs" / "a.lease").write_text("{}")

    report = go(slide, tmp_path, Slow())
    assert report.status == "interrupted"
    assert "another has taken the slide over" in report.error["message"]
    assert not (tmp_path / "reports" / "a.json").exists()
    assert not (tmp_path / "objects" / "a.parquet").exists()
    assert (tmp_path / "logs" / "a.lease").exists()


def test_maps_here_and_objects_there_give_the_same_table(slide, undisturbed, tmp_path):
    predictor = StubPredictor()
    predictor.device = "cuda:3"
    first = go(slide, tmp_path, predictor, only="maps")
    assert (first.status, first.left, first.as_asked) == ("interrupted", "objects", True)
    assert (tmp_path / "maps" / "a.zarr").is_dir()
    assert not list(tmp_path.glob("objects/*"))
    (second,) = run_slides(
        [job(slide, tmp_path)], None, only="objects", watcher=Watcher(), stop=lambda: False
    )
    assert (second.status, second.device, second.left) == ("done", "cuda", "")
    ours, other = (out / "objects" / "a.parquet" for out in (tmp_path, undisturbed[0]))
    pd.testing.assert_frame_equal(pd.read_parquet(ours), pd.read_parquet(other))
    assert read_metadata(ours)["options"]["device"] == "cuda"


def test_objects_without_maps_say_what_to_do(slide, tmp_path):
    (report,) = run_slides(
        [job(slide, tmp_path)], None, only="objects", watcher=Watcher(), stop=lambda: False
    )
    assert report.status == "failed"
    assert "--only maps" in report.error["message"]
    go(slide, tmp_path, only="maps")
    (report,) = run_slides(
        [job(slide, tmp_path, mpp=0.4)], None, only="objects", watcher=Watcher(), stop=lambda: False
    )
    assert "another slide, pixel size, mask or model" in report.error["message"]


def test_objects_only_keeps_the_reason_why_there_are_no_maps(slide, tmp_path):
    go(slide, tmp_path, StubPredictor(fail_at=0), only="maps")
    (report,) = run_slides(
        [job(slide, tmp_path)], None, only="objects", watcher=Watcher(), stop=lambda: False
    )
    assert "the stub fails as told" in report.error["message"]


def test_objects_made_again_keep_their_maps(slide, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    jobs = [job(slide, tmp_path / "out")]
    how = {"only": "objects", "overwrite": True, "watcher": Watcher(), "stop": lambda: False}
    (report,) = run_slides(jobs, None, **how)
    assert (report.status, how["watcher"].ended) == ("done", [("a", "done", False)])
    assert results(tmp_path / "out") == results(undisturbed[0])


def test_a_slide_that_kills_again_and_again_is_given_up(slide, tmp_path, monkeypatch):
    def kill(*_args, **_kwargs):
        raise Killed

    def died():
        with monkeypatch.context() as patch:
            patch.setattr("wsi_pipeline.results.write_tissue", kill)
            with pytest.raises(Killed):
                go(slide, tmp_path)

    assert deaths(job(slide, tmp_path)) == 0
    for number in (1, 1, 2, 3):  # the second try finds more blocks than the first
        died()
        assert deaths(job(slide, tmp_path)) == number
    report = go(slide, tmp_path)
    assert report.status == "failed"
    assert "killed 3 times in a row" in report.error["message"]
    assert deaths(job(slide, tmp_path)) == 0
    assert go(slide, tmp_path).status == "done"


def test_a_slide_that_comes_further_each_time_is_not_given_up(slide, tmp_path):
    predictor = StubPredictor()
    for _ in range(5):

        class Dying(StubPredictor):
            def predict(self, slide, tiles, **how):
                for number, block in enumerate(super().predict(slide, tiles, **how)):
                    if number == 2:
                        raise Killed
                    yield block

        with pytest.raises(Killed):
            go(slide, tmp_path, Dying())
    assert deaths(job(slide, tmp_path)) < 3
    assert go(slide, tmp_path, predictor).status == "done"


def test_restarts_are_counted(slide, tmp_path):
    for _ in range(2):
        go(slide, tmp_path, watcher=Watcher(1))
    assert go(slide, tmp_path).restarts == 2
    assert go(slide, tmp_path, overwrite=True).restarts == 0


def test_an_unreadable_region_is_reported_and_kept(slide, tmp_path, monkeypatch):
    def left_half(_slide, _grid, box):
        return 1.0 if box.x1 <= 750 else 0.0

    monkeypatch.setattr("wsi_pipeline.slide.Slide.unreadable_share", left_half)
    report = go(slide, tmp_path)
    assert report.status == "done"
    assert 0.2 < report.unreadable_fraction < 0.8
    assert report.warnings[0]["code"] == "corrupt_region"
    # The share is in the maps, so that a later run on them reports it too.
    monkeypatch.undo()
    (tmp_path / "reports" / "a.json").unlink()
    assert go(slide, tmp_path).unreadable_fraction == report.unreadable_fraction


def test_maps_of_another_job_under_the_final_name_are_replaced(slide, undisturbed, tmp_path):
    go(slide, tmp_path, model_digest="2" * 64)
    assert go(slide, tmp_path).status == "done"
    assert results(tmp_path) == results(undisturbed[0])
    store = PredictionStore.open(tmp_path / "maps" / "a.zarr")
    assert store.meta["made"]["precision"] == "fp32"
    assert store.meta["made"]["tile_px"] == 256
    assert not partial_path(tmp_path / "maps" / "a.zarr").exists()


def test_pipeline_imports_no_torch():
    code = (
        "import sys, wsi_pipeline.pipeline, wsi_pipeline.engines; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_store_is_a_plain_zarr_group(undisturbed):
    group = zarr.open_group(undisturbed[0] / "maps" / "a.zarr", mode="r")
    assert group["cells/prob"].dtype == np.uint8
    assert pipeline.TISSUE_MPP == 8.0
