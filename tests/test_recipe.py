from pathlib import Path

import pytest

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.spec import HeadSpec, ModelSpec, PeakRules, RunRules
from wsi_pipeline.training.recipe import Recipe, model_spec, read_recipe

RECIPES = sorted((Path(__file__).parent.parent / "workflows" / "recipes").glob("*.toml"))

MINIMAL = """
[model]
architecture = "cerberus"
mpp = 0.5
heads = ["gland"]
[[source]]
path = "data"
"""


def read(tmp_path, text=MINIMAL, *overrides) -> Recipe:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return read_recipe(path, overrides)


def test_a_minimal_recipe_has_the_papers_defaults(tmp_path):
    recipe = read(tmp_path)
    assert recipe.source[0].path == tmp_path / "data"
    assert (recipe.schedule.steps, recipe.schedule.optimiser) == (90_000, "adam")
    assert recipe.schedule.milestones == (70_000,)
    assert recipe.text == MINIMAL
    spec = model_spec(recipe, None, name="mine")
    assert [head.name for head in spec.heads] == ["gland"]
    assert (spec.name, spec.mpp, spec.halo_px) == ("mine", 0.5, 160)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_project_can_be_read(path, monkeypatch):
    for name in ("WSI_DATA", "WSI_DATASETS", "WSI_BUNDLE"):
        monkeypatch.setenv(name, "/somewhere")
    recipe = read_recipe(path)
    assert recipe.description
    if not (recipe.start.bundle or recipe.start.model):
        spec = model_spec(recipe, None, name=path.stem)
        assert set(recipe.heads) <= {head.name for head in spec.heads}


def test_all_the_recipes_are_there():
    assert {path.stem for path in RECIPES} == {
        "cerberus", "cerberus-plus", "ebhi-seg", "gland", "lumen", "nuclei", "signet-ring", "small",
        "subtyping", "tissue",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = ", "cannot be read as a recipe"),
        (MINIMAL + "[shedule]\nsteps = 3", r"unknown keys \['shedule'\]; known are .*schedule"),
        (MINIMAL + "[schedule]\nsteps = 'many'", "schedule: steps: int wanted, not 'many'"),
        (MINIMAL + "[schedule]\nsteps = true", "schedule: steps: int wanted, not True"),
        (MINIMAL + "[schedule]\ndecay = 'linear'", "'linear' is none of .*cosine"),
        (MINIMAL + "[schedule]\nmilestones = ['a']", "milestones: int wanted, not 'a'"),
        (MINIMAL + "[schedule]\nsteps = 0", "steps >= 1"),
        (MINIMAL + "[heads.gland]\nchannel_weights = [1, 2]", "3 values wanted"),
        (MINIMAL + "[batches]\nmode = 1", "none of"),
        (MINIMAL + "[[source]]\nlayout = 'glas'", r"\['path'\] must be given"),
        (MINIMAL + "[[source]]\npath = '$NO_SUCH_NAME_HERE/x'", "environment variable that is not"),
        ("[model]\nmpp = 0.5", r"names no \[\[source\]\]"),
        ("source = 3", "source: tuple.* wanted, not 3"),
        ("source = [3]", "a table wanted, not 3"),
    ],
)
def test_one_clear_error(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        read(tmp_path, text)


def test_what_a_source_leaves_out_and_how_it_is_scaled(tmp_path):
    more = "leave_out = ['a', 'b/*']\nscale_min = 0.7\n[augment]\nvesicular_p = 0.4"
    recipe = read(tmp_path, MINIMAL + more)
    (source,) = recipe.source
    assert source.leave_out == ("a", "b/*")
    assert (source.scale_min, source.scale_max) == (0.7, None)
    assert (recipe.augment.vesicular_p, recipe.augment.vesicular_head) == (0.4, "nuclei")
    (plain,) = read(tmp_path).source
    assert (plain.leave_out, plain.scale_min, plain.scale_max) == ((), None, None)


def test_start_and_pretrain_together(tmp_path):
    both = MINIMAL + "[start]\nmodel = 'x'\n[[pretrain.slide]]\npath = 'a.svs'"
    with pytest.raises(RecipeError, match="keep one"):
        read(tmp_path, both)


def test_overrides(tmp_path):
    recipe = read(
        tmp_path,
        MINIMAL,
        "schedule.steps=7",
        "source.0.mpp=0.25",
        'source.0.layout="plain"',
        "model.options.widths=[4,6,8,10]",
        "heads.gland.weight=2",
    )
    assert recipe.schedule.steps == 7
    assert (recipe.source[0].mpp, recipe.source[0].layout) == (0.25, "plain")
    assert recipe.model.options == {"widths": [4, 6, 8, 10]}
    assert recipe.heads["gland"].weight == 2.0
    # what is written into the bundle says so, and is still TOML
    assert "# changed: schedule.steps=7" in recipe.text
    again = read(tmp_path, recipe.text)
    assert (again.schedule, again.source, again.model) == (
        recipe.schedule, recipe.source, recipe.model,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "KEY=VALUE"),
        ("schedule.steps=many", "no TOML value"),
        ("source.9.mpp=1", "no such place"),
        ("source.x.mpp=1", "no such place"),
        ("description.x=1", "no such place"),
        ("schedule.step=1", "unknown keys"),
    ],
)
def test_overrides_that_fit_nowhere(tmp_path, override, words):
    with pytest.raises(RecipeError, match=words):
        read(tmp_path, "description = 'd'" + MINIMAL, override)


