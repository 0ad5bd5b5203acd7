"""U-Net, SegNet and MedT: their promises, against naive versions and published sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from wsi_pipeline import comparison, medt
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import HeadSpec, ModelSpec, RunRules

GLAND = HeadSpec(name="gland", kind="instance", object_kind="gland", rules=RunRules())
CLASS = HeadSpec(name="gland-class", kind="class", classes=tuple("abcd"), classifies="gland")
SMALL = {
    "unet": {"width": 4},
    "segnet": {"width": 4},
    "medt": {"width": 4, "attention_heads": 2, "image_px": 96},
}


def build(architecture, options=None, heads=(GLAND, CLASS)):
    torch.manual_seed(0)
    return build_network(
        ModelSpec(
            name="x",
            architecture=architecture,
            mpp=1.0,
            halo_px=16,
            heads=heads,
            options=SMALL[architecture] if options is None else options,
        )
    )


@pytest.fixture(params=SMALL)
def network(request):
    return build(request.param)


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (96, 32)])
def test_every_multiple_of_16_keeps_its_size(network, size):
    network.eval()
    with torch.no_grad():
        maps = network(torch.rand(2, 3, *size) * 255)
    shapes = {name: tuple(map_.shape) for name, map_ in maps.items()}
    assert shapes == {"gland": (2, 3, *size), "gland-class": (2, 4, *size)}


def test_rows_choose_samples_and_heads(network):
    network.eval()
    x = torch.rand(3, 3, 32, 48) * 255
    rows = {"gland-class": torch.tensor([0, 2])}
    ran = []
    for name, head in network.heads.items():
        head.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        some = network(x, rows)
        assert ran == ["gland-class"]
        full = network(x)
    assert list(some) == ["gland-class"]
    torch.testing.assert_close(some["gland-class"], full["gland-class"][[0, 2]])


def test_gradients_reach_every_parameter_and_training_learns(network):
    x = torch.rand(2, 3, 32, 32) * 255
    truth = (x[:, 0] > 128).long()
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for step in range(12):
        loss = F.cross_entropy(network(x)["gland"], truth)
        if step == 0:
            (loss + network(x)["gland-class"].square().mean()).backward()
            assert [n for n, p in network.named_parameters() if p.grad is None] == []
            optimiser.zero_grad()
            loss = F.cross_entropy(network(x)["gland"], truth)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_published_widths_have_the_published_number_of_parameters():
    """Counted by hand from the papers' tables of layers."""

    def conv(before, after, kernel=3):
        return kernel * kernel * before * after + 2 * after  # with scale and shift

    heads = 7 * 64 + 7  # 3 + 4 logits
    wide = [64, 128, 256, 512, 1024]
    unet = sum(conv(a, b) + conv(b, b) for a, b in zip([3, *wide[:-1]], wide, strict=True))
    for b, a in zip(wide[1:], wide[:-1], strict=True):
        unet += 4 * b * a + a + conv(b, a) + conv(a, a)
    vgg = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    segnet = sum(conv(a, b) for a, b in itertools.pairwise(vgg))
    back = [*vgg[:0:-1], 64]
    segnet += sum(conv(a, b) for a, b in itertools.pairwise(back))
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in build(name, {}).parameters())
            for name in ("unet", "segnet")
        }
    assert counts == {"unet": unet + heads, "segnet": segnet + heads}


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1), (6, 3)])
def test_unpooling_is_torchs(size):
    x = torch.randn(2, 3, *size)
    pooled, index = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    found = comparison._unpool(pooled, index, size)
    torch.testing.assert_close(found, F.max_unpool2d(pooled, index, 2, output_size=list(size)))
    kept = found != 0
    assert torch.equal(found[kept], x[kept])


def test_unet_hands_over_every_levels_map():
    network = build("unet").eval()
    maps, received = [], []
    for down in network.down:
        down.register_forward_hook(lambda _, __, found: maps.append(found))
    for up in network.up:
        up.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    with torch.no_grad():
        network(torch.rand(1, 3, 32, 48) * 255)
    for map_, both in zip(maps[-2::-1], received, strict=True):
        assert both.shape[1] == 2 * map_.shape[1]
        assert torch.equal(both[:, : map_.shape[1]], map_)


