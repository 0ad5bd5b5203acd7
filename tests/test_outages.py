"""Outages of the disk or the network fail a slide; damage makes holes."""

import os
import subprocess
import sys
import threading

import numpy as np
import openslide
import pytest
from slide_fixtures import picture, write_slide

from wsi_pipeline.errors import SlideError
from wsi_pipeline.slide import PixelSize, Slide, opening, outages
from wsi_pipeline.slide.regions import OpenSlideReader, TiffSlideReader

IMAGE = picture(1200, 700)
READ_ERROR = "Cannot read raw tile, last error: TIFFReadRawTile: Read error; got 0 bytes"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(outages, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def path(tmp_path):
    return write_slide(tmp_path / "a.svs", IMAGE, "deflate")


def opened(path, kind=OpenSlideReader):
    return Slide(str(path), kind.open(str(path)), PixelSize(x=0.25, y=0.25, source="argument"))


def read_all(slide):
    grid = slide.working_grid(0.25)
    return slide.read(grid, grid.box)


class Outage:
    """Lets calls fail from one to another, counted from 0."""

    def __init__(self, monkeypatch, owner, name, error, *, first=1, last=10**9):
        original, lock, self.calls = getattr(owner, name), threading.Lock(), 0

        def call(*args, **kwargs):
            with lock:
                number, self.calls = self.calls, self.calls + 1
            if first <= number <= last:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


def test_an_error_of_openslide_that_passes_leaves_no_trace(path, monkeypatch):
    with opened(path) as slide:
        Outage(monkeypatch, openslide.OpenSlide, "read_region",
               openslide.OpenSlideError(READ_ERROR), first=1, last=3)  # fmt: skip
        assert np.array_equal(read_all(slide), IMAGE)
        assert slide.holes == ()


def test_an_error_of_openslide_that_stays_is_a_hole_if_the_file_can_be_read(path, monkeypatch):
    with opened(path) as slide:
        Outage(monkeypatch, openslide.OpenSlide, "read_region",
               openslide.OpenSlideError(READ_ERROR), first=0)  # fmt: skip
        assert (read_all(slide) == 255).all()
        assert slide.holes


@pytest.mark.parametrize("known_damage", [False, True])
def test_an_error_of_openslide_is_an_outage_if_the_file_cannot_be_read(
    path, monkeypatch, known_damage
):
    with opened(path) as slide:
        Outage(monkeypatch, openslide.OpenSlide, "read_region",
               openslide.OpenSlideError(READ_ERROR), first=0)  # fmt: skip
        if known_damage:
            read_all(slide)
        holes = slide.holes
        Outage(monkeypatch, outages.os, "pread", OSError(5, "Input/output error"), first=0)
        with pytest.raises(SlideError, match="try again") as caught:
            read_all(slide)
        assert (caught.value.code, slide.holes) == ("unreadable_slide", holes)


def test_a_slide_of_openslide_that_went_away_is_no_hole(path, monkeypatch):
    with opened(path) as slide:
        path.rename(path.with_suffix(".away"))
        Outage(monkeypatch, openslide.OpenSlide, "read_region",
               openslide.OpenSlideError(READ_ERROR), first=0)  # fmt: skip
        with pytest.raises(SlideError, match="try again"):
            read_all(slide)


def test_what_openslide_calls_an_io_error_is_an_outage(path, monkeypatch):
    with opened(path) as slide:
        error = openslide.OpenSlideError("I/O error reading file a.mrxs")
        Outage(monkeypatch, openslide.OpenSlide, "read_region", error, first=0)
        with pytest.raises(SlideError, match="I/O error reading"):
            read_all(slide)


def test_files_beside_a_slide_count_as_the_slide(path):
    beside = path.with_suffix("")
    beside.mkdir()
    (beside / "Data0000.dat").symlink_to("/nonexistent")
    (beside / "Data0001.dat").write_bytes(b"x")
    assert list(outages._files_of(path)) == [path, beside / "Data0001.dat"]


class ForeignError(Exception):
    """What a file system of the network raises."""


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), TimeoutError("slow"), ForeignError("503")]
)
@pytest.mark.parametrize(("last", "passes"), [(3, True), (10**9, False)])
def test_a_url_that_fails(path, monkeypatch, error, last, passes):
    import fsspec

    fsspec.filesystem("memory").pipe("/outage/a.svs", path.read_bytes())
    with opened("memory://outage/a.svs", TiffSlideReader) as slide:
        _fail_reads(slide, monkeypatch, error, last)
        if passes:
            assert np.array_equal(read_all(slide), IMAGE)
        else:
            with pytest.raises(SlideError, match="try again"):
                read_all(slide)
        assert slide.holes == ()


def _fail_reads(slide, monkeypatch, error, last):
    file = slide._reader._handle.ts_tifffile.filehandle._fh
    Outage(monkeypatch, file._file, "read", error, first=1, last=last)


def test_damage_behind_a_url_is_a_hole(tmp_path):
    path = write_slide(tmp_path / "a.svs", IMAGE, "deflate", spoil={(2, 2)})
    with Slide.open(path.as_uri()) as slide:
        read_all(slide)
        assert len(slide.holes) == 1


def test_a_url_that_fails_while_it_is_opened_has_a_code(path, monkeypatch):
    import fsspec.implementations.memory as memory

    fs = memory.MemoryFileSystem()
    fs.pipe("/outage/b.svs", path.read_bytes())
    Outage(monkeypatch, memory.MemoryFile, "read", ForeignError("503"), first=4)
    with pytest.raises(SlideError, match="503") as caught:
        opening.open_reader("memory://outage/b.svs")
    assert caught.value.code == "unreadable_slide"


def test_the_rehearsal_lets_reads_fail(path, tmp_path):
    from benchmarks.cohort.places import ReadErrors

    reading = ReadErrors(tmp_path)
    if not reading.available:
        pytest.skip("no C compiler (cc)")
    code = (
        "import os, sys; from wsi_pipeline.slide import Slide\n"
        "slide = Slide.open(sys.argv[1]); grid = slide.working_grid(0.25)\n"
        "print(slide.read(grid, grid.box).shape, open(sys.argv[2]).read())"
    )
    other = tmp_path / "a.txt"
    other.write_text("other")
    call = [sys.executable, "-c", code, path, other]
    environment = {**os.environ, **reading.environment}
    how = {"env": environment, "capture_output": True, "text": True, "check": False}
    assert "other" in subprocess.run(call, **how).stdout
    reading.begin()
    failed = subprocess.run(call, **how)
    assert "Input/output error" in failed.stderr
    reading.end()
    assert subprocess.run(call, **how).returncode == 0
