"""The judge of rehearsals finds what a run has lost, doubled, changed or left behind."""

import json
import shutil

import pytest

from benchmarks.cohort.judge import judge
from benchmarks.cohort.slides import Cohort

DONE = {"status": "done", "error": None, "job_id": "1"}
FAILED = {"status": "failed", "error": {"code": "missing_mpp"}, "job_id": "2"}
LOG = [{"event": "start", "job_id": "1"}, {"event": "end", "status": "done"}]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def ended(tmp_path):
    """An undisturbed run, and one that ended alike."""
    reference, results = tmp_path / "undisturbed", tmp_path / "disturbed"
    for name in ("objects/a.parquet", "tissue/a.parquet", "previews/a.png", "maps/a.zarr/c/0/0"):
        write(reference / name, name)
    write(reference / "reports/a.json", DONE)
    write(reference / "reports/b.json", FAILED)
    write(reference / "logs/a.jsonl", "\n".join(map(json.dumps, LOG)))
    write(reference / "run.json", "{}")
    write(reference / "summary.csv", "slide_id,status,n_nucleus\na,done,7\nb,failed,\n")
    shutil.copytree(reference, results)
    cohort = Cohort(folder=tmp_path / "slides", healthy=("a",), broken={"b": "missing_mpp"})
    return cohort, results, reference


def again(results):
    with (results / "logs/a.jsonl").open("a") as file:
        file.write("\n" + "\n".join(map(json.dumps, LOG)))


WRONGS = {
    "a slide that is lost": (
        lambda r: (r / "reports/a.json").unlink(),
        "a: missing",
    ),
    "a healthy slide that failed": (lambda r: write(r / "reports/a.json", FAILED), "a: failed"),
    "a warning that nobody had": (
        lambda r: write(r / "reports/a.json", {**DONE, "error": {"code": "corrupt_region"}}),
        "a: done, {'code': 'corrupt_region'}",
    ),
    "another code": (
        lambda r: write(r / "reports/b.json", {**FAILED, "error": {"code": "internal"}}),
        "should be missing_mpp",
    ),
    "done twice": (again, "a: done 2 times"),
    "another table": (lambda r: write(r / "objects/a.parquet", "x"), "objects/a.parquet: other"),
    "another map": (lambda r: write(r / "maps/a.zarr/c/0/0", "x"), "undisturbed: c/0/0"),
    "one chunk more": (lambda r: write(r / "maps/a.zarr/c/0/1", "x"), "undisturbed: c/0/1"),
    "half a file": (lambda r: write(r / "objects/.a.parquet~h.1.partial", ""), "left behind"),
    "a lease": (lambda r: write(r / "logs/a.lease", ""), "logs/a.lease: left behind"),
    "a stranger": (lambda r: write(r / "core", ""), "nobody knows"),
    "other totals": (
        lambda r: write(r / "summary.csv", "slide_id,status,n_nucleus\na,done,8\nb,failed,\n"),
        "summary",
    ),
}


def test_nothing_is_wrong_with_an_equal_run(ended):
    assert judge(*ended) == []


@pytest.mark.parametrize("name", WRONGS)
def test_whatever_is_wrong_is_found(ended, name):
    damage, said = WRONGS[name]
    damage(ended[1])
    found = judge(*ended)
    assert any(said in line for line in found), found
