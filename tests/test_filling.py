"""From tiles to maps: when blocks can be read, when they are marked, and what may go wrong."""

import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from test_store import SPEC, block, make, truth

from wsi_pipeline.errors import DiskFullError, Interrupted, SlideBusyError
from wsi_pipeline.filling import fill_store
from wsi_pipeline.store import PredictionStore

LONG = 20
"""Seconds after which a test that waits has failed; none waits that long otherwise."""


class Network:
    """Yields the blocks of a store; may stop for good in front of one."""

    spec = SPEC

    def __init__(self, store, *, device="cpu", fail_at=None):
        self.store = store
        self.device = device
        self.fail_at = fail_at

    def predict(self, slide, tiles, *, stop, warn, feed=None):
        for number, tile in enumerate(tiles.tiles):
            if stop():
                return
            if number == self.fail_at:
                raise RuntimeError("the network fails as told")
            yield block(self.store, tile)


SLIDE = SimpleNamespace(unreadable_share=lambda grid, box: 0.0)
TISSUE = SimpleNamespace(window=lambda grid, box: np.ones((box.height, box.width), np.uint8))


def filling(store, missing, network, **how):
    how = {"stop": lambda: False, "wrote": lambda tile: None, "warn": print, **how}
    return closing(fill_store(store, missing, slide=SLIDE, tissue=TISSUE, predictor=network, **how))


def marked(tmp_path, tiles):
    """Return the tiles that whoever goes on with the store finds marked; look at their blocks."""
    again, _ = make(tmp_path / "a.zarr")
    missing = set(again.missing(tiles).tiles)
    found = [tile for tile in tiles.tiles if tile not in missing]
    for tile in found:
        np.testing.assert_array_equal(
            again.read("cells/prob", tile.write), truth("cells/prob")[(..., *tile.write.slices)]
        )
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_blocks_can_be_read_before_they_are_on_the_disk(tmp_path, monkeypatch, device):
    """Objects are drafted from them meanwhile: `wrote` does not wait for the disk."""
    store, tiles = make(tmp_path / "a.zarr")
    told, all_told, real = [], threading.Event(), PredictionStore.commit

    def wrote(tile):
        np.testing.assert_array_equal(
            store.read("cells/prob", tile.write), truth("cells/prob")[(..., *tile.write.slices)]
        )
        told.append(tile)
        if len(told) == len(tiles.tiles):
            all_told.set()

    def slow(self, written, threads):
        assert all_told.wait(LONG)
        real(self, written, threads)

    monkeypatch.setattr(PredictionStore, "commit", slow)
    with filling(store, tiles, Network(store, device=device), wrote=wrote) as blocks:
        assert len(list(blocks)) == len(tiles.tiles)
    assert len(told) == len(set(told)) == len(tiles.tiles)
    assert marked(tmp_path, tiles) == list(tiles.tiles)


def test_a_network_that_fails_leaves_the_blocks_before_it(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    with (
        pytest.raises(RuntimeError, match="as told"),
        filling(store, tiles, Network(store, fail_at=5)) as blocks,
    ):
        list(blocks)
    assert marked(tmp_path, tiles) == list(tiles.tiles[:5])


def test_a_stop_leaves_the_blocks_before_it(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    seen = []
    with (
        pytest.raises(Interrupted, match="after 3 of"),
        filling(store, tiles, Network(store), stop=lambda: len(seen) == 3) as blocks,
    ):
        seen.extend(blocks)
    assert marked(tmp_path, tiles) == list(tiles.tiles[:3])


def test_whoever_walks_away_leaves_the_blocks_before_it(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    with filling(store, tiles, Network(store)) as blocks:
        for _ in range(4):
            next(blocks)
    assert marked(tmp_path, tiles) == list(tiles.tiles[:4])


def test_a_disk_that_fills_up_is_told_and_keeps_what_was_written(tmp_path, monkeypatch):
    store, tiles = make(tmp_path / "a.zarr")
    real = PredictionStore._write_chunks

    def full(self, key, box, pixels):
        if box == tiles.tiles[6].write.coarsen(1):
            raise OSError(28, "No space left on device")
        return real(self, key, box, pixels)

    monkeypatch.setattr(PredictionStore, "_write_chunks", full)
    with (
        pytest.raises(DiskFullError),
        filling(store, tiles, Network(store)) as blocks,
    ):
        list(blocks)
    monkeypatch.undo()
    found = marked(tmp_path, tiles)
    assert set(tiles.tiles[:6]) <= set(found)
    assert tiles.tiles[6] not in found


@pytest.mark.parametrize("at", [0, 1], ids=["before a block is written", "before it is marked"])
def test_who_may_not_write_any_more_marks_nothing(tmp_path, at):
    store, tiles = make(tmp_path / "a.zarr")
    asked = []

    def allowed():
        asked.append(threading.current_thread().name)
        by_committer = asked[-1] == "committer"
        if by_committer == bool(at):
            raise SlideBusyError("another has it")

    with (
        pytest.raises(SlideBusyError, match="another has it"),
        filling(store, tiles, Network(store), allowed=allowed) as blocks,
    ):
        list(blocks)
    assert "committer" in asked or not at
    assert not marked(tmp_path, tiles)
