"""`wsi bench`: arithmetic on fake clocks, the verdict, the document, and the command."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_fixtures import SMALL, FakeClock, small_slide
from click.testing import CliRunner
from torch import nn

from wsi_pipeline import bench as room
from wsi_pipeline.bench import BenchOptions, rates
from wsi_pipeline.bench.advice import Circumstances, advise
from wsi_pipeline.bench.run import bench
from wsi_pipeline.bench.timing import Limit, Measured, Stage, Stopwatch, in_threads, measure
from wsi_pipeline.bench.whole import BusyMeter, _Sampler
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.cli import wsi
from wsi_pipeline.eight_bit import obstacle
from wsi_pipeline.errors import Interrupted
from wsi_pipeline.network import build_network


def fake_stage(name, clock, works, limits, log=None):
    """A stage whose work and limit take the given seconds in each round."""
    works, limits = iter(works), iter(limits)

    def work(now):
        begun = now()
        clock.spend(next(works))
        if log is not None:
            log.append(name)
        return now() - begun

    def limit(now):
        if log is not None:
            log.append(f"{name} limit")
        return Limit(name=f"least of {name}", seconds=next(limits))

    return Stage(name=name, work=work, limit=limit)


def whole_stage(clock, works):
    return replace(fake_stage("whole", clock, works, []), limit=None)


@pytest.fixture
def slow_rates_are_small(monkeypatch):
    monkeypatch.setitem(rates.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(rates.COPY_BYTES, "cpu", 1 << 12)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return small_slide(tmp_path_factory.mktemp("slides") / "one.svs")


# --- arithmetic ---------------------------------------------------------------------------


def test_results_are_medians_of_rounds_and_shares_are_compared_within_a_round():
    clock = FakeClock()
    stage = fake_stage("read", clock, [4.0, 10.0, 5.0], [2.0, 1.0, 4.0])
    (found,) = measure([stage], 3, clock=clock)
    assert found.rounds == (4.0, 10.0, 5.0)
    assert found.seconds == 5.0
    assert found.limit == Limit(name="least of read", seconds=2.0)
    assert found.share == statistics.median([0.5, 0.1, 0.8])  # not 2 / 5


def test_work_and_limit_take_turns():
    clock, log = FakeClock(), []
    pair = [fake_stage(name, clock, [1, 1], [1, 1], log) for name in ("a", "b")]
    measure(pair, 2, clock=clock)
    assert log == ["a", "a limit", "b", "b limit"] * 2


def test_the_whole_is_measured_against_its_slowest_stage_of_the_same_round():
    clock = FakeClock()
    parts = [
        fake_stage("read", clock, [3.0, 1.0], [1.0, 1.0]),
        fake_stage("network", clock, [2.0, 4.0], [1.0, 1.0]),
    ]
    *_, whole = measure([*parts, whole_stage(clock, [6.0, 5.0])], 2, clock=clock)
    assert [limit.seconds for limit in whole.limits] == [3.0, 4.0]
    assert whole.share == statistics.median([3 / 6, 4 / 5])


def test_a_stage_that_takes_no_time_divides_nothing():
    stage = Measured(name="a", rounds=(0.0,), limits=(Limit(name="b", seconds=1.0),))
    assert stage.share == 0.0


def test_measuring_stops_when_asked():
    clock, log = FakeClock(), []
    pair = [fake_stage(name, clock, [1], [1], log) for name in ("a", "b")]
    with pytest.raises(Interrupted):
        measure(pair, 1, clock=clock, stop=lambda: "a limit" in log)
    assert "b" not in log


def test_a_stopwatch_counts_its_blocks_alone():
    clock = FakeClock()
    watch = Stopwatch(clock)
    for seconds in (2.0, 3.0):
        with watch.running():
            clock.spend(seconds)
        clock.spend(100.0)
    assert watch.seconds == 5.0


def test_threads_do_every_item_and_raise_what_fails():
    seen = []
    in_threads(seen.append, range(20), 3)
    assert sorted(seen) == list(range(20))
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda value: 1 / value, [1, 0], 2)


def test_rates_are_work_over_time(slow_rates_are_small):
    clock = FakeClock(tick=0.5)
    assert rates.matrix_rate("cpu", "fp32", clock=clock) == 2 * 64**3 / 0.5
    if obstacle() is None:
        assert rates.matrix_rate("cpu", "int8", clock=clock) == 2 * 64**3 / 0.5
    assert rates.memory_rate("cpu", clock=clock) == 2 * 4096 / 0.5  # read and written


def test_flops_are_those_of_the_convolutions():
    """Against a count of each convolution's outputs while the network runs."""
    spec = find_bundle("cerberus-lite").spec
    network, total = build_network(spec).eval().to("meta"), 0

    def count(module, _inputs, out):
        nonlocal total
        kernel = module.kernel_size[0] * module.kernel_size[1]
        total += 2 * out.numel() * kernel * module.in_channels // module.groups

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 96, 96, device="meta"))
    assert rates.dense_flops(spec, [(96, 96)]) == pytest.approx(total, rel=1e-6)
    assert total > 0


