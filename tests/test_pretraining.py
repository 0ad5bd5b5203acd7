"""From slides without labels to a bundle: ``[pretrain]`` in a recipe, end to end."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import write_discs, write_recipe

from wsi_pipeline.errors import Interrupted, RecipeError
from wsi_pipeline.network import build_network
from wsi_pipeline.synth import write_slide
from wsi_pipeline.training.augment import AugmentRules
from wsi_pipeline.training.begin import begin
from wsi_pipeline.training.fit import train
from wsi_pipeline.training.pretraining import PretrainRules, PretrainSlide, pretrain_encoder
from wsi_pipeline.training.recipe import model_spec, read_recipe

PRETRAIN = """
[pretrain]
batch = 3
crop_px = 32
workers = 1
slide = [{{ path = "{slide}" }}]
[pretrain.simclr]
steps = 4
warmup = 1
checkpoint_every = 2
projection = 8
learning_rate = 1e-2
"""
FEW = ("schedule.steps=2", "validation.every=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    write_slide(folder / "s.svs", width=600, height=600, mpp=0.5, seed=1, truth=False)
    more = PRETRAIN.format(slide=folder / "s.svs")
    write_recipe(folder, write_discs(folder / "data"), more)
    return folder


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("whole") / "model"
    told: list[dict] = []
    train(plan(place), out, device="cpu", on_row=told.append)
    return out, told


def plan(place, *overrides):
    return read_recipe(place / "recipe.toml", [*FEW, *overrides])


def training(out):
    return out.with_name(out.name + ".training")


def encoder(out):
    return load_file(training(out) / "simclr" / "encoder.safetensors")


def rows(out):
    return [json.loads(line) for line in (training(out) / "log.jsonl").read_text().splitlines()]


def steps(told):
    return [row["step"] for row in told if "pretrain" in row]


def test_training_starts_from_the_encoder(place, whole):
    out, told = whole
    assert steps(told) == [0, 1, 2, 3]
    assert all(row["pretrain"]["loss"] > 0 for row in told if "pretrain" in row)
    (first,) = [row["begin"] for row in rows(out) if "begin" in row]
    path = training(out) / "simclr" / "encoder.safetensors"
    assert first["start"]["source"] == f"SimCLR encoder {path}"
    learnt = encoder(out)
    assert set(first["start"]["taken"]) == set(learnt)
    assert first["start"]["skipped"] == {}
    assert all(not name.startswith("encoder.") for name in first["start"]["fresh"])
    assert any(name.startswith("heads.nuclei.") for name in first["start"]["fresh"])
    # pre-training comes before the first step, and its rows are told apart
    assert [("pretrain" in row) for row in told[:5]] == [True] * 4 + [False]
    assert f"started from SimCLR encoder {path}" in (out / "card.md").read_text()
    # the encoder learnt something, and the network begins with just that
    state = begin(plan(place), name="m", device="cpu", encoder=path).network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in learnt.items())
    torch.manual_seed(plan(place).pretrain.simclr.seed)
    drawn = build_network(model_spec(plan(place), None, name="m")).state_dict()
    assert not torch.equal(learnt["encoder.stem.conv.weight"], drawn["encoder.stem.conv.weight"])
    assert not torch.equal(
        learnt["encoder.stem.norm.running_mean"], drawn["encoder.stem.norm.running_mean"]
    )


def test_the_weights_that_are_kept_come_of_the_encoder(place, whole, tmp_path):
    out, _ = whole
    text = (place / "recipe.toml").read_text().partition("[pretrain]")[0]
    (tmp_path / "bare.toml").write_text(text)
    train(read_recipe(tmp_path / "bare.toml", FEW), tmp_path / "bare", device="cpu")
    name = "encoder.stem.conv.weight"
    learnt = encoder(out)[name]
    kept, bare = (load_file(p / "weights.safetensors")[name] for p in (out, tmp_path / "bare"))
    assert (kept - learnt).abs().max() < 0.1 * (bare - learnt).abs().max()


@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_while_pretraining_is_uninterrupted(place, whole, tmp_path, stop_after):
    out = tmp_path / "model"
    asked = iter([False] * stop_after + [True])
    with pytest.raises(Interrupted, match=f"before step {stop_after}"):
        train(plan(place), out, device="cpu", stop=lambda: next(asked))
    assert not out.exists()
    assert not (training(out) / "simclr" / "encoder.safetensors").exists()
    told: list[dict] = []
    train(plan(place), out, device="cpu", on_row=told.append)
    assert steps(told) == list(range(stop_after, 4))
    file = "weights.safetensors"
    assert (out / file).read_bytes() == (whole[0] / file).read_bytes()
    learnt, same = encoder(out), encoder(whole[0])
    assert all(torch.equal(learnt[name], same[name]) for name in same)


def test_what_was_pretrained_is_not_pretrained_again(place, whole, tmp_path):
    out = tmp_path / "model"
    # asked before each of 4 steps of pre-training, then after the first of training
    asked = iter([False] * 4 + [True])
    with pytest.raises(Interrupted, match="after step 1"):
        train(plan(place), out, device="cpu", stop=lambda: next(asked))
    told: list[dict] = []
    train(plan(place), out, device="cpu", on_row=told.append)
    assert steps(told) == []
    assert (out / "weights.safetensors").read_bytes() == (
        whole[0] / "weights.safetensors"
    ).read_bytes()


def test_the_seed_of_pretraining_is_its_own(place, whole, tmp_path):
    train(plan(place, "pretrain.simclr.seed=6"), tmp_path / "model", device="cpu")
    name = "encoder.stem.conv.weight"
    assert not torch.equal(encoder(tmp_path / "model")[name], encoder(whole[0])[name])


def test_other_architectures_are_refused(place, tmp_path):
    unet = plan(place, 'model.architecture="unet"', "model.options={}")
    with pytest.raises(RecipeError, match=r"\[pretrain\] is for architecture 'cerberus', not"):
        train(unet, tmp_path / "model", device="cpu")
    assert not (tmp_path / "model").exists()


def test_start_and_pretrain_together_are_refused(place):
    with pytest.raises(RecipeError, match=r"\[start\] and \[pretrain\].*keep one"):
        plan(place, 'start.model="cerberus"')


def test_crops_and_augmentation_are_the_recipes(place, tmp_path):
    seen = {}
    recipe = plan(place)
    spec = model_spec(recipe, None, name="m")
    slide = PretrainSlide(path=place / "s.svs")
    for name, changes in {"same": {}, "crop": {"crop_px": 48}, "mpp": {"mpp": 0.8}}.items():
        crop = {key: value for key, value in changes.items() if key == "crop_px"}
        own = PretrainSlide(path=slide.path, mpp=changes.get("mpp"))
        rules = PretrainRules(
            slide=(own,), batch=3, simclr=recipe.pretrain.simclr, **{"crop_px": 32, **crop}
        )
        path = pretrain_encoder(rules, spec, out=tmp_path / name, device="cpu")
        seen[name] = load_file(path)["encoder.stem.conv.weight"]
    alike = dataclasses.replace(recipe.pretrain, views=AugmentRules.off())
    path = pretrain_encoder(alike, spec, out=tmp_path / "off", device="cpu")
    seen["off"] = load_file(path)["encoder.stem.conv.weight"]
    for name in ("crop", "mpp", "off"):
        assert not torch.equal(seen[name], seen["same"]), name


@pytest.mark.parametrize("changes", [{"slide": ()}, {"batch": 1}, {"crop_px": 40}, {"crop_px": 0}])
def test_rules_that_make_no_sense(changes):
    slide = PretrainSlide(path=Path("s.svs"))
    assert PretrainRules(slide=(slide,), crop_px=16, batch=2)
    with pytest.raises(RecipeError, match=r"\[pretrain\] wants a slide"):
        PretrainRules(**{"slide": (slide,), **changes})