def test_segnet_hands_over_places_not_values():
    network = build("segnet").eval()
    seen = []
    network.up[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(torch.rand(1, 3, 32, 32) * 255)
    cells = seen[0].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert (cells.count_nonzero(-1) <= 1).all()


def naive_attention(layer, x):
    """Equation 3 of the MedT paper, one query at a time."""
    batch, _, height, width = x.shape
    qkv = layer.project(x)
    value = qkv.shape[1] // (2 * layer.attention_heads)
    half = value // 2
    out = torch.zeros(batch, layer.attention_heads * value, height, width)
    centre = layer.span - 1
    for b in range(batch):
        for g in range(layer.attention_heads):
            part = qkv[b, g * 2 * value : (g + 1) * 2 * value]
            q, k, v = part[:half] / math.sqrt(half), part[half:value], part[value:]
            for c in range(width):
                for i in range(height):
                    r = [layer.places[:, centre + j - i] for j in range(height)]
                    logits = torch.stack(
                        [
                            q[:, i, c] @ k[:, j, c]
                            + layer.gates[0] * (q[:, i, c] @ r[j][:half])
                            + layer.gates[1] * (k[:, j, c] @ r[j][half:value])
                            for j in range(height)
                        ]
                    )
                    weights = logits.softmax(0)
                    out[b, g * value : (g + 1) * value, i, c] = sum(
                        weights[j] * (layer.gates[3] * v[:, j, c] + layer.gates[2] * r[j][value:])
                        for j in range(height)
                    )
    return layer.norm(out)


@pytest.mark.parametrize("height", [1, 5, 7])
def test_axial_attention_is_the_papers_formula(height):
    torch.manual_seed(1)
    layer = medt._AxialAttention(8, 2, 7).eval()
    torch.nn.init.normal_(layer.gates)
    x = torch.randn(2, 8, height, 3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), naive_attention(layer, x))


def test_medt_block_attends_along_both_axes_and_no_further():
    torch.manual_seed(0)
    block = medt._AxialBlock(4, 4, 2, 9, False).eval()
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    middle = x
    y = block.columns(block.enter(middle))
    grad = torch.autograd.grad(y[0, :, 4, 4].sum(), x)[0].abs().sum((0, 1)) > 0
    assert grad[:, 4].any()
    grad[:, 4] = False
    assert not grad.any()
    grad = torch.autograd.grad(block(x)[0, :, 4, 4].sum(), x)[0].abs().sum((0, 1)) > 0
    assert grad.sum() > 40


def test_medt_local_branch_sees_each_part_alone():
    network = build("medt").eval()
    x = torch.rand(1, 3, 64, 32)
    parts = medt._cut(x)
    assert parts.shape == (16, 3, 16, 8)
    assert torch.equal(parts[4 * 2 + 1], x[0, :, 32:48, 8:16])
    assert torch.equal(medt._join(parts), x)
    with torch.no_grad():
        whole = network.parts(parts)
        torch.testing.assert_close(whole[9:10], network.parts(parts[9:10]))


def test_medt_refuses_longer_inputs_than_it_has_places_for():
    network = build("medt")
    with pytest.raises(ValueError, match="up to 96 x 96 px, not 112 x 16"):
        network(torch.zeros(1, 3, 16, 112))


@pytest.mark.parametrize("shape", [(1, 3, 40, 48), (1, 1, 48, 48), (3, 48, 48), (1, 3, 0, 16)])
def test_unfit_inputs_are_refused(network, shape):
    with pytest.raises(ValueError, match="multiples of 16"):
        network(torch.zeros(shape))


@pytest.mark.parametrize("architecture", SMALL)
def test_patch_heads_and_unknown_options_are_refused(architecture):
    patch = HeadSpec(name="tissue", kind="patch", stride=16, classes=("x", "y"))
    with pytest.raises(ModelBundleError, match=r"no patch heads.*tissue"):
        build(architecture, heads=(GLAND, patch))
    with pytest.raises(ModelBundleError, match="depth"):
        build(architecture, {"depth": 3})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 6, "attention_heads": 2}, "width 6"),
        ({"width": 0, "attention_heads": 2}, "width 0"),
        ({"width": 4, "attention_heads": 2, "image_px": 40}, "image_px 40"),
    ],
)
def test_medts_options_must_fit_together(options, words):
    with pytest.raises(ModelBundleError, match=words):
        build("medt", options)
