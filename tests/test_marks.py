"""What a power cut leaves of a store: blocks that are marked are whole, whenever it comes."""

import os
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from wsi_pipeline.durable import partial_path
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec
from wsi_pipeline.store import PredictionBlock, PredictionStore
from wsi_pipeline.tiling import TileGrid

SPEC = ModelSpec(
    name="t",
    architecture="none",
    mpp=0.5,
    halo_px=0,
    options={},
    heads=(HeadSpec(name="cells", kind="instance", object_kind="cell", rules=AnchorRules()),),
)
GRID = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(600, 500))
TILES = TileGrid.cover(GRID, tile_px=256, halo_px=0)
PIXELS = np.random.default_rng(0).integers(1, 256, (2, 500, 600), np.uint8)
GROUPS = (TILES.tiles[:1], TILES.tiles[1:5], TILES.tiles[5:])
"""Blocks that are committed together; the second ones share a row with the first and the third."""


class Cut(BaseException):
    """The power goes."""


class Disk:
    """Keeps what was synced, as it was then, and loses the rest; the power goes at an event."""

    def __init__(self, monkeypatch, cut_at=None):
        self.events = []
        """``(sync or replace, name)``, in order."""
        self._cut_at = cut_at
        self._lock = threading.RLock()
        self._folders = {}
        self._files = {}
        fsync, replace = os.fsync, os.replace

        def synced(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            with self._lock:
                self._happens("sync", path)
                self._keep(descriptor)
            fsync(descriptor)

        def replaced(source, target):
            with self._lock:
                self._happens("replace", os.fspath(target))
                replace(source, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)

    def _happens(self, what, path):
        if self._cut_at is not None and len(self.events) >= self._cut_at:
            raise Cut  # and for all that comes after it
        self.events.append((what, path))

    def _keep(self, descriptor):
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            names = os.listdir(descriptor)
            below = {name: os.stat(name, dir_fd=descriptor) for name in names}
            self._folders[facts.st_ino] = {
                name: (each.st_ino, stat.S_ISDIR(each.st_mode)) for name, each in below.items()
            }
        else:
            self._files[facts.st_ino] = os.pread(descriptor, facts.st_size, 0)

    def restore(self, folder, target, *, names):
        """Make what is left of a folder somewhere else: names that were synced, or all names."""
        if names == "all":
            shutil.copytree(folder, target, copy_function=self._copy)
        else:
            self._restore(os.stat(folder).st_ino, target)

    def _copy(self, source, target):
        Path(target).write_bytes(self._files.get(os.stat(source).st_ino, b""))

    def _restore(self, number, target):
        target.mkdir()
        for name, (below, is_folder) in self._folders.get(number, {}).items():
            if is_folder:
                self._restore(below, target / name)
            else:  # of a file that was not synced the name alone is left
                (target / name).write_bytes(self._files.get(below, b""))


def block(tile):
    return PredictionBlock(tile=tile, arrays={"cells/prob": PIXELS[(..., *tile.write.slices)]})


def make(path):
    return PredictionStore.create(
        path, spec=SPEC, tiles=TILES, pixel_size=(0.5, 0.5), made={"by": "test"}
    )


def fill(store, committed):
    for group in GROUPS:
        missing = set(store.missing(TILES).tiles)
        store.commit([store.put(block(tile)) for tile in group if tile in missing])
        committed.update(group)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a whole store, and what befell the disk while it was made."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsi_pipeline.pyramid.COARSEST_PX", 300)
        disk = Disk(patch)
        store = make(folder / "a.zarr")
        fill(store, set())
        events = list(disk.events)
        return tree(store.seal().path), events


@pytest.mark.parametrize("names", ["synced", "all"])
def test_wherever_the_power_goes_what_is_marked_is_whole(tmp_path, monkeypatch, undisturbed, names):
    """File systems may write names at any time, with or without what they stand for."""
    monkeypatch.setattr("wsi_pipeline.pyramid.COARSEST_PX", 300)
    wanted, events = undisturbed
    assert len(events) > 40
    for cut_at in range(len(events) + 1):
        folder, left = tmp_path / f"{cut_at}", tmp_path / f"{cut_at}-left"
        folder.mkdir()
        committed, where = set(), f"{cut_at}: {events[cut_at:][:1]}"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, cut_at)
            try:
                fill(make(folder / "a.zarr"), committed)
            except Cut:
                assert cut_at < len(events)
            disk.restore(folder, left, names=names)
        again = make(left / "a.zarr")
        marked = set(TILES.tiles) - set(again.missing(TILES).tiles)
        assert committed <= marked, where
        for tile in marked:
            np.testing.assert_array_equal(
                again.read("cells/prob", tile.write), PIXELS[(..., *tile.write.slices)], where
            )
        if cut_at % 3 == 0:
            fill(again, set())
            assert tree(again.seal().path) == wanted, where


def test_a_commit_waits_for_the_disk_twice_however_many_blocks_it_is_for(tmp_path, monkeypatch):
    store = make(tmp_path / "a.zarr")
    written = [store.put(block(tile)) for tile in TILES.tiles]
    disk = Disk(monkeypatch)
    store.commit(written)
    what = [event for event, _ in disk.events]
    rows = TILES.shape[1]
    first = what.index("replace")
    assert what[first : first + rows] == ["replace"] * rows
    assert what.count("replace") == rows, "of marks alone"
    before = {path for _, path in disk.events[:first]}
    assert {str(path) for each in written for path in each.chunks} <= before
    root = partial_path(tmp_path / "a.zarr")
    inside = root / "cells" / "prob" / "c"
    assert {str(inside.parent), str(inside), str(inside / "0"), str(inside / "0" / "1")} <= before
    after = {path for _, path in disk.events[first + rows :]}
    marks = root / "blocks" / "c"
    assert {str(marks.parent), str(marks), *(str(marks / f"{n}") for n in range(rows))} <= set(
        after
    )
    assert all(path.startswith(str(root)) for path in (*before, *after))


def test_folders_whose_names_are_on_the_disk_are_not_synced_again(tmp_path, monkeypatch):
    store = make(tmp_path / "a.zarr")
    store.write(block(TILES.tiles[0]))
    disk = Disk(monkeypatch)
    store.write(block(TILES.tiles[1]))  # beside the first
    root = partial_path(tmp_path / "a.zarr")
    folders = {path for what, path in disk.events if what == "sync" and Path(path).is_dir()}
    row = {str(root / "cells" / "prob" / "c" / "0" / "0"), str(root / "blocks" / "c" / "0")}
    assert folders == row


def test_a_commit_that_fails_marks_nothing_and_leaves_no_file(tmp_path, monkeypatch):
    store = make(tmp_path / "a.zarr")
    written = [store.put(block(tile)) for tile in TILES.tiles[:2]]
    before = tree(store.path)

    def full(source, target):
        raise OSError(5, "bad sector")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="bad sector"):
        store.commit(written)
    monkeypatch.undo()
    assert tree(store.path) == before
    assert store.missing(TILES) == TILES
    store.commit(written[1:])
    assert set(TILES.tiles) - set(make(tmp_path / "a.zarr").missing(TILES).tiles) == {
        TILES.tiles[1]
    }
