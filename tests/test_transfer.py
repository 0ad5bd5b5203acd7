"""Starting points and freezing: every tensor accounted for, frozen parts bit for bit the same."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.checkpoint import read_torchvision
from wsi_pipeline.errors import ModelBundleError, RecipeError
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.training.transfer import (
    Freeze,
    Start,
    apply_freeze,
    read_start,
    start_from,
    take,
)

NUCLEI = HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules())
TYPES = HeadSpec(name="nuclei-class", kind="class", classes=("none", "a", "b"), classifies="nuclei")
GLAND = HeadSpec(name="gland", kind="instance", object_kind="gland", rules=RunRules())
TISSUE = HeadSpec(name="tissue", kind="patch", stride=16, classes=("x", "y"))
SPEC = ModelSpec(
    name="narrow",
    architecture="cerberus",
    mpp=0.5,
    halo_px=16,
    heads=(NUCLEI, TYPES, TISSUE),
    options={"widths": [4, 4, 6, 8], "blocks": [1, 2, 1, 1], "head_width": 5, "patch_width": 7},
)


def build(spec=SPEC, seed=0):
    torch.manual_seed(seed)
    return build_network(spec)


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def counted(network):
    return [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]


def resnet_keys(blocks, *, widths=(64, 128, 256, 512), classes=1000):
    """The state dict of torchvision's ResNet of basic blocks, by rule."""

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
        shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes = {"conv1.weight": (widths[0], 3, 7, 7)}
    norm("bn1", widths[0])
    before = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for block in range(count):
            at = f"layer{stage + 1}.{block}"
            shapes[f"{at}.conv1.weight"] = (width, before, 3, 3)
            norm(f"{at}.bn1", width)
            shapes[f"{at}.conv2.weight"] = (width, width, 3, 3)
            norm(f"{at}.bn2", width)
            if stage and not block:
                shapes[f"{at}.downsample.0.weight"] = (width, before, 1, 1)
                norm(f"{at}.downsample.1", width)
            before = width
    shapes["fc.weight"], shapes["fc.bias"] = (classes, before), (classes,)
    return shapes


def resnet_file(path, blocks, **how):
    torch.manual_seed(3)
    tensors = {
        name: torch.tensor(7) if not shape else torch.randn(shape)
        for name, shape in resnet_keys(blocks, **how).items()
    }
    torch.save(tensors, path)
    return tensors


# torchvision


@pytest.mark.parametrize(("blocks", "count"), [((2, 2, 2, 2), 122), ((3, 4, 6, 3), 218)])
def test_torchvision_resnets_fill_the_whole_encoder(tmp_path, blocks, count):
    """122 and 218 entries: what torchvision 0.2x's resnet18 and resnet34 have."""
    widths = (4, 6, 8, 10)
    source = resnet_file(tmp_path / "r.pth", blocks, widths=widths, classes=5)
    assert len(source) == count
    found = read_torchvision(tmp_path / "r.pth")
    assert set(found.skipped) == {
        key for key in source if key.startswith("fc.") or key.endswith("num_batches_tracked")
    }
    spec = dataclasses.replace(SPEC, options={"widths": list(widths), "blocks": list(blocks)})
    network = build(spec)
    expected = {
        name: tensor.shape
        for name, tensor in network.state_dict().items()
        if name.startswith("encoder.") and name in counted(network)
    }
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == expected
    assert torch.equal(
        found.tensors["encoder.stages.1.0.shortcut.norm.running_var"],
        source["layer2.0.downsample.1.running_var"],
    )
    assert torch.equal(found.tensors["encoder.stem.norm.bias"], source["bn1.bias"])


def test_full_size_shapes_are_torchvisions():
    with torch.device("meta"):
        network = build_network(dataclasses.replace(SPEC, options={}))
    ours = sorted(
        tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if name.startswith("encoder.")
    )
    theirs = resnet_keys((3, 4, 6, 3))
    assert ours == sorted(shape for name, shape in theirs.items() if not name.startswith("fc."))


