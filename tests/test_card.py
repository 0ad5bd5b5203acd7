"""The card of a trained bundle: the facts of its run, and no claim that it has none for."""

from dataclasses import replace

import pytest
from training_fixtures import write_discs, write_recipe

from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.spec import HeadSpec
from wsi_pipeline.training.begin import begin
from wsi_pipeline.training.card import write_card
from wsi_pipeline.training.recipe import read_recipe

METRICS = {
    "step": 4321,
    "steps": 9876,
    "validation": {"nuclei": {"pq": 0.51249}, "tissue": {"accuracy": None}},
    "data": [
        {"source": "glas", "part": "train", "images": 85, "patients": 15, "heads": ["gland"]},
        {
            "source": "lizard",
            "part": "validation",
            "images": 40,
            "patients": 8,
            "heads": ["nuclei", "nuclei-class"],
        },
    ],
}
KINDS = HeadSpec(name="kinds", kind="class", classes=("none", "round"), classifies="nuclei")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    write_recipe(folder, write_discs(folder / "data", 4))
    return folder


@pytest.fixture(scope="module")
def run(place):
    recipe = read_recipe(place / "recipe.toml", ["seed=77"])
    return recipe, begin(recipe, name="mine", device="cpu")


def card(run, **changes):
    recipe, beginning = run
    return write_card(recipe, beginning.spec, beginning, {**METRICS, **changes})


def test_the_facts_of_the_run_are_in_it(run):
    text = card(run)
    count = sum(p.numel() for p in run[1].network.parameters())
    for words in (
        "# mine\n",
        "\ndiscs\n",
        f"`cerberus`, {count:,} parameters, 0.5 um a pixel",
        "started from fresh weights",
        "after step 4321 of 9876, seed 77",
        "| nuclei | instance | nucleus |",
        "| glas | train | 85 | 15 | gland |",
        "| lizard | validation | 40 | 8 | nuclei, nuclei-class |",
        "| nuclei | pq | 0.512 |",
        "| tissue | accuracy | undefined |",
    ):
        assert words in text, words
    assert "no image was held out" not in text


@pytest.mark.parametrize("changes", [{"validation": {}}, {"validation": {"nuclei": {}}}])
def test_without_scores_it_says_so(run, changes):
    text = card(run, **changes)
    assert "None: no image was held out." in text
    assert "| score |" not in text


def test_what_it_started_from_and_the_classes_of_its_heads(place, run, tmp_path):
    save_bundle(tmp_path / "base", run[1].spec, run[1].network, card="x")
    recipe = read_recipe(
        place / "recipe.toml", [f'start={{bundle="{tmp_path}/base"}}', 'description=""']
    )
    beginning = begin(recipe, name="later", device="cpu")
    spec = replace(beginning.spec, heads=(*beginning.spec.heads, KINDS))
    text = write_card(recipe, spec, beginning, METRICS)
    assert "| kinds | class | none, round |" in text
    assert f"started from bundle {tmp_path}/base" in text
    assert "(one sentence: what it is for)" in text
