"""The predictor on a fake slide: the right pixels, any batch, any tile size, clean ends."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from wsi_pipeline import device, inference
from wsi_pipeline.bundle import find_bundle, save_bundle
from wsi_pipeline.errors import JobError, OutOfMemoryError, SlideError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.tiling import TileGrid

SPEC = ModelSpec(
    name="tiny",
    architecture="cerberus",
    mpp=0.5,
    halo_px=32,
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(
            name="nuclei-class", kind="class", classes=("none", "a", "b", "c"), classifies="nuclei"
        ),
        HeadSpec(name="gland", kind="instance", stride=2, object_kind="gland", rules=RunRules()),
        HeadSpec(name="tissue", kind="patch", stride=16, classes=("x", "y", "z")),
    ),
    options={"widths": [4, 4, 6, 8], "blocks": [1, 1, 1, 1], "head_width": 4, "patch_width": 4},
)


class FakeSlide:
    """An image in memory; yields views of one reused buffer, as a real reader may."""

    def __init__(self, image, *, fail_at=None):
        self.image = image
        self.fail_at = fail_at
        self.asked = []
        self.threads = None
        self.reader = None

    @property
    def grid(self):
        height, width = self.image.shape[:2]
        return PixelGrid.level0((width, height))

    def read_windows(self, grid, boxes, *, threads, stop=lambda: False):
        assert grid == self.grid
        self.threads, self.reader = threads, threading.current_thread()
        side = max((side for box in boxes for side in box.size), default=0)
        buffer = np.empty((side, side, 3), np.uint8)
        for index, box in enumerate(boxes):
            if stop():
                return
            if index == self.fail_at:
                raise SlideError("broken here")
            self.asked.append(box)
            window = buffer[: box.height, : box.width]
            window[:] = read(self.image, box)
            yield window
        buffer[:] = 0


def read(image, box):
    out = np.full((box.height, box.width, 3), 255, np.uint8)
    height, width = image.shape[:2]
    x0, y0, x1, y1 = max(box.x, 0), max(box.y, 0), min(box.x1, width), min(box.y1, height)
    if x0 < x1 and y0 < y1:
        out[y0 - box.y : y1 - box.y, x0 - box.x : x1 - box.x] = image[y0:y1, x0:x1]
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(5)
    network = build_network(SPEC)
    with torch.no_grad():  # heads sure enough of themselves that their maps vary
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return save_bundle(tmp_path_factory.mktemp("zoo") / "tiny", SPEC, network, card="")


@pytest.fixture(scope="module")
def slide():
    image = np.random.default_rng(2).integers(0, 256, (150, 200, 3), np.uint8)
    return FakeSlide(image)


def load(bundle, **options):
    options = {"device": "cpu", "precision": "fp32", "tile_size": 64, **options}
    return TorchPredictor.load(bundle, **options)


def predict(predictor, slide, **options):
    tiles = TileGrid.cover(slide.grid, tile_px=predictor.tile_px, halo_px=predictor.halo_px)
    return tiles, list(predictor.predict(slide, tiles, **options))


def test_blocks_are_what_the_network_says_about_their_pixels(bundle, slide):
    """Against the formula written out in numpy, one tile at a time."""
    predictor = load(bundle, batch_size=3, workers=2)
    tiles, blocks = predict(predictor, slide)
    assert [block.tile for block in blocks] == list(tiles.tiles)
    assert slide.threads == 2
    network = bundle.load_network()
    for block in blocks:
        x = torch.from_numpy(read(slide.image, block.tile.read)).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            logits = {name: t[0].double().numpy() for name, t in network(x).items()}
        for head in SPEC.heads:
            scale = 16 if head.kind == "patch" else 1
            e = np.exp(logits[head.name] - logits[head.name].max(0))
            p = (e / e.sum(0))[:, 32 // scale : 96 // scale, 32 // scale : 96 // scale]
            k = head.stride // scale
            p = p.reshape(len(p), p.shape[1] // k, k, p.shape[2] // k, k).mean((2, 4))
            box = block.tile.write.coarsen(head.stride)
            p = p[:, : box.height, : box.width]
            if head.has_class_map:
                found = block.arrays[f"{head.name}/class"]
                assert found.dtype == np.uint8
                assert found.shape == (box.height, box.width)
                chosen = np.take_along_axis(p, found[None].astype(int), 0)[0]
                np.testing.assert_allclose(chosen, p.max(0), atol=1e-5)
            if head.prob_channels:
                kept = p[1:] if head.kind == "instance" else p
                found = block.arrays[f"{head.name}/prob"]
                assert found.dtype == np.uint8
                assert found.shape == kept.shape
                assert np.abs(found - kept * 255).max() <= 0.5 + 1e-3
        keys = {"nuclei/prob", "nuclei-class/class", "gland/prob", "tissue/prob", "tissue/class"}
        assert set(block.arrays) == keys


def test_what_decoders_do_not_see_changes_nothing(slide, tmp_path):
    spec = dataclasses.replace(SPEC, halo_px=96)
    torch.manual_seed(0)
    bundle = save_bundle(tmp_path / "wide", spec, build_network(spec).eval(), card="test")
    cropping, whole = load(bundle), load(bundle)
    assert cropping.margin_px == 95  # one pixel, and one logit, more than nothing
    whole.margin_px = 0
    tiles, found = predict(cropping, slide)
    _, wanted = predict(whole, slide)
    assert len(found) == len(wanted) == len(tiles.tiles)
    for own, other in zip(found, wanted, strict=True):
        for key, values in own.arrays.items():
            if key.endswith("/prob"):
                assert np.abs(values.astype(int) - other.arrays[key]).max() <= 1
            else:
                assert (values != other.arrays[key]).mean() < 1e-3


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 5}, {"batch_size": 12, "workers": 3}]
)
def test_bytes_do_not_depend_on_batch_or_workers(bundle, slide, options):
    _, expected = predict(load(bundle, batch_size=2, workers=1), slide)
    _, found = predict(load(bundle, **options), slide)
    for a, b in zip(expected, found, strict=True):
        assert a.tile == b.tile
        for key, array in a.arrays.items():
            np.testing.assert_array_equal(array, b.arrays[key], err_msg=key)


def test_a_shard_gives_the_same_bytes(bundle, slide):
    predictor = load(bundle, batch_size=4)
    tiles, whole = predict(predictor, slide)
    part = list(predictor.predict(slide, tiles.shard(1, 3)))
    assert [block.tile for block in part] == [block.tile for block in whole[1::3]]
    for a, b in zip(whole[1::3], part, strict=True):
        for key, array in a.arrays.items():
            np.testing.assert_array_equal(array, b.arrays[key], err_msg=key)


def test_no_tiles_no_blocks(bundle, slide):
    predictor = load(bundle)
    tiles = TileGrid.cover(slide.grid, tile_px=64, halo_px=32, wanted=lambda _: False)
    assert list(predictor.predict(slide, tiles)) == []


def test_stop_and_close_end_the_threads(bundle, slide):
    predictor = load(bundle, batch_size=1)
    before = set(threading.enumerate())
    done = []
    _, blocks = predict(predictor, slide, stop=lambda: len(done) == 0 and bool(slide.asked))
    assert len(blocks) < 12
    tiles = TileGrid.cover(slide.grid, tile_px=64, halo_px=32)
    blocks = predictor.predict(slide, tiles)
    next(blocks)
    assert slide.reader is not threading.current_thread()
    blocks.close()
    assert set(threading.enumerate()) <= before


def test_errors_of_the_reader_surface_after_the_good_tiles(bundle, slide):
    broken = FakeSlide(slide.image, fail_at=4)
    tiles = TileGrid.cover(broken.grid, tile_px=64, halo_px=32)
    seen = []
    with pytest.raises(SlideError, match="broken here"):
        seen.extend(block.tile for block in load(bundle, batch_size=2).predict(broken, tiles))
    assert len(tiles.tiles) == 12


def waited_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_reading_can_begin_before_prediction_and_waits_for_it(bundle, slide):
    predictor = load(bundle, batch_size=2)
    tiles, expected = predict(predictor, slide)
    own = FakeSlide(slide.image)
    before = set(threading.enumerate())
    feed = predictor.begin(own, tiles)
    assert waited_for(lambda: len(own.asked) == 5)  # two batches wait, one tile is about to
    assert not waited_for_more(own)
    assert not feed.failed
    found = list(predictor.predict(own, tiles, feed=feed))
    assert [tile.tile for tile in found] == list(tiles.tiles)
    assert all(
        np.array_equal(one.arrays[key], other.arrays[key])
        for one, other in zip(found, expected, strict=True)
        for key in one.arrays
    )
    assert len(own.asked) == 12, "each window was read once"
    feed.close()
    assert set(threading.enumerate()) <= before


def waited_for_more(slide):
    """Whether anything is read that nobody takes; a short look, which cannot fail wrongly."""
    asked = len(slide.asked)
    time.sleep(0.05)
    return len(slide.asked) > asked


def test_reading_that_nobody_wants_any_more_ends(bundle, slide):
    before = set(threading.enumerate())
    tiles = TileGrid.cover(slide.grid, tile_px=64, halo_px=32)
    load(bundle, batch_size=1).begin(FakeSlide(slide.image), tiles).close()
    broken = load(bundle, batch_size=1).begin(FakeSlide(slide.image, fail_at=0), tiles)
    assert waited_for(lambda: broken.failed)
    broken.close()
    assert set(threading.enumerate()) <= before


def test_a_reader_that_ends_early_is_an_error(bundle, slide):
    class Short(FakeSlide):
        def read_windows(self, grid, boxes, **options):
            yield from super().read_windows(grid, boxes[:3], **options)

    short = Short(slide.image)
    with pytest.raises(RuntimeError, match="ended after 3 of 12"):
        predict(load(bundle, batch_size=2), short)


def test_out_of_memory_halves_the_batch(bundle, slide, monkeypatch):
    _, expected = predict(load(bundle), slide)
    predictor = load(bundle, batch_size=5)
    compute, sizes = predictor._compute, []

    def limited(pixels):
        sizes.append(len(pixels))
        if len(pixels) > room:
            raise torch.OutOfMemoryError("too much")
        return compute(pixels)

    monkeypatch.setattr(predictor, "_compute", limited)
    predictor._at_once = predictor._limit = 5  # as if it were a GPU
    room = 1
    _, found = predict(predictor, slide)
    assert sizes[:3] == [5, 2, 1]
    assert set(sizes[3:]) == {1}
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a.arrays["nuclei/prob"], b.arrays["nuclei/prob"])
    room = 0
    with pytest.raises(OutOfMemoryError, match="--tile-size"):
        predict(predictor, slide)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_cuts_a_tile_into_pieces_that_are_as_right(bundle, slide, monkeypatch, error):
    _, small = predict(load(bundle, tile_size=64), slide)
    predictor = load(bundle, tile_size=128)
    network, widths = predictor._network, []

    def limited(x_BCHW, **how):
        widths.append(x_BCHW.shape[-1])
        if x_BCHW.shape[-1] > 128:
            raise error
        return network(x_BCHW, **how)

    monkeypatch.setattr(predictor, "_network", limited)
    told = []
    tiles = TileGrid.cover(slide.grid, tile_px=128, halo_px=32)
    found = list(predictor.predict(slide, tiles, warn=lambda *said: told.append(said)))
    assert widths[0] == 192
    assert set(widths[1:]) == {128}
    ((code, message),) = told
    assert code == "out_of_memory"
    assert "pieces of 64 px" in message
    place = {(block.tile.write.x, block.tile.write.y): block for block in small}
    for block in found:
        for x, y in [(0, 0), (64, 0), (0, 64), (64, 64)]:
            piece = place.get((block.tile.write.x + x, block.tile.write.y + y))
            for key, expected in piece.arrays.items() if piece else ():
                stride = SPEC.maps[key].stride
                part = block.arrays[key][..., y // stride :, x // stride :]
                part = part[..., : expected.shape[-2], : expected.shape[-1]]
                np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("pieces", [False, True])
def test_a_fitted_window_says_what_a_tile_of_its_size_says(bundle, slide, pieces):
    _, small = predict(load(bundle, tile_size=64), slide)
    place = {(block.tile.write.x, block.tile.write.y): block for block in small}
    wanted = {
        (0, 0): Box(x=70, y=3, width=20, height=30),  # one step of 64
        (128, 0): Box(x=130, y=10, width=60, height=118),  # two, below each other
        (0, 128): Box(x=5, y=130, width=120, height=9),  # beyond the slide's lower edge
        (128, 128): Box(x=190, y=140, width=3, height=3),
    }
    tiles = TileGrid.cover(
        slide.grid,
        tile_px=128,
        halo_px=32,
        extent=lambda write: wanted[write.x, write.y],
        step_px=64,
    )
    predictor = load(bundle, tile_size=128, batch_size=3)
    if pieces:
        predictor._piece_px = 64
    assert predictor.is_fitting
    seen = 0
    for block in predictor.predict(slide, tiles):
        tile = block.tile
        steps = tile.computed.width // 64, tile.computed.height // 64
        if not pieces and steps != (1, 1):
            continue
        for key, found in block.arrays.items():
            stride = SPEC.maps[key].stride
            assert found.shape[-2:] == tile.write.coarsen(stride).size[::-1]
            rest = found.copy()
            for y in range(tile.computed.y, tile.computed.y1, 64):
                for x in range(tile.computed.x, tile.computed.x1, 64):
                    expected = place[x, y].arrays[key]
                    at = Box(x=x, y=y, width=64, height=64).intersect(tile.write)
                    at = at.coarsen(stride).relative_to(tile.write.coarsen(stride))
                    np.testing.assert_array_equal(found[(..., *at.slices)], expected)
                    rest[(..., *at.slices)] = 0
                    seen += expected.any()
            assert not rest.any()
    assert seen > 3


def test_batches_of_several_tiles_bind_windows_to_one_size(bundle):
    plain = {"precision": "fp32", "tile_px": 64, "halo_px": 32, "workers": 1}
    network = bundle.load_network()
    for where, batch_size, fits in (("cpu", 1, True), ("cpu", 4, True), ("meta", 4, False)):
        predictor = TorchPredictor(SPEC, network, device=where, batch_size=batch_size, **plain)
        assert predictor.is_fitting == fits


@pytest.mark.parametrize(("where", "held", "times"), [("cpu", 0, 12), ("cpu", 1 << 60, 0)])
def test_memory_kept_for_other_windows_is_given_back(
    bundle, slide, monkeypatch, where, held, times
):
    given_back = []
    monkeypatch.setattr(inference, "release_memory", lambda: given_back.append(1))
    predictor = load(bundle, device=where)
    assert 0 < predictor._host_bytes < 1 << 40
    predictor._host_bytes = held
    _, found = predict(predictor, slide)
    assert len(given_back) == times
    _, expected = predict(load(bundle), slide)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.arrays["nuclei/prob"], b.arrays["nuclei/prob"])


def test_a_network_that_looks_at_all_of_its_input_gets_whole_tiles():
    options = {"width": 16, "attention_heads": 2, "image_px": 128}
    heads = (SPEC.head("nuclei"),)
    medt = dataclasses.replace(SPEC, architecture="medt", options=options, heads=heads)
    plain = {"device": "cpu", "tile_px": 64, "halo_px": 32, "batch_size": 1, "workers": 1}
    predictor = TorchPredictor(medt, build_network(medt).eval(), precision="fp32", **plain)
    assert not predictor.is_fitting
    predictor._piece_px = 4 * inference._LEAST_PIECE_PX
    assert not predictor._can_halve_pieces


def test_the_next_slide_is_told_of_pieces_too(bundle, slide):
    predictor = load(bundle, tile_size=128)
    predictor._piece_px = 64
    told = []
    tiles = TileGrid.cover(slide.grid, tile_px=128, halo_px=32)
    for _ in range(2):
        list(predictor.predict(slide, tiles, warn=lambda *said: told.append(said)))
    assert len(told) == 2


def test_other_errors_of_the_network_are_not_mistaken(bundle, slide, monkeypatch):
    predictor = load(bundle)

    def wrong(_, **_how):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(predictor, "_network", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        predict(predictor, slide)


def test_tiles_of_another_size_are_refused(bundle, slide):
    tiles = TileGrid.cover(slide.grid, tile_px=128, halo_px=32)
    with pytest.raises(ValueError, match="128"):
        next(load(bundle).predict(slide, tiles))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_and_not_the_same(bundle, slide, precision):
    _, expected = predict(load(bundle), slide)
    _, found = predict(load(bundle, precision=precision), slide)
    a = np.concatenate([block.arrays["nuclei/prob"].ravel() for block in expected]).astype(int)
    b = np.concatenate([block.arrays["nuclei/prob"].ravel() for block in found]).astype(int)
    assert np.abs(a - b).mean() < 3
    assert (a != b).any()


def test_auto_choices(bundle, monkeypatch):
    predictor = TorchPredictor.load(bundle)
    assert predictor.device in {"cpu", "cuda", "mps"}
    assert predictor.halo_px == 32
    assert predictor.spec == SPEC
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: True)
    predictor = TorchPredictor.load(bundle)
    assert (predictor.device, predictor.precision, predictor.tile_px) == ("cpu", "bf16", 1024)
    assert predictor.batch_size == 1
    assert predictor.workers >= 1
    assert TorchPredictor.load(find_bundle("stain-baseline")).precision == "fp32"
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)
    assert TorchPredictor.load(bundle).precision == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose_device("auto") == "cuda"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")],
)
def test_half_precision_of_a_gpu_is_one_that_it_has(monkeypatch, capability, expected):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda name: asked.append(name) or capability
    )
    assert device.choose_precision("auto", "cuda:1", architecture="cerberus") == expected
    assert asked == ["cuda:1"]
    assert device.choose_precision("auto", "cuda", architecture="stain-baseline") == "fp32"
    assert device.choose_precision("bf16", "cuda", architecture="cerberus") == "bf16"


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("shapes do not fit", False),
    ],
)
def test_a_device_that_has_failed_is_lost_to_its_process(bundle, slide, monkeypatch, said, lost):
    predictor = load(bundle)

    def failing(_pixels):
        raise RuntimeError(said)

    monkeypatch.setattr(predictor, "_compute", failing)
    with pytest.raises(RuntimeError, match=said):
        predict(predictor, slide)
    assert predictor.is_lost is lost


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "tpu"),
        ("device", "cpu:1"),
        ("device", "cuda:99"),
        ("precision", "int4"),
        ("tile_size", 100),
        ("tile_size", "big"),
        ("batch_size", 0),
        ("workers", -1),
    ],
)
def test_impossible_choices_are_refused(bundle, option, value):
    with pytest.raises(JobError, match=str(value)):
        TorchPredictor.load(bundle, **{option: value})


def test_the_network_counts_the_seconds_in_which_it_runs(bundle, slide, monkeypatch):
    predictor = load(bundle, batch_size=5)
    ticks = itertools.count()
    monkeypatch.setattr(inference.time, "perf_counter", lambda: float(next(ticks)))
    tiles, _ = predict(predictor, slide)
    assert len(tiles.tiles) == 12
    assert predictor.busy_s == 12  # a tick for each tile, none for what lies between
    predict(predictor, slide)
    assert predictor.busy_s == 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "largest"), [("fp32", 3), ("bf16", 40)])
def test_a_gpu_gives_the_maps_of_the_cpu(bundle, slide, precision, largest):
    _, expected = predict(load(bundle), slide)
    predictor = load(bundle, device="cuda", precision=precision, batch_size=3)
    begun = time.perf_counter()
    _, found = predict(predictor, slide)
    assert 0 < predictor.busy_s <= time.perf_counter() - begun
    for ours, theirs in zip(found, expected, strict=True):
        for key in (key for key in ours.arrays if key.endswith("/prob")):
            apart = np.abs(ours.arrays[key].astype(int) - theirs.arrays[key])
            assert apart.max() <= largest, key
            assert apart.mean() <= largest / 10, key
