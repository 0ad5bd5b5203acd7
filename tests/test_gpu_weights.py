"""The script for a machine with a GPU, without one: its arithmetic, its arguments, a tiny run."""

import json
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_fixtures import write_discs, write_recipe

from benchmarks import gpu_weights, step_cost
from benchmarks.gpu_weights import LIMITS, SETTINGS, differences, named, parse, read
from benchmarks.step_cost import Operation, Rates, counted, floor_seconds, network_pass, totals
from wsi_pipeline.bundle import open_bundle
from wsi_pipeline.golden import check_golden
from wsi_pipeline.network import build_network
from wsi_pipeline.training.recipe import model_spec, read_recipe
from wsi_pipeline.weights import SHARD_BYTES, halved, write_weights

WEIGHTS = Path(__file__).parent.parent / "workflows" / "weights"
OPEN, LITE = WEIGHTS / "open.toml", WEIGHTS / "stage-5.toml"


@pytest.fixture(autouse=True)
def variables(monkeypatch, tmp_path):
    for name in ("WSI_DATA", "PSEUDO", "STAGES"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, write_discs(tmp_path / "discs"))


def spec_of(path):
    return model_spec(read_recipe(path), None, name="x")


def call(recipe, folder, *arguments):
    words = ["--recipe", str(recipe), "--tiny", "--device", "cpu", "--name", "discs"]
    gpu_weights.main([*arguments, *words, "--work", str(folder / "w"), "--out", str(folder / "o")])
    return json.loads((folder / "o" / "report.json").read_text())


# The recipe


def test_the_wide_network_learns_from_what_the_narrow_one_did():
    wide, narrow = (tomllib.loads(path.read_text()) for path in (OPEN, LITE))
    # of the pseudo-labels the narrow one set a slide's aside
    (wider,) = [source for source in wide["source"] if "split" in source]
    assert (wider["path"], wider.pop("split")) == ("$PSEUDO", False)
    assert wide["source"] == narrow["source"]
    assert wide["model"]["heads"] == narrow["model"]["heads"]
    assert wide["heads"] == narrow["heads"]
    assert wide["batches"]["tasks"] == narrow["batches"]["tasks"]


def test_the_wide_network_is_as_wide_as_the_paper_s_and_starts_from_nothing():
    recipe = read_recipe(OPEN)
    spec = model_spec(recipe, None, name="x")
    assert recipe.start == type(recipe.start)()
    with torch.device("meta"):
        own = sum(p.numel() for p in build_network(spec).parameters())
    # Encoder, projection, four decoders of 3, 3, 3 and 3 channels; see test_network.py
    decoder = 1_255_872 + 6_723
    assert spec.architecture == "cerberus"
    assert own == 21_797_672 - 513_000 + 131_072 + 4 * decoder


def test_an_encoder_can_be_pretrained_first():
    wanted = (
        'pretrain={slide=[{path="$WSI_DATA/a.svs"}, {path="$WSI_DATA/b.tiff", mpp=0.37}], '
        'simclr={steps=3000, precision="bf16"}}'
    )
    pretrain = read_recipe(OPEN, [wanted]).pretrain
    assert [slide.mpp for slide in pretrain.slide] == [None, 0.37]
    assert "$" not in str(pretrain.slide[0].path)
    assert pretrain.simclr.steps == 3000


def test_released_files_of_the_wide_network_are_small(tmp_path):
    write_weights(tmp_path, halved(build_network(spec_of(OPEN)).state_dict()))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) <= SHARD_BYTES
    assert 2 * 26e6 < sum(sizes) < 2.2 * 26e6


# What a step costs


@pytest.mark.parametrize("path", [OPEN, LITE])
def test_flops_are_those_that_torch_counts(path):
    spec = spec_of(path)
    rows = {"nuclei": 1, "gland": 2}
    own = network_pass(spec, rows, size=3, crop_px=64, dtype=torch.bfloat16)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_network(spec)
        at = {head: torch.empty(count, dtype=torch.int64) for head, count in rows.items()}
        logits = network(torch.empty(3, 3, 64, 64), at)
        sum(value.mean() for value in logits.values()).backward()
    assert sum(op.flops for op in own) == counter.get_total_flops() > 0


