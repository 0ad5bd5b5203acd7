"""Before the first step: what is built, what it starts from, who validates."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from training_fixtures import write_discs, write_recipe

from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.errors import DatasetError, RecipeError
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.training.annotation import AnnotatedImage, Dataset, InstanceLabel, Item
from wsi_pipeline.training.begin import _used, begin, held_out_images, open_parts
from wsi_pipeline.training.recipe import model_spec, read_recipe
from wsi_pipeline.training.scoring import _sources
from wsi_pipeline.training.sources import Source

TINY = {"name": "m", "device": "cpu"}
SMALL = {"widths": [4, 6, 8, 12], "blocks": [1, 1, 1, 1], "head_width": 6, "patch_width": 6}
HEADS = (
    HeadSpec(name="gland", kind="instance", object_kind="gland", rules=RunRules()),
    HeadSpec(
        name="nuclei",
        kind="instance",
        object_kind="nucleus",
        rules=AnchorRules(),
        parent="gland",
        inside_parent=True,
    ),
    HeadSpec(name="nuclei-class", kind="class", classes=("none", "a", "b"), classifies="nuclei"),
    HeadSpec(name="tissue", kind="patch", stride=16, classes=("fat", "muscle")),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("begin")
    write_recipe(folder, write_discs(folder / "data"))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A bundle of four heads."""
    path = tmp_path_factory.mktemp("base") / "base"
    spec = ModelSpec(
        name="base", architecture="cerberus", mpp=0.5, halo_px=32, heads=HEADS, options=SMALL
    )
    torch.manual_seed(11)
    save_bundle(path, spec, build_network(spec), card="x")
    return path


def plan(place, *overrides):
    return read_recipe(place / "recipe.toml", overrides)


def from_base(place, base, *overrides):
    start = f'start={{bundle="{base}"}}'
    return plan(place, start, "model.heads=[]", "model.options={}", *overrides)


def names(beginning):
    return [head.name for head in beginning.spec.heads]


def test_a_fresh_network_is_drawn_from_the_seed(place):
    one = begin(plan(place), name="mine", device="cpu")
    two = begin(plan(place), name="mine", device="cpu")
    other = begin(plan(place, "seed=4"), name="mine", device="cpu")
    state, same, different = (own.network.state_dict() for own in (one, two, other))
    assert all(torch.equal(state[key], same[key]) for key in state)
    assert not torch.equal(state["encoder.stem.conv.weight"], different["encoder.stem.conv.weight"])
    assert (one.spec.name, one.report, one.network.training) == ("mine", None, True)
    told = one.describe()
    assert told["start"] is None
    assert told["parameters"] == sum(p.numel() for p in one.network.parameters())
    assert told["validated_on"] == len(one.held_out) == 3


def test_parts_and_their_counts(place):
    (place / "data" / "images.csv").write_text(
        "image,patient,part\n"
        + "".join(f"p{i}.png,q{i // 2},{'test' if i > 5 else 'train'}\n" for i in range(8))
    )
    try:
        found = begin(plan(place, "validation.images=64"), name="m", device="cpu")
    finally:
        (place / "data" / "images.csv").unlink()
    rows = {row["part"]: row for row in found.data}
    assert set(rows) == {"train", "validation", "test"}
    assert (rows["test"]["images"], rows["test"]["patients"]) == (2, 1)
    assert rows["train"]["images"] + rows["validation"]["images"] == 6
    assert rows["train"]["patients"] * 2 == rows["train"]["images"]
    assert all(row["heads"] == ["nuclei"] and row["task"] == "nuclei" for row in found.data)
    assert [row["source"] for row in found.data] == ["plain"] * 3
    # learnt from train, validated on validation, the publishers' test left alone
    assert [len(own) for own in found.sources] == [rows["train"]["images"]]
    held = {own.item.name for own in found.held_out}
    assert len(held) == rows["validation"]["images"]
    assert held.isdisjoint({"p6", "p7"})
    assert held.isdisjoint({item.name for own in found.sources for item in own.items})
    assert found.describe()["data"] == found.data
    # sizes are those of what is learnt from
    assert [size.images for size in found.sizes] == [rows["train"]["images"]]


