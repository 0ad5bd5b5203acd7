"""``wsi train`` and ``wsi evaluate`` as a user meets them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from training_fixtures import write_discs, write_recipe

from wsi_pipeline.cli import wsi
from wsi_pipeline.learning import describe_row


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    write_recipe(folder, write_discs(folder / "data"))
    return folder


@pytest.fixture(scope="module")
def bundle(place) -> Path:
    done = invoke("train", place / "recipe.toml", "--out", place / "model", "--device", "cpu")
    assert done.exit_code == 0, done.output
    return place / "model"


def invoke(*arguments):
    return CliRunner().invoke(wsi, [str(argument) for argument in arguments])


def test_train_says_what_it_did_and_where_to_look(place, bundle):
    done = invoke(
        "train", place / "recipe.toml", "--out", place / "other", "--device", "cpu",
        "--set", "schedule.steps=2", "--set", "seed=8",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("fresh weights", "2/2 loss nuclei/ce", "validation nuclei pq", "curves.png",
                  f"--model {place / 'other'}"):  # fmt: skip
        assert words in done.output
    assert json.loads((place / "other" / "metrics.json").read_text())["seed"] == 8
    again = invoke("train", place / "recipe.toml", "--out", place / "other", "--device", "cpu")
    assert again.exit_code == 2
    assert "--restart" in again.output
    anew = invoke(
        "train", place / "recipe.toml", "--out", place / "other", "--device", "cpu", "--restart"
    )
    assert anew.exit_code == 0, anew.output


def test_a_trained_bundle_runs_on_a_slide(bundle, tmp_path):
    assert invoke("synth", tmp_path / "s.svs", "--width", 512, "--height", 512,
                  "--mpp", 0.5).exit_code == 0  # fmt: skip
    done = invoke(
        "run", tmp_path / "s.svs", "--out", tmp_path / "out", "--model", bundle, "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    assert invoke("info", bundle).exit_code == 0


def test_evaluate_a_folder_and_a_recipe(bundle, place, tmp_path):
    done = invoke(
        "evaluate", bundle, place / "data", "--layout", "plain",
        "--json", tmp_path / "deep" / "f.json", "--pictures", tmp_path / "p.png",
        "--resamples", 20, "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("8 images, 8 patients", "aji_plus", "95 % interval"):
        assert words in done.output
    found = json.loads((tmp_path / "deep" / "f.json").read_text())
    assert found["images"] == 8
    assert set(found["heads"]["nuclei"]["pq"]) == {"value", "low", "high"}
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    counts = {}
    for part in ("validation", "train", "all"):
        path = tmp_path / f"{part}.json"
        done = invoke(
            "evaluate", bundle, place / "recipe.toml", "--json", path, "--part", part,
            "--resamples", 0, "--device", "cpu",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        counts[part] = json.loads(path.read_text())["images"]
    assert counts == {"validation": 4, "train": 4, "all": 8}
    few = invoke("evaluate", bundle, place / "data", "--layout", "plain", "--images", 2,
                 "--resamples", 0, "--json", tmp_path / "few.json")  # fmt: skip
    assert few.exit_code == 0, few.output
    assert json.loads((tmp_path / "few.json").read_text())["images"] == 2


def test_mpp_and_precision_change_what_is_computed(place, tmp_path):
    scores = {}
    for name, extra in {
        "plain": [], "mpp": ["--mpp", 1.0], "bf16": ["--precision", "bf16"],
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.json"
        done = invoke(
            "evaluate", "stain-baseline", place / "data", "--layout", "plain", "--resamples", 0,
            "--json", path, "--device", "cpu", "--precision", "fp32", *extra,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        scores[name] = json.loads(path.read_text())["heads"]
    assert scores["plain"]["nuclei"]["f1"]["value"] > 0.5
    assert scores["mpp"] != scores["plain"]
    assert scores["bf16"] != scores["plain"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{place}/recipe.toml", "--set", "batches.size=0"], "size >= 1"),
        (["train", "{place}/recipe.toml", "--set", 'source.0.layout="glas"'], "no Grade.csv"),
        (["train", "{place}/recipe.toml", "--set", 'source.0.path="nowhere"'], "does not exist"),
        (["train", "{place}/recipe.toml", "--set", 'model.heads=["lumen"]'], "lumen"),
        (["train", "{place}/recipe.toml", "--device", "cuda:9"], "is not here"),
        (["evaluate", "no-such-bundle", "{place}/data"], "no model bundle"),
        (["evaluate", "stain-baseline", "{place}/data", "--layout", "plain", "--part", "test"],
         "no images of the part 'test'"),
        (["evaluate", "stain-baseline", "{place}/empty"], "empty"),
    ],
)  # fmt: skip
def test_one_clear_error_and_exit_code_2(place, tmp_path, arguments, words):
    (place / "empty").mkdir(exist_ok=True)
    arguments = [argument.format(place=place) for argument in arguments]
    if arguments[0] == "train":
        arguments += ["--out", str(tmp_path / "model")]
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "model").exists()


def test_a_signal_stops_the_run_and_the_same_command_goes_on(place, bundle, tmp_path):
    command = [
        sys.executable, "-m", "wsi_pipeline", "train", str(place / "recipe.toml"),
        "--out", str(tmp_path / "model"), "--device", "cpu", "--set", "schedule.steps=3000",
        "--set", "validation.every=3000",
    ]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ}, text=True)
    log = tmp_path / "model.training" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and log.read_text().count("\n") > 20):
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 75, said
    assert "the same command goes on" in said
    assert (tmp_path / "model.training" / "checkpoint.pt").is_file()


def test_lines_of_the_log_for_people():
    assert describe_row({"step": 3, "losses": {"a/ce": 0.25}}) == "loss a/ce 0.250"
    assert describe_row({"step": 3, "validation": {"a": {"pq": None}}}).startswith(
        "validation none"
    )
    start = {"taken": ["x", "y"], "fresh": ["z"], "source": "bundle b"}
    begun = {"step": 0, "begin": {"parameters": 1234, "start": start}}
    assert describe_row(begun) == "1,234 parameters, 2 tensors from bundle b, 1 fresh"
    assert describe_row({"step": 3, "pretrain": {"loss": 0.5}}) == "SimCLR loss 0.500"
