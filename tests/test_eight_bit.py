"""8-bit networks: every convolution against exact arithmetic, maps near those of float32."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from wsi_pipeline import device, eight_bit
from wsi_pipeline.blocks import DoubledSum, FusedConv, Logits, fold_batch_norms
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.device import choose_precision, why_no_int8
from wsi_pipeline.eight_bit import obstacle, pixel_levels, to_eight_bits
from wsi_pipeline.errors import JobError
from wsi_pipeline.fixed_images import golden_tiles
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.kept_sums import rounded_to_levels
from wsi_pipeline.levels import Levels
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.tiling import TileGrid

HERE = obstacle()
needs_int8 = pytest.mark.skipif(HERE is not None, reason=str(HERE))

WIDE = ModelSpec(
    name="tiny",
    architecture="cerberus",
    mpp=0.5,
    halo_px=32,
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="gland", kind="instance", stride=2, object_kind="gland", rules=RunRules()),
        HeadSpec(name="tissue", kind="patch", stride=16, classes=("x", "y", "z")),
    ),
    options={"widths": [8, 8, 12, 16], "blocks": [2, 1, 1, 1], "head_width": 8, "patch_width": 4},
)


class Image:
    """An image that goes on as its own mirror image."""

    def __init__(self, pixels):
        self.pixels = pixels
        self.grid = PixelGrid.level0(pixels.shape[1::-1])

    def read_windows(self, _grid, boxes, **_how):
        side = len(self.pixels)
        for box in boxes:
            rows, columns = np.arange(box.y, box.y1), np.arange(box.x, box.x1)
            rows, columns = (side - 1 - np.abs(side - 1 - np.abs(n)) for n in (rows, columns))
            yield self.pixels[np.ix_(rows, columns)]


def unseen():
    """Return tissue that no range was measured on: drawn larger, and a little darker."""
    return (golden_tiles(0.37)["tissue"] * 0.9).astype(np.uint8)


def predict(predictor, pixels):
    image = Image(pixels)
    tiles = TileGrid.cover(image.grid, tile_px=predictor.tile_px, halo_px=predictor.halo_px)
    return [block.arrays for block in predictor.predict(image, tiles)]


def load(**options):
    bundle = find_bundle("cerberus-lite")
    return TorchPredictor.load(bundle, device="cpu", **{"tile_size": 256, **options})


def levels(shape, *, scale, zero=0, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    laid = torch.from_numpy(values).to(memory_format=torch.channels_last)
    return Levels(laid, scale, zero)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 5, 1, 4), (1, 24, 9, 16), (1, 48, 33, 7)])
def test_doubling_is_interpolation_rounded_once(shape):
    own = levels(shape, scale=0.5, zero=7)
    found = functional.interpolate(own, scale_factor=2, mode="bilinear", align_corners=False)
    expected = functional.interpolate(own.values.double(), scale_factor=2, mode="bilinear")
    assert isinstance(found, Levels)
    assert (found.scale, found.zero) == (0.5, 7)
    assert torch.equal(found.values, (expected + 0.5).floor().to(torch.uint8))


def test_levels_stand_for_their_numbers():
    own = levels((2, 3, 8, 8), scale=0.25, zero=100)
    numbers = (own.values.double() - 100) * 0.25
    assert torch.equal(own.floats().double(), numbers)
    parts = own[:, :, :3], own[:, :, 3:]
    assert torch.equal(torch.cat(parts, 2).floats().double(), numbers)
    assert torch.equal((own / 4).floats().double(), numbers / 4)
    for how in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):
        pooled = functional.max_pool2d(own, **how)
        assert isinstance(pooled, Levels)
        assert torch.equal(pooled.floats().double(), functional.max_pool2d(numbers, **how))
    mean = functional.avg_pool2d(own, 2)
    assert isinstance(mean, torch.Tensor), "means of levels are no levels"
    assert torch.equal(mean.double(), functional.avg_pool2d(numbers, 2))


@needs_int8
@pytest.mark.parametrize(
    ("kernel", "stride", "zero_in", "zero_out", "plus", "relu"),
    [
        (3, 1, 0, 0, False, True),
        (3, 2, 0, 0, False, True),
        (3, 1, 128, 0, False, True),
        (3, 1, 0, 0, True, True),
        (1, 1, 0, 131, True, False),
        (1, 1, 90, 140, False, False),
        (7, 1, 0, 0, False, True),
    ],
)
def test_a_convolution_is_exact_up_to_its_rounding(kernel, stride, zero_in, zero_out, plus, relu):
    """Against float64, with the weights that the levels stand for."""
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 10, kernel, stride, padding=kernel // 2).requires_grad_(False)
    x = levels((1, 6, 17, 20), scale=0.02, zero=zero_in)
    per_output = conv.weight.abs().amax((1, 2, 3), keepdim=True) / 127
    weights = rounded_to_levels(conv.weight / per_output).double() * per_output.double()
    wanted = functional.conv2d(
        (x.values.double() - zero_in) * 0.02,
        weights,
        conv.bias.double(),
        stride=stride,
        padding=kernel // 2,
    )
    added = levels(wanted.shape, scale=0.01, zero=zero_out, seed=3) if plus else None
    if added is not None:
        wanted = wanted + (added.values.double() - zero_out) * 0.01
    if relu:
        wanted = wanted.relu()
    scale = float(wanted.max() - min(wanted.min(), 0)) / 200
    own = eight_bit._EightBitConv(copy.deepcopy(conv), scale=scale, zero=zero_out, floats=False)
    found = own.fused(x, added, relu=relu)
    exact = wanted / scale + zero_out
    assert len(found.values.unique()) > 50
    assert (found.values.double() - exact.clamp(0, 255)).abs().max() <= 0.5 + 1e-3
    logits = eight_bit._EightBitConv(conv, scale=scale, zero=zero_out, floats=True)
    if added is None:
        as_floats = logits.fused(x, None, relu=relu)
        assert as_floats.dtype == torch.float32
        torch.testing.assert_close(as_floats.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_int8
def test_every_convolution_is_replaced_and_logits_are_floats():
    torch.manual_seed(2)
    network = build_network(WIDE).eval()
    joints = [module for module in network.modules() if isinstance(module, DoubledSum)]
    fold_batch_norms(network)
    to_eight_bits(network, golden_tiles(0.5).values())
    fused = [module for module in network.modules() if isinstance(module, FusedConv)]
    inner = {id(module.conv) for module in fused}
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert {id(conv) for conv in convs} == inner
    assert len(joints) == 8
    assert all(isinstance(joint.identity, FusedConv) for joint in joints)
    pixels = torch.from_numpy(unseen())[None].permute(0, 3, 1, 2)
    with torch.inference_mode():
        found = network(pixel_levels(pixels))
    assert {name: logits.dtype for name, logits in found.items()} == dict.fromkeys(
        ("nuclei", "gland", "tissue"), torch.float32
    )
    assert sum(isinstance(conv, Logits) for conv in convs) == 3


@needs_int8
def test_cerberus_is_near_float32():
    """Random weights: sums, pooling and the patch head, which sees floats."""
    torch.manual_seed(3)
    network = build_network(WIDE).eval()
    fold_batch_norms(network)
    turned = golden_tiles(0.5)["tissue"][::-1, ::-1].copy()
    pixels = torch.from_numpy(turned)[None].permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = network(pixels.float())
        to_eight_bits(network, golden_tiles(0.5).values())
        found = network(pixel_levels(pixels))
    for name, logits in expected.items():
        away = (found[name] - logits).abs().mean() / logits.std()
        assert away < 0.25, (name, away)


@needs_int8
def test_maps_of_the_released_network_are_near_float32():
    expected, found = (predict(load(precision=one), unseen()) for one in ("fp32", "int8"))
    both = list(zip(expected, found, strict=True))
    for a, b in both:
        for key, array in a.items():
            if key.endswith("/prob"):
                gap = np.abs(array.astype(int) - b[key])
                assert gap.mean() < 0.6, key
                assert gap.max() < 64, key
            else:
                assert (array != b[key]).mean() < 0.01, key
    assert any((a["nuclei/prob"] != b["nuclei/prob"]).any() for a, b in both)
    assert max(a["nuclei/prob"].max() for a in expected) > 200


@needs_int8
def test_bytes_do_not_depend_on_batch_threads_or_what_was_before():
    """Ranges are measured on the number of threads there is, too."""
    before, found = torch.get_num_threads(), []
    try:
        for threads, batch in ((1, 1), (3, 4)):
            torch.set_num_threads(threads)
            predictor = load(precision="int8", batch_size=batch)
            if threads == 3:
                predict(predictor, 255 - unseen())
            found.append(predict(predictor, unseen()))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        for key, array in a.items():
            np.testing.assert_array_equal(array, b[key], err_msg=key)


@needs_int8
def test_a_network_is_quantised_once():
    """Single images are predicted by a new predictor each, with the same network."""
    bundle = find_bundle("cerberus-lite")
    network = bundle.load_network()
    how = {"device": "cpu", "precision": "int8", "halo_px": 0, "batch_size": 1, "workers": 1}
    first, second = (
        predict(TorchPredictor(bundle.spec, network, tile_px=384, **how), unseen())
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(array, b[key]) for key, array in a.items())


@needs_int8
def test_scales_do_not_see_the_last_digits_of_ranges():
    steps = {eight_bit._upper_step(0.1 * (1 + off)) for off in (-1e-6, 0.0, 1e-6)}
    assert len(steps) == 1
    for value in (1e-3, 0.1, 0.5, 1.0, 77.0):
        assert value <= eight_bit._upper_step(value) <= value * 1.07


@pytest.mark.parametrize("where", ["cuda", "cuda:1", "mps"])
def test_other_devices_are_refused(where):
    with pytest.raises(JobError, match=rf"CPUs, not for {where}.*--device cpu"):
        choose_precision("int8", where, architecture="cerberus-lite")


@pytest.mark.parametrize("architecture", ["unet", "segnet", "medt", "stain-baseline"])
def test_other_networks_are_refused(architecture):
    with pytest.raises(JobError, match=rf"cerberus or cerberus-lite, not for '{architecture}'"):
        choose_precision("int8", "cpu", architecture=architecture)


def test_processors_without_the_instructions_are_refused(monkeypatch):
    monkeypatch.setattr(device, "obstacle", lambda: "this processor lacks them")
    with pytest.raises(JobError, match="int8 cannot be had: this processor lacks them"):
        load(precision="int8")
    assert why_no_int8("cpu", "cerberus") == "this processor lacks them"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86 processor")
def test_sums_that_are_cut_off_are_noticed():
    """What oneDNN does with the instructions of older processors, of which it says nothing."""
    code = "from wsi_pipeline.eight_bit import obstacle; print(obstacle())"
    older = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=older, check=True, capture_output=True, text=True
    )
    assert "VNNI" in done.stdout


def test_nobody_gets_8_bits_who_did_not_ask():
    for architecture in eight_bit.ARCHITECTURES:
        assert choose_precision("auto", "cpu", architecture=architecture) in {"bf16", "fp32"}
