import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import write_discs, write_recipe

from wsi_pipeline.bundle import open_bundle
from wsi_pipeline.errors import Interrupted, RecipeError
from wsi_pipeline.training.begin import begin
from wsi_pipeline.training.fit import Learner, learning_rate, train
from wsi_pipeline.training.loader import load_batches
from wsi_pipeline.training.ranks import Ranks
from wsi_pipeline.training.recipe import Schedule, read_recipe
from wsi_pipeline.training.sampler import Sampler
from wsi_pipeline.training.scoring import score_bundle


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("discs")
    return write_recipe(folder, write_discs(folder / "data"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "model"
    train(read_recipe(recipe), out, device="cpu")
    return out


def weights(bundle: Path) -> bytes:
    return (bundle / "weights.safetensors").read_bytes()


def rows(bundle: Path) -> list[dict]:
    log = bundle.with_name(bundle.name + ".training") / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_whole_bundle_is_written(whole, recipe):
    bundle = open_bundle(whole)
    assert bundle.spec.name == "model"
    assert bundle.load_network()
    assert (whole / "train.toml").read_text() == recipe.read_text()
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert metrics["step"] in (3, 6)
    assert set(metrics["validation"]["nuclei"]) == {"pq"}
    assert {row["part"]: row["images"] for row in metrics["data"]} == {"train": 4, "validation": 4}
    card = (whole / "card.md").read_text()
    for words in ("discs", "| plain | train | 4 | 4 | nuclei |", "seed 3", "Not for"):
        assert words in card
    for picture in ("curves.png", "examples.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")


def test_the_log_has_a_line_a_step_with_losses_and_rate(whole):
    steps = [row for row in rows(whole) if "losses" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]["losses"]) == {"nuclei/ce", "nuclei/dice"}
    for row in steps:
        assert row["loss"] == pytest.approx(sum(row["losses"].values()), rel=1e-5)
        assert row["samples"] == {"nuclei": 4}
    assert [row["step"] for row in rows(whole) if "validation" in row] == [3, 6]
    (first,) = [row["begin"] for row in rows(whole) if "begin" in row]
    assert first["start"] is None
    assert first["parameters"] > 1000


@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_interrupted_is_uninterrupted(recipe, whole, tmp_path, stop_after):
    out = tmp_path / "model"
    asked = iter([False] * (stop_after - 1) + [True] * 9)
    with pytest.raises(Interrupted, match="the same command goes on"):
        train(read_recipe(recipe), out, device="cpu", stop=lambda: next(asked))
    assert not out.exists()
    assert rows(out)[-1]["step"] == stop_after
    train(read_recipe(recipe), out, device="cpu")
    assert weights(out) == weights(whole)
    assert rows(out) == rows(whole)


def test_a_killed_run_goes_on_from_its_checkpoint(recipe, whole, tmp_path):
    out = tmp_path / "model"

    def die(row):
        if row.get("step") == 5 and "losses" in row:
            raise KeyboardInterrupt

    # rows are looked at every 20 steps and at checkpoints: the kill comes after step 6's learning
    with pytest.raises(KeyboardInterrupt):
        train(read_recipe(recipe), out, device="cpu", on_row=die)
    with (out.with_name("model.training") / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "los')  # half a line
    train(read_recipe(recipe), out, device="cpu")
    assert weights(out) == weights(whole)
    assert [row["step"] for row in rows(out) if "losses" in row] == [1, 2, 3, 4, 5, 6]


def test_another_seed_gives_other_weights_and_the_number_of_threads_does_not(
    recipe, whole, tmp_path
):
    train(read_recipe(recipe, ["batches.workers=3"]), tmp_path / "model", device="cpu")
    assert weights(tmp_path / "model") == weights(whole)
    train(read_recipe(recipe, ["seed=4"]), tmp_path / "other", device="cpu")
    assert weights(tmp_path / "other") != weights(whole)


def test_a_source_is_learnt_at_its_own_scales(recipe, tmp_path):
    found = {}
    for name, overrides in {
        "usual": [],
        "source": ["source.0.scale_min=1", "source.0.scale_max=1"],
        "all": ["augment.scale_min=1", "augment.scale_max=1"],
    }.items():
        short = ["schedule.steps=1", "validation.images=1", *overrides]
        train(read_recipe(recipe, short), tmp_path / name, device="cpu")
        found[name] = weights(tmp_path / name)
    assert found["source"] == found["all"] != found["usual"]


def test_it_learns(recipe, tmp_path):
    steps = ["schedule.steps=120", "validation.every=60", "batches.size=8", "schedule.ema=0.95"]
    train(read_recipe(recipe, steps), tmp_path / "model", device="cpu")
    losses = [row["loss"] for row in rows(tmp_path / "model") if "losses" in row]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    score = json.loads((tmp_path / "model" / "metrics.json").read_text())["score"]
    assert score > 0.5  # PQ of discs; an untrained network has 0


def test_it_stops_early(recipe, tmp_path):
    wanted = ["schedule.steps=400", "validation.every=2", "validation.patience=2"]
    slow = [*wanted, "schedule.learning_rate=1e-9"]  # nothing will get better
    train(read_recipe(recipe, slow), tmp_path / "model", device="cpu")
    assert json.loads((tmp_path / "model" / "metrics.json").read_text())["steps"] < 20


def test_without_validation_images_the_last_weights_are_kept(recipe, tmp_path):
    wanted = ["source.0.split=false", "schedule.steps=4"]
    train(read_recipe(recipe, wanted), tmp_path / "model", device="cpu")
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["step"] == 4
    assert metrics["validation"] == {}
    assert "no image was held out" in (tmp_path / "model" / "card.md").read_text()


def test_another_recipe_is_refused_until_restarted(recipe, whole, tmp_path):
    out = tmp_path / "model"
    asked = iter([True])
    with pytest.raises(Interrupted):
        train(read_recipe(recipe), out, device="cpu", stop=lambda: next(asked))
    with pytest.raises(RecipeError, match="--restart"):
        train(read_recipe(recipe, ["seed=9"]), out, device="cpu")
    train(read_recipe(recipe, ["seed=9"]), out, device="cpu", restart=True)
    assert weights(out) != weights(whole)


def test_a_damaged_checkpoint_is_said(recipe, tmp_path):
    folder = tmp_path / "model.training"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(RecipeError, match=r"checkpoint\.pt cannot be read.*--restart"):
        train(read_recipe(recipe), tmp_path / "model", device="cpu")


def test_losses_that_are_no_numbers_end_the_run(recipe, tmp_path):
    wild = read_recipe(recipe, ["schedule.learning_rate=1e30", "schedule.clip_norm=0"])
    with pytest.raises(RecipeError, match="lower learning_rate"):
        train(wild, tmp_path / "model", device="cpu")


def learner(recipe, *overrides) -> tuple[Learner, object]:
    read = read_recipe(recipe, overrides)
    start = begin(read, name="x", device="cpu")
    found = Learner(read, start.spec, start.network, Ranks(rank=0, world=1, device="cpu"))
    sampler = Sampler(start.sizes, read.batches, seed=read.seed)
    return found, islice(load_batches(start.sources, sampler, start.spec, workers=1), 5)


def test_frozen_parts_stay_as_they_are_and_thaw_when_told(recipe):
    frozen, batches = learner(recipe, 'freeze.thaw={"encoder"=2}')
    before = {k: v.clone() for k, v in frozen.network.state_dict().items()}
    frozen.learn(next(batches))
    frozen.learn(next(batches))
    state = frozen.network.state_dict()
    assert all(torch.equal(state[k], before[k]) for k in state if k.startswith("encoder."))
    assert not torch.equal(state["project.weight"], before["project.weight"])
    frozen.learn(next(batches))
    changed = frozen.network.state_dict()
    assert not torch.equal(changed["encoder.stem.conv.weight"], before["encoder.stem.conv.weight"])
    mean = "encoder.stem.norm.running_mean"
    assert not torch.equal(changed[mean], before[mean])


def test_the_moving_average_is_an_average(recipe):
    plain, batches = learner(recipe, "schedule.ema=0.5")
    own = plain.averaged.state_dict()["project.weight"].clone()
    for step in range(3):
        plain.learn(next(batches))
        decay = min(0.5, (1 + step) / (10 + step))
        own = decay * own + (1 - decay) * plain.network.state_dict()["project.weight"]
    assert torch.allclose(plain.averaged.state_dict()["project.weight"], own, atol=1e-6)
    none, batches = learner(recipe, "schedule.ema=0")
    none.learn(next(batches))
    for name, tensor in none.network.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(none.averaged.state_dict()[name], tensor), name


def test_gradients_are_clipped(recipe):
    norms = {}
    for clip in (0.001, 0):
        one, batches = learner(recipe, f"schedule.clip_norm={clip}")
        one.learn(next(batches))
        grads = [p.grad.flatten() for p in one.network.parameters() if p.grad is not None]
        norms[clip] = float(torch.cat(grads).norm())
    assert norms[0.001] == pytest.approx(0.001, rel=1e-3)
    assert norms[0] > 0.01


def test_learning_rates():
    paper = Schedule()
    assert [learning_rate(paper, s) for s in (0, 69_999, 70_000, 89_999)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4]
    )
    cosine = Schedule(steps=110, decay="cosine", warmup=10, learning_rate=2.0)
    assert learning_rate(cosine, 0) == pytest.approx(0.2)
    assert learning_rate(cosine, 9) == pytest.approx(2.0)
    assert learning_rate(cosine, 60) == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert learning_rate(cosine, 110) == pytest.approx(0.02)
    for bad in ({"steps": 0}, {"learning_rate": 0.0}, {"ema": 1.0}):
        with pytest.raises(RecipeError):
            Schedule(**bad)


def test_half_precision_learns_too(recipe):
    half, batches = learner(recipe, 'schedule.precision="bf16"')
    full, same = learner(recipe)
    a, b = half.learn(next(batches)), full.learn(next(same))
    assert math.isclose(float(a.total), float(b.total), rel_tol=0.05)
    assert float(a.total) != float(b.total)
    assert half.network.state_dict()["project.weight"].dtype == torch.float32


def test_torchrun_trains_one_model_on_two_processes(recipe, tmp_path):
    out = tmp_path / "model"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "wsi_pipeline", "train", str(recipe), "--out", str(out), "--device", "cpu",
    ]  # fmt: skip
    settings = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=settings)
    assert done.returncode == 0, done.stderr
    assert load_file(out / "weights.safetensors")
    steps = [row for row in rows(out) if "losses" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(row["samples"] == {"nuclei": 2} for row in steps)  # its half of each batch
    assert len([row for row in rows(out) if "begin" in row]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 5e-2)])
