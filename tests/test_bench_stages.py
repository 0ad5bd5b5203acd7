"""The stages of `wsi bench`: limits on the same tiles, and what can be measured at all."""

from __future__ import annotations

import threading
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
from bench_fixtures import SMALL, FakeClock, small_slide

from wsi_pipeline.bench import BenchOptions, stages
from wsi_pipeline.bench import subject as preparing
from wsi_pipeline.bench.stages import HeldWindows, network_bytes, stages_of
from wsi_pipeline.bench.subject import prepared
from wsi_pipeline.bench.whole import Whole
from wsi_pipeline.chunks import compress
from wsi_pipeline.errors import JobError, ModelBundleError, SlideError
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.table import count_rows


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return small_slide(tmp_path_factory.mktemp("slides") / "one.svs")


@pytest.fixture(scope="module")
def subject(slide, tmp_path_factory):
    options = BenchOptions(slide=str(slide), **SMALL)
    with prepared(options, tmp_path_factory.mktemp("bench")) as made:
        yield made


@pytest.fixture(scope="module")
def of_one_tile(slide, tmp_path_factory):
    options = BenchOptions(slide=str(slide), tiles=1, **SMALL)
    with prepared(options, tmp_path_factory.mktemp("one")) as made:
        yield made


@pytest.fixture(scope="module")
def by_name(subject):
    return {stage.name: stage for stage in stages_of(subject)}


# --- limits: the same tiles ---------------------------------------------------------------


def spy_on_tiles(subject, monkeypatch):
    reader, seen = subject.slide._reader, []
    tile = reader.tile
    lock = threading.Lock()

    def spying(*where):
        with lock:
            seen.append(where)
        return tile(*where)

    monkeypatch.setattr(reader, "tile", spying)
    return seen


@pytest.mark.parametrize("name", ["tissue", "read"])
def test_decoding_is_of_the_same_tiles_of_the_file_each_once(name, by_name, subject, monkeypatch):
    seen = spy_on_tiles(subject, monkeypatch)
    by_name[name].work(FakeClock())
    worked = set(seen)
    seen.clear()
    by_name[name].limit(FakeClock())
    assert worked
    assert set(seen) == worked
    assert len(seen) == len(worked)


