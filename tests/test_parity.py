"""The same answers however they are computed: rewrites of the network, tile sizes, precisions."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch

from benchmarks.parity import compare, compare_maps, panoptic_quality, variants
from wsi_pipeline import blocks, inference
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.device import _cpu_has_bf16
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.slide import Slide
from wsi_pipeline.synth import write_slide
from wsi_pipeline.tiling import TileGrid

DATA = Path(os.environ.get("WSI_DATA", Path(__file__).parents[2] / "shared" / "data"))
SLIDE = DATA / "slides" / "CMU-1-Small-Region.svs"

# What each switch is set to where its rewrite is left out, or does more than it would here.
REWRITES = {
    "maps as a whole, not in strips": (blocks, "_STRIP_BYTES", 1 << 62),
    "narrow strips": (blocks, "_STRIP_BYTES", 1 << 18),
    "convolution, sum and rectifier one by one": (blocks, "_ONEDNN", False),
    "normalisations as they are": (inference, "fold_batch_norms", lambda _network: None),
}


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "s.svs"
    write_slide(path, width=768, height=768, mpp=0.5, seed=3)
    with Slide.open(path) as slide:
        yield slide


def maps_of(slide, *, margin=True, precision="fp32", compiler=None, extent=None):
    predictor = inference.TorchPredictor.load(
        find_bundle("cerberus-lite"), device="cpu", precision=precision, tile_size=512
    )
    if not margin:
        predictor.margin_px = 0
    if compiler is not None:
        predictor._maps_of = compiler(predictor._maps_of)
    grid: PixelGrid = slide.working_grid(0.5)
    tiles = TileGrid.cover(grid, tile_px=512, halo_px=predictor.halo_px, extent=extent)
    found = list(predictor.predict(slide, tiles))
    keys = [key for key in found[0].arrays if key.endswith("/prob")]
    return {key: [block.arrays[key].astype(np.int16) for block in found] for key in keys}


def assert_same(found, expected):
    for key, blocks_of_key in expected.items():
        difference = np.concatenate(
            [np.abs(a - b).ravel() for a, b in zip(found[key], blocks_of_key, strict=True)]
        )
        assert (difference > 1).mean() <= 0.001, key
        assert difference.max() <= 3, key
        assert np.concatenate([b.ravel() for b in blocks_of_key]).std() > 1  # there is something


def distances(found, expected):
    """Return the mean difference by map."""
    return {
        key: np.mean([np.abs(a - b).mean() for a, b in zip(found[key], maps, strict=True)])
        for key, maps in expected.items()
    }


@pytest.fixture(scope="module")
def expected(tissue):
    return maps_of(tissue)


@pytest.mark.parametrize("name", REWRITES)
def test_a_rewrite_of_the_network_changes_nothing(tissue, expected, monkeypatch, name):
    monkeypatch.setattr(*REWRITES[name])
    assert_same(maps_of(tissue), expected)


def test_decoders_that_see_the_whole_halo_say_the_same(tissue, expected):
    assert_same(maps_of(tissue, margin=False), expected)


def test_windows_fitted_to_the_tissue_say_the_same_of_it(tissue, expected):
    # 768 px in tiles of 512: of three of the four, half is left out
    middle = Box(x=256, y=256, width=512, height=512)
    found = maps_of(tissue, extent=lambda write: write.intersect(middle))
    key, inside = "nuclei/prob", (..., slice(256, 512), slice(256, 512))
    assert_same({key: [found[key][0][inside]]}, {key: [expected[key][0][inside]]})
    assert not found[key][0][..., :256, :].any()
    assert expected[key][0][..., :256, :].any()
    for part in (1, 2, 3):
        same = (..., slice(256 if part == 1 else 0, None), slice(256 if part == 2 else 0, None))
        assert_same({key: [found[key][part][same]]}, {key: [expected[key][part][same]]})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiler_sees_network_and_heads_as_one_graph(tissue, expected, precision):
    # Without its back end, which takes a minute: what it is given must be whole, and right.
    compiler = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    found = maps_of(tissue, precision=precision, compiler=compiler)
    if precision == "fp32":
        assert_same(found, expected)
    for key, maps in expected.items():
        apart = [np.abs(a - b).mean() for a, b in zip(found[key], maps, strict=True)]
        assert np.mean(apart) < 0.5, key


def test_maps_doubled_in_bf16_are_as_near_to_float32_as_torch_comes(tissue, expected, monkeypatch):
    ours = distances(maps_of(tissue, precision="bf16"), expected)
    double = partial(torch.nn.functional.interpolate, scale_factor=2, mode="bilinear")
    monkeypatch.setattr(blocks, "_doubled", double)
    torchs = distances(maps_of(tissue, precision="bf16"), expected)
    for key, value in ours.items():
        assert 0 < value <= 1.1 * torchs[key] + 0.01, key
        assert value != torchs[key], key  # it is ours that was left out


def test_bf16_is_nearer_to_float32_than_plain_rounding(tissue, expected, monkeypatch):
    ours = distances(maps_of(tissue, precision="bf16"), expected)
    monkeypatch.setattr(inference, "to_half", lambda _network, _dtype: None)
    plain = distances(maps_of(tissue, precision="bf16"), expected)
    assert 0 < sum(ours.values()) < 0.75 * sum(plain.values())


def test_the_comparison_of_objects_can_fail():
    squares = np.array([shapely.box(x, 0, x + 10, 10) for x in range(0, 1000, 20)])
    assert panoptic_quality(squares, squares) == 1
    assert panoptic_quality(squares, squares[:-2]) == pytest.approx(48 / 49)
    moved = shapely.transform(squares, lambda xy: xy + np.array([1, 0]))
    assert panoptic_quality(moved, squares) == pytest.approx(90 / 110)


@pytest.mark.real
@pytest.mark.skipif(not SLIDE.is_file(), reason=f"no {SLIDE} (set WSI_DATA to the data kit)")
def test_tile_sizes_and_precisions_agree_on_a_real_slide(tmp_path):
    precisions = ["bf16"] if _cpu_has_bf16() else []
    plan = variants([512], precisions, 2048)
    runs = compare(SLIDE, tmp_path, "cerberus-lite", plan)
    assert sorted(runs) == sorted(["fp32-512", *(f"{p}-2048" for p in precisions)])
    for name, found in runs.items():
        least = 0.995 if name.startswith("fp32") else 0.99
        nuclei = found["objects"]["nucleus"]
        assert nuclei["of_fp32"] > 1500
        assert nuclei["pq"] >= least, name
        assert found["maps"]["nuclei/prob"]["largest"] > 0  # they are not the same maps
    whole = tmp_path / "fp32-2048" / "maps" / f"{SLIDE.stem}.zarr"
    assert compare_maps(whole, whole)["nuclei/prob"] == {"share_beyond_1": 0, "largest": 0}