def test_a_pass_moves_twice_the_bytes_for_twice_the_samples():
    spec = spec_of(LITE)
    moved = [
        totals(network_pass(spec, {"nuclei": n}, size=n, crop_px=256, dtype=torch.bfloat16))
        for n in (4, 8)
    ]
    assert moved[1]["gigabytes"] == pytest.approx(2 * moved[0]["gigabytes"], rel=0.05)
    assert moved[1]["operations"] == moved[0]["operations"]


def test_each_tensor_is_read_and_written_once():
    a, b = torch.ones(10, 100), torch.ones(10, 100)
    size = 4 * 1000

    def bytes_of(work):
        return sum(op.bytes for op in counted(work))

    assert bytes_of(lambda: a + b) == 3 * size
    assert bytes_of(lambda: a.add_(b)) == 3 * size
    assert bytes_of(lambda: a.copy_(b)) == 2 * size
    assert bytes_of(lambda: a.zero_()) == size
    assert bytes_of(lambda: a.view(100, 10).t()[3:]) == 0
    assert bytes_of(lambda: torch.empty_like(a)) == 0
    row = torch.ones(1, 100).expand(10, 100)
    assert bytes_of(lambda: a + row) == 2 * size + 400
    assert bytes_of(lambda: torch._foreach_add_([a, b], 1)) == 4 * size
    assert bytes_of(lambda: a.to(torch.bfloat16)) == 1.5 * size


def test_an_operation_takes_the_longer_of_arithmetic_and_bytes():
    work = [
        Operation(name="convolution", flops=600, bytes=10),  # 6 s, 1 s
        Operation(name="add", flops=0, bytes=30),  # 3 s
    ]
    rates = {"flops": 100.0, "bytes": 10.0}
    assert floor_seconds(work, Rates(**rates, launch_s=0.0, waits=False)) == 9
    assert floor_seconds(work, Rates(**rates, launch_s=4.0, waits=False)) == 9
    assert floor_seconds(work, Rates(**rates, launch_s=5.0, waits=False)) == 10
    assert floor_seconds(work, Rates(**rates, launch_s=5.0, waits=True)) == 19
    assert totals(work) == {"tflop": 6e-10, "gigabytes": 4e-8, "operations": 2}


def test_times_are_medians_after_warming_up(monkeypatch):
    clock = iter([0, 50, 100, 150, 200, 201, 300, 302, 400, 409])  # 50, 50, then 1, 2, 9
    monkeypatch.setattr(step_cost.time, "perf_counter", lambda: next(clock))
    done = []
    found = step_cost.median_seconds(lambda: done.append(1), "cpu", repeats=3, warm_up=2)
    assert (found, len(done)) == (2, 5)


# What a device may differ by


def test_differences_are_of_logits_and_of_probabilities():
    expected = {"a": torch.tensor([[[[0.0]], [[0.0]]]]), "b": torch.tensor([[[[3.0]], [[4.0]]]])}
    same = differences(expected, expected)
    assert same == {"relative": 0, "largest": 0, "mean": 0}
    found = {"a": torch.tensor([[[[0.0]], [[1.0]]]]), "b": expected["b"]}
    other = differences(found, expected)
    gap = torch.tensor([0.0, 1.0]).softmax(0)[1] - 0.5
    assert other["relative"] == pytest.approx(1 / 5)
    assert other["largest"] == pytest.approx(float(gap))
    assert other["mean"] == pytest.approx(float(gap) / 2)


def test_every_setting_has_a_limit_and_names_say_what_it_is():
    assert [named(setting)[0] for setting in SETTINGS] == [
        "fp32", "fp32 channels last", "fp32 TF32 channels last", "bf16", "bf16 channels last",
    ]  # fmt: skip
    assert {named(setting)[1] for setting in SETTINGS} == set(LIMITS.values())


@pytest.mark.parametrize("wrong", [float("nan"), 2.0])
def test_a_device_that_computes_something_else_ends_the_call(recipe, tmp_path, monkeypatch, wrong):
    right = gpu_weights._logits

    def off(network, pixels, device, setting):
        found = right(network, pixels, device, setting)
        last = setting == ("bf16", False, True)
        return {name: value * wrong if last else value for name, value in found.items()}

    monkeypatch.setattr(gpu_weights, "_logits", off)
    with pytest.raises(SystemExit, match="something else"):
        call(recipe, tmp_path, "check", "train")
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert [row["passed"] for row in report["check"]["settings"]] == [True] * 4 + [False]
    assert "train" not in report


