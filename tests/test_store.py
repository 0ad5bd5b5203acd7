"""The prediction store: whole chunks, resume, seal, and what other tools make of it."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsi_pipeline import durable
from wsi_pipeline.durable import partial_path
from wsi_pipeline.errors import DiskFullError, FolderGoneError, StoreError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.pyramid import Pyramid
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.store import PredictionBlock, PredictionStore, open_maps
from wsi_pipeline.tiling import TileGrid

SPEC = ModelSpec(
    name="test",
    architecture="none",
    mpp=0.5,
    halo_px=16,
    options={},
    heads=(
        HeadSpec(name="cells", kind="instance", object_kind="cell", rules=AnchorRules()),
        HeadSpec(
            name="cells-class", kind="class", classes=("none", "a"), classifies="cells", stride=1
        ),
        HeadSpec(name="rings", kind="instance", object_kind="ring", rules=RunRules(), stride=2),
        HeadSpec(name="area", kind="patch", classes=("x", "y", "z"), stride=16),
    ),
)
GRID = PixelGrid(origin=(0.0, 0.0), spacing=(2.0, 2.0), size=(333, 270))


def make(path: Path, made: str = "job", tile_px: int = 64) -> tuple[PredictionStore, TileGrid]:
    tiles = TileGrid.cover(GRID, tile_px=tile_px, halo_px=16)
    store = PredictionStore.create(
        path, spec=SPEC, tiles=tiles, pixel_size=(0.25, 0.26), made={"job": made}
    )
    return store, tiles


@pytest.mark.parametrize("side", [16, 64])
def test_what_could_not_be_read_is_a_share_of_what_was_predicted(tmp_path, side):
    """Of windows fitted to the tissue, a small one counts as little as it is."""

    def extent(write):
        return write if write.x == 0 else Box(x=write.x, y=write.y, width=side, height=16)

    tiles = TileGrid.cover(
        GRID, tile_px=64, halo_px=16, wanted=lambda box: box.y == 0, extent=extent, step_px=16
    )
    store = PredictionStore.create(
        tmp_path / "a.zarr", spec=SPEC, tiles=tiles, pixel_size=(0.25, 0.26), made={}
    )
    lost = 0
    for number, tile in enumerate(tiles.tiles):
        lost_px = tile.predicted.area if number == 1 else 0
        lost += lost_px
        arrays = {key: truth(key)[(..., *box.slices)] for key, box in boxes_of(tile).items()}
        block = PredictionBlock(tile=tile, arrays=arrays)
        store.write(block, readable=1 - lost_px / tile.write.area)
    expected = lost / sum(tile.predicted.area for tile in tiles.tiles)
    assert 0 < expected < 0.5
    assert store.unreadable_fraction() == pytest.approx(expected, abs=1 / 255)
    del store.meta["predicted_px"]  # a store of an earlier version, whose tiles were whole
    assert store.unreadable_fraction() == pytest.approx(
        lost / sum(tile.write.area for tile in tiles.tiles), abs=1 / 255
    )


def boxes_of(tile):
    return {key: tile.write.coarsen(head.stride) for key, head in SPEC.maps.items()}


def truth(key: str) -> np.ndarray:
    head = SPEC.head(key.rsplit("/", 1)[0])
    width, height = GRID.coarsen(head.stride).size
    channels = len(head.prob_channels) if key.endswith("prob") else 0
    rng = np.random.default_rng(len(key))
    shape = (channels, height, width) if channels else (height, width)
    return rng.integers(0, 255, shape).astype(np.uint8)


def block(store: PredictionStore, tile) -> PredictionBlock:
    arrays = {}
    for key in store.keys:
        box = tile.write.coarsen(SPEC.head(key.rsplit("/", 1)[0]).stride)
        arrays[key] = truth(key)[(..., *box.slices)]
    return PredictionBlock(tile=tile, arrays=arrays)


def fill(store, tiles, count=None):
    for tile in store.missing(tiles).tiles[:count]:
        store.write(block(store, tile))


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_round_trip_and_final_name(tmp_path):
    path = tmp_path / "maps" / "a.zarr"
    store, tiles = make(path)
    fill(store, tiles)
    assert not path.exists()
    sealed = store.seal()
    assert path.is_dir()
    assert not partial_path(path).exists()
    for key in sealed.keys:
        whole = sealed.read(key, sealed.head_grid(key.rsplit("/", 1)[0]).box)
        np.testing.assert_array_equal(whole, truth(key))
        np.testing.assert_array_equal(open_maps(path)[key].compute(), truth(key))


def test_interrupted_store_goes_on_and_ends_with_the_same_bytes(tmp_path):
    for name, stops in (("one", [None]), ("two", [3, 0, 7, None])):
        for count in stops:
            store, tiles = make(tmp_path / f"{name}.zarr")
            fill(store, tiles, count)
        assert not store.missing(tiles).tiles
        store.seal()
    assert tree(tmp_path / "one.zarr") == tree(tmp_path / "two.zarr")


def test_what_is_made_otherwise_starts_again(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    fill(store, tiles, 3)
    other, tiles = make(tmp_path / "a.zarr", made="other")
    assert len(other.missing(tiles).tiles) == len(tiles.tiles)


def test_unfinished_template_is_made_again(tmp_path):
    beside = partial_path(tmp_path / "a.zarr")
    zarr.create_group(beside).create_array("cells/prob", shape=(1,), dtype="uint8")
    store, tiles = make(tmp_path / "a.zarr")
    fill(store, tiles)
    assert store.seal().keys


def test_partial_chunks_are_refused(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    good = block(store, tiles.tiles[0])
    short = {k: v[..., :-1] for k, v in good.arrays.items()}
    with pytest.raises(StoreError, match="whole chunks"):
        store.write(PredictionBlock(tile=good.tile, arrays=short))
    with pytest.raises(StoreError, match="must hold"):
        store.write(PredictionBlock(tile=good.tile, arrays={}))
    assert store.missing(tiles) == tiles


def test_unfinished_or_foreign_stores_do_not_open(tmp_path):
    make(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match="unfinished one"):
        PredictionStore.open(tmp_path / "a.zarr")
    (tmp_path / "b.zarr").mkdir()
    with pytest.raises(StoreError, match="no finished store"):
        open_maps(tmp_path / "b.zarr")


def test_glass_costs_no_files_and_reads_as_zero(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    store.write(block(store, tiles.tiles[4]))
    sealed = store.seal()
    key = "cells/prob"
    expected = np.zeros_like(truth(key))
    where = (..., *tiles.tiles[4].write.slices)
    expected[where] = truth(key)[where]
    np.testing.assert_array_equal(sealed.read(key, sealed.grid.box), expected)
    chunks = [p for p in (tmp_path / "a.zarr" / key / "c").rglob("*") if p.is_file()]
    assert len(chunks) == 1


def test_disk_full_is_named_and_the_block_stays_missing(tmp_path, monkeypatch):
    store, tiles = make(tmp_path / "a.zarr")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PredictionStore, "_write_chunks", full)
    with pytest.raises(DiskFullError, match="run the same command again"):
        store.write(block(store, tiles.tiles[0]))
    monkeypatch.undo()
    assert len(store.missing(tiles).tiles) == len(tiles.tiles)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    store, tiles = make(tmp_path_factory.mktemp("s") / "a.zarr", tile_px=1024 + 512)
    fill(store, tiles)
    return store.seal()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store big enough to have pyramids, with odd sides."""
    path = tmp_path_factory.mktemp("l") / "a.zarr"
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(2051, 1333))
    tiles = TileGrid.cover(grid, tile_px=512, halo_px=0)
    spec = ModelSpec(
        name="t", architecture="none", mpp=0.5, halo_px=0, options={}, heads=SPEC.heads[:2]
    )
    store = PredictionStore.create(path, spec=spec, tiles=tiles, pixel_size=(0.5, 0.5), made={})
    rng = np.random.default_rng(0)
    for tile in tiles.tiles:
        h, w = tile.write.height, tile.write.width
        store.write(
            PredictionBlock(
                tile=tile,
                arrays={
                    "cells/prob": rng.integers(0, 256, (2, h, w)).astype(np.uint8),
                    "cells-class/class": rng.integers(0, 2, (h, w)).astype(np.uint8),
                },
            )
        )
    return store.seal()


