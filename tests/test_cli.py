"""The commands as a user types them: output, exit codes, and no traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import geopandas
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from wsi_pipeline.cli import run, wsi
from wsi_pipeline.synth import write_slide
from wsi_pipeline.table import read_metadata

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("WSI_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "slides").is_dir(), reason=f"no data kit at {DATA} (set WSI_DATA)"
)


BIN = Path(sys.executable).parent
BASELINE = ("--model", "stain-baseline")
"""Fast, and always the same; which model is the default is not what is tested here."""


def invoke(command, *arguments):
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "one.svs", width=1400, height=1200, mpp=0.5, seed=1)
    write_slide(folder / "two.svs", width=1000, height=900, mpp=0.5, seed=2, truth=False)
    return folder


@pytest.fixture(scope="module")
def finished(slides, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results")
    result = invoke(run, slides / "*.svs", "--out", out, "--no-progress", *BASELINE)
    assert result.exit_code == 0, result.output
    return out


def test_a_folder_whose_name_is_no_utf_8(slides, tmp_path):
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    folder.mkdir()
    (folder / "two.svs").write_bytes((slides / "two.svs").read_bytes())
    call = [folder, "--out", folder / "results", "--no-progress", "--tile-size", "256", *BASELINE]
    refused = invoke(run, *call)
    assert refused.exit_code == 2
    assert r"M\udcfcller/results: its name is not UTF-8" in refused.output
    out = tmp_path / "results"
    call[2] = out
    done = subprocess.run([BIN / "wsi-run", *call], capture_output=True)
    assert done.returncode == 0, done.stderr
    (row,) = pd.read_parquet(out / "summary.parquet").to_dict("records")
    assert (row["status"], Path(row["path"]).parent.name) == ("done", r"M\udcfcller")
    (row,) = pd.read_csv(out / "summary.csv").to_dict("records")
    assert row["path"].endswith(r"M\udcfcller/two.svs")
    for command in ("status", "summary"):
        done = subprocess.run([BIN / "wsi", command, out], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
    (folder / "two.svs").unlink()
    (folder / "two.svs").write_bytes(b"no slide")
    done = subprocess.run([BIN / "wsi-run", *call], capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (1, False)
    done = subprocess.run([BIN / "wsi", "status", out], capture_output=True)
    assert rb"M\udcfcller" in done.stdout


def report(out: Path, slide_id: str) -> dict:
    return json.loads((out / "reports" / f"{slide_id}.json").read_text())


def test_a_run_leaves_what_the_contract_says(finished):
    for slide_id in ("one", "two"):
        for name in (
            f"objects/{slide_id}.parquet",
            f"tissue/{slide_id}.parquet",
            f"maps/{slide_id}.zarr/zarr.json",
            f"previews/{slide_id}.png",
            f"reports/{slide_id}.json",
            f"logs/{slide_id}.jsonl",
        ):
            assert (finished / name).is_file(), name
        assert report(finished, slide_id)["status"] == "done"
    assert {s["slide_id"] for s in json.loads((finished / "run.json").read_text())["slides"]} == {
        "one",
        "two",
    }
    table = pd.read_parquet(finished / "objects")
    assert set(table.slide_id) == {"one", "two"}
    assert table[table.kind == "nucleus"].shape[0] > 200


def test_every_reader_takes_the_folder(finished):
    whole = geopandas.read_parquet(finished / "objects")
    assert whole.crs is not None
    assert len(whole) == len(pd.read_parquet(finished / "objects"))
    rows = duckdb.sql(f"select count(*) from '{finished}/objects/*.parquet'").fetchone()
    assert rows == (len(whole),)


def test_the_same_command_again_does_nothing(slides, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    result = invoke(run, slides / "*.svs", "--out", finished, "--no-progress")
    assert result.exit_code == 0
    assert "was done before" in result.output
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_status_names_every_state(slides, finished, tmp_path):
    result = invoke(wsi, "status", finished)
    assert "2 slides: 2 done, 0 running, 0 interrupted, 0 missing, 0 failed" in result.output
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide at all")
    out = tmp_path / "out"
    how = ("--no-progress", "--shard", "0/2", *BASELINE)
    result = invoke(run, bad, slides / "two.svs", "--out", out, *how)
    assert result.exit_code == 1
    result = invoke(wsi, "status", out)
    assert re.search(r"bad\tfailed\tunreadable_slide: .*\n", result.output)
    assert "two\tmissing" in result.output
    assert invoke(wsi, "status", tmp_path).exit_code == 2


def test_a_finished_run_leaves_a_summary_and_a_shard_none(slides, finished, tmp_path):
    table = pd.read_parquet(finished / "summary.parquet")
    assert list(table.status) == ["done", "done"]
    assert list(table.n_nucleus) == [
        report(finished, n)["counts"]["nucleus"] for n in table.slide_id
    ]
    assert (pd.read_csv(finished / "summary.csv").slide_id == table.slide_id).all()
    how = ("--out", tmp_path, "--no-progress", "--shard", "1/2", *BASELINE)
    assert invoke(run, slides, *how).exit_code == 0
    assert not (tmp_path / "summary.csv").exists()
    assert "1 done" in invoke(wsi, "summary", tmp_path).output
    assert list(pd.read_csv(tmp_path / "summary.csv").status) == ["missing", "done"]


def test_failed_slides_come_last_with_their_reason(slides, tmp_path):
    (tmp_path / "aaa.svs").write_bytes(b"no slide at all")
    how = ("--out", tmp_path / "out", "--no-progress", *BASELINE)
    result = invoke(run, tmp_path / "aaa.svs", slides / "two.svs", *how)
    assert result.exit_code == 1
    table = result.output[result.output.index("┏") :]
    assert table.index("two") < table.index("aaa")
    assert "unreadable_slide" in table


def test_dry_run_lists_and_touches_nothing(slides, finished, tmp_path):
    result = invoke(run, slides, "--out", tmp_path / "new", "--dry-run", "--shard", "1/2")
    assert result.exit_code == 0
    assert not (tmp_path / "new").exists()
    line = next(x for x in result.output.splitlines() if x.startswith("two"))
    assert line.split("\t") == ["two", "1000x900", "0.5", "aperio.MPP", "missing", "1/2"]
    assert "one\t" not in result.output
    assert (
        "one\t1400x1200\t0.5\taperio.MPP\tdone\t0/1"
        in invoke(run, slides, "--out", finished, "--dry-run").output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.svs"], "nothing found at 'missing.svs'"),
        ([], "Missing argument"),
        (["SLIDES", "--shard", "2/2"], "counts from 0"),
        (["SLIDES", "--model", "nonsense"], "stain-baseline"),
        (["SLIDES", "--tile-size", "0"], "positive whole number"),
        (["SLIDES", "--tile-size", "100"], "multiple of 16"),
        (["SLIDES", "--device", "abacus"], "abacus"),
        (["SLIDES", "--precision", "int3"], "fp32"),
        (["SLIDES", "--nonsense"], "No such option"),
        (["SLIDES", "--mpp", "nan"], "positive number"),
        ([""], "variable unset"),
    ],
)
def test_wrong_use_is_code_2_and_says_what_is_right(slides, tmp_path, arguments, message):
    arguments = [str(slides) if a == "SLIDES" else a for a in arguments]
    result = invoke(run, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.glob("out/reports/*"))


def test_every_option_changes_something(slides, finished, tmp_path):
    def go(*options, name="two"):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        how = ("--no-progress", *BASELINE, *options)
        result = invoke(run, slides / f"{name}.svs", "--out", out, *how)
        assert result.exit_code == 0, result.output
        return out, result

    plain = report(finished, "two")
    out, _ = go("--mpp", "0.45")
    assert report(out, "two")["mpp"] == {"x": 0.45, "y": 0.45, "source": "argument"}
    assert report(out, "two")["tissue_mm2"] != plain["tissue_mm2"]
    out, _ = go("--precision", "bf16", "--device", "cpu")
    assert (report(out, "two")["precision"], plain["precision"]) == ("bf16", "fp32")
    out, _ = go("--drop-maps", "--tile-size", "256", "--batch-size", "2", "--workers", "1")
    assert not (out / "maps" / "two.zarr").exists()
    table = out / "objects" / "two.parquet"
    assert read_metadata(table)["options"]["tile_px"] == 256
    options = json.loads((out / "run.json").read_text())["options"]
    assert (options["batch_size"], options["workers"]) == (2, 1)
    out, _ = go("--memory", "2G", "--device", "cpu")
    assert json.loads((out / "run.json").read_text())["options"]["memory"] == "2G"
    refused = invoke(run, slides / "two.svs", "--out", out, "--memory", "99M", *BASELINE)
    assert (refused.exit_code, "needs at least" in refused.output) == (2, True)
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(np.kron([[255, 0]], np.ones((90, 50))).astype(np.uint8)).save(masks / "two.png")
    out, _ = go("--mask-dir", masks)
    assert report(out, "two")["tissue_mm2"] == pytest.approx(0.45 * 0.25, rel=0.02)
    _, result = go("--log-format", "json")
    events = [json.loads(x) for x in result.output.splitlines() if x.startswith("{")]
    assert events[-1]["event"] == "end"
    assert events[-1]["status"] == "done"
    _, result = go("-v")
    assert "INFO" in result.output


def test_overwrite_retry_and_fail_fast(slides, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.svs").write_bytes(b"no slide at all")
    out = tmp_path / "out"

    def go(*options):
        how = ("--out", out, "--no-progress", *BASELINE, *options)
        return invoke(run, tmp_path / "*.svs", *how)

    assert go("--fail-fast").exit_code == 1
    assert not (out / "reports" / "b.json").exists()
    assert go().exit_code == 1
    first = report(out, "b")["started"]
    go("--no-retry-failed")
    assert report(out, "b")["started"] == first
    go("--retry-failed")
    assert report(out, "b")["started"] != first
    done = tmp_path / "done"
    invoke(run, slides / "two.svs", "--out", done, "--no-progress", *BASELINE)
    first = report(done, "two")["started"]
    # The folder goes on with its model, named or not.
    invoke(run, slides / "two.svs", "--out", done, "--no-progress", "--overwrite")
    assert report(done, "two")["started"] != first


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A slide of some tiles, and the files of an undisturbed run of it."""
    folder = tmp_path_factory.mktemp("big")
    write_slide(folder / "big.svs", width=2200, height=2200, mpp=0.5, seed=5, truth=False)
    result = subprocess.run(command(folder), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "big.svs", outputs(folder / "out")


def command(folder: Path, slide: Path | None = None) -> list[str]:
    start = [sys.executable, "-c", "from wsi_pipeline.cli import main_run; main_run()"]
    slide = slide or folder / "big.svs"
    options = ["--tile-size", "256", "--batch-size", "1", "--no-progress", *BASELINE]
    return [*start, str(slide), "--out", str(folder / "out"), *options]


def outputs(out: Path) -> dict[str, bytes]:
    folders = ("objects", "tissue", "maps", "previews")
    files = (path for name in folders for path in out.glob(f"{name}/**/*"))
    return {str(p.relative_to(out)): p.read_bytes() for p in files if p.is_file()}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 75),
        (signal.SIGUSR1, 75),
        (signal.SIGINT, 130),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_stopped_by_a_signal_the_same_command_goes_on_to_the_same_bytes(
    big, tmp_path, number, code
):
    slide, undisturbed = big
    process = subprocess.Popen(command(tmp_path, slide), stderr=subprocess.PIPE, text=True)
    chunks = tmp_path / "out" / "maps" / ".big.zarr.partial" / "nuclei" / "prob" / "c"
    deadline = time.monotonic() + 120
    while not chunks.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        assert report(tmp_path / "out", "big")["status"] == "interrupted"
    assert "big\tinterrupted" in invoke(wsi, "status", tmp_path / "out").output
    again = subprocess.run(command(tmp_path, slide), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert report(tmp_path / "out", "big")["restarts"] == 1
    assert outputs(tmp_path / "out") == undisturbed
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.endswith(".partial")]


