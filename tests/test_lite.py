"""``cerberus-lite`` and its blocks: shapes, size, what a pixel depends on, enlarged logits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_inference import FakeSlide, read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wsi_pipeline.blocks import BasicBlock, begin_undecided, enlarged
from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.checkpoint import cerberus_heads
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules, RunRules
from wsi_pipeline.tiling import TileGrid
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.losses import HeadRules, compute_losses

NUCLEI = HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules())
KINDS = HeadSpec(name="kinds", kind="class", classes=("none", "a", "b", "c"), classifies="nuclei")
GLAND = HeadSpec(name="gland", kind="instance", stride=2, object_kind="gland", rules=RunRules())
CELLS = HeadSpec(name="cells", kind="detect", object_kind="cell", rules=PeakRules())
TISSUE = HeadSpec(name="tissue", kind="patch", stride=16, classes=("x", "y"))

NARROW = {"widths": [4, 5, 6, 7], "blocks": [1, 2, 3, 2], "decoder": [4, 5, 6, 7]}
HALO = 192
"""A multiple of 16 beyond ``reach_px()``."""


def lite(heads=(NUCLEI,), halo_px=HALO, **options):
    return ModelSpec(
        name="cerberus-lite",
        architecture="cerberus-lite",
        mpp=0.5,
        halo_px=halo_px,
        heads=heads,
        options={**NARROW, **options},
    )


def build(spec, seed=0):
    """A network whose outputs vary: random statistics of normalisation, logits of spread 1.5."""
    torch.manual_seed(seed)
    network = build_network(spec).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        for name, map_ in network(pixels(64, 64)).items():
            last = network.heads[name].logits
            middle, spread = map_.mean((0, 2, 3)), map_.std((0, 2, 3))
            last.weight.mul_((1.5 / spread)[:, None, None, None])
            last.bias.sub_(middle).mul_(1.5 / spread)
    return network


def pixels(height, width, batch=1, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=random).float()


def test_shapes_at_each_scale():
    heads = (NUCLEI, KINDS, GLAND, CELLS)
    spec = lite(heads, scales={"kinds": 4, "gland": 8, "cells": 16})
    with torch.no_grad():
        maps = build(spec)(pixels(48, 80, batch=2))
    shapes = {name: tuple(map_.shape) for name, map_ in maps.items()}
    assert shapes == {
        "nuclei": (2, 3, 24, 40),
        "kinds": (2, 4, 12, 20),
        "gland": (2, 3, 6, 10),
        "cells": (2, 3, 3, 5),
    }


def test_a_head_at_a_coarse_scale_has_no_finer_parts():
    fine, coarse = (build(lite((GLAND,), scales={"gland": scale})) for scale in (2, 8))
    assert [len(n.heads["gland"].units) for n in (fine, coarse)] == [4, 2]
    assert coarse.heads["gland"].units[0].conv.in_channels == 7


@pytest.mark.parametrize(
    ("heads", "options", "says"),
    [
        ((NUCLEI, TISSUE), {}, "no patch heads.*tissue"),
        ((NUCLEI,), {"scales": {"gland": 2}}, r"no heads \['gland'\].*nuclei"),
        ((NUCLEI,), {"scales": {"nuclei": 1}}, "nuclei.*1"),
        ((NUCLEI,), {"scales": {"nuclei": 32}}, "nuclei.*32"),
        ((NUCLEI,), {"widths": [4, 4, 4]}, "four widths"),
        ((NUCLEI,), {"blocks": [1, 1, 1, 1, 1]}, "four widths"),
        ((NUCLEI,), {"decoder": [4]}, "four widths"),
        ((NUCLEI,), {"head_width": 4}, "head_width"),
    ],
)
def test_wrong_options_are_named(heads, options, says):
    with pytest.raises(ModelBundleError, match=says):
        build_network(lite(heads, **options))


@pytest.mark.parametrize("shape", [(1, 3, 40, 48), (1, 3, 48, 40), (1, 4, 48, 48), (3, 48, 48)])
def test_inputs_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 16"):
        build(lite())(torch.zeros(shape))


def test_rows_are_the_same_numbers_and_other_heads_do_not_run():
    network = build(lite((NUCLEI, GLAND)))
    x_BCHW = pixels(32, 48, batch=4)
    with torch.no_grad():
        whole = network(x_BCHW)
        part = network(x_BCHW, {"gland": torch.tensor([3, 1])})
        every = network(x_BCHW, {"nuclei": torch.arange(4)})
    assert set(part) == {"gland"}
    torch.testing.assert_close(part["gland"], whole["gland"][[3, 1]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(every["nuclei"], whole["nuclei"], rtol=0, atol=0)
    network.train()
    hidden = network.heads["nuclei"].units[0].norm
    before = hidden.running_mean.clone()
    network(x_BCHW, {"gland": torch.arange(4)})
    assert torch.equal(hidden.running_mean, before), "a head that is not asked for learnt"


def test_input_is_scaled_from_0_255():
    network = build(lite())
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(torch.full((1, 3, 16, 16), 255.0))
    assert torch.equal(seen[0], torch.ones(1, 3, 16, 16))


def size_and_cost(spec):
    """Parameters, and floating-point operations an input pixel."""
    network = build_network(spec).eval().to("meta")  # where no convolution is fused with a sum
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, 64, 64, device="meta"))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, counter.get_total_flops() / 64**2


def test_it_is_small():
    """With its default options and three heads, beside the published network with its six."""
    spec = dataclasses.replace(lite(), heads=cerberus_heads(), architecture="cerberus", options={})
    parameters, full = size_and_cost(spec)
    assert parameters == 27_864_284
    assert full == pytest.approx(1.849e6, rel=1e-3)
    three = tuple(head for head in cerberus_heads() if head.kind == "instance")
    assert len(three) == 3
    spec = dataclasses.replace(lite(three), options={})
    parameters, narrow = size_and_cost(spec)
    assert parameters <= 3_000_000
    assert narrow <= full / 15
    # Head by head, as its three heads alone would cost in the published network, it is a twelfth.
    _, same = size_and_cost(dataclasses.replace(spec, architecture="cerberus"))
    assert narrow <= same / 12
    coarse = dataclasses.replace(spec, options={"scales": {"gland": 4}})
    assert size_and_cost(coarse)[1] < narrow


def test_cost_is_that_of_the_convolutions():
    """FlopCounterMode against the sum over layers, written out."""
    spec = lite((NUCLEI, GLAND), scales={"gland": 8})
    network = build_network(spec).eval().to("meta")
    sizes = []

    def note(module, _, out):
        sizes.append(out.shape[-2] * out.shape[-1] * 2 * module.weight.numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.inference_mode():
        network(torch.zeros(1, 3, 64, 64, device="meta"))
    assert sum(sizes) / 64**2 == pytest.approx(size_and_cost(spec)[1])


def reach_px():
    """How far beyond its own edges an output pixel sees: the deepest path, index by index."""
    blocks, worst = NARROW["blocks"], 0
    for start in range(1024, 1032):  # output pixels at scale 2
        low = high = start
        for _ in range(3):  # a 3 x 3 convolution, then the two nearest of the coarser map
            low, high = (low - 2) // 2, (high + 2) // 2
        low, high = low - 1, high + 1
        for count in reversed(blocks[1:]):  # all convolutions of a stage but its first, that
            low, high = low - (2 * count - 1), high + (2 * count - 1)
            low, high = 2 * low - 1, 2 * high + 1
        low, high = low - 2 * blocks[0], high + 2 * blocks[0]
        low, high = 2 * low - 1, 2 * high + 1  # the stem
        worst = max(worst, 2 * start - low, high - (2 * start + 1))
    return worst


def slopes(network, head, side=512):
    """For 8 output pixels, how much they depend on pixels by their distance from the edge."""
    x_BCHW = pixels(side, side).double().requires_grad_()
    logits = network(x_BCHW)[head]
    scale = side // logits.shape[-1]
    by_distance = np.zeros(side)
    for at in range(logits.shape[-1] // 2, logits.shape[-1] // 2 + 16 // scale):
        output = logits[0, :, at, at].square().sum()
        (slope,) = torch.autograd.grad(output, x_BCHW, retain_graph=True)
        before = at * scale - np.arange(side)
        away = np.maximum(np.maximum(before, -before - scale + 1), 0)
        away = np.maximum(away[:, None], away)
        by_distance += np.bincount(away.ravel(), slope.abs().sum((0, 1)).numpy().ravel(), side)
    return by_distance


def test_nothing_beyond_the_reach_counts():
    """With weights of one sign nothing cancels, so that all within the reach counts."""
    network = build(lite()).double()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.abs_()
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.zero_()
    assert np.flatnonzero(slopes(network, "nuclei")).max() == reach_px() == 177


@pytest.mark.parametrize("head", ["nuclei", "gland"])
def test_little_beyond_96_pixels_counts(head):
    """Of random weights; what trained ones see beyond their halo, test_models.py asks."""
    network = build(lite((NUCLEI, GLAND), scales={"gland": 4})).double()
    by_distance = slopes(network, head)
    share = 1 - by_distance.cumsum() / by_distance.sum()
    assert share[16] > 0.05
    assert share[64] < 0.3
    assert share[96] < 0.05


@pytest.mark.parametrize("shift", [(16, 0), (-16, 32)])
def test_a_shift_by_16_pixels_shifts_the_maps(shift):
    """Away from the borders, that is beyond the reach; another shift changes the maps."""
    network = build(lite((NUCLEI, GLAND), scales={"gland": 4})).double()
    side, rim = 512, 224
    large = pixels(side + 64, side + 64).double()

    def maps(dy, dx):
        with torch.no_grad():
            return network(large[:, :, 32 + dy : 32 + dy + side, 32 + dx : 32 + dx + side])

    def middle(map_, dy, dx):
        scale = side // map_.shape[-1]
        rows, columns = (slice((rim - by) // scale, (side - rim - by) // scale) for by in (dy, dx))
        return map_[..., rows, columns]

    here, moved = maps(0, 0), maps(*shift)
    for name, map_ in here.items():
        expected = middle(map_, 0, 0)
        assert expected.std() > 0.1
        torch.testing.assert_close(middle(moved[name], *shift), expected, rtol=0, atol=1e-9)
    odd = middle(maps(4, 0)["nuclei"], 4, 0)
    assert (odd - middle(here["nuclei"], 0, 0)).abs().max() > 0.01


def test_a_block_adds_its_shortcut():
    torch.manual_seed(0)
    for width_in, stride in ((6, 1), (4, 1), (4, 2)):
        block = BasicBlock(width_in, 6, stride=stride).eval().double()
        assert (block.shortcut is None) == (width_in == 6)
        x = torch.randn(2, width_in, 8, 8).double()
        y = block.norm2(block.conv2(torch.relu(block.norm1(block.conv1(x)))))
        side = x
        if block.shortcut is not None:
            weight = block.shortcut.conv.weight
            side = block.shortcut.norm(nn.functional.conv2d(x, weight, stride=stride))
        kept = x.clone()
        torch.testing.assert_close(block(x), torch.relu(y + side))
        assert torch.equal(x, kept), "the input was written over"


def test_a_fresh_head_is_undecided():
    for few, heat in ((False, 0.5), (True, 0.01)):
        logits = nn.Conv2d(8, 3, 1)
        begin_undecided(logits, few=few)
        prob = logits(torch.zeros(1, 8, 1, 1)).sigmoid()[0, :, 0, 0]
        assert prob.tolist() == pytest.approx([heat, 0.5, 0.5])
        assert 0 < logits.weight.std() < 0.2


def bilinear(map_, times):
    """``enlarged`` written out: each new pixel's centre between four old ones, edges repeated."""
    for axis in (-2, -1):
        size = map_.shape[axis]
        at = (np.arange(size * times) + 0.5) / times - 0.5
        low = np.floor(at).astype(int)
        share = (at - low).reshape([-1 if a == axis else 1 for a in (-2, -1)])
        first, second = (np.clip(index, 0, size - 1) for index in (low, low + 1))
        map_ = (1 - share) * map_.take(first, axis) + share * map_.take(second, axis)
    return map_


