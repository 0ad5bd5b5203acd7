"""The file for Prometheus' node_exporter."""

import json
import os
import re
import time

import pytest
from click.testing import CliRunner

from wsi_pipeline import exposition
from wsi_pipeline.cli import run
from wsi_pipeline.exposition import MetricsWatcher
from wsi_pipeline.job import RunReport, SlideJob

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{((?:{LABEL},?)*)\}})? (\S+)")


def parse(text):
    """Read the text exposition format 0.0.4 strictly; samples by name and labels."""
    assert text.endswith("\n")
    samples, types, helped, seen = {}, {}, set(), []
    for line in text.splitlines():
        if match := re.fullmatch(rf"# HELP ({NAME}) [^\n]+", line):
            assert match[1] not in helped
            helped.add(match[1])
        elif match := re.fullmatch(rf"# TYPE ({NAME}) (gauge|counter)", line):
            assert match[1] not in types
            assert match[1].endswith("_total") == (match[2] == "counter")
            types[match[1]] = match[2]
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name = match[1]
            assert name in types, f"{name}: its type comes after its value"
            if not seen or seen[-1] != name:  # all lines of a metric are one group
                assert name not in seen, name
                seen.append(name)
            pairs = re.findall(LABEL, match[2] or "")
            assert len(dict(pairs)) == len(pairs)
            key = (name, frozenset(pairs))
            assert key not in samples
            samples[key] = float(match[5])
    assert helped == set(types) == set(seen)
    return samples


class Inner:
    def __init__(self):
        self.told = []

    def start(self, job):
        self.told.append(("start", job.slide_id))

    def advance(self, job, stage, done, total):
        self.told.append((stage, done, total))

    def finish(self, job, report, *, skipped):
        self.told.append(("finish", report.status, skipped))

    def close(self):
        self.told.append("closed")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics" / "run.prom"


def job(slide_id, out):
    return SlideJob(path="", slide_id=slide_id, out=out, model_name="m", model_digest="")


def ended(slide_id, status="done", **facts):
    seconds = {"open": 1.5, "predict": 4.0, "total": 5.0}
    return RunReport(slide_id=slide_id, path="", job_id="", status=status, seconds=seconds, **facts)


def values(path, name):
    prefix = "wsi_pipeline_"
    found = parse(path.read_text())
    constant = {("shard", "0/1"), ("odd", r"a\"b\\c\nd")}
    by_labels = {}
    for (metric, labels), value in found.items():
        if metric == prefix + name:
            assert constant <= labels
            by_labels[tuple(sorted(value for _, value in labels - constant))] = value
    return by_labels


def test_slides_seconds_and_objects_are_counted(path, tmp_path):
    inner = Inner()
    labels = {"shard": "0/1", "odd": 'a"b\\c\nd'}
    watcher = MetricsWatcher(inner, path, planned=5, labels=labels)
    try:
        assert values(path, "slides")[("waiting",)] == 5
        for name in "abcd":
            watcher.start(job(name, tmp_path))
        watcher.advance(job("a", tmp_path), "predict", 1, 2)
        done = ended("a", counts={"nucleus": 7, "gland": 1}, tissue_mm2=2.5, device_busy_s=3.0)
        watcher.finish(job("a", tmp_path), done, skipped=False)
        watcher.finish(job("b", tmp_path), ended("b", "failed", tissue_mm2=9.0), skipped=False)
        before = ended("c", counts={"nucleus": 100}, tissue_mm2=50.0)
        watcher.finish(job("c", tmp_path), before, skipped=True)
    finally:
        watcher.close()
    assert values(path, "slides") == {
        ("done",): 2,
        ("failed",): 1,
        ("interrupted",): 0,
        ("running",): 1,
        ("waiting",): 1,
    }
    assert values(path, "slides_skipped") == {(): 1}
    assert values(path, "objects_total") == {("nucleus",): 7, ("gland",): 1}
    assert values(path, "stage_seconds_total") == {("open",): 3.0, ("predict",): 8.0}
    assert values(path, "tissue_mm2_total") == {(): 2.5}
    assert values(path, "device_busy_seconds_total") == {(): 3.0}
    assert values(path, "ended") == {(): 1}
    assert values(path, "heartbeat_time_seconds")[()] == pytest.approx(time.time(), abs=100)
    assert list(values(path, "build_info").values()) == [1]
    assert inner.told[4:] == [
        ("predict", 1, 2),
        ("finish", "done", False),
        ("finish", "failed", False),
        ("finish", "done", True),
        "closed",
    ]
    assert os.listdir(path.parent) == ["run.prom"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_file_lives_while_nothing_happens(path, monkeypatch):
    monkeypatch.setattr(exposition, "WRITE_EVERY_S", 0.01)
    labels = {"shard": "0/1", "odd": 'a"b\\c\nd'}
    watcher = MetricsWatcher(Inner(), path, planned=1, labels=labels)
    try:
        first = values(path, "heartbeat_time_seconds")[()]
        deadline = time.monotonic() + 30
        while values(path, "heartbeat_time_seconds")[()] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert values(path, "heartbeat_time_seconds")[()] > first
        assert values(path, "ended") == {(): 0}
    finally:
        watcher.close()


def test_a_file_that_cannot_be_written_later_costs_one_warning(path, monkeypatch, caplog):
    watcher = MetricsWatcher(Inner(), path, planned=1, labels={})
    monkeypatch.setattr(watcher, "_write", lambda: (_ for _ in ()).throw(OSError(5, "gone")))
    watcher._try_to_write()
    watcher.close()
    assert len(caplog.records) == 1


def test_a_run_writes_it_and_a_place_that_is_none_is_wrong_use(tmp_path):
    slide = tmp_path / "bad.svs"
    slide.write_bytes(b"no slide at all")
    how = [str(slide), "--out", str(tmp_path / "out"), "--no-progress", "--model", "stain-baseline"]
    path = tmp_path / "run.prom"
    result = CliRunner().invoke(run, [*how, "--metrics-file", str(path), "--shard", "0/2"])
    assert result.exit_code == 1, result.output
    found = parse(path.read_text())
    failed = [v for (name, labels), v in found.items() if ("state", "failed") in labels]
    assert failed == [1]
    assert all({"shard", "device", "model"} <= {key for key, _ in labels} for _, labels in found)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(run, [*how, "--metrics-file", str(tmp_path / "file" / "x.prom")])
    assert result.exit_code == 2
    assert json.loads((tmp_path / "out" / "run.json").read_text())["slides"]