def test_weights_tasks_and_crops_of_a_source(place):
    rules = ["source.0.weight=2.5", 'source.0.task="cells"', "source.0.crop_px=48"]
    (size,) = begin(plan(place, *rules), name="m", device="cpu").sizes
    assert (size.task, size.weight, size.crop_px) == ("cells", 2.5, 48)
    (size,) = begin(plan(place), name="m", device="cpu").sizes
    assert (size.task, size.weight, size.crop_px) == ("nuclei", 1.0, 32)


def test_every_image_is_for_training_where_the_recipe_says_so(place):
    found = begin(plan(place, "source.0.split=false"), name="m", device="cpu")
    assert [(part.name, len(part.source)) for part in found.parts] == [("train", 8)]
    assert found.held_out == ()


def images_of(parts):
    return {part.name: {item.name for item in part.source.items} for part in parts}


def test_images_that_are_left_out_neither_train_nor_validate(place):
    def opened(*overrides):
        recipe = plan(place, *overrides)
        return images_of(open_parts(recipe, model_spec(recipe, None, name="m")))

    whole = opened()
    gone = {"p0", "p4", "p5"}
    found = opened('source.0.leave_out=["p0","p[45]"]')
    assert set.union(*found.values()) == set.union(*whole.values()) - gone
    # who stays keeps his part
    assert found == {name: own - gone for name, own in whole.items()}
    assert all(whole[name] & gone for name in whole)  # or that would show little
    kept = opened('source.0.leave_out=["p[!3]"]', "source.0.split=false")
    assert kept == {"train": {"p3"}}


def test_names_with_brackets_can_be_left_out_and_case_counts():
    items = tuple(
        Item(name=name, patient=name, load=partial(load, name))
        for name in ("a[1]", "a1", "A1", "b")
    )
    dataset = Dataset(name="x", path=Path("x"), labels={"nuclei": ()}, items=items)
    assert [item.name for item in _used(dataset, ("a[1]",))] == ["A1", "b"]
    assert [item.name for item in _used(dataset, ("A*",))] == ["a[1]", "a1", "b"]
    assert _used(dataset, ()) == items


def test_scoring_a_folder_takes_what_a_recipe_leaves_out(place):
    recipe = plan(place, 'source.0.leave_out=["p0"]')
    (source,) = _sources(model_spec(recipe, None, name="m"), place / "data", None, None, None)
    assert "p0" in {item.name for item in source.items}


def test_the_scales_of_a_source_reach_its_windows(place):
    def scales(*overrides):
        return {part.source.scales for part in begin(plan(place, *overrides), **TINY).parts}

    assert scales() == {None}
    assert scales("source.0.scale_min=0.6") == {(0.6, 1.3)}
    assert scales("source.0.scale_max=1.1", "augment.scale_min=0.9") == {(0.9, 1.1)}
    assert scales("source.0.scale_min=0.8", "source.0.scale_max=1.25") == {(0.8, 1.25)}


def test_the_split_follows_its_own_seed(place):
    def held(*overrides):
        found = begin(plan(place, "validation.images=8", *overrides), name="m", device="cpu")
        return {own.item.name for own in found.held_out}

    assert held() == held("seed=9")
    assert len({frozenset(held(f"split.seed={seed}")) for seed in range(4)}) > 1
    assert len(held("split.validation=0.6")) >= len(held("split.validation=0.3"))


def test_heads_that_nobody_labels_are_refused_when_fresh(place, base):
    nuclei = '{name="nuclei",kind="instance",object_kind="nucleus",rules={by="anchor"}}'
    with pytest.raises(RecipeError, match=r"heads \['gland'\] are new.*label \['nuclei'\]"):
        begin(plan(place, f'model.heads=["gland",{nuclei}]'), name="m", device="cpu")
    # heads that are known already may wait
    assert names(begin(from_base(place, base), name="m", device="cpu")) == [
        head.name for head in HEADS
    ]
    organ = 'model.heads=[{name="organ",kind="patch",stride=16,classes=["lung","skin"]}]'
    with pytest.raises(RecipeError, match=r"heads \['organ'\] are new"):
        begin(from_base(place, base, organ), name="m", device="cpu")
    # nor does an encoder make a head known
    with pytest.raises(RecipeError, match=r"heads \['gland'\] are new"):
        begin(
            from_base(place, base, 'start.only=["encoder"]', f'model.heads=["gland",{nuclei}]'),
            name="m",
            device="cpu",
        )