def test_a_cpu_is_busy_by_the_processor_time_of_the_process():
    clock, cpu = FakeClock(), FakeClock()
    with BusyMeter("cpu", clock=clock, cpu_clock=cpu, cpus=2) as meter:
        clock.spend(10.0)
        cpu.spend(15.0)
    assert (meter.seconds, meter.share) == (10.0, 0.75)


def test_a_device_that_tells_nothing_has_no_share():
    with BusyMeter("mps", clock=FakeClock(tick=1.0)) as meter:
        pass
    assert meter.share is None
    assert meter.seconds == 1.0


@pytest.mark.parametrize(("is_empty", "share"), [(False, 1.0), (True, 0.0)])
def test_a_queue_is_busy_while_it_is_not_empty(is_empty, share):
    asked = threading.Event()

    def query():
        asked.set()
        return is_empty

    sampler = _Sampler(query)
    sampler.start()
    assert asked.wait(10)
    assert sampler.stop() == share


# --- the verdict --------------------------------------------------------------------------


def measured(name, seconds, limit):
    return Measured(name=name, rounds=(seconds,), limits=(Limit(name="x", seconds=limit),))


WHERE = Circumstances(device="cpu", precision="bf16", half_pays=True, decoders=1, cpus=4)
NAMES = ("tissue", "read", "network", "maps", "objects")


def verdict(slowest, *, share, whole=10.0, where=WHERE):
    parts = [
        measured(name, 9.0 if name == slowest else 0.1, 9.0 * share if name == slowest else 0.1)
        for name in NAMES
    ]
    return advise(parts, measured("whole", whole, 9.0), where)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_the_slowest_stage_is_named_with_its_numbers(name, share):
    advice = verdict(name, share=share)
    assert advice.stage == name
    assert name in advice.finding
    assert f"{share:.0%}" in advice.finding
    assert advice.remedy


def test_remedies_depend_on_what_is_near_its_limit():
    assert "--workers" in verdict("read", share=0.9).remedy
    assert "local disk" in verdict("read", share=0.2).remedy
    assert "--tile-size" in verdict("maps", share=0.2).remedy
    assert "--out" in verdict("maps", share=0.9).remedy
    fully = replace(WHERE, decoders=4)
    assert "--workers" not in verdict("read", share=0.9, where=fully).remedy


def test_remedies_depend_on_the_device():
    assert "--device cuda" in verdict("network", share=0.9).remedy
    able = replace(WHERE, int8_runs=True)
    assert "--precision int8" in verdict("network", share=0.9, where=able).remedy
    assert "int8" not in verdict("network", share=0.2, where=able).remedy
    done = replace(able, precision="int8")
    assert "--device cuda" in verdict("network", share=0.9, where=done).remedy
    cuda = replace(WHERE, device="cuda")
    assert "--device" not in verdict("network", share=0.9, where=cuda).remedy
    assert "--batch-size" in verdict("network", share=0.2, where=cuda).remedy
    full = replace(cuda, precision="fp32")
    assert "bf16" in verdict("network", share=0.9, where=full).remedy
    never = replace(full, half_pays=False)
    assert "bf16" not in verdict("network", share=0.9, where=never).remedy


def test_a_whole_that_no_stage_explains_is_about_overlap_or_the_rest():
    assert verdict("network", share=0.9, whole=16.0).stage == "overlap"
    assert verdict("network", share=0.9, whole=30.0).stage == "rest"
    assert "9.4 s" in verdict("network", share=0.9, whole=30.0).remedy
    shared = verdict("maps", share=0.2, whole=16.0).remedy
    assert "share the processors" in shared
    assert "--tile-size" in shared  # and what helps the slowest
    cuda = replace(WHERE, device="cuda")
    assert "wait for each other" in verdict("maps", share=0.2, whole=16.0, where=cuda).remedy


# --- from end to end ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(slide, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rates.MATRIX_SIDE, "cpu", 64)
        patch.setitem(rates.COPY_BYTES, "cpu", 1 << 12)
        options = BenchOptions(slide=str(slide), repeat=2, tiles=2, **SMALL)
        return bench(options, tmp_path_factory.mktemp("bench"))


def test_the_document_holds_every_stage_and_the_whole(result):
    document = json.loads(json.dumps(result.to_json()))
    assert (document["schema"], document["schema_version"]) == ("wsi-bench", 1)
    assert [stage["name"] for stage in document["stages"]] == list(NAMES)
    for stage in (*document["stages"], document["whole"]):
        assert len(stage["rounds_s"]) == len(stage["limit"]["rounds_s"]) == 2
        assert stage["seconds"] == statistics.median(stage["rounds_s"]) > 0
        assert stage["limit"]["seconds"] > 0
        assert stage["mpx_per_s"] == pytest.approx(document["mpx"] / stage["seconds"])
        pairs = zip(stage["limit"]["rounds_s"], stage["rounds_s"], strict=True)
        assert stage["share_of_limit"] == pytest.approx(statistics.median(a / b for a, b in pairs))
    whole = document["whole"]
    assert 0 < whole["device_busy"] <= 1
    assert whole["mm2_per_s"] == pytest.approx(document["mm2"] / whole["seconds"], rel=1e-3)
    assert document["options"]["tiles"] == 2
    assert 1 <= document["options"]["flops_redundancy"] <= document["options"]["redundancy"]
    assert document["bottleneck"]["stage"] in (*NAMES, "overlap", "rest")
    assert document["peak_rss_mb"] > 0
    assert document["rates"]["matrix_tflops"] > 0