def test_torchvision_encoder_computes_what_the_tensors_say(tmp_path):
    """The first block by hand, from torchvision's names."""
    source = resnet_file(tmp_path / "r.pth", (1, 1, 1, 1), widths=(4, 4, 6, 8), classes=2)
    for name in source:
        if name.endswith("running_var"):
            source[name] = source[name].abs() + 0.5
    torch.save(source, tmp_path / "r.pth")
    spec = dataclasses.replace(SPEC, options={**SPEC.options, "blocks": [1, 1, 1, 1]})
    network = build(spec)
    start_from(network, spec, read_start(Start(torchvision=tmp_path / "r.pth")))
    x = torch.rand(1, 4, 8, 8)

    def norm(y, name):
        parts = (source[f"layer1.0.{name}.{part}"] for part in ("running_mean", "running_var"))
        return torch.nn.functional.batch_norm(
            y, *parts, source[f"layer1.0.{name}.weight"], source[f"layer1.0.{name}.bias"]
        )

    conv = torch.nn.functional.conv2d
    y = norm(conv(x, source["layer1.0.conv1.weight"], padding=1), "bn1").relu()
    y = (norm(conv(y, source["layer1.0.conv2.weight"], padding=1), "bn2") + x).relu()
    torch.testing.assert_close(network.eval().encoder.stages[0](x), y)