def test_info_knows_slides_tables_maps_and_models(slides, finished):
    output = invoke(wsi, "info", slides / "one.svs").output
    assert "1400 x 1200 px" in output
    assert "0.5 x 0.5 um, from aperio.MPP" in output
    output = invoke(wsi, "info", finished / "objects" / "one.parquet").output
    assert "one.svs" in output
    assert "stain-baseline" in output
    output = invoke(wsi, "info", finished / "maps" / "one.zarr").output
    assert "nuclei/prob: 1400 x 1200" in output
    output = invoke(wsi, "info", ROOT / "models" / "stain-baseline").output
    assert "head       lumen (instance, stride 2)" in output
    assert "weights    0.0 MiB in 1 files" in output
    assert invoke(wsi, "info", "stain-baseline").output == output
    result = invoke(wsi, "info", "no-such-model")
    assert result.exit_code == 2
    assert "no-such-model" in result.output
    result = invoke(wsi, "info", slides)
    assert result.exit_code == 2
    assert "neither a model bundle" in result.output


def test_models_lists_the_zoo():
    lines = invoke(wsi, "models").output.splitlines()
    assert any(line.startswith("stain-baseline") for line in lines)
    assert sum("(default" in line for line in lines) in (1, 2)


def test_doctor_runs_the_main_job():
    result = invoke(wsi, "doctor", *BASELINE)
    assert result.exit_code == 0, result.output
    assert "stain-baseline" in result.output
    assert "nucleus" in result.output
    result = invoke(wsi, "doctor", "--model", "nonsense")
    assert result.exit_code == 1
    assert "FAIL  model" in result.output


