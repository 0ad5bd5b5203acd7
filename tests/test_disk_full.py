"""A disk that fills up, whenever: the code, nothing half-written, and going on with more space."""

import os
import subprocess

import pytest

from benchmarks.standin import StandIn
from wsi_pipeline.engines import Silent, run_slides
from wsi_pipeline.instances import spool
from wsi_pipeline.job import SlideJob, read_report
from wsi_pipeline.synth import write_slide

pytestmark = pytest.mark.usefixtures("small_pictures")

SIZE = 16 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A small file system of its own."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small file system may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_slide(path, width=900, height=700, mpp=0.5, seed=3, truth=False)
    return path


def go(slide, out, **facts):
    job = SlideJob(
        path=str(slide),
        slide_id="a",
        out=out,
        model_name="stand-in",
        model_digest="0" * 64,
        **facts,
    )
    (report,) = run_slides([job], StandIn(), watcher=Silent(), stop=lambda: False)
    return report


def files(out):
    """All files; those that hold times by their names alone."""
    return {
        name: b"" if name.startswith(("reports", "logs")) else path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
        for name in [path.relative_to(out).as_posix()]
    }


def free(disk):
    facts = os.statvfs(disk)
    return facts.f_bavail * facts.f_frsize


def leave(disk, free_bytes):
    """Fill a disk but for so many bytes; return the file to remove."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, free(disk) - free_bytes)))
    return ballast


@pytest.fixture(scope="module")
def wanted(slide, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    go(slide, out)
    return files(out)


def with_little_space(disk, slide, wanted, free_bytes):
    """Run a slide, then again with more space; return the error of the first run."""
    out = disk / "out"
    ballast = leave(disk, free_bytes)
    report = go(slide, out)
    where = f"{free_bytes} bytes: {report.error}"
    for name, data in files(out).items():
        if name in wanted:  # not what is hidden
            assert data == wanted[name], f"{where}: {name}"
    claim = read_report(out / "reports" / "a.json")
    assert claim is None or claim.status == report.status, where
    ballast.unlink()
    assert go(slide, out).done, where
    assert files(out) == wanted, where
    subprocess.run(["rm", "-r", str(out)], check=True)
    return report.error


@pytest.mark.parametrize(("held", "last"), [(1, "polygonize"), (spool.HELD_BYTES, "write")])
def test_wherever_the_space_ends_the_slide_has_the_code_and_goes_on(
    disk, slide, wanted, monkeypatch, held, last
):
    """Rows that are put aside take space while objects are drawn, if they do not fit in memory."""
    monkeypatch.setattr(spool, "HELD_BYTES", held)
    low, high, ends = 0, SIZE, {0: with_little_space(disk, slide, wanted, 0)}
    while high - low > 8192:  # nearer and nearer to the bytes that suffice
        middle = (low + high) // 2 // 4096 * 4096
        ends[middle] = with_little_space(disk, slide, wanted, middle)
        low, high = (low, middle) if ends[middle] is None else (middle, high)
    for part in range(1, 7):
        for free_bytes in (high * part // 7 // 4096 * 4096, high - 8192 * part):
            ends[free_bytes] = with_little_space(disk, slide, wanted, free_bytes)
    errors = [error for error in ends.values() if error is not None]
    assert None in ends.values()
    assert {error["code"] for error in errors} == {"disk_full"}
    assert {"predict", last} <= {error["stage"] for error in errors}, errors
