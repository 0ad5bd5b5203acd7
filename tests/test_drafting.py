"""Objects beside the network: they follow the blocks, and end when the network does."""

import errno
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from object_maps import tissue_like
from test_pipeline import StubPredictor, Watcher, go, results

from wsi_pipeline.drafting import ArrivingMaps, Draft
from wsi_pipeline.durable import partial_path
from wsi_pipeline.errors import Interrupted
from wsi_pipeline.geometry import Box
from wsi_pipeline.instances import extract_objects, survey
from wsi_pipeline.instances.spool import Spool
from wsi_pipeline.instances.survey import SmallObjects
from wsi_pipeline.store import PredictionBlock, PredictionStore
from wsi_pipeline.synth import write_slide
from wsi_pipeline.tiling import TileGrid

LONG = 20
"""Seconds after which a test that waits has failed; none waits that long otherwise."""


class FakeDevice(StubPredictor):
    """A network on a device of its own: what is called "cpu" in identities stays comparable."""

    device = "fake"


class Patient(FakeDevice):
    """Predicts its last tile only after rows of the first ones have been seen."""

    def __init__(self, seen: threading.Event, **options):
        super().__init__(**options)
        self.rows_seen = seen
        self.in_time = False

    def predict(self, slide, tiles, **how):
        last = tiles.tiles[-1]
        for block in super().predict(slide, tiles, **how):
            if block.tile is last:
                self.in_time = self.rows_seen.wait(LONG)
            yield block


@pytest.fixture
def rows_seen(monkeypatch):
    """Set as soon as rows are put aside."""
    event = threading.Event()
    keep = SmallObjects.keep

    def note(self, tile, found):
        keep(self, tile, found)
        if found[0] is not None:
            event.set()

    monkeypatch.setattr(SmallObjects, "keep", note)
    return event


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(LONG)
    ours = ("draft", "writer", "committer", "sync", "objects", "ThreadPoolExecutor")
    assert not [t.name for t in left if t.is_alive() and t.name.startswith(ours)]


def small_windows(monkeypatch):
    """Let windows be no larger than the tiles of the stub, which are unusually small."""
    monkeypatch.setattr(survey, "_SECOND_LOOK_PX", 32)
    monkeypatch.setattr(
        "wsi_pipeline.pipeline.extract_objects",
        lambda *args, **options: extract_objects(*args, window_px=256, **options),
    )


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_slide(path, width=800, height=700, mpp=0.5, seed=3, truth=False)
    return path


@pytest.fixture(scope="module")
def of_the_device(sample, tmp_path_factory):
    """Results of an undisturbed run with objects beside the network."""
    out = tmp_path_factory.mktemp("device")
    assert go(sample, out, FakeDevice()).status == "done"
    return out


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_there_before_the_last_block(
    sample,
    tmp_path,
    monkeypatch,
    rows_seen,
    of_the_device,
    workers,
):
    small_windows(monkeypatch)
    predictor = Patient(rows_seen)
    report = go(sample, tmp_path, predictor, workers=workers)
    assert report.status == "done"
    assert predictor.in_time
    assert results(tmp_path) == results(of_the_device)


def test_on_the_network_s_own_processor_nothing_is_beside_it(
    sample,
    tmp_path,
    monkeypatch,
):
    begun = []
    monkeypatch.setattr(Draft, "beside", lambda self: begun.append(self))
    assert go(sample, tmp_path).status == "done"
    assert not begun


def test_the_table_is_that_of_maps_that_were_there_before(sample, tmp_path, of_the_device):
    shutil.copytree(of_the_device, tmp_path / "out")
    (tmp_path / "out" / "reports" / "a.json").unlink()
    again = FakeDevice()
    assert go(sample, tmp_path / "out", again).status == "done"
    assert not again.seen
    assert results(tmp_path / "out") == results(of_the_device)
    # And without anything beside the network; only the name of the device differs.
    assert go(sample, tmp_path / "cpu").status == "done"
    rows, same = (
        pd.read_parquet(out / "objects" / "a.parquet") for out in (of_the_device, tmp_path / "cpu")
    )
    pd.testing.assert_frame_equal(rows, same)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("fail_at", [0, 3, 8])
