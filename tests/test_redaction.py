"""No folder of an input gets into what is written, if so asked."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from wsi_pipeline.cli import run
from wsi_pipeline.redaction import FOLDER, Redaction
from wsi_pipeline.synth import write_slide

MARKER = "Müller, O'Brien 1950"
"""Blanks, a quote, a comma and a letter beyond ASCII: whatever a name may have."""


@pytest.fixture
def redaction(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / MARKER / "slides"
    folder.mkdir(parents=True)
    return Redaction.of(files=[folder / "a.svs", f"{MARKER}/rel/b.svs"], folders=[])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("{0}/slides/a.svs cannot be read", "a.svs cannot be read"),
        ("[Errno 2] No such file: '{0}/slides/a.svs'", "[Errno 2] No such file: 'a.svs'"),
        ("no space is left in {0}/slides. Free some", f"no space is left in {FOLDER}. Free some"),
        ("{0}/others/c.svs and {0}", f"others/c.svs and {FOLDER}"),
        (f"{MARKER}/rel/b.svs", "b.svs"),
        ("PosixPath('{0}/slides/a')", "PosixPath('a')"),
        ('File "/usr/lib/python3/x.py", line 3', 'File "x.py", line 3'),
        ("s3://bucket/patient/a.svs?key=5 is gone", "a.svs is gone"),
        ("file://{0}/a", "a"),
        ("2.0 mm2/s, 3/4, and/or, ./a", "2.0 mm2/s, 3/4, and/or, ./a"),
    ],
)
def test_folders_go_and_names_stay(redaction, tmp_path, text, left):
    assert redaction.text(text.format(tmp_path / MARKER)) == left


def test_by_default_everything_stays(tmp_path):
    text = f"{tmp_path}/a s3://b/c /d/e"
    assert Redaction().text(text) == text
    assert Redaction().including("/x/y").text("/x/y /x") == "/x/y /x"


def test_values_of_every_form(redaction, tmp_path):
    path = f"{tmp_path / MARKER}/slides/a.svs"
    value = {"a": [path, 5, None, {"b": (path,)}], "c": True}
    assert redaction.value(value) == {"a": ["a.svs", 5, None, {"b": ["a.svs"]}], "c": True}
    assert pickle.loads(pickle.dumps(redaction)).text(path) == "a.svs"


def test_links_are_seen_through(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    found = Redaction.of(files=[tmp_path / "link" / "a"], folders=[])
    assert found.text(f"{real}/a {tmp_path}/link/a") == "a a"


def written(out: Path):
    """Everything in a results folder: names and bytes."""
    for path in [out, *out.rglob("*")]:
        yield str(path.relative_to(out)).encode()
        if path.is_file():
            yield path.read_bytes()


def traces(data: bytes):
    """Forms of the marker that are found in bytes, also escaped ones."""
    forms = {
        MARKER.encode(),
        json.dumps(MARKER).strip('"').encode(),
        b"O'Brien",
        b"ller, O",
        b"1950",
    }
    return [form for form in forms if form in data]


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """Good and bad slides, a mask, a list and a model in folders of secret names."""
    folder = tmp_path_factory.mktemp("private") / MARKER
    slides = folder / "slides"
    slides.mkdir(parents=True)
    write_slide(slides / "good.svs", width=700, height=600, mpp=0.5, seed=1, truth=False)
    (slides / "masked.svs").write_bytes((slides / "good.svs").read_bytes())
    (slides / "noise.svs").write_bytes(b"no slide at all")
    (slides / "empty.tif").touch()
    Image.new("RGB", (300, 300), "white").save(slides / "flat.tiff")
    Image.new("L", (40, 7), 255).save(folder / "bad mask.png")
    lines = "".join(f"slides/{p.name},,\n" for p in sorted(slides.iterdir()) if p.stem != "masked")
    far = tmp_path_factory.mktemp("far") / f"for {MARKER}" / "far.svs"
    far.parent.mkdir()
    far.write_bytes(b"no slide, and far from the list")
    more = f'slides/masked.svs,,bad mask.png\nslides/gone.svs,,\n"{far}",,\n'
    (folder / "list.csv").write_text("path,mpp,mask\n" + lines + more)
    return folder


def wsi_run(*arguments, cwd):
    code = "from wsi_pipeline.cli import main_run; main_run()"
    how = ("--no-progress", "--model", "stain-baseline", "-v", "--batch-size", "1")
    command = [sys.executable, "-c", code, *map(str, arguments), *how]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, capture_output=True, cwd=cwd, env=environment)


def test_a_run_leaves_no_trace_of_secret_folders(secret):
    """Slides, masks, the list and the results lie in folders of a secret name."""
    out = secret / "results"
    how = ("--redact-paths", "--log-format", "json")
    result = wsi_run(secret / "list.csv", "--out", out, *how, cwd=secret.parent)
    assert result.returncode == 1, result.stderr
    for data in [*written(out), result.stderr, result.stdout]:
        assert traces(data) == [], data[:2000]
    reports = {p.stem: json.loads(p.read_text()) for p in (out / "reports").iterdir()}
    assert reports["good"]["path"] == "good.svs"
    bad = ["far", "noise", "empty", "flat", "masked", "gone"]
    states = {name: own["status"] for name, own in reports.items()}
    assert states == {**dict.fromkeys(bad, "failed"), "good": "done"}
    slides = json.loads((out / "run.json").read_text())["slides"]
    assert {slide["path"] for slide in slides} >= {"good.svs", "masked.svs"}
    assert {slide["mask"] for slide in slides} == {None, "bad mask.png"}
    lines = [json.loads(line) for line in result.stderr.decode().splitlines()]
    assert {"start", "end", "log"} <= {line["event"] for line in lines}
    # Whoever goes on need not say it again; names relative to where one is are covered, too.
    again = wsi_run(f"{MARKER}/list.csv", "--out", f"{MARKER}/results", cwd=secret.parent)
    assert again.returncode == 1
    for data in [*written(out), again.stderr, again.stdout]:
        assert traces(data) == [], data[:2000]
    assert b"gone.svs" in again.stderr


def invoke(*arguments):
    how = ("--no-progress", "--model", "stain-baseline")
    return CliRunner().invoke(run, [*map(str, arguments), *how])


def test_wrong_use_and_faults_of_our_own_tell_nothing_either(secret, monkeypatch):
    how = ("--out", secret / "none", "--redact-paths")
    result = invoke(secret / "nothing.csv", *how)
    assert (result.exit_code, traces(result.output.encode())) == (2, [])
    assert "nothing.csv" in result.output

    def fail(plan, **_):
        logging.getLogger("wsi_pipeline").warning("%s is odd", plan.entries[1].path)
        raise LookupError(f"{plan.entries[1].path} is missed")

    monkeypatch.setattr("wsi_pipeline.api.execute", fail)
    result = invoke(secret / "list.csv", *how)
    assert (result.exit_code, traces(result.output.encode())) == (1, [])
    assert "LookupError: far.svs is missed" in result.output
    assert "wsi_pipeline:far.svs is odd" in result.output


def test_without_being_asked_the_paths_are_there(secret):
    out = secret / "plain"
    assert invoke(secret / "slides" / "noise.svs", "--out", out).exit_code == 1
    for name in ("run.json", "logs/noise.jsonl", "reports/noise.json", "summary.csv"):
        assert traces((out / name).read_bytes()), name


def test_of_a_signed_address_that_is_named_the_key_goes_too():
    address = "https://user:secret@example.org/patient/x.svs?sig=secret"
    redaction = Redaction.of(files=[address], folders=[])
    assert redaction.text(f"{address} cannot be read") == "x.svs cannot be read"
    assert redaction.value({"path": address}) == {"path": "x.svs"}
