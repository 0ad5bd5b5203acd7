"""The folder of a run: what a killed run leaves, and what the next one makes of it."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from test_bundle import SPEC

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.training.workplace import Workplace

RECIPE = "seed = 3\n"


BEFORE = []


def work(tmp_path, recipe=RECIPE, *, restart=False, first=True, told=None):
    """Open the folder as a process does whose predecessor is dead."""
    while BEFORE:
        BEFORE.pop().close()
    found = Workplace.open(
        tmp_path / "model",
        recipe,
        restart=restart,
        first=first,
        on_row=(lambda row: None) if told is None else told.append,
    )
    BEFORE.append(found)
    return found


def log(tmp_path):
    path = tmp_path / "model.training" / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def state(step, **more):
    return {"course": {"step": step, "best": -math.inf, "stale": 0}, **more}


def names(tmp_path):
    found = sorted(path.name for path in (tmp_path / "model.training").iterdir())
    return [name for name in found if name != "lock"]


def step(number):
    return {"step": number, "loss": 1.0, "losses": {"a/ce": 1.0}}


def test_lines_are_written_told_and_free_of_nan(tmp_path):
    told = []
    one = work(tmp_path, told=told)
    row = {
        "step": 1,
        "losses": {"a/ce": math.nan, "b/ce": 0.5},
        "deep": [{"x": (math.inf, -math.inf)}, True, "nan", 3],
        "score": 0.25,
    }
    one.write(row)
    one.write_all([step(2), step(3)])
    plain = {
        "step": 1,
        "losses": {"a/ce": None, "b/ce": 0.5},
        "deep": [{"x": [None, None]}, True, "nan", 3],
        "score": 0.25,
    }
    assert log(tmp_path) == told == [plain, step(2), step(3)]
    assert "NaN" not in (tmp_path / "model.training" / "log.jsonl").read_text()
    assert math.isnan(row["losses"]["a/ce"])  # the caller's is left as it was


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    one = work(tmp_path)
    one.write({"step": 0, "begin": {}})
    one.write_all([step(1), step(2)])
    one.write({"step": 2, "validation": {"a": {"pq": 0.5}}, "score": 0.5})
    one.save_checkpoint(state(2, network={"w": torch.arange(3.0)}))
    one.write_all([step(3), step(4)])
    with (tmp_path / "model.training" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # a killed run
    again = work(tmp_path)
    found = again.load_checkpoint()
    assert found["course"]["step"] == 2
    assert torch.equal(found["network"]["w"], torch.arange(3.0))
    assert [row["step"] for row in log(tmp_path)] == [0, 1, 2, 2]
    # what was read is known, and goes on
    assert again.validation(2) == {"score": 0.5, "validation": {"a": {"pq": 0.5}}}
    again.write(step(3))
    assert [row["step"] for row in log(tmp_path)] == [0, 1, 2, 2, 3]


def test_half_a_line_before_the_checkpoints_step_costs_that_line_alone(tmp_path):
    one = work(tmp_path)
    one.write_all([step(1), step(2)])
    one.save_checkpoint(state(3))
    path = tmp_path / "model.training" / "log.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], json.dumps(step(3))]) + "\n")
    again = work(tmp_path)
    again.load_checkpoint()
    assert [row["step"] for row in log(tmp_path)] == [1, 3]


def test_without_a_checkpoint_a_run_begins_with_an_empty_log(tmp_path):
    one = work(tmp_path)
    one.write_all([step(1), step(2)])
    again = work(tmp_path)
    assert again.load_checkpoint() is None
    again.write(step(1))
    assert log(tmp_path) == [step(1)]


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"PK\x03\x04 half a file"], ids=["empty", "text", "half"]
)
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path, content):
    one = work(tmp_path)
    one.write(step(1))
    (one.folder / "checkpoint.pt").write_bytes(content)
    with pytest.raises(RecipeError, match=r"checkpoint\.pt cannot be read.*--restart"):
        work(tmp_path).load_checkpoint()
    torch.save({"network": {}}, one.folder / "checkpoint.pt")  # of something else
    with pytest.raises(RecipeError, match=r"checkpoint\.pt cannot be read.*course"):
        work(tmp_path).load_checkpoint()
    assert log(tmp_path) == [step(1)]


def test_another_recipe_is_refused_and_restart_throws_everything_away(tmp_path):
    one = work(tmp_path)
    one.write(step(1))
    one.save_checkpoint(state(1))
    one.save_best({"w": torch.zeros(2)}, 1, 0.5)
    before = names(tmp_path)
    work(tmp_path)  # the same recipe goes on
    with pytest.raises(RecipeError, match=r"model\.training holds a run of another.*--restart"):
        work(tmp_path, "seed = 4\n")
    assert names(tmp_path) == before
    assert (one.folder / "recipe.toml").read_text() == RECIPE
    anew = work(tmp_path, "seed = 4\n", restart=True)
    assert names(tmp_path) == ["recipe.toml"]
    assert (one.folder / "recipe.toml").read_text() == "seed = 4\n"
    assert anew.load_checkpoint() is None


def test_two_runs_at_once_are_refused(tmp_path):
    one = work(tmp_path)
    one.write(step(1))
    BEFORE.clear()
    with pytest.raises(RecipeError, match=r"another process trains in .*model\.training"):
        work(tmp_path)
    one.close()
    one.close()
    again = work(tmp_path)
    assert log(tmp_path) == [step(1)]
    again.close()
    BEFORE.clear()


def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    one = work(tmp_path)
    one.save_checkpoint(state(1))
    one.save_best({"w": torch.zeros(2)}, 1, 0.5)
    before = names(tmp_path)

    def half(*args, **kwargs):
        args[1].write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr("wsi_pipeline.training.workplace.torch.save", half)
    monkeypatch.setattr("wsi_pipeline.training.workplace.save_file", half)
    with pytest.raises(RuntimeError, match="killed"):
        one.save_checkpoint(state(2))
    with pytest.raises(RuntimeError, match="killed"):
        one.save_best({"w": torch.ones(2)}, 2, 0.6)
    monkeypatch.undo()
    one.write(step(1))
    assert work(tmp_path).load_checkpoint()["course"]["step"] == 1
    weights, number = one.load_best()
    assert (weights["w"].tolist(), number) == ([0.0, 0.0], 1)
    assert names(tmp_path) == sorted([*before, "log.jsonl"])


def test_the_best_weights_keep_their_step(tmp_path):
    one = work(tmp_path)
    weights = {"a": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(7)}
    one.save_best(weights, 40, 0.5)
    one.save_best({**weights, "n": torch.tensor(8)}, 60, math.nan)
    found, number = work(tmp_path).load_best()
    assert number == 60
    assert torch.equal(found["a"], weights["a"])
    assert found["n"].item() == 8
    with safe_open(one.folder / "best.safetensors", framework="pt") as file:
        assert file.metadata() == {"step": "60", "score": "nan"}
    # they are a copy
    weights["a"].zero_()
    assert one.load_best()[0]["a"].sum() == 15


def test_only_the_first_rank_writes(tmp_path):
    told = []
    other = work(tmp_path, first=False, told=told)
    other.write(step(1))
    assert not other.folder.exists()
    assert told == []
    one = work(tmp_path)
    one.write_all([step(1), step(2), step(3)])
    one.save_checkpoint(state(2))
    other = work(tmp_path, "whatever", first=False)
    assert other.load_checkpoint()["course"]["step"] == 2
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3]  # cut by the first rank alone


def test_scores_of_a_step_are_its_last_validations(tmp_path):
    one = work(tmp_path)
    one.write(step(5))
    assert one.validation(5) == {}
    one.write({"step": 5, "validation": {"a": {"pq": 0.1}}, "score": 0.1})
    one.write({"step": 5, "validation": {"a": {"pq": 0.2}}, "score": 0.2})
    one.write({"step": 6, "validation": {"a": {"pq": 0.9}}, "score": 0.9})
    assert one.validation(5) == {"score": 0.2, "validation": {"a": {"pq": 0.2}}}


def test_pictures_are_drawn_and_found(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "wsi_pipeline.training.workplace.draw_curves",
        lambda rows, path: (drawn.extend(rows), path.write_bytes(b"png")),
    )
    one = work(tmp_path)
    assert one.pictures(5) == {}
    one.write({"step": 5, "lr": 0.5, "loss": 3.0, "losses": {"a/ce": 1.0, "a/dice": 2.0}})
    one.write({"step": 5, "validation": {"a": {"pq": 0.1}, "b": {"ap": math.nan}}, "score": 0.1})
    one.draw_curves()
    learnt, judged = drawn
    assert (learnt.step, learnt.loss, learnt.learning_rate) == (5, 3.0, 0.5)
    assert dict(learnt.losses) == {"a": 3.0}  # a line a head
    assert dict(judged.scores) == {"a pq": 0.1}
    assert list(one.pictures(5)) == ["curves.png"]
    (one.folder / "examples-000005.png").write_bytes(b"png")
    assert list(one.pictures(5)) == ["curves.png", "examples.png"]
    assert list(one.pictures(6)) == ["curves.png"]
    one.draw_examples(7, [])
    assert not (one.folder / "examples-000007.png").exists()


def test_what_the_bundle_must_not_replace_is_refused_at_once(tmp_path):
    """Not after hours of training; whatever was begun under the name before."""
    work(tmp_path)
    out = tmp_path / "model"
    (tmp_path / "elsewhere").mkdir()
    out.symlink_to("elsewhere")
    with pytest.raises(RecipeError, match="is a link"):
        work(tmp_path, restart=True)
    out.unlink()
    out.mkdir()
    (out / "spec.json").write_text('{"spec_dir": "spec"}')
    with pytest.raises(RecipeError, match="exists and is no model bundle"):
        work(tmp_path, restart=True)
    (out / "spec.json").write_text(SPEC.to_json())
    work(tmp_path, restart=True)