def test_heads_of_a_bundle_are_kept_replaced_and_added_to(tmp_path):
    base = ModelSpec(
        name="old",
        architecture="cerberus",
        mpp=0.4,
        halo_px=64,
        heads=(
            HeadSpec(
                name="gland", kind="instance", stride=2, object_kind="gland", rules=RunRules()
            ),
            HeadSpec(name="tissue", kind="patch", stride=16, classes=("a", "b")),
        ),
        options={"widths": [1, 2, 3, 4]},
    )
    text = """
    [model]
    options = { head_width = 9 }
    heads = [
      "lumen",
      { name = "tissue", kind = "patch", stride = 16, classes = ["x", "y", "z"] },
      { name = "cells", kind = "detect", object_kind = "cell", rules = { by = "peak" } },
    ]
    [[source]]
    path = "data"
    """
    spec = model_spec(read(tmp_path, text), base, name="new")
    assert [head.name for head in spec.heads] == ["gland", "tissue", "lumen", "cells"]
    assert spec.head("tissue").classes == ("x", "y", "z")
    assert spec.head("lumen").parent == "gland"
    assert spec.head("cells").rules == PeakRules()
    assert (spec.mpp, spec.halo_px, spec.name) == (0.4, 64, "new")
    assert spec.options == {"widths": [1, 2, 3, 4], "head_width": 9}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("heads = ['gland']", r"lacks \['architecture', 'mpp'\]"),
        ("architecture = 'cerberus'\nmpp = 0.5", r"lacks \['heads'\]"),
        ("architecture = 'cerberus'\nmpp = 0.5\nheads = ['glands']", "none of .*gland"),
        (
            "architecture = 'cerberus'\nmpp = 0.5\nheads = [{name = 'a', kind = 'patch'}]",
            "lacks 'classes'",
        ),
        ("architecture = 'cerberus'\nmpp = 0.5\nhalo_px = 7\nheads = ['gland']", "multiple of 16"),
        ("architecture = 'cerberus'\nmpp = 0.5\nheads = ['nuclei-class']", "no other instance"),
    ],
)
def test_a_model_that_cannot_be_built(tmp_path, model, words):
    recipe = read(tmp_path, f"[model]\n{model}\n[[source]]\npath = 'data'")
    with pytest.raises(RecipeError, match=words):
        model_spec(recipe, None, name="x")


def test_a_lumen_without_a_gland_has_no_parent(tmp_path):
    recipe = read(tmp_path, MINIMAL.replace('"gland"', '"lumen"'))
    (head,) = model_spec(recipe, None, name="x").heads
    assert (head.parent, head.inside_parent) == (None, False)


def test_what_the_recipe_says_of_the_model_wins_over_the_bundle(tmp_path):
    head = HeadSpec(name="gland", kind="instance", object_kind="gland", rules=RunRules())
    base = ModelSpec(
        name="old",
        architecture="cerberus",
        mpp=0.4,
        halo_px=64,
        heads=(head,),
        options={"widths": [1, 2, 3, 4], "head_width": 7},
        description="old words",
    )
    text = "[model]\noptions = { head_width = 9 }\nmpp = 0.25\n[[source]]\npath = 'd'"
    spec = model_spec(read(tmp_path, text), base, name="new")
    assert spec.options == {"widths": [1, 2, 3, 4], "head_width": 9}
    assert (spec.mpp, spec.halo_px) == (0.25, 64)
    described = model_spec(read(tmp_path, "description = 'new'\n" + text), base, name="new")
    assert described.description == "new"


def test_paths_of_home_and_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA_HERE", str(tmp_path / "data"))
    for written, meant in (
        ("~/x", tmp_path / "home" / "x"),
        ("$DATA_HERE/x", tmp_path / "data" / "x"),
        ("x", tmp_path / "x"),
        (str(tmp_path / "y"), tmp_path / "y"),
    ):
        found = read(tmp_path, MINIMAL.replace('"data"', f"'{written}'"))
        assert found.source[0].path == meant


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("leave_out = 'a'", "leave_out: tuple.* wanted, not 'a'"),
        ("leave_out = [1]", "leave_out: str wanted, not 1"),
        ("scale_min = 'x'", "scale_min: float wanted, not 'x'"),
        ("[augment]\nvesicular_p = 2", "vesicular_p must be at most 1"),
        ("[augment]\nvesicular_head = 2", "vesicular_head: str wanted, not 2"),
        ("[schedule]\nlearning_rate = true", "learning_rate: float wanted, not True"),
        ("[schedule]\nlearning_rate = 0", "learning_rate > 0"),
        ("[schedule]\nema = 1.0", "0 <= ema < 1"),
        ("[validation]\nimages = 0", "images >= 1"),
        ("[validation]\nevery = 0", "every"),
    ],
)
def test_values_that_make_no_sense(tmp_path, more, words):
    with pytest.raises(RecipeError, match=words):
        read(tmp_path, MINIMAL + more)


def test_the_text_of_a_recipe_is_no_key_of_it(tmp_path):
    with pytest.raises(RecipeError, match="unknown keys") as error:
        read(tmp_path, MINIMAL + "[tekst]")
    assert "'text'" not in str(error.value)