def test_a_gpu_learns_what_a_cpu_learns(recipe, precision, tolerance):
    found = {}
    for device in ("cpu", "cuda"):
        read = read_recipe(recipe, [f'schedule.precision="{precision}"'])
        start = begin(read, name="x", device=device)
        own = Learner(read, start.spec, start.network, Ranks(rank=0, world=1, device=device))
        sampler = Sampler(start.sizes, read.batches, seed=read.seed)
        batches = islice(load_batches(start.sources, sampler, start.spec, workers=1), 3)
        found[device] = [float(own.learn(batch).total) for batch in batches]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=tolerance)


def test_the_optimiser_learns_at_the_rate_of_the_step(recipe):
    found, batches = learner(recipe, "schedule.warmup=3", "schedule.clip_norm=0")
    rates = []
    for step in range(3):
        before = found.network.state_dict()["project.weight"].clone()
        found.learn(next(batches))
        moved = (found.network.state_dict()["project.weight"] - before).abs().max()
        rates.append(float(moved))
        # Adam's first step is the learning rate itself
        if step == 0:
            assert moved == pytest.approx(5e-3 / 3, rel=0.05)
    rows = found.take_rows()
    assert [row["lr"] for row in rows] == pytest.approx([5e-3 / 3, 1e-2 / 3, 5e-3])
    assert rates[2] > 1.5 * rates[0]
    assert found.take_rows() == []


