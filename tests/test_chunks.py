"""Files of chunks: zarr reads what we write, writes the same bytes, and damage is told."""

import errno
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from wsi_pipeline.chunks import ChunkFiles, compress
from wsi_pipeline.errors import StoreError
from wsi_pipeline.ome import create_arrays


def array(folder, shape, chunks):
    """An empty array of zarr's making, and its files."""
    group = zarr.create_group(folder, zarr_format=3)
    made = create_arrays(group, {"head/prob": (shape, chunks)})["head/prob"]
    return made, ChunkFiles(folder / "head/prob", shape=shape, chunks=chunks)


def cells(shape, chunks):
    high, wide = chunks[-2:]
    for row in range(-(-shape[-2] // high)):
        for column in range(-(-shape[-1] // wide)):
            lines = slice(row * high, (row + 1) * high)
            yield row, column, (..., lines, slice(column * wide, (column + 1) * wide))


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@given(
    channels=st.sampled_from([(), (1,), (3,)]),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    chunk=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_zarr_writes_the_same_files_and_reads_ours(tmp_path_factory, channels, size, chunk, seed):
    folder = tmp_path_factory.mktemp("a")
    shape, chunks = (*channels, *size), (*channels, *chunk)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 3, shape, np.uint8)
    theirs, _ = array(folder / "theirs", shape, chunks)
    ours, files = array(folder / "ours", shape, chunks)
    for row, column, place in cells(shape, chunks):
        if rng.random() < 0.3:
            pixels[place] = 0
        files.write(row, column, pixels[place])
    theirs[:] = pixels
    assert tree(folder / "ours") == tree(folder / "theirs")
    np.testing.assert_array_equal(ours[:], pixels)
    for row, column, place in cells(shape, chunks):
        found = files.read(row, column)
        assert (found is None) == (not pixels[place].any())
        if found is not None:
            np.testing.assert_array_equal(found, pixels[place])


def test_zeros_take_the_place_of_an_older_chunk(tmp_path):
    _, files = array(tmp_path / "a", (8, 8), (8, 8))
    assert files.write(0, 0, np.ones((8, 8), np.uint8)) == files.path(0, 0)
    assert files.write(0, 0, np.zeros((8, 8), np.uint8)) is None
    assert files.read(0, 0) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"torn", "in place of 64"),
        (b"", "in place of 64"),
        (bytes(Zstd().encode(bytes(65))), "65 bytes in place of 64"),
        (compress(np.ones((8, 8), np.uint8))[:-2], None),
    ],
)
def test_a_file_of_anything_else_is_damaged(tmp_path, data, message):
    _, files = array(tmp_path / "a", (8, 8), (8, 8))
    files.write(0, 0, np.ones((8, 8), np.uint8))
    files.path(0, 0).write_bytes(data)
    with pytest.raises(StoreError, match=message):
        files.read(0, 0)


def test_of_an_endless_file_only_a_part_is_read(tmp_path):
    _, files = array(tmp_path / "a", (8, 8), (8, 8))
    path = files.write(0, 0, np.ones((8, 8), np.uint8))
    with path.open("ab") as file:
        file.truncate(1 << 42)  # a sparse one, larger than any memory
    with pytest.raises(StoreError):
        files.read(0, 0)


def test_nothing_is_made_in_the_place_of_an_array_that_is_gone(tmp_path):
    _, files = array(tmp_path / "a", (2, 8, 8), (2, 8, 8))
    (tmp_path / "a").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        files.write(0, 0, np.ones((2, 8, 8), np.uint8))
    assert not (tmp_path / "a").exists()


def test_a_write_that_fails_leaves_the_old_chunk_and_no_other_file(tmp_path, monkeypatch):
    _, files = array(tmp_path / "a", (8, 8), (8, 8))
    files.write(0, 0, np.ones((8, 8), np.uint8))
    before = tree(tmp_path / "a")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(0, 0, np.full((8, 8), 2, np.uint8))
    monkeypatch.undo()
    assert tree(tmp_path / "a") == before