def test_a_network_that_fails_takes_the_draft_along(
    sample,
    tmp_path,
    of_the_device,
    fail_at,
    workers,
):
    report = go(sample, tmp_path, FakeDevice(fail_at=fail_at), workers=workers)
    assert report.error == {
        "code": "internal",
        "stage": "predict",
        "message": "RuntimeError: the stub fails as told",
    }
    assert not (tmp_path / "objects" / "a.parquet").exists()
    assert not list((tmp_path / "objects").glob("*"))
    assert go(sample, tmp_path, FakeDevice(), workers=workers).status == "done"
    assert results(tmp_path) == results(of_the_device)


@pytest.mark.parametrize("after", [1, 5])
def test_a_stop_ends_both_and_the_next_run_goes_on(
    sample,
    tmp_path,
    monkeypatch,
    of_the_device,
    after,
):
    small_windows(monkeypatch)
    first, second = FakeDevice(), FakeDevice()
    report = go(sample, tmp_path, first, Watcher(after), workers=2)
    assert report.status == "interrupted"
    assert not (tmp_path / "objects" / "a.parquet").exists()
    assert go(sample, tmp_path, second, workers=2).status == "done"
    assert not set(first.seen) & set(second.seen)
    assert results(tmp_path) == results(of_the_device)


class Killed(BaseException):
    """Caught by nobody."""