def test_weights_decay_with_adamw(recipe):
    moved = {}
    for decay in (0.0, 50.0):
        found, batches = learner(recipe, f"schedule.weight_decay={decay}")
        before = found.network.state_dict()["project.weight"].clone()
        found.learn(next(batches))
        moved[decay] = found.network.state_dict()["project.weight"]
    assert torch.allclose(moved[0.0] - moved[50.0], 50.0 * 5e-3 * before, atol=1e-5)


def test_what_is_validated_is_what_is_kept(recipe, tmp_path):
    steps = ["schedule.steps=60", "validation.every=60", "batches.size=8", "schedule.ema=0.99"]
    out = tmp_path / "model"
    train(read_recipe(recipe, [*steps, "validation.pictures=2"]), out, device="cpu")
    metrics = json.loads((out / "metrics.json").read_text())
    again = score_bundle(out, recipe, at_most=3, resamples=0, device="cpu", precision="fp32")
    assert again.heads["nuclei"]["pq"].value > 0  # or the test would show nothing
    assert metrics["validation"]["nuclei"]["pq"] == pytest.approx(
        again.heads["nuclei"]["pq"].value, abs=1e-6
    )


def test_a_validation_without_a_score_is_never_better_than_one_with(recipe):
    found, _ = learner(recipe, "validation.patience=2")
    assert found.note(math.nan)
    assert found.note(0.2)
    assert not found.note(math.nan)
    assert not found.note(0.2)
    assert found.exhausted
    assert found.note(0.3)
    assert not found.exhausted