def test_the_document_names_no_folder(result, slide):
    text = json.dumps(result.to_json())
    assert slide.name in text
    assert str(slide.parent) not in text


def test_the_table_has_a_line_a_stage_and_the_verdict(result):
    lines = list(result.lines())
    for stage in (*result.stages, result.whole):
        (line,) = (line for line in lines if line.startswith(f"{stage.name} "))
        words = line.split()
        assert words[1] == f"{stage.seconds:.3f}"
        assert words[2] == f"{result.mpx / stage.seconds:.1f}"
        assert words[3] == f"{stage.limit.seconds:.3f}"
        assert words[4] == f"{stage.share:.0%}"
        assert line.endswith(stage.limit.name)
    assert any(line.startswith(f"Bottleneck: {result.advice.stage}. ") for line in lines)
    assert lines[-1].startswith("Remedy: ")


@pytest.fixture
def fake_bench(monkeypatch, result):
    """Stands in for the measurement; keeps what it was asked."""
    asked = []

    def stand_in(options, folder, *, stop, say):
        assert folder.is_dir()
        asked.append((options, folder))
        say("working")
        return result

    monkeypatch.setattr(room, "bench", stand_in)
    return asked


def invoke(*arguments):
    done = CliRunner().invoke(wsi, ["bench", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_the_table_goes_to_the_standard_output(fake_bench, result):
    done = invoke()
    assert done.exit_code == 0
    assert done.stdout.splitlines() == list(result.lines())
    assert "working" in done.stderr
    assert fake_bench[0][0] == BenchOptions()


@pytest.mark.parametrize("how", [["--json"], ["--json", "-"], ["--json", "--repeat", "2"]])
def test_json_on_the_standard_output_is_alone_there(fake_bench, result, how):
    done = invoke(*how)
    assert json.loads(done.stdout) == json.loads(json.dumps(result.to_json()))
    assert "Bottleneck" in done.stderr


def test_json_in_a_file_comes_beside_the_table(fake_bench, result, tmp_path):
    done = invoke("--json", tmp_path / "new" / "bench.json")
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert "Bottleneck" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("--slide", "a.svs", "slide", "a.svs"),
        ("--model", "m", "model", "m"),
        ("--device", "cuda:1", "device", "cuda:1"),
        ("--precision", "fp16", "precision", "fp16"),
        ("--batch-size", 3, "batch_size", 3),
        ("--tile-size", 512, "tile_size", 512),
        ("--workers", 5, "workers", 5),
        ("--mpp", 0.3, "mpp", 0.3),
        ("--size", 4096, "size_px", 4096),
        ("--tiles", 7, "tiles", 7),
        ("--repeat", 9, "repeat", 9),
    ],
)
def test_every_option_is_asked_for(fake_bench, option, value, field, expected):
    invoke(option, value)
    ((options, _),) = fake_bench
    assert options == replace(BenchOptions(), **{field: expected})


def test_scratch_space_is_where_it_was_asked_for_and_empty_again(fake_bench, tmp_path):
    invoke("--scratch", tmp_path)
    ((_, folder),) = fake_bench
    assert Path(folder).parent == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repeat", "0"],
        ["--repeat", "many"],
        ["--tile-size", "-1"],
        ["--precision", "int4"],
        ["--slide", "nowhere.svs"],
        ["--slide", "a.svs", "--size", "1024"],
        ["--model", "no-such-model"],
        ["--scratch", "nowhere"],
    ],
)
def test_wrong_use_is_said_without_a_traceback(arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Error" in done.stderr
    assert "Traceback" not in done.output
    assert not done.stdout


def test_a_signal_ends_it_with_the_code_of_an_interrupted_run(monkeypatch):
    def interrupted(options, folder, *, stop, say):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        raise Interrupted("asked to stop; nothing was reported")

    monkeypatch.setattr(room, "bench", interrupted)
    assert invoke().exit_code == 75


def test_the_command_works_from_end_to_end(slow_rates_are_small, tmp_path):
    done = invoke(
        "--size", 1024, "--model", "stain-baseline", "--tile-size", 256, "--tiles", 1,
        "--repeat", 1, "--device", "cpu", "--scratch", tmp_path, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["slide"]["synthetic"] is True
    assert document["model"]["name"] == "stain-baseline"
    assert not list(tmp_path.iterdir())