@pytest.mark.parametrize(
    "place",
    [
        "wsi_pipeline.store.PredictionStore._write_chunks",
        "wsi_pipeline.pyramid.Pyramid.update",
        "wsi_pipeline.pyramid.Pyramid.finish",
        "wsi_pipeline.instances.survey.SmallObjects.keep",
        "wsi_pipeline.instances.extract.find_regions",
    ],
)
def test_killed_anywhere_the_slide_ends_with_the_same_bytes(
    sample,
    tmp_path,
    monkeypatch,
    of_the_device,
    place,
):
    def kill(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(Killed):
            go(sample, tmp_path, FakeDevice(), workers=2)
    assert not (tmp_path / "objects" / "a.parquet").exists()
    assert go(sample, tmp_path, FakeDevice(), workers=2).status == "done"
    assert results(tmp_path) == results(of_the_device)


def test_a_draft_that_fails_costs_no_maps(sample, tmp_path, monkeypatch, of_the_device):
    def full(_self, _batch):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.instances.spool.HELD_BYTES", 0)
        patch.setattr("pyarrow.ipc.RecordBatchFileWriter.write_batch", full)
        report = go(sample, tmp_path, FakeDevice(), workers=2)
    assert report.error["code"] == "disk_full"
    assert report.error["stage"] == "polygonize"
    assert not list((tmp_path / "objects").glob("*"))
    again = FakeDevice()
    assert go(sample, tmp_path, again).status == "done"
    assert not again.seen
    assert results(tmp_path) == results(of_the_device)


@pytest.mark.parametrize("where", ["pipeline._report_holes", "pipeline.provenance"])
def test_what_fails_after_the_last_block_ends_the_draft(
    sample, tmp_path, monkeypatch, of_the_device, where
):
    """No thread is left (a fixture looks), and the slide can be tried again."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"wsi_pipeline.{where}", fail)
        report = go(sample, tmp_path, FakeDevice(), workers=2)
    assert report.status == "failed"
    assert not [t for t in threading.enumerate() if t.name.startswith("draft")]
    assert go(sample, tmp_path, FakeDevice()).status == "done"
    assert results(tmp_path) == results(of_the_device)


def test_a_table_that_fails_stays_away(sample, tmp_path, monkeypatch, of_the_device):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.table.ObjectWriter.write", full)
        report = go(sample, tmp_path, FakeDevice())
    assert report.error["code"] == "disk_full"
    assert not (tmp_path / "maps" / "a.zarr").exists()  # not sealed: nobody vouches for it yet
    assert partial_path(tmp_path / "maps" / "a.zarr").is_dir()
    assert go(sample, tmp_path, FakeDevice()).status == "done"
    assert results(tmp_path) == results(of_the_device)


def test_a_network_that_ends_early_is_an_error_not_an_endless_wait(sample, tmp_path):
    class Short(FakeDevice):
        def predict(self, slide, tiles, **how):
            yield from list(super().predict(slide, tiles, **how))[:-1]

    report = go(sample, tmp_path, Short())
    assert report.status == "failed"
    assert "ended after" in report.error["message"]


# ---- maps that arrive ----------------------------------------------------------------


@pytest.fixture
def arriving(tmp_path):
    """Maps of three tiles in a row, none of them written, and what fills them."""
    from test_store import GRID, SPEC, block

    tiles = TileGrid.cover(GRID, tile_px=128, halo_px=16, wanted=lambda box: box.y == 0)
    store = PredictionStore.create(
        tmp_path / "a.zarr", spec=SPEC, tiles=tiles, pixel_size=(0.25, 0.25), made={}
    )
    maps = ArrivingMaps(store, store.missing(tiles))

    def write(number: int) -> PredictionBlock:
        one = block(store, tiles.tiles[number])
        store.write(one)
        maps.arrived(one.tile)
        return one

    return maps, write


def test_a_read_waits_for_all_blocks_under_its_box(arriving):
    maps, write = arriving
    box = Box(x=100, y=-5, width=40, height=30)  # the first tile and the second
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(maps.read, "cells/prob", box)
        assert not read.done()
        second = write(1)
        with pytest.raises(TimeoutError):
            read.result(timeout=0.05)  # it has no way to be done: the first is missing
        first = write(0)
        found = read.result(LONG)
    expected = [first.arrays["cells/prob"][:, :25, 100:], second.arrays["cells/prob"][:, :25, :12]]
    np.testing.assert_array_equal(found[:, 5:], np.concatenate(expected, axis=2))
    assert maps.waited_s > 0


def test_nothing_waits_for_what_will_never_come(arriving):
    maps, _ = arriving
    assert not maps.read("rings/prob", Box(x=0, y=70, width=60, height=50)).any()
    assert not maps.read("cells/prob", Box(x=-50, y=-50, width=50, height=50)).any()


def test_giving_up_wakes_who_waits(arriving):
    maps, write = arriving
    done = write(0)
    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(maps.read, "cells/prob", maps.grid.box) for _ in range(2)]
        maps.give_up()
        for read in reads:
            with pytest.raises(Interrupted, match="before the maps were complete"):
                read.result(LONG)
    inside = done.tile.write
    assert maps.read("cells/prob", inside).any()  # what is there can be read all the same


def test_arrival_is_that_of_the_last_block(arriving):
    maps, _ = arriving
    assert maps.arrival(Box(x=0, y=0, width=128, height=300)) == 0
    assert maps.arrival(Box(x=0, y=0, width=129, height=300)) == 1
    assert maps.arrival(Box(x=0, y=128, width=300, height=9)) == -1
    assert maps.arrival(Box(x=0, y=0, width=0, height=0)) == -1


# ---- rows put aside ------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_batches_come_back_in_any_order(tmp_path, monkeypatch, share):
    batches = list(extract_objects(tissue_like(0), slide_id="a", window_px=200).batches)
    held = share * sum(batch.nbytes for batch in batches)
    monkeypatch.setattr("wsi_pipeline.instances.spool.HELD_BYTES", held)
    spool = Spool(batches[0].schema, tmp_path / "new")
    numbers = [spool.put(batch) for batch in batches]
    for number, batch in reversed(list(zip(numbers, batches, strict=True))):
        assert spool.get(number).equals(batch)
    assert (tmp_path / "new").exists() == (share < 1)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))  # its file has no name
    spool.close()


def test_what_is_begun_does_not_decide_the_rows():
    store = tissue_like(2)
    plain = list(extract_objects(store, slide_id="a").batches)
    begun = extract_objects(store, slide_id="a", window_px=150, workers=2)
    begun.begin(lambda box: -(box.x // 100))  # right to left
    table = [row for batch in begun.batches for row in batch.to_pylist()]
    assert table == [row for batch in plain for row in batch.to_pylist()]
