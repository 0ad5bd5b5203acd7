"""The Cerberus network's own promises; ``test_bundle.py`` compares it with upstream's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec

SPEC = ModelSpec(
    name="narrow",
    architecture="cerberus",
    mpp=0.5,
    halo_px=16,
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="nuclei-class", kind="class", classes=tuple("abcdefg"), classifies="nuclei"),
        HeadSpec(name="tissue", kind="patch", stride=16, classes=("x", "y", "z")),
    ),
    options={"widths": [4, 4, 6, 8], "blocks": [1, 2, 1, 1], "head_width": 5, "patch_width": 7},
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network(SPEC).eval()


def test_shapes_of_every_kind_of_head(network):
    with torch.no_grad():
        maps = network(torch.rand(2, 3, 48, 80) * 255)
    shapes = {name: tuple(map_.shape) for name, map_ in maps.items()}
    assert shapes == {
        "nuclei": (2, 3, 48, 80),
        "nuclei-class": (2, 7, 48, 80),
        "tissue": (2, 3, 3, 5),
    }


def test_full_size_parameters():
    """The published network: 27,864,284 parameters with its six heads, without ImageNet's fc."""
    one = dataclasses.replace(SPEC, options={}, heads=SPEC.heads[:1])
    with torch.device("meta"):
        count = sum(p.numel() for p in build_network(one).parameters())
    assert count == 21_797_672 - 513_000 + 131_072 + 1_255_872 + 6_723


def test_dense_patch_head_is_the_crop_at_every_cell(network):
    """Cell by cell against the head applied to the 9 x 9 cells around it."""
    head = network.heads["tissue"]
    x = torch.randn(1, 8, 13, 17)
    with torch.no_grad():
        dense = head(x)
        for row, column in ((4, 4), (6, 9), (8, 12)):
            crop = x[:, :, row - 4 : row + 5, column - 4 : column + 5]
            mean = F.adaptive_avg_pool2d(crop, 1)
            hidden = torch.relu(head.norm2(head.conv1(torch.relu(head.norm1(mean)))))
            expected = head.conv2(hidden)[0, :, 0, 0]
            torch.testing.assert_close(dense[0, :, row, column], expected)


def test_a_144_pixel_patch_is_classified_as_upstream_does(network):
    with torch.no_grad():
        maps = network.encoder(torch.rand(1, 3, 144, 144))
        dense = network.heads["tissue"](maps[-1])
        mean = maps[-1].mean((2, 3), keepdim=True).expand(-1, -1, 9, 9)
        torch.testing.assert_close(dense[..., 4, 4], network.heads["tissue"](mean)[..., 4, 4])


def test_input_is_scaled_from_0_255(network):
    seen = []
    hook = network.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(torch.full((1, 3, 16, 16), 255.0))
    hook.remove()
    assert torch.equal(seen[0], torch.ones(1, 3, 16, 16))


@pytest.mark.parametrize("shape", [(1, 3, 40, 48), (1, 1, 48, 48), (3, 48, 48)])
def test_unfit_inputs_are_refused(network, shape):
    with pytest.raises(ValueError, match="multiples of 16"):
        network(torch.zeros(shape))


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "resnet"},
        {"options": {"depth": 3}},
        {"options": {"widths": [4, 4, 4]}},
        {"heads": (dataclasses.replace(SPEC.heads[0], name="train"),)},
    ],
)
def test_impossible_specs_are_refused(change):
    with pytest.raises(ModelBundleError):
        build_network(dataclasses.replace(SPEC, **change))


def test_initialisation_is_kaiming_fan_out(network):
    torch.manual_seed(1)
    spec = dataclasses.replace(SPEC, options={"widths": [32, 32, 64, 64], "blocks": [1, 1, 1, 1]})
    weight = build_network(spec).encoder.stages[2][0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    network = build_network(SPEC).train()
    maps = network(torch.rand(2, 3, 32, 32) * 255)
    sum((map_**2).mean() for map_ in maps.values()).backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("architecture", ["cerberus", "cerberus-lite"])
@pytest.mark.parametrize("margin", [16, 33, 95, 96])
def test_logits_without_a_margin_are_those_of_the_whole(architecture, margin):
    kinds = {"nuclei": "instance", "gland": "instance"}
    heads = [HeadSpec(name=n, kind=k, object_kind=n, rules=AnchorRules()) for n, k in kinds.items()]
    if architecture == "cerberus":
        heads.append(HeadSpec(name="tissue", kind="patch", stride=16, classes=tuple("abc")))
        options = {"widths": (8, 8, 16, 16), "blocks": (1, 1, 1, 1)}
    else:
        rules = AnchorRules()
        heads.append(HeadSpec(name="spot", kind="instance", object_kind="spot", rules=rules))
        scales = {"gland": 4, "spot": 16}
        options = {"widths": (8, 8, 16, 16), "decoder": (8, 8, 8, 8), "scales": scales}
    spec = ModelSpec(
        name="x", architecture=architecture, mpp=0.5, halo_px=96, heads=heads, options=options
    )
    torch.manual_seed(1)
    network = build_network(spec).eval().double()
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight") or ".norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.rand(1, 3, 256, 288, dtype=torch.double) * 255
    computed = []
    for module in network.heads["nuclei"].modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *told: computed.append(told[2][0, 0].numel()))
    with torch.inference_mode():
        whole = network(x)
        of_whole = sum(computed)
        computed.clear()
        inner = network(x, margin=margin)
    for name, logits in whole.items():
        scale = 256 // logits.shape[2]
        cut = margin // scale
        wanted = logits[:, :, cut : logits.shape[2] - cut, cut : logits.shape[3] - cut]
        torch.testing.assert_close(inner[name], wanted, atol=1e-9, rtol=1e-9)
    # A decoder looks 45 px further than its logits, and less so in its finer stages.
    smallest = (256 - 2 * margin) * (288 - 2 * margin) / (256 * 288)
    assert smallest < sum(computed) / of_whole < 1.48 * smallest