@pytest.mark.parametrize(
    ("only", "kept"),
    [
        ('["encoder", "heads"]', ["gland", "nuclei", "nuclei-class", "tissue"]),
        ('["encoder", "heads.nuclei"]', ["nuclei"]),
        ('["heads.nuclei", "heads.nuclei-class"]', ["nuclei", "nuclei-class"]),
        # who classifies nothing any more goes too
        ('["heads.gland", "heads.nuclei-class"]', ["gland"]),
    ],
)
def test_start_only_says_which_heads_stay(place, base, only, kept):
    extra = [] if "nuclei" in kept else ['source.0.heads={nuclei="gland"}', "heads={}"]
    found = begin(from_base(place, base, f"start.only={only}", *extra), name="m", device="cpu")
    assert names(found) == kept
    if "nuclei" in kept:
        parent = "gland" if "gland" in kept else None
        nuclei = found.spec.head("nuclei")
        assert (nuclei.parent, nuclei.inside_parent) == (parent, parent is not None)


def test_what_is_taken_is_in_the_network_and_in_the_report(place, base):
    from safetensors.torch import load_file

    old = load_file(base / "weights.safetensors")
    found = begin(
        from_base(place, base, 'start.only=["encoder","heads.nuclei"]'), name="m", device="cpu"
    )
    state = found.network.state_dict()
    assert "bundle" in found.report.source
    assert found.report.taken
    for name in found.report.taken:
        assert name.startswith(("encoder.", "heads.nuclei.")), name
        assert torch.equal(state[name].float(), old[name].float()), name
    assert any(name.startswith("project.") for name in found.report.fresh)
    assert found.describe()["start"]["taken"] == list(found.report.taken)


