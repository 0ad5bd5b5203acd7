"""Memory: sizes that fit below a cap, what the machine has, and a run that keeps to it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from wsi_pipeline import machine, memory
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.errors import JobError
from wsi_pipeline.filling import _panel_px
from wsi_pipeline.inference import TorchPredictor, _demand
from wsi_pipeline.memory import MARGIN, Demand, Sizes, default_cap, fit_sizes, parse_size
from wsi_pipeline.slide import Slide
from wsi_pipeline.synth import write_slide
from wsi_pipeline.tiling import PANEL_PX

GIB = 1 << 30
SPEC = replace(find_bundle("cerberus-lite").spec, architecture="cerberus", options={}, halo_px=160)
FULL = Demand(spec=SPEC, weights=36_000_000, value_bytes=4, on_host=True)
WANTED = Sizes(tile_px=1024, batch_size=1, extractors=8)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8G", 8 * GIB), ("1.5 GiB", 3 * GIB // 2), ("900mb", 900 << 20), ("2T", 2 << 40), (77, 77)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["8", "", "G", "-1G", "0G", "8 GX", "1e3M", 0, 8e9, True, 400 * "9" + "G", "\u0661G"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(JobError, match="memory must be"):
        parse_size(text)


def test_a_smaller_cap_gives_smaller_sizes_that_fit():
    tiles = []
    for cap in (8 * GIB, 3 * GIB, 2 * GIB, 3 * GIB // 2):
        sizes = fit_sizes(FULL, WANTED, cap=cap)
        assert FULL.peak(sizes) <= cap
        tiles.append(sizes.tile_px)
    assert tiles[0] == 1024
    assert tiles == sorted(tiles, reverse=True)
    assert len(set(tiles)) >= 3


@pytest.mark.parametrize(("value_bytes", "measured_mib"), [(2, 1449), (4, 2220)])
def test_the_model_is_not_below_what_was_measured(value_bytes, measured_mib):
    """By ``python -m benchmarks.memory --full --memory``, the cap being what the model says.

    Its windows change their sizes to and fro.
    """
    demand = replace(FULL, weights=27_846_492, value_bytes=value_bytes)
    sizes = replace(WANTED, extractors=2)
    assert measured_mib << 20 <= demand.peak(sizes) <= 3 * GIB
    assert fit_sizes(demand, sizes, cap="3GiB").tile_px == 1024


def test_with_small_tiles_finding_the_ranges_of_an_8_bit_network_sets_the_peak():
    half = replace(FULL, value_bytes=2)
    sizes = replace(WANTED, tile_px=256, extractors=1, canvas_bytes=memory.SMALL_CANVASES)
    assert replace(half, in_bytes=True).peak(sizes) > half.peak(sizes)
    large = replace(sizes, tile_px=2048)
    assert replace(half, in_bytes=True).peak(large) == half.peak(large)


@pytest.mark.parametrize("cap", [None, "3GiB", "2GiB", "1500M", "8G"])
@pytest.mark.parametrize("value_bytes", [1, 2, 4])
def test_memory_is_kept_as_long_as_a_pass_that_cannot_use_it_stays_below_the_cap(cap, value_bytes):
    demand = replace(FULL, value_bytes=value_bytes)
    most = parse_size(cap) if cap else default_cap(on_host=True)
    sizes = fit_sizes(demand, WANTED, cap=cap)
    enough, a_pass = demand.enough(sizes, cap=cap), demand._pass_bytes(sizes)
    counted_on = int(demand.peak(sizes) / MARGIN - 0.2 * a_pass)
    assert abs(enough - counted_on) <= 1 or counted_on < enough == int(most / MARGIN) - a_pass
    assert demand.enough(sizes, cap=8 * most) == int(8 * most / MARGIN) - a_pass
    assert demand.enough(sizes, cap=8 * most, share=2) == int(4 * most / MARGIN) - a_pass


def test_threads_go_before_batches_and_batches_before_tiles():
    gpu = replace(FULL, on_host=False)
    wanted = Sizes(tile_px=2048, batch_size=8, extractors=16)
    small = replace(wanted, extractors=1, canvas_bytes=memory.SMALL_CANVASES)
    caps = [gpu.peak(replace(small, extractors=4)), gpu.peak(small) - 1]
    fewer, smaller = (fit_sizes(gpu, wanted, cap=cap) for cap in caps)
    assert (fewer.tile_px, fewer.batch_size) == (2048, 8)
    assert fewer.extractors < 16
    assert (smaller.tile_px, smaller.batch_size) == (2048, 4)


def test_a_slide_that_is_ready_has_canvases_and_batches_of_its_own():
    gpu = replace(FULL, on_host=False)
    sizes = Sizes(tile_px=2048, batch_size=8, extractors=4)
    more = replace(gpu, ahead=True).peak(sizes) - gpu.peak(sizes)
    canvases_and_batches = sizes.canvas_bytes + 3 * 8 * (2048 + 2 * 160) ** 2 * 3
    assert more == pytest.approx(1.05 * canvases_and_batches, abs=2)
    small = Sizes(tile_px=256, batch_size=1, extractors=1, canvas_bytes=memory.SMALL_CANVASES)
    overview = replace(gpu, ahead=True).peak(small) - gpu.peak(small)
    assert overview > 2 * memory.SMALL_CANVASES


@pytest.mark.parametrize(("device", "ahead"), [("cpu", False), ("cuda:1", True), ("mps", True)])
def test_where_the_network_has_a_device_of_its_own_a_slide_is_ready(device, ahead):
    bundle = find_bundle("stain-baseline")
    demand = _demand(bundle.spec, bundle.load_network(), device, "fp32")
    assert demand.ahead == ahead


def test_too_small_a_cap_is_refused_with_the_least_that_does():
    with pytest.raises(JobError, match=r"--memory 500M is too little.*at least ([\d,]+) MiB") as no:
        fit_sizes(FULL, WANTED, cap="500M")
    least = int(str(no.value).split("at least ")[1].split(" MiB")[0].replace(",", ""))
    assert fit_sizes(FULL, WANTED, cap=f"{least + 32}M").tile_px == 256


def test_processes_divide_a_cap():
    for share in (2, 3):
        half = fit_sizes(FULL, WANTED, cap=f"{share * 2}G", share=share)
        assert half == fit_sizes(FULL, WANTED, cap="2G")
    with pytest.raises(JobError, match="in each of 4 processes needs at least"):
        fit_sizes(FULL, WANTED, cap="2G", share=4)


def test_what_was_asked_for_stays_or_is_refused():
    asked = replace(WANTED, extractors=1)
    fixed = ["tile_px", "extractors"]
    assert fit_sizes(FULL, asked, cap="8G", fixed=fixed).tile_px == 1024
    with pytest.raises(JobError, match="--tile-size 1024 and --workers 1 needs"):
        fit_sizes(FULL, asked, cap="2G", fixed=fixed)


def test_without_a_cap_a_cpu_keeps_below_3_gib_and_a_small_machine_below_its_own(monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda: 64 * GIB)
    assert FULL.peak(fit_sizes(FULL, WANTED, cap=None)) <= 3 * GIB
    monkeypatch.setattr(memory, "memory_limit", lambda: 2 * GIB)
    assert FULL.peak(fit_sizes(FULL, WANTED, cap=None)) <= 1.5 * GIB
    # No promise is broken by trying.
    monkeypatch.setattr(memory, "memory_limit", lambda: GIB // 2)
    assert fit_sizes(FULL, WANTED, cap=None).tile_px == 256


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_has_what_its_control_group_has(tmp_path, version):
    (tmp_path / "self").mkdir()
    top = tmp_path / "cgroup"
    folder = (top / "memory" if version == 1 else top) / "slurm" / "job_1"
    folder.mkdir(parents=True)
    line = "9:cpu,memory:/slurm/job_1" if version == 1 else "0::/slurm/job_1"
    (tmp_path / "self" / "cgroup").write_text(f"{line}\n8:cpuset:/else\n")
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    (folder / name).write_text("max\n" if version == 2 else str((1 << 63) - 4096))
    (folder.parent / name).write_text(f"{123 << 20}\n")
    assert machine.memory_limit(tmp_path, top) == 123 << 20
    assert machine.memory_limit(tmp_path / "none", top) == machine.total_memory()


def test_the_predictor_takes_sizes_from_the_cap():
    bundle = find_bundle("cerberus-lite")
    sizes = [TorchPredictor.load(bundle, device="cpu", memory=cap) for cap in ("8G", "900M")]
    assert sizes[0].tile_px == 1024
    assert sizes[0].canvas_bytes > sizes[1].canvas_bytes
    assert (sizes[1].tile_px, sizes[1].extractors) <= (sizes[0].tile_px, sizes[0].extractors)


def test_columns_of_tiles_are_as_wide_as_their_canvases_may_be(tmp_path):
    path = tmp_path / "a.svs"
    write_slide(path, width=1024, height=1024, mpp=0.25, seed=1, truth=False)
    predictor = TorchPredictor.load(find_bundle("stain-baseline"), device="cpu", tile_size=1024)
    with Slide.open(str(path)) as slide:
        grid = slide.working_grid(0.5)
        assert _panel_px(slide, grid, predictor) == PANEL_PX
        margin = 2 * predictor.halo_px
        width, side = 8 * predictor.tile_px + margin, predictor.tile_px + margin
        predictor.canvas_bytes = slide.band_bytes(grid, (width, side))
        assert _panel_px(slide, grid, predictor) == 8 * predictor.tile_px
        predictor.canvas_bytes = 1
        assert _panel_px(slide, grid, predictor) == predictor.tile_px


def test_a_run_keeps_to_its_cap(tmp_path):
    slide = tmp_path / "a.svs"
    write_slide(slide, width=4096, height=4096, mpp=0.25, seed=1, truth=False)
    code = "from wsi_pipeline.cli import main_run; main_run()"
    command = [sys.executable, "-c", code, str(slide), "--out", str(tmp_path / "out")]
    command += ["--model", "cerberus-lite", "--device", "cpu", "--no-progress"]
    done = subprocess.run([*command, "--memory", "1G"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "more than --memory" not in done.stderr
    report = json.loads((tmp_path / "out" / "reports" / "a.json").read_text())
    assert 300 < report["peak_rss_mb"] < 1024
    refused = subprocess.run([*command, "--memory", "300M"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "needs at least" in refused.stderr
