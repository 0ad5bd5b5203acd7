"""The model's promise: round trip through JSON, and contradictions refused."""

import json

import pytest

from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules, RunRules

HEADS = (
    HeadSpec(
        name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules(), parent="gland"
    ),
    HeadSpec(name="nuclei-class", kind="class", classes=("none", "a"), classifies="nuclei"),
    HeadSpec(
        name="gland",
        kind="instance",
        stride=2,
        object_kind="gland",
        rules=RunRules(fill_holes_um2=30.0),
    ),
    HeadSpec(
        name="lumen",
        kind="instance",
        stride=2,
        object_kind="lumen",
        rules=RunRules(),
        parent="gland",
        inside_parent=True,
    ),
    HeadSpec(name="tissue", kind="patch", classes=("glass", "stroma"), stride=16),
    HeadSpec(
        name="ring",
        kind="detect",
        object_kind="signet-ring",
        rules=PeakRules(threshold=0.4, min_distance_um=5.0, max_size_um=50.0),
        parent="gland",
    ),
)


def spec(heads=HEADS, **changes):
    facts = {"name": "m", "architecture": "a", "mpp": 0.5, "halo_px": 160, "options": {"w": [1]}}
    return ModelSpec(**{**facts, **changes}, heads=heads)


def test_json_round_trip_keeps_everything():
    assert ModelSpec.from_json(spec().to_json()) == spec()


def test_lookups():
    model = spec()
    assert model.class_head("nuclei").name == "nuclei-class"
    assert model.class_head("gland") is None
    assert model.patch_head.name == "tissue"
    assert [h.name for h in model.instance_heads] == ["nuclei", "gland", "lumen"]
    assert [h.name for h in model.object_heads] == ["nuclei", "gland", "lumen", "ring"]
    assert model.head("gland").logit_channels == 3
    assert model.head("tissue").prob_channels == ("glass", "stroma")
    assert model.head("nuclei-class").prob_channels == ()
    assert model.head("ring").logit_channels == 3
    assert model.head("ring").prob_channels == ("heat", "width", "height")
    assert {name for name in model.maps if name.startswith("ring/")} == {"ring/prob"}
    with pytest.raises(KeyError):
        model.head("other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour="red"), "unknown keys"),
        (lambda d: d["heads"][0].update(kidn="x"), "unknown keys"),
        (lambda d: d["heads"][0]["rules"].update(by="magic"), "rules.by"),
        (lambda d: d["heads"][0]["rules"].update(speed=3), "unknown keys"),
        (lambda d: d["heads"][0].update(rules=None), "lacks 'rules'"),
        (lambda d: d["heads"][4].update(classes=[]), "lacks 'classes'"),
        (lambda d: d["heads"][1].update(classifies="glands"), "no other instance head"),
        (lambda d: d["heads"][3].update(stride=1), "same stride"),
        (lambda d: d["heads"][1].update(stride=2), "same stride"),
        (lambda d: d["heads"][3].update(parent="nuclei"), "stride|run rules"),
        (lambda d: d["heads"][3].update(parent=None), "needs a parent"),
        (lambda d: d["heads"][5].update(rules=None), "lacks 'rules'"),
        (lambda d: d["heads"][5].update(rules=d["heads"][2]["rules"]), "takes peak rules"),
        (lambda d: d["heads"][5].update(inside_parent=True), "no inside_parent"),
        (lambda d: d["heads"][0].update(rules=d["heads"][5]["rules"]), "for detect heads"),
        (lambda d: d["heads"][5]["rules"].update(threshold=1.0), "threshold from 0 to 1"),
        (lambda d: d["heads"][5]["rules"].update(min_distance_um=-1), "a distance"),
        (lambda d: d["heads"][5]["rules"].update(max_size_um=0), "positive size"),
        (lambda d: d["heads"][1].update(classifies="ring"), "no other instance head"),
        (lambda d: d["heads"].append(d["heads"][0]), "twice"),
        (lambda d: d.update(halo_px=100), "multiple of 16"),
        (lambda d: d.pop("mpp"), "mpp"),
        (lambda d: d.update(mpp=-1), "mpp must be from 0.05 to 5"),
        (lambda d: d.update(mpp=0), "mpp must be"),
        (lambda d: d.update(mpp=float("nan")), "mpp cannot be nan"),
        (lambda d: d.update(mpp=500), "mpp must be"),
        (lambda d: d.update(mpp="0.5"), "spec.json"),
        (lambda d: d.pop("heads"), "cannot be read"),
    ],
)
def test_contradictions_are_named(change, message):
    data = json.loads(spec().to_json())
    change(data)
    with pytest.raises(ModelBundleError, match=message):
        ModelSpec.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"heads": 3}', '{"heads": [3]}'])
def test_garbage_is_no_spec(text):
    with pytest.raises(ModelBundleError):
        ModelSpec.from_json(text)