@pytest.mark.parametrize("times", [1, 2, 4])
def test_enlarged_is_bilinear_corner_on_corner(times):
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    np.testing.assert_allclose(enlarged(logits, times), bilinear(logits.numpy(), times))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    spec = lite((NUCLEI, KINDS, GLAND, CELLS), scales={"kinds": 4, "gland": 4, "cells": 2})
    folder = tmp_path_factory.mktemp("zoo") / "cerberus-lite"
    return save_bundle(folder, spec, build(spec), card="# cerberus-lite\n")


@pytest.fixture(scope="module")
def slide():
    image = np.random.default_rng(2).integers(0, 256, (150, 220, 3), np.uint8)
    return FakeSlide(image)


def predicted(bundle, slide, tile_size):
    """The whole maps, put together from blocks."""
    predictor = TorchPredictor.load(
        bundle, device="cpu", precision="fp32", tile_size=tile_size, batch_size=1, workers=1
    )
    tiles = TileGrid.cover(slide.grid, tile_px=tile_size, halo_px=predictor.halo_px)
    height, width = slide.image.shape[:2]
    whole = {}
    for block in predictor.predict(slide, tiles):
        for key, part in block.arrays.items():
            stride = bundle.spec.maps[key].stride
            shape = (*part.shape[:-2], -(-height // stride), -(-width // stride))
            map_ = whole.setdefault(key, np.zeros(shape, np.uint8))
            box = block.tile.write.coarsen(stride)
            map_[(..., *box.slices)] = part
    return whole


def test_stored_maps_are_the_enlarged_logits(bundle, slide):
    """The first tile against the formula: enlarge, then soften, then cut the halo off."""
    predictor = TorchPredictor.load(
        bundle, device="cpu", precision="fp32", tile_size=64, batch_size=1, workers=1
    )
    tiles = TileGrid.cover(slide.grid, tile_px=64, halo_px=HALO)
    block = next(iter(predictor.predict(slide, tiles)))
    x = torch.from_numpy(read(slide.image, block.tile.read)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        found = bundle.load_network()(x)
    for head in bundle.spec.heads:
        logits = found[head.name][0].double().numpy()
        scale = x.shape[-1] // logits.shape[-1]
        logits = bilinear(logits, scale // head.stride)
        kept = slice(HALO // head.stride, (HALO + 64) // head.stride)
        logits = logits[:, kept, kept]
        if head.kind == "detect":
            prob = 1 / (1 + np.exp(-logits))
        else:
            odds = np.exp(logits - logits.max(0))
            prob = odds / odds.sum(0)
        if head.has_class_map:
            chosen = block.arrays[f"{head.name}/class"]
            kept = np.take_along_axis(prob, chosen[None].astype(int), 0)[0]
            np.testing.assert_allclose(kept, prob.max(0), atol=1e-4)
            assert len(np.unique(chosen)) > 1
            continue
        stored = block.arrays[f"{head.name}/prob"]
        wanted = prob[1:] if head.kind == "instance" else prob
        assert stored.shape == wanted.shape
        assert wanted.std() > 0.01
        assert np.abs(stored - wanted * 255).max() <= 0.5 + 0.05, head.name


def test_enlarged_maps_do_not_depend_on_the_tile_size(bundle, slide):
    """With a halo as wide as the reach; enlarging sees beyond a tile what is in its halo."""
    small, large = (predicted(bundle, slide, tile_size) for tile_size in (64, 208))
    assert set(small) == set(bundle.spec.maps)
    for key, map_ in small.items():
        if key.endswith("/class"):
            assert (map_ != large[key]).mean() < 1e-4, key
        else:
            assert np.abs(map_.astype(int) - large[key]).max() <= 1, key


def labelled(head, labels, side):
    return Batch(
        pixels=torch.zeros(len(labels), 3, side, side, dtype=torch.uint8),
        rows={head.name: torch.arange(len(labels))},
        labels={head.name: labels},
        unknown={},
    )


@pytest.mark.parametrize(("head", "channels"), [(NUCLEI, 3), (KINDS, 4), (GLAND, 3)])
def test_losses_compare_what_inference_stores(head, channels):
    """Coarse logits cost what the same logits, enlarged beforehand, cost; and gradients flow."""
    spec = lite((NUCLEI, KINDS, GLAND))
    random = torch.Generator().manual_seed(3)
    ids = torch.zeros(2, 32, 32, dtype=torch.uint8 if head.kind == "class" else torch.int32)
    ids[0, 4:14, 6:16], ids[0, 18:29, 3:13], ids[1, 8:20, 10:26] = 1, 2, 3
    if head.kind == "class":
        ids %= channels
    logits = torch.randn(2, channels, 8, 8, generator=random).requires_grad_()
    rules = {head.name: HeadRules()}
    counts = {head.name: 2}
    batch = labelled(head, ids, 32)

    def cost(of):
        return compute_losses({head.name: of}, batch, spec, rules, counts)

    coarse = cost(logits)
    before = torch.from_numpy(bilinear(logits.detach().numpy(), 4 // head.stride))
    fine = cost(before)
    assert coarse.terms.keys() == fine.terms.keys()
    for term, value in fine.terms.items():
        torch.testing.assert_close(coarse.terms[term], value.float(), rtol=1e-4, atol=1e-5)
    coarse.total.backward()
    assert logits.grad.abs().sum() > 0
