"""A slide or mask that changes while it is read fails its slide, and is begun anew."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.standin import StandIn
from wsi_pipeline import pipeline, unchanged
from wsi_pipeline.durable import partial_path
from wsi_pipeline.engines import Silent, run_slides
from wsi_pipeline.job import SlideJob
from wsi_pipeline.synth import write_slide

pytestmark = pytest.mark.usefixtures("small_pictures")


class Meddler(StandIn):
    """Does something to the slide before a tile is predicted."""

    def __init__(self, meddle=lambda: None, *, at=2):
        super().__init__()
        self.meddle = meddle
        self.at = at
        self.seen = 0

    def predict(self, slide, tiles, **how):
        for number, block in enumerate(super().predict(slide, tiles, **how)):
            if number == self.at:
                self.meddle()
            self.seen += 1
            yield block


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for name, seed in (("first", 3), ("second", 4)):
        path = folder / f"{name}.svs"
        write_slide(path, width=900, height=700, mpp=0.5, seed=seed, truth=False)
    return folder


@pytest.fixture
def slide(slides, tmp_path):
    return Path(shutil.copy(slides / "first.svs", tmp_path / "a.svs"))


def go(slide, out, predictor=None, *, stop=lambda: False, **facts):
    job = SlideJob(
        path=str(slide),
        slide_id="a",
        out=out,
        model_name="stand-in",
        model_digest="0" * 64,
        **facts,
    )
    (report,) = run_slides([job], predictor or StandIn(), watcher=Silent(), stop=stop)
    return report


def files(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for name in ("objects", "tissue", "maps", "previews")
        for path in (out / name).rglob("*")
        if path.is_file()
    }


def replace(slides, slide):
    """As whoever copies it again does: another file takes the name."""
    shutil.copy(slides / "second.svs", slide.with_suffix(".new"))
    os.replace(slide.with_suffix(".new"), slide)


def truncate(_slides, slide):
    os.truncate(slide, slide.stat().st_size // 2)


def append(_slides, slide):
    with slide.open("ab") as file:
        file.write(b"more")


def touch_a_pixel(_slides, slide):
    """Where nobody samples, and of the same size."""
    with slide.open("r+b") as file:
        file.seek(slide.stat().st_size // 2 + 5000)
        file.write(b"\0")


def remove(_slides, slide):
    slide.unlink()


@pytest.mark.parametrize("change", [replace, truncate, append, touch_a_pixel, remove])
def test_a_slide_that_changes_while_it_is_read_fails(slides, slide, tmp_path, change):
    out = tmp_path / "out"
    report = go(slide, out, Meddler(lambda: change(slides, slide)))
    assert report.status == "failed"
    assert report.error["code"] == "unreadable_slide"
    assert "changed while it was read" in report.error["message"]
    assert not list(out.glob("objects/*")), "no table"
    if change is not remove:  # what is out of reach may come back as it was
        assert files(out) == {}, "nor blocks of two contents"


@pytest.mark.parametrize("when", ["before the handle", "before the slide"])
def test_another_file_that_was_there_only_while_it_was_opened_is_noticed(
    slides, slide, tmp_path, monkeypatch, when
):
    """In the end the slide is back, as it was in the beginning."""
    kept = slide.with_suffix(".kept")

    def swapping(function):
        def swapped(*args, **how):
            if not kept.exists():
                slide.rename(kept)
                shutil.copy(slides / "second.svs", slide)
            return function(*args, **how)

        return swapped

    if when == "before the handle":
        monkeypatch.setattr(unchanged, "_handle", swapping(unchanged._handle))
    else:
        monkeypatch.setattr(pipeline.Slide, "open", swapping(pipeline.Slide.open))
    report = go(slide, tmp_path / "out", Meddler(lambda: kept.rename(slide), at=0))
    assert report.status == "failed"
    assert "changed while it was read" in report.error["message"]
    assert not list((tmp_path / "out" / "maps").glob("*.zarr"))


def test_the_next_run_is_about_the_new_content(slides, slide, tmp_path):
    go(slide, tmp_path / "out", Meddler(lambda: replace(slides, slide)))
    again = Meddler()
    assert go(slide, tmp_path / "out", again).done
    assert go(slide, tmp_path / "fresh").done
    assert again.seen
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_between_two_runs_blocks_of_the_old_content_are_not_kept(slides, slide, tmp_path):
    out, stopped = tmp_path / "out", []
    first = go(slide, out, Meddler(lambda: stopped.append(1)), stop=lambda: bool(stopped))
    assert first.status == "interrupted"
    assert partial_path(out / "maps" / "a.zarr").is_dir()
    replace(slides, slide)
    assert go(slide, out).done
    assert go(slide, tmp_path / "fresh").done
    assert files(out) == files(tmp_path / "fresh")


def test_a_change_after_the_maps_were_made_is_seen_by_the_next_run(slides, slide, tmp_path):
    out = tmp_path / "out"
    assert go(slide, out).done
    (out / "objects" / "a.parquet").unlink()  # the maps alone are left
    replace(slides, slide)
    again = Meddler()
    assert go(slide, out, again).done
    assert again.seen
    assert go(slide, tmp_path / "fresh").done
    assert files(out) == files(tmp_path / "fresh")


def test_a_mask_that_changes_meanwhile_fails_its_slide(slides, slide, tmp_path):
    mask = tmp_path / "a.png"
    Image.fromarray(np.full((7, 9), 255, np.uint8)).save(mask)

    def other():
        Image.fromarray(np.tri(7, 9, dtype=np.uint8)).save(mask)

    report = go(slide, tmp_path / "out", Meddler(other), mask=mask)
    assert report.status == "failed"
    assert report.error["code"] == "mask_mismatch"
    assert "changed while it was read" in report.error["message"]
    assert go(slide, tmp_path / "out", mask=mask).done


def test_what_happens_to_a_slide_after_it_was_read_does_not_matter(slides, slide, tmp_path):
    """The tables come from the maps: whoever moves slides away as they are read may do so."""

    def moved(job, stage, done, total):
        if stage == "polygonize":
            slide.unlink(missing_ok=True)

    watcher = Silent()
    watcher.advance = moved
    job = SlideJob(
        path=str(slide), slide_id="a", out=tmp_path, model_name="", model_digest="0" * 64
    )
    (report,) = run_slides([job], StandIn(), watcher=watcher, stop=lambda: False)
    assert report.done
    assert not slide.exists()


@pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
def test_a_results_folder_that_vanishes_interrupts_the_slide_and_may_come_back(
    slide, tmp_path, leaves
):
    """As where a network disk is lost: its mount point is then an empty folder."""
    out, gone = tmp_path / "out", tmp_path / "gone"

    def vanish():
        out.rename(gone)
        if leaves == "an empty folder":
            out.mkdir()

    report = go(slide, out, Meddler(vanish, at=4))
    # Not the slide's fault: the command ends with "call again".
    assert (report.status, report.error["code"]) == ("interrupted", "internal")
    assert "is gone" in report.error["message"]
    made = {path.name for path in out.rglob("*")} if out.exists() else set()
    assert not made & {"logs", "reports", "objects", "a.zarr"}, "another folder in its place"
    shutil.rmtree(out, ignore_errors=True)
    gone.rename(out)
    again = Meddler()
    assert go(slide, out, again).done
    assert 0 < again.seen < 12, "its finished blocks are kept"
    assert go(slide, tmp_path / "fresh").done
    assert files(out) == files(tmp_path / "fresh")


def test_maps_that_vanish_before_they_are_read_make_no_empty_table(slide, tmp_path):
    out = tmp_path / "out"

    def vanish(job, stage, done, total):
        if stage == "predict" and done == total:
            (out / "maps").rename(out / "elsewhere")

    watcher = Silent()
    watcher.advance = vanish
    job = SlideJob(path=str(slide), slide_id="a", out=out, model_name="", model_digest="0" * 64)
    (report,) = run_slides([job], StandIn(), watcher=watcher, stop=lambda: False)
    assert report.status == "interrupted"
    assert "is gone" in report.error["message"]
    assert not (out / "objects" / "a.parquet").exists()