@pytest.mark.parametrize(
    ("tile_px", "chunk"),
    [(16, 16), (512, 512), (1024, 1024), (2048, 1024), (1536, 768), (1072, 1072)],
)
def test_chunks_are_neither_tiny_nor_huge(tmp_path, tile_px, chunk):
    store, _ = make(tmp_path / "a.zarr", tile_px=tile_px)
    assert store._arrays["cells/prob"].chunks[1:] == (chunk, chunk)


def test_a_damaged_chunk_is_named(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    fill(store, tiles)
    sealed = store.seal()
    chunk = next(p for p in (sealed.path / "cells" / "prob" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(b"torn")
    with pytest.raises(StoreError, match="--overwrite"):
        sealed.read("cells/prob", sealed.grid.box)


@given(
    x=st.integers(-50, 400),
    y=st.integers(-50, 300),
    width=st.integers(0, 200),
    height=st.integers(0, 200),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_equal_the_whole_padded_with_zeros(sealed, x, y, width, height):
    key = "cells/prob"
    padded = np.pad(truth(key), ((0, 0), (60, 600), (60, 700)))
    window = sealed.read(key, Box(x=x, y=y, width=width, height=height))
    np.testing.assert_array_equal(
        window, padded[:, y + 60 : y + 60 + height, x + 60 : x + 60 + width]
    )


def test_pyramid_is_the_mean_of_existing_pixels(large):
    group = zarr.open_group(large.path, mode="r")
    fine = group["cells/prob"][:].astype(np.int64)
    padded = np.pad(fine, ((0, 0), (0, 1), (0, 1)), mode="edge")
    cells = padded.reshape(2, padded.shape[1] // 2, 2, padded.shape[2] // 2, 2)
    np.testing.assert_array_equal(group["cells/prob_2x"][:], (cells.sum((2, 4)) + 2) // 4)
    np.testing.assert_array_equal(
        group["cells-class/class_2x"][:], group["cells-class/class"][:][::2, ::2]
    )
    assert max(group["cells/prob_8x"].shape) <= 512


def test_coarser_chunks_are_there_as_soon_as_what_is_below_them(tmp_path):
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(2100, 1024))
    tiles = TileGrid.cover(grid, tile_px=512, halo_px=0, wanted=lambda box: box.x < 1024)
    spec = ModelSpec(
        name="t", architecture="none", mpp=0.5, halo_px=0, options={}, heads=SPEC.heads[:1]
    )
    store = PredictionStore.create(
        tmp_path / "a.zarr", spec=spec, tiles=tiles, pixel_size=(0.5, 0.5), made={}
    )
    coarse = zarr.open_group(store.path, mode="r")["cells/prob_2x"]
    ones = {"cells/prob": np.ones((2, 512, 512), np.uint8)}
    for number, tile in enumerate(tiles.tiles):
        assert not coarse[:].any(), f"after {number} of four blocks"
        store.write(PredictionBlock(tile=tile, arrays=ones))
    assert coarse[:, :, :512].all()
    sealed = zarr.open_group(store.seal().path, mode="r")
    assert sealed["cells/prob_4x"][:, :, :256].all()


def test_scales_and_translations_put_pixels_where_they_are(sealed):
    entry = next(
        m
        for m in zarr.open_group(sealed.path, mode="r").attrs["ome"]["multiscales"]
        if m["name"] == "rings/prob"
    )
    scale, shift = (
        t[k]
        for t, k in zip(
            entry["datasets"][0]["coordinateTransformations"], ("scale", "translation"), strict=True
        )
    )
    # A pixel of this head spans 4 level-0 pixels; the first one's centre is 1.5 pixels from
    # the centre of level-0 pixel 0.
    assert scale == pytest.approx([1.0, 4 * 0.26, 4 * 0.25])
    assert shift == pytest.approx([0.0, 1.5 * 0.26, 1.5 * 0.25])


def test_independent_validator_accepts_the_root_and_every_head(sealed, large):
    tool = Path(sys.executable).with_name("ome-zarr-models")
    if not tool.exists():
        pytest.skip("ome-zarr-models is not installed")
    folders = [large.path, *(large.path / h.name for h in large.spec.heads)]
    folders += [sealed.path, *(sealed.path / h.name for h in SPEC.heads)]
    for folder in folders:
        done = subprocess.run([tool, "validate", folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Valid" in done.stdout


def test_a_block_can_be_read_before_it_is_marked(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    tile = tiles.tiles[0]
    written = store.put(block(store, tile))
    np.testing.assert_array_equal(
        store.read("cells/prob", tile.write), truth("cells/prob")[(..., *tile.write.slices)]
    )
    assert store.missing(tiles) == tiles
    assert make(tmp_path / "a.zarr")[0].missing(tiles) == tiles
    store.commit([written])
    assert tile not in store.missing(tiles).tiles
    assert tile not in make(tmp_path / "a.zarr")[0].missing(tiles).tiles


def test_a_store_that_is_sealed_syncs_no_chunk_of_a_block_again(tmp_path, monkeypatch):
    store, tiles = make(tmp_path / "a.zarr")
    fill(store, tiles)
    synced, real = [], durable.sync
    monkeypatch.setattr(durable, "sync", lambda path: (synced.append(path), real(path)))
    store.seal()
    inside = [path.relative_to(store.path) for path in synced if path != tmp_path]
    assert {Path(), Path("cells/prob"), Path("cells/prob/zarr.json")} <= set(inside)
    assert not [path for path in inside if "c" in path.parts]


def test_coarser_chunks_are_synced_when_a_store_is_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.pyramid.COARSEST_PX", 200)
    store, tiles = make(tmp_path / "a.zarr")
    fill(store, tiles)
    synced, real = [], durable.sync
    monkeypatch.setattr(durable, "sync", lambda path: (synced.append(path), real(path)))
    coarse = set((store.path / "cells" / "prob_2x").rglob("*"))
    assert any(path.name == "0" and path.is_file() for path in coarse)
    store.seal()
    assert coarse <= set(synced)


def test_no_coarse_chunk_is_made_of_a_map_that_is_away(tmp_path, monkeypatch):
    """A mount that goes after a block was written, and comes back before the next one."""
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(1024, 1024))
    tiles = TileGrid.cover(grid, tile_px=512, halo_px=0)
    spec = ModelSpec(
        name="t", architecture="none", mpp=0.5, halo_px=0, options={}, heads=SPEC.heads[:1]
    )
    how = {"spec": spec, "tiles": tiles, "pixel_size": (0.5, 0.5), "made": {}}
    store = PredictionStore.create(tmp_path / "a.zarr", **how)
    blocks = [
        PredictionBlock(tile=t, arrays={"cells/prob": np.ones((2, 512, 512), np.uint8)})
        for t in tiles.tiles
    ]
    for one in blocks[:-1]:
        store.write(one)
    update = Pyramid.update

    def away_before_it_is_updated(*args):
        store.path.rename(tmp_path / "away")
        update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Pyramid, "update", away_before_it_is_updated)
        with pytest.raises(FolderGoneError):
            store.put(blocks[-1])
    assert not store.path.exists(), "nothing is made in its place"
    (tmp_path / "away").rename(store.path)
    again = PredictionStore.create(tmp_path / "a.zarr", **how)
    (missing,) = again.missing(tiles).tiles
    assert missing == blocks[-1].tile
    again.write(blocks[-1])
    sealed = zarr.open_group(again.seal().path, mode="r")
    assert sealed["cells/prob_2x"][:].all()


def test_blocks_are_not_committed_to_a_store_that_is_away(tmp_path):
    store, tiles = make(tmp_path / "a.zarr")
    written = [store.put(block(store, tile)) for tile in tiles.tiles[:2]]
    store.path.rename(tmp_path / "away")
    with pytest.raises(FolderGoneError):
        store.commit(written)
    assert not store.path.exists(), "nothing is made in its place"
    (tmp_path / "away").rename(store.path)
    assert make(tmp_path / "a.zarr")[0].missing(tiles) == tiles
    store.commit(written)
    assert len(make(tmp_path / "a.zarr")[0].missing(tiles).tiles) == len(tiles.tiles) - 2


def test_a_disk_that_is_full_when_blocks_are_committed_is_named(tmp_path, monkeypatch):
    store, tiles = make(tmp_path / "a.zarr")
    written = [store.put(block(store, tile)) for tile in tiles.tiles[:2]]

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync", full)
        with pytest.raises(DiskFullError, match="run the same command again"):
            store.commit(written)
    assert store.missing(tiles) == tiles


def test_a_store_that_is_away_while_it_is_described_is_not_sealed(tmp_path, monkeypatch):
    store, tiles = make(tmp_path / "a.zarr")
    fill(store, tiles)
    real, calls = PredictionStore.require_there, []

    def flicker(self):
        calls.append(1)
        if len(calls) == 4:
            shutil.rmtree(self.path)
            (tmp_path / "away").rename(self.path)
        real(self)
        if len(calls) == 3:  # a head is described elsewhere
            self.path.rename(tmp_path / "away")

    monkeypatch.setattr(PredictionStore, "require_there", flicker)
    with pytest.raises(FolderGoneError, match="was away"):
        store.seal()
    monkeypatch.undo()
    assert not (tmp_path / "a.zarr").exists()
    whole, _ = make(tmp_path / "b.zarr")
    fill(whole, tiles)
    assert tree(make(tmp_path / "a.zarr")[0].seal().path) == tree(whole.seal().path)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"zarr_format": 3, "node_type": "group"}'])
def test_a_coarser_map_that_was_torn_is_made_again(tmp_path, monkeypatch, text):
    """A power cut may leave the name of a file without what it held."""
    monkeypatch.setattr("wsi_pipeline.pyramid.COARSEST_PX", 200)
    whole, tiles = make(tmp_path / "b.zarr")
    fill(whole, tiles)
    store, _ = make(tmp_path / "a.zarr")
    fill(store, tiles, 2)
    (store.path / "cells" / "prob_2x" / "zarr.json").write_text(text)
    again, _ = make(tmp_path / "a.zarr")
    assert len(again.missing(tiles).tiles) == len(tiles.tiles) - 2
    fill(again, tiles)
    assert tree(again.seal().path) == tree(whole.seal().path)


def halved(pixels):
    """The mean of 2 x 2 pixels, the last ones repeated."""
    odd = [(0, side % 2) for side in pixels.shape[-2:]]
    pixels = np.pad(pixels, [(0, 0), *odd], mode="edge").astype(int)
    cells = (pixels[..., i::2, j::2] for i in range(2) for j in range(2))
    return ((sum(cells) + 2) // 4).astype(np.uint8)


@given(
    width=st.integers(1100, 2300),
    height=st.integers(1100, 2300),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=12, deadline=None)
def test_pyramids_of_a_store_that_was_gone_on_with(tmp_path_factory, width, height, seed):
    """Killed between the mark of a block and the coarser chunks that it completes, anywhere."""
    rng = np.random.default_rng(seed)
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(width, height))
    tiles = TileGrid.cover(grid, tile_px=256, halo_px=0)
    spec = ModelSpec(
        name="t", architecture="none", mpp=0.5, halo_px=0, options={}, heads=SPEC.heads[:1]
    )
    how = {"spec": spec, "tiles": tiles, "pixel_size": (0.5, 0.5), "made": {}}
    path = tmp_path_factory.mktemp("p") / "a.zarr"
    pixels = rng.integers(0, 256, (2, height, width), np.uint8)

    def write(store, tile):
        arrays = {"cells/prob": pixels[(..., *tile.write.slices)]}
        store.write(PredictionBlock(tile=tile, arrays=arrays))

    store = PredictionStore.create(path, **how)
    for tile in tiles.tiles:
        if rng.random() < 0.4:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("wsi_pipeline.pyramid.Pyramid.update", lambda *_: None)
                write(store, tile)
    again = PredictionStore.create(path, **how)
    for tile in again.missing(tiles).tiles:
        write(again, tile)
    sealed = zarr.open_group(again.seal().path, mode="r")
    expected = pixels
    for scale in ("2x", "4x"):
        expected = halved(expected)
        np.testing.assert_array_equal(sealed[f"cells/prob_{scale}"][:], expected)


@pytest.mark.parametrize("kept", [0, 300, 1 << 24], ids=["nothing kept", "little", "all"])
@pytest.mark.parametrize("stride", [1, 16], ids=["even chunks", "odd chunks"])
def test_pyramids_do_not_depend_on_what_was_kept_in_memory(tmp_path, monkeypatch, stride, kept):
    """Chunks of 17 x 17 pixels have means across their edges."""
    monkeypatch.setattr("wsi_pipeline.pyramid.KEPT_BYTES", kept)
    monkeypatch.setattr("wsi_pipeline.pyramid.COARSEST_PX", 40)
    side = 272
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(5 * side - 40, 3 * side - 90))
    tiles = TileGrid.cover(grid, tile_px=side, halo_px=0, wanted=lambda box: box.x != side)
    head = replace(SPEC.heads[0], stride=stride)
    spec = ModelSpec(name="t", architecture="none", mpp=0.5, halo_px=0, options={}, heads=(head,))
    store = PredictionStore.create(
        tmp_path / "a.zarr", spec=spec, tiles=tiles, pixel_size=(0.5, 0.5), made={}
    )
    width, height = grid.coarsen(stride).size
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width), np.uint8)
    expected = np.zeros_like(pixels)
    for tile in reversed(tiles.tiles):
        part = (..., *tile.write.coarsen(stride).slices)
        expected[part] = pixels[part]
        store.write(PredictionBlock(tile=tile, arrays={"cells/prob": pixels[part]}))
    sealed = zarr.open_group(store.seal().path, mode="r")
    levels = [name for name in sealed["cells"] if name.startswith("prob_")]
    assert len(levels) >= 1
    for scale in range(1, len(levels) + 1):
        expected = halved(expected)
        np.testing.assert_array_equal(sealed[f"cells/prob_{2**scale}x"][:], expected)
    assert not any(p._halves or p._halves_bytes for p in store._pyramids.values())
