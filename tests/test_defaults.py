"""Which model runs when none is named: by device in a new folder, else the folder's own."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from test_lite import GLAND, NUCLEI, build, lite

from wsi_pipeline import batch
from wsi_pipeline import bundle as bundle_module
from wsi_pipeline.api import execute, plan_run, run
from wsi_pipeline.bundle import default_bundle, find_bundle, save_bundle
from wsi_pipeline.cli import wsi
from wsi_pipeline.errors import JobError, ModelBundleError
from wsi_pipeline.golden import write_golden
from wsi_pipeline.synth import write_slide

BASELINE = find_bundle("stain-baseline").path


def tiny(folder, name, seed):
    spec = replace(lite((NUCLEI, GLAND), halo_px=16), name=name, description=f"tiny {name}")
    return save_bundle(folder / name, spec, build(spec, seed), card=f"# {name}\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tiny(folder, "cerberus-lite", 1)
    tiny(folder, "cerberus-open", 2)
    shutil.copytree(BASELINE, folder / "stain-baseline")
    write_slide(folder / "s.svs", width=300, height=260, mpp=0.5, seed=1, truth=False)
    return folder


@pytest.fixture
def zoo(made, monkeypatch):
    """A function that decides which bundles are installed."""

    def install(*names, at=made):
        known = {name: at / name for name in names}
        monkeypatch.setattr(bundle_module, "_zoo", lambda: known)

    install("cerberus-lite", "cerberus-open", "stain-baseline")
    return install


@pytest.fixture
def gpu(monkeypatch):
    """Two CUDA devices, as far as choosing goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


ALL = ("cerberus-lite", "cerberus-open", "stain-baseline")


@pytest.mark.parametrize(
    ("installed", "cpu", "cuda"),
    [
        (ALL, "cerberus-lite", "cerberus-open"),
        (("cerberus-lite", "stain-baseline"), "cerberus-lite", "cerberus-lite"),
        (("cerberus-open", "stain-baseline"), "stain-baseline", "cerberus-open"),
        (("stain-baseline",), "stain-baseline", "stain-baseline"),
    ],
)
def test_the_device_decides(zoo, gpu, installed, cpu, cuda):
    zoo(*installed)
    assert find_bundle(device="cpu").name == default_bundle("cpu") == cpu
    assert find_bundle(device="mps" if torch.backends.mps.is_available() else "cpu").name == cpu
    for device in ("cuda", "cuda:1", "auto"):
        assert find_bundle(device=device).name == cuda
    assert default_bundle("cuda") == cuda
    assert default_bundle("mps") == cpu