def test_tiles_of_the_file_that_no_window_needs_are_not_decoded(of_one_tile, monkeypatch):
    (tile,) = of_one_tile.tiles.tiles
    read = next(stage for stage in stages_of(of_one_tile) if stage.name == "read")
    seen = spy_on_tiles(of_one_tile, monkeypatch)
    read.limit(FakeClock())
    columns, rows = of_one_tile.slide._reader.levels[0].lattice
    assert 0 < len(seen) < columns * rows
    # 256 + 2 x 240 working pixels are 1472 of level 0: at most 7 tiles of 256 a side
    assert len(seen) <= (2 * tile.read.width // 256 + 2) ** 2


def test_the_network_sees_the_windows_of_its_tiles(subject):
    held = HeldWindows.of(subject)
    boxes = [tile.read for tile in subject.tiles.tiles]
    asked = subject.slide.read_windows(subject.tiles.grid, boxes, threads=1)
    given = held.read_windows(subject.tiles.grid, boxes, threads=1)
    count = 0
    for expected, window in zip(asked, given, strict=True):
        np.testing.assert_array_equal(window, expected)
        count += 1
    assert count == len(boxes) > 1


def test_a_large_slides_windows_are_seen_again(subject, monkeypatch):
    monkeypatch.setattr(stages, "HELD_BYTES", 2 * 3 * subject.tiles.read_px**2)
    held = HeldWindows.of(subject)
    assert len(held.windows) == 2
    boxes = [tile.read for tile in subject.tiles.tiles[:5]]
    given = list(held.read_windows(subject.tiles.grid, boxes, threads=1))
    assert len(given) == 5
    assert [window.shape[:2] for window in given] == [box.size[::-1] for box in boxes]
    assert given[0].base is given[2].base is held.windows[0]
    assert given[1].base is held.windows[1]


def count_pixels(_spec, sizes, margin_px):
    return sum(10 * width * height for width, height in sizes)


def test_the_networks_limit_is_the_slower_of_arithmetic_and_memory(subject, monkeypatch):
    monkeypatch.setattr(stages, "dense_flops", count_pixels)
    monkeypatch.setattr(stages, "matrix_rate", lambda *_, clock: 1e6)
    monkeypatch.setattr(stages, "memory_rate", lambda *_, clock: 1e15)
    network = next(stage for stage in stages_of(subject) if stage.name == "network")
    limit = network.limit(FakeClock())
    pixels = sum(tile.read.area for tile in subject.tiles.tiles)
    assert limit.seconds == pytest.approx(10 * pixels / 1e6)
    assert "FLOPs" in limit.name
    monkeypatch.setattr(stages, "memory_rate", lambda *_, clock: 1.0)
    limit = network.limit(FakeClock())
    assert limit.seconds == network_bytes(subject)
    assert "memory" in limit.name


def test_bytes_of_the_network_are_windows_and_maps(subject):
    total = sum(3 * tile.read.area for tile in subject.tiles.tiles)
    for key in subject.maps.keys:
        stored = np.zeros_like(subject.maps._arrays[key][:])
        stride = subject.maps.spec.maps[key].stride
        for tile in subject.tiles.tiles:
            stored[(..., *tile.predicted.coarsen(stride).slices)] = 1
        total += np.count_nonzero(stored)
    assert network_bytes(subject) == total


def test_the_codec_writes_the_bytes_of_the_store(by_name, subject, monkeypatch):
    """Chunk files of the sealed store, pyramids included, against what the limit wrote."""
    written = []

    def keep(beside, final):
        written.extend(path.read_bytes() for path in beside.iterdir())

    monkeypatch.setattr(stages, "publish_directory", keep)
    by_name["maps"].limit(FakeClock())
    heads = [subject.maps.path / head.name for head in subject.maps.spec.heads]
    stored = [p.read_bytes() for head in heads for p in head.rglob("c/**/*") if p.is_file()]
    assert len(stored) > len(subject.maps.keys)
    assert sorted(written) == sorted(stored)


def test_maps_are_written_again_as_they_were(by_name, subject, monkeypatch):
    sealed = []
    seal = PredictionStore.seal

    def keep(store):
        again = seal(store)
        sealed.extend((key, again.read(key, again.head_grid(key.partition("/")[0]).box))
                      for key in again.keys)  # fmt: skip
        return again

    monkeypatch.setattr(PredictionStore, "seal", keep)
    by_name["maps"].work(FakeClock())
    assert {key for key, _ in sealed} == set(subject.maps.keys)
    for key, pixels in sealed:
        box = subject.maps.head_grid(key.partition("/")[0]).box
        np.testing.assert_array_equal(pixels, subject.maps.read(key, box))
    assert any(pixels.any() for _, pixels in sealed)


def test_only_the_writing_of_maps_is_timed(by_name, subject, monkeypatch):
    clock = FakeClock()
    read, put, commit = PredictionStore.read, PredictionStore.put, PredictionStore.commit
    committed = []

    def slow_read(store, key, box):
        clock.spend(1000.0)
        return read(store, key, box)

    def slow_put(store, block, **how):
        clock.spend(1.0)
        return put(store, block, **how)

    def noted(store, written, threads):
        committed.extend(written)
        commit(store, written, threads)

    monkeypatch.setattr(PredictionStore, "read", slow_read)
    monkeypatch.setattr(PredictionStore, "put", slow_put)
    monkeypatch.setattr(PredictionStore, "commit", noted)
    assert by_name["maps"].work(clock) == len(subject.tiles.tiles) == len(committed)


def test_the_scan_sees_each_pixel_of_the_object_maps_once(by_name, subject, monkeypatch):
    seen = []
    monkeypatch.setattr(stages, "_scan", lambda pixels: seen.append(pixels))
    monkeypatch.setattr(stages, "GROUP_BYTES", 1 << 16)  # several groups
    by_name["objects"].limit(FakeClock())
    expected = [
        subject.maps.read(f"{head.name}/prob", subject.maps.head_grid(head.name).box)[0]
        for head in subject.maps.spec.object_heads
    ]
    areas = [
        tile.write.coarsen(head.stride).area
        for head in subject.maps.spec.object_heads
        for tile in subject.tiles.tiles
    ]
    assert sum(p.size for p in seen) == sum(areas)
    assert sum(int(p.sum()) for p in seen) == sum(int(p.sum()) for p in expected) > 0


def test_the_scan_lists_runs(monkeypatch):
    found = []
    monkeypatch.setattr(stages, "find_runs", lambda image: found.append(image.copy()))
    stages._scan(np.array([[0, 127, 128, 255]], np.uint8))
    np.testing.assert_array_equal(found, [[[0, 0, 1, 1]]])


def test_objects_are_those_of_the_run(by_name, subject):
    by_name["objects"].work(FakeClock())
    rows = count_rows(subject.folder / "objects.parquet")
    assert rows == count_rows(subject.job.objects_path) > 0


def test_the_whole_runs_anew_each_time(of_one_tile):
    subject = of_one_tile
    whole = Whole(subject=subject)
    clock = FakeClock(tick=1.0)
    assert whole.work(clock) == whole.work(clock) == 1.0  # between two looks at the clock
    assert len(whole.seconds) == 2
    assert set(whole.stage_seconds) == {"open", "tissue", "predict", "polygonize", "write"}
    assert all(seconds["predict"] > 0 for seconds in whole.seconds)
    assert subject.job.report_path.exists()  # the first run is left alone
    assert not (subject.folder / "again").exists()


# --- what is measured ---------------------------------------------------------------------


def test_the_tiles_are_those_of_the_pipeline(subject):
    assert not subject.maps.missing(subject.tiles).tiles
    assert np.count_nonzero(subject.maps._blocks) == len(subject.tiles.tiles)
    tiles = subject.tiles.tiles
    assert subject.mpx == sum(tile.predicted.area for tile in tiles) / 1e6
    assert any(tile.predicted != tile.write for tile in tiles)  # fitted to the tissue
    assert 0 < subject.mm2 <= subject.mpx * 0.25  # a working pixel is 0.25 um2
    assert subject.working_mpp == pytest.approx((0.5, 0.5))


def test_few_tiles_are_neighbours_from_the_middle(slide, subject, of_one_tile, tmp_path):
    every = [(tile.column, tile.row) for tile in subject.tiles.tiles]
    with prepared(BenchOptions(slide=str(slide), tiles=3, **SMALL), tmp_path) as of_three:
        for made, most in ((of_one_tile, 1), (of_three, 3)):
            found = [(tile.column, tile.row) for tile in made.tiles.tiles]
            assert len(found) == most
            assert every[0] not in found
            assert every[-1] not in found
            assert found == sorted(found, key=every.index)
            # and the whole did no others
            assert np.count_nonzero(made.maps._blocks) == most
            assert not made.maps.missing(made.tiles).tiles


def test_options_reach_the_predictor(slide, tmp_path):
    options = BenchOptions(
        slide=str(slide), model="cerberus-lite", device="cpu", precision="fp32", tile_size=128,
        batch_size=2, workers=1, tiles=1, mpp=0.5,
    )  # fmt: skip
    with prepared(options, tmp_path) as made:
        assert made.bundle.name == "cerberus-lite"
        assert made.predictor.precision == "fp32"
        assert (made.tiles.tile_px, made.predictor.batch_size) == (128, 2)
        assert (made.predictor.workers, made.workers) == (1, 1)
        assert made.pixel_size == (0.5, 0.5)
        assert not made.synthetic


def test_a_synthetic_slide_is_drawn_where_none_is_given(tmp_path):
    options = BenchOptions(size_px=1024, mpp=0.5, tiles=1, **SMALL)
    with prepared(options, tmp_path) as made:
        assert made.synthetic
        assert made.slide.size == (1024, 1024)
        assert made.pixel_size == (0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"slide": "nowhere.svs"}, (JobError, SlideError), "nowhere.svs"),
        ({"slide": ""}, (JobError, SlideError), "empty name"),
        ({"model": "no-such-model"}, ModelBundleError, "no-such-model"),
        ({"device": "tpu"}, JobError, "tpu"),
        ({"tile_size": 100}, JobError, "multiple of 16"),
        ({"mpp": 0.0}, (JobError, ValueError), "mpp|pixel size"),
    ],
)
def test_what_cannot_be_measured_is_said(slide, tmp_path, options, error, said):
    given = {"slide": str(slide), **SMALL, **options}
    with pytest.raises(error, match=said), prepared(BenchOptions(**given), tmp_path):
        pass