def test_a_folder_that_cannot_be_made_is_wrong_use(slides, tmp_path):
    (tmp_path / "file").touch()
    result = invoke(run, slides / "two.svs", "--out", tmp_path / "file" / "out", *BASELINE)
    assert result.exit_code == 2
    result = invoke(wsi, "synth", tmp_path / "s.svs", "--width", 10)
    assert result.exit_code == 2


def test_synth_writes_a_slide_and_its_truth(tmp_path):
    result = invoke(
        wsi,
        "synth",
        tmp_path / "s.svs",
        "--width",
        700,
        "--height",
        500,
        "--mpp",
        0.5,
        "--compression",
        "jpeg2000",
        "--seed",
        4,
    )
    assert result.exit_code == 0
    assert "700 x 500 px, " in invoke(wsi, "info", tmp_path / "s.svs").output.replace("size ", "")
    assert len(pd.read_parquet(tmp_path / "s.truth.parquet"))


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for name in wsi.commands:
        assert f"wsi {name}" in text or (name == "run" and "wsi-run" in text), name
    for option in (p for p in run.params if p.param_type_name == "option"):
        assert option.help or option.name == "verbose", option.name


@pytest.mark.real
@needs_data
def test_real_slides_end_as_they_should(tmp_path):
    """Small real slides whole; of the large one only that it is refused."""
    broken = sorted((DATA / "slides_broken").iterdir())
    small = [
        DATA / "slides" / n
        for n in (
            "CMU-1-Small-Region.svs",
            "TCGA-CR-7395-01A-01-TS1.svs",
            "BRACS_1640_N_3_cropped.tiff",
            "colon_submucosal_lipoma_HE_nompp.tiff",
        )
    ]
    out = tmp_path / "out"
    result = invoke(run, *broken, *small, "--out", out, "--no-progress", *BASELINE)
    assert result.exit_code == 1
    codes = {
        p.stem: (json.loads(p.read_text())["error"] or {}).get("code")
        for p in (out / "reports").iterdir()
    }
    assert codes["CMU-1-Small-Region"] is None
    assert codes["TCGA-CR-7395-01A-01-TS1"] == "missing_mpp"
    assert codes["colon_submucosal_lipoma_HE_nompp"] == "missing_mpp"
    assert codes["BRACS_1640_N_3_cropped"] == "implausible_mpp"
    assert {path.stem: codes[path.stem] for path in broken} == {
        "boxes": "implausible_mpp",
        # Whole and readable, 16 x 16 pixels: done, with a warning.
        "boxes_0": "no_tissue",
        "small": "no_tissue",
        "histolab_broken": "unreadable_slide",
        "unopenable": "unsupported_format",
        "unreadable": "unreadable_slide",
    }
    for name in ("boxes_0", "small"):
        assert report(out, name)["status"] == "done"
    result = invoke(run, small[2], "--out", out, "--no-progress", "--mpp", "0.25")
    assert result.exit_code == 0, result.output
    assert report(out, "BRACS_1640_N_3_cropped")["mpp"]["source"] == "argument"
    assert report(out, "CMU-1-Small-Region")["counts"]["nucleus"] > 500