def test_auto_is_a_cpu_where_there_is_nothing_else(zoo, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_bundle().name == "cerberus-lite"


def test_a_name_does_not_ask_for_the_device(zoo):
    assert find_bundle("stain-baseline", device="abacus").name == "stain-baseline"
    with pytest.raises(JobError, match="abacus"):
        find_bundle(device="abacus")
    zoo()
    with pytest.raises(ModelBundleError, match=r"'stain-baseline'.*\[\]"):
        find_bundle(device="cpu")


@pytest.mark.parametrize(
    ("installed", "marks"),
    [
        (ALL, ["cerberus-lite (default on a CPU)", "cerberus-open (default on a GPU)",
               "stain-baseline"]),
        (("cerberus-lite", "stain-baseline"), ["cerberus-lite (default)", "stain-baseline"]),
        (("stain-baseline",), ["stain-baseline (default)"]),
    ],
)  # fmt: skip
def test_the_list_says_which(zoo, installed, marks):
    zoo(*installed)
    lines = CliRunner().invoke(wsi, ["models"]).output.splitlines()
    assert [line.split("\t")[0] for line in lines] == marks


def plan(made, out, **how):
    return plan_run([made / "s.svs"], out, **how)


def model_of(out):
    return json.loads((out / "run.json").read_text())["model"]


def test_a_folder_begun_on_a_cpu_goes_on_with_its_model_on_a_gpu(made, zoo, gpu, tmp_path):
    (report,) = run([made / "s.svs"], tmp_path, device="cpu", tile_size=128, precision="fp32")
    assert report.done, report.reason
    assert report.model["name"] == model_of(tmp_path)["name"] == "cerberus-lite"
    assert set(model_of(tmp_path)) == {"name", "sha256"}
    assert plan(made, tmp_path / "new", device="cuda").bundle.name == "cerberus-open"
    again = plan(made, tmp_path, device="cuda")
    assert again.bundle.name == "cerberus-lite"
    assert again.jobs[0].model_digest == report.model["sha256"]
    # Also when its slides are done again; and when the default itself has changed since.
    assert plan(made, tmp_path, device="cuda", overwrite=True).bundle.name == "cerberus-lite"
    begun = (tmp_path / "reports" / "s.json").read_bytes()
    (report,) = execute(again, device="cpu", tile_size=128, precision="fp32")
    assert (tmp_path / "reports" / "s.json").read_bytes() == begun, "it was done before"
    # Who names another model is refused as before, and may overwrite.
    other = plan(made, tmp_path, model="cerberus-open", device="cpu")
    with pytest.raises(JobError, match="holds results of model cerberus-lite"):
        execute(other, device="cpu", tile_size=128)
    (report,) = execute(other, device="cpu", tile_size=128, overwrite=True)
    assert report.model["name"] == model_of(tmp_path)["name"] == "cerberus-open"
    assert plan(made, tmp_path, device="cpu").bundle.name == "cerberus-open"


def test_a_folder_of_the_baseline_stays_one_when_a_learned_model_is_installed(made, zoo, tmp_path):
    zoo("stain-baseline")
    run([made / "s.svs"], tmp_path, device="cpu", tile_size=128)
    zoo(*ALL)
    assert plan(made, tmp_path, device="cpu").bundle.name == "stain-baseline"


def test_a_model_from_a_folder_is_found_again_there(made, zoo, tmp_path, monkeypatch):
    own = tiny(tmp_path / "models", "own", 3)
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    how = {"device": "cpu", "tile_size": 128, "precision": "fp32"}
    run([made / "s.svs"], out, model="models/own", **how)
    assert model_of(out)["folder"] == str(own.path)
    monkeypatch.chdir(made)
    assert plan(made, out).bundle.digest == own.digest
    own.path.rename(tmp_path / "elsewhere")
    with pytest.raises(JobError, match=r"begun with model own .*not here.*--model"):
        plan(made, out, device="cpu")
    assert plan(made, out, device="cpu", overwrite=True).bundle.name == "cerberus-lite"
    moved = plan(made, out, model=str(tmp_path / "elsewhere"))
    (report,) = execute(moved, **how)
    assert report.done
    assert model_of(out)["folder"] == str(tmp_path / "elsewhere")


def test_new_weights_of_the_same_name_are_another_model(made, zoo, tmp_path):
    run([made / "s.svs"], tmp_path / "out", device="cpu", tile_size=128)
    tiny(tmp_path, "cerberus-lite", 9)
    zoo("cerberus-lite", at=tmp_path)
    with pytest.raises(JobError, match=r"begun with model cerberus-lite .*not here"):
        plan(made, tmp_path / "out", device="cpu")


def test_of_two_that_begin_together_one_decides(made, zoo, gpu, tmp_path, caplog):
    """Both plan before either has written anything, each with the default of its device."""
    how = {"device": "cpu", "tile_size": 128, "precision": "fp32"}
    first, second = (plan(made, tmp_path, device=device) for device in ("cpu", "cuda"))
    assert (first.bundle.name, second.bundle.name) == ("cerberus-lite", "cerberus-open")
    execute(first, **how)
    (report,) = execute(second, **how)
    assert report.model["name"] == model_of(tmp_path)["name"] == "cerberus-lite"
    assert "going on with it" in caplog.text
    named = plan(made, tmp_path, model="cerberus-open")
    with pytest.raises(JobError, match="holds results"):
        execute(named, **how)


def entry():
    return (batch.SlideEntry(path="a.svs", slide_id="a"),)


def freeze(out, name, **how):
    model = {"name": name, "sha256": name * 20}
    batch.freeze_run(out, entry(), model=model, options={}, **{"overwrite": False, **how})


def test_a_record_that_appears_meanwhile_is_not_written_over(tmp_path, monkeypatch):
    """Between looking for run.json and writing it, another process writes its own."""
    freeze(tmp_path / "other", "first")
    sweep = batch.sweep_shared

    def too_late(path):
        shutil.copy(tmp_path / "other" / "run.json", path)
        sweep(path)

    monkeypatch.setattr(batch, "sweep_shared", too_late)
    with pytest.raises(JobError, match="holds results of model first"):
        freeze(tmp_path, "second")
    assert model_of(tmp_path)["name"] == "first"
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    freeze(tmp_path, "second", overwrite=True)
    assert model_of(tmp_path)["name"] == "second"


def test_runs_that_begin_together_lose_no_slide(tmp_path):
    """Each call reads, adds and writes; one after the other."""
    names = [f"s{number}" for number in range(12)]

    def begin(name):
        entries = (batch.SlideEntry(path=f"{name}.svs", slide_id=name),)
        model = {"name": "m", "sha256": "0"}
        batch.freeze_run(tmp_path, entries, model=model, options={}, overwrite=False)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(begin, names))
    assert [slide["slide_id"] for slide in batch.read_run(tmp_path)["slides"]] == sorted(names)