def test_safetensors_and_dataparallel_names_are_read(tmp_path):
    tensors = resnet_file(tmp_path / "r.pth", (1, 1, 1, 1), widths=(2, 2, 2, 2), classes=2)
    save_file(tensors, tmp_path / "r.safetensors")
    torch.save({f"module.{key}": t for key, t in tensors.items()}, tmp_path / "m.pth")
    wanted = read_torchvision(tmp_path / "r.pth").tensors
    for name in ("r.safetensors", "m.pth"):
        found = read_torchvision(tmp_path / name).tensors
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_files_that_are_no_basic_resnet_are_refused(tmp_path):
    tensors = resnet_file(tmp_path / "r.pth", (1, 1, 1, 1), widths=(2, 2, 2, 2), classes=2)
    path = tmp_path / "other.pth"
    torch.save({**tensors, "layer1.0.conv3.weight": torch.zeros(8, 2, 1, 1)}, path)
    with pytest.raises(ModelBundleError, match=r"bottleneck.*resnet18 and resnet34"):
        read_torchvision(path)
    torch.save({**tensors, "features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelBundleError, match=r"no state dict of a ResNet.*features\.0\.weight"):
        read_torchvision(path)
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelBundleError, match="no state dict of a ResNet"):
        read_torchvision(path)
    torch.save({"state_dict": tensors}, path)
    with pytest.raises(ModelBundleError, match=r"no state dict.*state_dict"):
        read_torchvision(path)
    for name in ("other.pth", "other.safetensors"):
        (tmp_path / name).write_bytes(b"no tensors")
        with pytest.raises(ModelBundleError, match=name):
            read_torchvision(tmp_path / name)
    with pytest.raises(ModelBundleError, match=r"absent\.pth"):
        read_torchvision(tmp_path / "absent.pth")


# taking


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_every_tensor_is_accounted_for_and_nothing_else_changes(data):
    network, other = build(seed=0), build(seed=1)
    names = counted(network)
    fates = {
        name: data.draw(st.sampled_from(["same", "reshaped", "renamed", "absent"]), label=name)
        for name in data.draw(st.lists(st.sampled_from(names), unique=True, max_size=12))
    }
    offered = {}
    for name in names:
        tensor = other.state_dict()[name] + 1
        fate = fates.get(name, "same")
        if fate == "same":
            offered[name] = tensor
        elif fate == "reshaped":
            offered[name] = tensor[None]
        elif fate == "renamed":
            offered[f"x.{name}"] = tensor
    before = state(network)
    report = take(network, offered, source="s")
    kept = [name for name, fate in fates.items() if fate != "same"]
    assert set(report.taken) | set(report.skipped) == set(offered)
    assert sorted(report.taken + report.fresh) == sorted(names)
    assert sorted(report.fresh) == sorted(kept)
    for name, tensor in network.state_dict().items():
        is_taken = name in report.taken
        assert torch.equal(tensor, offered[name] if is_taken else before[name]), name
    for name, reason in report.skipped.items():
        assert ("no such place" if name.startswith("x.") else "shape (1, ") in reason
    assert json.loads(json.dumps(report.to_dict()))["fresh"] == list(report.fresh)


def test_half_precision_is_taken_as_the_networks_own():
    network = build()
    weight = torch.full_like(network.project.weight, 0.3)
    take(network, {"project.weight": weight.half()}, source="s")
    assert network.project.weight.dtype == torch.float32
    assert torch.equal(network.project.weight, weight.half().float())


def test_nothing_taken_is_an_error_and_changes_nothing():
    network = build()
    before = state(network)
    with pytest.raises(ModelBundleError, match=r"s: none of its 2 tensors.*backbone\.a.*encoder"):
        take(network, {"backbone.a": torch.ones(1), "project.weight": torch.ones(3)}, source="s")
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_summary_counts_by_part(tmp_path):
    save_bundle(tmp_path / "b", SPEC, build(seed=1), card="c")
    spec = dataclasses.replace(SPEC, heads=(NUCLEI, GLAND))
    network = build(spec)
    report = start_from(network, spec, read_start(Start(bundle=tmp_path / "b")))
    inside = {
        part: sum(name.startswith(f"{part}.") for name in counted(network))
        for part in ("encoder", "heads.nuclei", "heads.gland")
    }
    lines = report.summary().splitlines()
    assert lines[0] == f"from bundle {tmp_path / 'b'}:"
    assert f"encoder: {inside['encoder']} taken" in lines
    assert "project: 1 taken" in lines
    assert f"heads.nuclei: {inside['heads.nuclei']} taken" in lines
    assert f"heads.gland: {inside['heads.gland']} fresh" in lines
    assert any(line.startswith("heads.tissue: ") and line.endswith("skipped") for line in lines)


# starting points


def test_a_bundle_gives_its_tensors_and_its_spec(tmp_path):
    other = build(seed=1)
    save_bundle(tmp_path / "b", SPEC, other, card="c")
    point = read_start(Start(bundle=tmp_path / "b"))
    assert point.spec == SPEC
    network = build()
    report = start_from(network, SPEC, point)
    assert (report.skipped, report.fresh) == ({}, ())
    for name in counted(network):
        assert torch.equal(network.state_dict()[name], other.state_dict()[name])


def test_last_layers_of_heads_with_other_classes_stay_fresh(tmp_path):
    save_bundle(tmp_path / "b", SPEC, build(seed=1), card="c")
    point = read_start(Start(bundle=tmp_path / "b"))
    heads = (
        NUCLEI,
        dataclasses.replace(TYPES, classes=("none", "b", "a")),
        dataclasses.replace(TISSUE, classes=("y", "x")),
    )
    spec = dataclasses.replace(SPEC, heads=heads)
    report = start_from(build(spec), spec, point)
    assert report.fresh == (
        "heads.nuclei-class.output.logits.weight",
        "heads.nuclei-class.output.logits.bias",
        "heads.tissue.conv2.weight",
        "heads.tissue.conv2.bias",
    )
    assert set(report.skipped) == set(report.fresh)
    assert all("other classes" in reason for reason in report.skipped.values())


@pytest.mark.parametrize("architecture", ["unet", "segnet"])
def test_the_same_for_a_comparison_network(tmp_path, architecture):
    heads = (NUCLEI, TYPES)
    spec = dataclasses.replace(SPEC, architecture=architecture, options={"width": 4}, heads=heads)
    save_bundle(tmp_path / "b", spec, build(spec, seed=1), card="c")
    heads = (NUCLEI, dataclasses.replace(TYPES, classes=("none", "b", "a")))
    spec = dataclasses.replace(spec, heads=heads)
    report = start_from(build(spec), spec, read_start(Start(bundle=tmp_path / "b")))
    assert report.fresh == ("heads.nuclei-class.weight", "heads.nuclei-class.bias")


def test_only_the_named_parts_are_taken(tmp_path):
    save_bundle(tmp_path / "b", SPEC, build(seed=1), card="c")
    start = Start(bundle=tmp_path / "b", only=("encoder", "heads.nuclei"))
    report = start_from(build(), SPEC, read_start(start), only=start.only)
    parts = {".".join(name.split(".")[: 2 if name[0] == "h" else 1]) for name in report.taken}
    assert parts == {"encoder", "heads.nuclei"}  # and not heads.nuclei-class
    assert set(report.skipped) == set(report.fresh)


def test_a_zoo_model_an_encoder_and_nothing(tmp_path):
    assert read_start(Start()) is None
    assert read_start(Start(model="stain-baseline")).spec.architecture == "stain-baseline"
    encoder = {f"encoder.{n}": t for n, t in build(seed=1).encoder.state_dict().items()}
    save_file(encoder, tmp_path / "e.safetensors")
    point = read_start(Start(simclr=tmp_path / "e.safetensors"))
    report = start_from(build(), SPEC, point)
    assert set(report.taken) == {n for n in counted(build()) if n.startswith("encoder.")}
    save_file({**encoder, "heads.x.weight": torch.ones(1)}, tmp_path / "e.safetensors")
    with pytest.raises(ModelBundleError, match=r"more than an encoder: heads\.x\.weight"):
        read_start(Start(simclr=tmp_path / "e.safetensors"))
    with pytest.raises(ModelBundleError, match="cannot be read"):
        read_start(Start(simclr=tmp_path / "absent.safetensors"))


def test_torchvisions_classifier_is_reported_as_skipped(tmp_path):
    resnet_file(tmp_path / "r.pth", (1, 2, 1, 1), widths=(4, 4, 6, 8), classes=2)
    report = start_from(build(), SPEC, read_start(Start(torchvision=tmp_path / "r.pth")))
    assert set(report.skipped) == {"fc.weight", "fc.bias"}
    assert not any(name.startswith("encoder.") for name in report.fresh)


def test_a_start_names_one_source(tmp_path):
    with pytest.raises(RecipeError, match=r"bundle.*simclr"):
        Start(bundle=tmp_path, simclr=tmp_path)
    with pytest.raises(RecipeError, match="not from where"):
        Start(only=("encoder",))


# freezing


def train(network, freeze, steps, start=0):
    """Train on noise with everything that could move a frozen part: momentum, decay, dropout."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.05, weight_decay=0.5)
    generator = torch.Generator().manual_seed(4)
    learned = []
    for step in range(start, start + steps):
        network.train()
        learned.append(apply_freeze(network, freeze, step))
        maps = network(torch.rand(4, 3, 32, 32, generator=generator) * 255)
        sum(map_.square().mean() for map_ in maps.values()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return learned


def changed(network, before):
    return {
        name
        for name, tensor in network.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


@pytest.mark.parametrize(
    ("freeze", "learns"),
    [
        (Freeze(), ["encoder", "project", "heads"]),
        (Freeze(parts=("encoder",)), ["project", "heads"]),
        (Freeze(all_but=("heads.nuclei-class",)), ["heads.nuclei-class"]),
        (
            Freeze(parts=("encoder", "heads.nuclei"), thaw={"encoder.stages.3": 0}),
            ["encoder.stages.3", "project", "heads.nuclei-class", "heads.tissue"],
        ),
    ],
)
def test_frozen_parts_stay_bit_for_bit_and_the_others_all_move(freeze, learns):
    network = build()
    before = state(network)
    assert train(network, freeze, 2) == [learns, learns]
    below = {n for n in before if any(n.startswith(f"{part}.") for part in learns)}
    assert changed(network, before) == below


def test_a_head_whose_name_begins_like_another_is_another():
    network = build()
    before = state(network)
    train(network, Freeze(all_but=("heads.nuclei",)), 1)
    moved = changed(network, before)
    assert moved
    assert all(name.startswith("heads.nuclei.") for name in moved)


def test_parts_thaw_at_their_step_and_not_before():
    network = build()
    freeze = Freeze(parts=("encoder",), thaw={"encoder.stages.3": 1, "encoder.stages": 2})
    assert train(network, freeze, 3) == [
        ["project", "heads"],
        ["encoder.stages.3", "project", "heads"],
        ["encoder.stages", "project", "heads"],
    ]
    before = state(network)
    train(network, freeze, 1, start=3)
    moved = changed(network, before)
    assert any(name.startswith("encoder.stages.0.") for name in moved)
    assert not any(name.startswith("encoder.stem.") for name in moved)
    assert network.encoder.stages[0].training
    assert not network.encoder.stem.norm.training


def test_leftover_gradients_of_what_freezes_are_dropped():
    network = build()
    train(network, Freeze(), 1)
    network(torch.rand(1, 3, 32, 32))["nuclei"].sum().backward()
    apply_freeze(network, Freeze(parts=("encoder",)), 0)
    assert all(p.grad is None for p in network.encoder.parameters())


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(RecipeError, match=r"decoder.*encoder\.stages\.3.*project.*heads\.nuclei"):
        apply_freeze(build(), Freeze(parts=("decoder",)), 0)
    unet = build(
        dataclasses.replace(SPEC, architecture="unet", options={"width": 4}, heads=(NUCLEI,))
    )
    with pytest.raises(RecipeError, match=r"encoder.*'down', 'down\.0'.*'heads\.nuclei'"):
        apply_freeze(unet, Freeze(parts=("encoder",)), 0)


def test_a_network_in_which_nothing_learns_is_refused():
    with pytest.raises(RecipeError, match="nothing to learn at step 3"):
        apply_freeze(build(), Freeze(thaw={"encoder": 9, "project": 9, "heads": 9}), 3)


def test_contradictions_are_refused():
    with pytest.raises(RecipeError, match="encoder"):
        Freeze(parts=("encoder",), thaw={"encoder": 3})
    with pytest.raises(RecipeError, match="steps are 0 or more"):
        Freeze(thaw={"encoder": -1})
