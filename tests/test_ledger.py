"""The ledger of training: each row is the complete recipe with one change, compared with it."""

import tomllib

import numpy as np
import pytest

from benchmarks.ledger import ROWS, TASKS, compare, markdown, recipe_text
from benchmarks.quality.judging import Judged
from benchmarks.quality.sets import ImageSet, Plan
from wsi_pipeline.training.recipe import read_recipe

ROW = {row.name: row for row in ROWS}


class Counted:
    """Stands for a measure: hits a share of the drawn images."""

    def __init__(self, hits):
        self.hits = np.array(hits, float)
        self.images = list(range(len(hits)))

    def scores(self, rows):
        return {"pq": float(self.hits[rows].mean())}


def judged(name, **hits):
    plan = Plan(name=name, title=name, folder=name, layout="crops")
    own = ImageSet(plan=plan, images=(), standing="")
    return Judged(set=own, measures={head: Counted(values) for head, values in hits.items()})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_a_recipe_from_fresh_weights_for_its_task_alone(row, tmp_path, monkeypatch):
    for name in ("WSI_DATA", "ANNOTATIONS", "PSEUDO"):
        monkeypatch.setenv(name, str(tmp_path))
    file = tmp_path / "row.toml"
    file.write_text(recipe_text(row, steps=7), encoding="utf-8")
    recipe = read_recipe(file)
    assert recipe.start.bundle is None
    assert recipe.schedule.steps == 7
    assert {head["name"] for head in recipe.model.heads} == set(TASKS[row.task].heads)
    assert {source.task for source in recipe.source} == {row.task}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_differs_from_the_complete_recipe_in_one_table(row):
    own, complete = (tomllib.loads(recipe_text(each, steps=7)) for each in (row, ROW[row.task]))
    different = {key for key in complete if key != "description" and own[key] != complete[key]}
    assert len(different) == (row.name != row.task), different


def test_what_is_left_out_is_what_the_row_says():
    def paths(name):
        return [own["path"] for own in tomllib.loads(recipe_text(ROW[name], steps=7))["source"]]

    assert set(paths("nuclei")) - set(paths("no own crops")) == {"$ANNOTATIONS"}
    assert set(paths("nuclei")) - set(paths("no pseudo-labels")) == {"$PSEUDO"}
    assert set(paths("gland")) - set(paths("no GG-pT1")) == {"$WSI_DATA/glands_pt1"}
    assert set(paths("gland")) - set(paths("no gland-free tiles")) == {"$WSI_DATA/tissue_kather"}


def test_a_difference_is_paired_by_image():
    # Images differ a lot, the networks by a tenth on each: only pairs can tell.
    complete = [judged(name, nuclei=np.linspace(0.1, 0.9, 20)) for name in TASKS["nuclei"].scores]
    own = [judged(name, nuclei=np.linspace(0.0, 0.8, 20)) for name in TASKS["nuclei"].scores]
    found = compare(TASKS["nuclei"], own, complete)
    assert found["monuseg/nuclei"]["pq"] == pytest.approx(0.4)
    assert found["monuseg/nuclei"]["difference"] == pytest.approx([-0.1, -0.1, -0.1])


def test_the_table_has_a_row_for_each_run_and_no_difference_for_the_complete_one():
    sets = {name: [0.5, 0.4, 0.6, 0.3] for name in TASKS["nuclei"].scores}
    complete = [judged(name, nuclei=hits) for name, hits in sets.items()]
    own = [judged(name, nuclei=np.array(hits) - 0.2) for name, hits in sets.items()]
    table = markdown(
        {
            "nuclei": compare(TASKS["nuclei"], complete, complete),
            "no DSB 2018": compare(TASKS["nuclei"], own, complete),
        }
    )
    assert "| nuclei | 0.450 | 0.450 | 0.450 |" in table
    assert "| no DSB 2018 | 0.250, -0.200 (-0.200 to -0.200) |" in table