@pytest.mark.parametrize("model", [{}, {"name": "m"}, None])
def test_a_record_without_its_model_is_named(made, zoo, tmp_path, model):
    (tmp_path / "run.json").write_text(json.dumps({"slides": [], "options": {}, "model": model}))
    with pytest.raises(JobError, match=r"run\.json cannot be read"):
        plan(made, tmp_path)


def invoke(*arguments):
    result = CliRunner().invoke(wsi, [str(a) for a in arguments])
    assert "Traceback" not in result.output
    return result


def test_the_command_says_which_model_ran(made, zoo, tmp_path):
    done = invoke("run", made / "s.svs", "--out", tmp_path, "--device", "cpu", "--tile-size", 128)
    assert done.exit_code == 0, done.output
    assert "model cerberus-lite: tiny cerberus-lite" in done.output
    listed = invoke("run", made / "s.svs", "--out", tmp_path, "--dry-run")
    assert listed.output.splitlines()[-1] == "1 of 1 slides, model cerberus-lite"


def test_a_dry_run_refuses_another_model_and_writes_nothing(made, zoo, tmp_path):
    freeze(tmp_path, "first")
    before = (tmp_path / "run.json").read_bytes()
    asked = ("run", made / "s.svs", "--out", tmp_path, "--model", "cerberus-open", "--dry-run")
    for more, says in ((), "holds results of model first"), (("--overwrite",), "found: a. Name"):
        refused = invoke(*asked, *more)
        assert refused.exit_code == 2
        assert says in refused.output
    assert (tmp_path / "run.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_release_and_golden_commands(made, zoo, tmp_path):
    (tmp_path / "card.md").write_text("# small\n")
    out = tmp_path / "small"
    made_here = invoke("models", "release", "cerberus-lite", "--out", out, "--card",
                       tmp_path / "card.md")  # fmt: skip
    assert made_here.exit_code == 0, made_here.output
    assert "1 weight files, 0.0 MiB" in made_here.output
    assert (out / "card.md").read_text() == "# small\n"
    good = invoke("models", "golden", out, "--device", "cpu", "--precision", "fp32")
    assert (good.exit_code, good.output) == (0, "small: as expected\n")
    spec = out / "spec.json"
    spec.write_text(spec.read_text().replace('"min_area_um2": 2.0', '"min_area_um2": 900.0'))
    bad = invoke("models", "golden", out, "--device", "cpu", "--precision", "fp32")
    assert bad.exit_code == 1
    assert "spec or weights have changed" in bad.output
    assert "of kind nucleus" in bad.output
    assert invoke("models", "golden", out, "--write").exit_code == 0
    assert invoke("models", "golden", out, "--precision", "fp32").exit_code == 0
    none = invoke("models", "golden", "cerberus-lite")
    assert none.exit_code == 2
    assert "has no golden.json" in none.output


def test_a_release_that_fails_leaves_what_was_there(made, zoo, tmp_path, monkeypatch):
    words = ("models", "release", "cerberus-lite", "--out")
    assert invoke(*words, tmp_path / "small").exit_code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()}

    def fail(bundle):
        raise ModelBundleError(f"no golden tiles of {bundle.name}")

    monkeypatch.setattr("wsi_pipeline.golden.write_golden", fail)
    for name in ("small", "another"):
        done = invoke(*words, tmp_path / name)
        assert (done.exit_code, done.output) == (2, f"Error: no golden tiles of {name}\n")
    assert {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_release_replaces_no_file(made, zoo, tmp_path):
    (tmp_path / "f.parquet").write_text("a table")
    (tmp_path / "metrics.json").write_text("[1]")
    done = invoke("models", "release", "cerberus-lite", "--out", tmp_path / "f.parquet")
    assert done.exit_code == 2
    assert "f.parquet exists and is no model bundle" in done.output
    assert (tmp_path / "f.parquet").read_text() == "a table"
    done = invoke("models", "release", "cerberus-lite", "--out", tmp_path / "x",
                  "--metrics", tmp_path / "metrics.json")  # fmt: skip
    assert done.exit_code == 2
    assert "metrics.json is no JSON object" in done.output


def test_the_doctor_compares_golden_tiles(made, zoo, tmp_path):
    from wsi_pipeline.doctor import _model, _try

    own = tiny(tmp_path, "own", 4)
    assert "no golden tiles" in _model(str(own.path))
    write_golden(own)
    golden = own.path / "golden.json"
    content = json.loads(golden.read_text())
    content["tiles"]["blank"]["maps"]["gland/prob/inner"]["mean"] += 0.5
    golden.write_text(json.dumps(content))
    check = _try("model", lambda: _model(str(own.path)))
    assert not check.ok
    assert "does not compute what it did" in check.detail
    zoo("stain-baseline", at=BASELINE.parent)
    assert "golden tiles as expected" in _model(None)