# Arguments


def test_arguments():
    options = parse(["check", "train", "--seconds", "60", "--set", "seed=7"])
    assert options.steps == ["check", "train"]
    assert (options.seconds, options.tile, options.tiny) == (60, 384, False)
    assert options.recipe == gpu_weights.RECIPE == OPEN
    assert read(options).seed == 7
    with pytest.raises(SystemExit):
        parse(["fly"])
    with pytest.raises(SystemExit):
        parse([])


def test_tiny_is_narrow_where_weights_are_fresh_and_gives_way_to_what_is_set():
    tiny = read(parse(["train", "--tiny", "--set", "schedule.steps=6"]))
    assert tiny.schedule.steps == 6
    assert tiny.batches.crop_px == 64
    assert max(tiny.model.options["widths"]) == 12
    start = 'start={model="cerberus-lite"}'
    goes_on = read(parse(["train", "--tiny", "--recipe", str(LITE), "--set", start]))
    assert goes_on.start.model == "cerberus-lite"
    assert max(goes_on.model.options["widths"]) == 192


# All of it, in small


def unpacked(folder):
    with tarfile.open(folder / "bundle.tar") as archive:
        archive.extractall(folder, filter="data")
    (folder / "bundle.tar").unlink()
    with tarfile.open(folder / "training.tar") as archive:
        names = archive.getnames()
    return open_bundle(folder), names


def test_a_tiny_run_from_the_check_to_the_release(recipe, tmp_path):
    report = call(recipe, tmp_path, "check", "cost", "train", "release")
    assert report["check"]["passed"]
    assert report["check"]["settings"][0]["relative"] == 0  # the reference itself
    for part in ("network", "step"):
        row = report["cost"][part]
        assert min(row.values()) > 0
    # On the CPU the optimiser and the rest of a step are operations of their own.
    assert report["cost"]["step"]["operations"] > 2 * report["cost"]["network"]["operations"]
    assert report["cost"]["step"]["tflop"] == report["cost"]["network"]["tflop"]
    assert report["train"]["finished"]
    assert report["train"]["steps"] == 4
    assert len(list((tmp_path / "o" / "discs").iterdir())) == 3
    bundle, names = unpacked(tmp_path / "o" / "discs")
    assert {"log.jsonl", "curves.png", "recipe.toml"} < set(names)
    assert bundle.digest == report["release"]["digest"]
    assert not check_golden(bundle, device="cpu", precision="fp32")
    assert "# changed: schedule.steps=4" in (bundle.path / "train.toml").read_text()


def test_a_call_that_runs_out_of_time_is_gone_on_with(recipe, tmp_path):
    first = call(recipe, tmp_path, "train", "release", "--seconds", "0")
    assert (first["train"]["finished"], first["train"]["steps"]) == (False, 1)
    assert not first["release"]["finished"]
    bundle, _ = unpacked(tmp_path / "o" / "discs")
    assert json.loads((bundle.path / "metrics.json").read_text())["step"] == 1
    state = torch.load(tmp_path / "w" / "discs.training" / "checkpoint.pt", weights_only=True)
    averaged = state["averaged"]["encoder.stem.conv.weight"]
    found = bundle.load_network().state_dict()["encoder.stem.conv.weight"]
    torch.testing.assert_close(found, averaged, rtol=1e-3, atol=1e-4)
    second = call(recipe, tmp_path, "train", "release")
    assert (second["train"]["finished"], second["train"]["steps"]) == (True, 3)
    assert second["release"]["finished"]
    assert second["release"]["digest"] != first["release"]["digest"]


def test_nothing_learnt_is_nothing_to_release(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(recipe, tmp_path, "release")
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_does_all_of_it(recipe, tmp_path):
    words = ["check", "cost", "train", "release", "--recipe", str(recipe), "--tiny"]
    folders = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    gpu_weights.main([*words, "--device", "cuda", "--name", "discs", *folders])
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["check"]["passed"]
    assert report["cost"]["peak_gigabytes"] > 0
    assert report["train"]["finished"]