def test_an_encoder_given_by_hand_wins(place, base, tmp_path):
    from safetensors.torch import load_file, save_file

    old = load_file(base / "weights.safetensors")
    path = tmp_path / "encoder.safetensors"
    save_file({name: tensor for name, tensor in old.items() if name.startswith("encoder.")}, path)
    found = begin(plan(place), name="m", device="cpu", encoder=path)
    assert found.report.source == f"SimCLR encoder {path}"
    assert torch.equal(
        found.network.state_dict()["encoder.stem.conv.weight"], old["encoder.stem.conv.weight"]
    )


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("source.0.options={lumen=false}", DatasetError, r"'plain' has no option \['lumen'\]"),
        ('source.0.heads={gland="nuclei"}', RecipeError, r"plain \(.*data\)"),
        ('source.0.heads={nuclei="glands"}', RecipeError, "glands"),
        ('freeze.parts=["encodr"]', RecipeError, r"\[freeze\] names \['encodr'\]"),
        ("heads.lumen.weight=2", RecipeError, r"\[heads.lumen\]"),
        ("source.0.weight=0", RecipeError, "must be positive"),
        (
            'source.0.leave_out=["p1","q*"]',
            RecipeError,
            r"plain \(.*data\): leave_out names \['q\*'\], which no image is called.*'p0', 'p1'",
        ),
        ('source.0.leave_out=["p?"]', RecipeError, "leaves none of 8 images"),
        ("source.0.scale_min=1.4", RecipeError, r"data: .*scale_min <= scale_max.* 1.4 and 1.3"),
        ("source.0.scale_max=5", RecipeError, "not 0.75 and 5"),
        (
            'augment={vesicular_p=0.4,vesicular_head="gland"}',
            RecipeError,
            r"'gland' is no instance head of the model; it has \['nuclei'\]",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(place, override, error, words):
    with pytest.raises(error, match=words):
        begin(plan(place, override), name="m", device="cpu")


def test_the_options_of_a_source_reach_its_reader(place, monkeypatch):
    from wsi_pipeline.training import layouts
    from wsi_pipeline.training.layouts.plain import read_plain

    asked = []

    def read(folder, *, mpp=None, shade="none"):
        asked.append((mpp, shade))
        return read_plain(folder, mpp=mpp)

    spare = layouts.Layout(read=read, marks=(("no such file",),))
    monkeypatch.setitem(layouts.LAYOUTS, "spare", spare)
    recipe = plan(
        place,
        'source.0.layout="spare"',
        "source.0.mpp=0.25",
        'source.0.options={shade="dark"}',
    )
    open_parts(recipe, model_spec(recipe, None, name="m"))
    assert asked == [(0.25, "dark")]


def test_classes_that_do_not_fit_name_the_source(tmp_path):
    data = write_discs(tmp_path / "data", 4)
    (data / "patches.csv").write_text(
        "image,tissue\n" + "".join(f"p{i}.png,{'fat' if i % 2 else 'skin'}\n" for i in range(4))
    )
    path = write_recipe(tmp_path, data)
    heads = (
        'model.heads=[{name="tissue",kind="patch",stride=16,classes=["fat","muscle"]}]',
        "heads={}",
        'source.0.heads={nuclei=""}',
    )
    with pytest.raises(RecipeError, match=r"plain \(.*data\).*skin"):
        begin(read_recipe(path, heads), name="m", device="cpu")
    mapped = [*heads, 'source.0.classes={tissue={skin="muscle"}}']
    (source,) = begin(read_recipe(path, mapped), name="m", device="cpu").sources
    assert source.heads == ("tissue",)
    labels = [source.image(i).labels["tissue"].id for i in range(len(source))]
    wanted = [0 if int(item.name[1:]) % 2 else 1 for item in source.items]
    assert labels == wanted


def load(name):
    return AnnotatedImage(
        name=name,
        image=np.zeros((8, 8, 3), np.uint8),
        mpp=0.5,
        labels={"nuclei": InstanceLabel(ids=np.zeros((8, 8), np.int32))},
    )


def source(name, groups):
    spec = ModelSpec(
        name="m",
        architecture="a",
        mpp=0.5,
        halo_px=32,
        options={},
        heads=(
            HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        ),
    )
    items = tuple(
        Item(name=f"{name}{i}", patient=f"{i}", load=partial(load, f"{name}{i}"), group=group)
        for i, group in enumerate(groups)
    )
    dataset = Dataset(name=name, path=Path(name), labels={"nuclei": ()}, items=items)
    return Source(dataset, items, spec)


def test_groups_of_two_sources_that_bear_one_name_are_two(tmp_path):
    sources = [source("x", ["a"] * 20), source("y", ["a"] * 2)]
    assert [own.source.name for own in held_out_images(sources, at_most=4)] == ["x", "y"] * 2


def test_crops_lie_on_objects_as_often_as_the_recipe_says(place):
    seen = {}
    for share in (0.0, 1.0):
        (part, *_) = begin(
            plan(place, f"source.0.object_share={share}"), name="m", device="cpu"
        ).parts
        rng = np.random.default_rng(0)
        cut = [part.source.window(0, rng, 16).labels["nuclei"][6:10, 6:10] for _ in range(80)]
        seen[share] = np.mean([(own > 0).any() for own in cut])
    assert seen[1.0] > seen[0.0] + 0.2


def test_images_to_score_come_in_turn_from_all_groups_and_reach_all():
    sources = [source("x", ["a"] * 17 + ["b"] * 2), source("y", [None] * 5)]
    every = held_out_images(sources)
    everything = {f"x{i}" for i in range(19)} | {f"y{i}" for i in range(5)}
    assert {own.item.name for own in every} == everything
    assert len(every) == 24
    for turn in (0, 3):
        groups = [own.item.group or own.source.name for own in every[turn : turn + 3]]
        assert groups == ["a", "b", "y"]
    few = held_out_images(sources, at_most=6)
    assert few == every[:6]
    # spread over a group: not its first images
    first = [int(own.item.name[1:]) for own in every if own.item.group == "a"][:4]
    assert max(first) - min(first) > 8
    assert held_out_images([]) == ()
    assert every[0].load().name == every[0].item.name


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 30, 100, 101])
def test_every_image_of_a_group_has_its_turn_once(count):
    every = held_out_images([source("x", ["a"] * count)])
    assert sorted(own.index for own in every) == list(range(count))