@pytest.mark.parametrize(
    "options", [{"repeat": 0}, {"tiles": 0}, {"size_px": 100}, {"slide": "a.svs", "size_px": 1000}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(JobError):
        BenchOptions(**options)


def test_several_slides_are_refused(slide, tmp_path):
    listed = tmp_path / "slides.txt"
    other = tmp_path / "two.svs"
    other.write_bytes(slide.read_bytes())
    listed.write_text(f"{slide}\n{other}\n")
    with (
        pytest.raises(JobError, match="one slide"),
        prepared(BenchOptions(slide=str(listed), **SMALL), tmp_path),
    ):
        pass


def test_a_slide_without_tissue_is_refused(slide, tmp_path, monkeypatch):
    detect = preparing.detect_tissue
    monkeypatch.setattr(
        preparing,
        "detect_tissue",
        lambda *how: replace(found := detect(*how), mask=np.zeros_like(found.mask)),
    )
    with (
        pytest.raises(JobError, match="no tissue"),
        prepared(BenchOptions(slide=str(slide), **SMALL), tmp_path),
    ):
        pass


def test_a_slide_that_fails_is_no_measurement(subject, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SlideError("broken here")

    monkeypatch.setattr("wsi_pipeline.engines.here.predict", fail)
    with pytest.raises(JobError, match="broken here"):
        Whole(subject=subject).work(FakeClock())


def test_the_codec_is_the_one_of_the_maps():
    """Chunks of zeros and noise, unpacked by another library."""
    for chunk in (np.zeros((2, 8, 8), np.uint8), np.arange(64, dtype=np.uint8).reshape(8, 8)):
        assert imagecodecs.zstd_decode(compress(chunk)) == chunk.tobytes()
