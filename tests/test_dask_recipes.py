"""The recipes in workflows/dask: on this machine, and on Slurm with stand-ins for its commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_fixtures import make_slides

pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
pytest.importorskip("dask_jobqueue", reason="the extra 'cluster' is not installed")

RECIPES = Path(__file__).parents[1] / "workflows" / "dask"
HOW = ("--model", "stain-baseline", "--device", "cpu", "--tile-size", "256", "--no-progress")

SBATCH = """#!/bin/bash
cp "$1" {folder}/script-$$
setsid bash {folder}/script-$$ > {folder}/log-$$ 2>&1 < /dev/null &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/bash
for job in "$@"; do kill -TERM -- "-$job"; done
"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    return make_slides(tmp_path_factory.mktemp("slides"), a=500)["a"]


def call(recipe: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, RECIPES / recipe, *map(str, arguments), *HOW],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_this_machine(slide, tmp_path):
    ended = call("local.py", slide, tmp_path / "out", "--workers", "1", "--threads", "1")
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "out" / "reports" / "a.json").read_text())["status"] == "done"


def test_jobs_of_two_kinds(slide, tmp_path):
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    ended = call(
        "slurm.py",
        *(slide, tmp_path / "out", "--interface", "lo", "--memory", "4GB", "--cores", "1"),
        *("--walltime", "90", "--partition", "night", "--gpu-jobs", "1", "--cpu-jobs", "1"),
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )
    logs = "".join(path.read_text() for path in tmp_path.glob("log-*"))
    assert ended.returncode == 0, ended.stderr + logs
    # The maps were made by one process, the tables by another.
    lines = (tmp_path / "out" / "logs" / "a.jsonl").read_text().splitlines()
    assert len({json.loads(line)["pid"] for line in lines}) == 2
    scripts = [path.read_text() for path in tmp_path.glob("script-*")]
    gpu, plain = sorted(scripts, key=lambda text: "--resources objects=1" in text)
    assert "#SBATCH --gres=gpu:1" in gpu
    assert "--resources GPU=1" in gpu
    assert "gres" not in plain
    for script in (gpu, plain):
        assert "#SBATCH -t 01:30:00" in script
        assert "#SBATCH -p night" in script
        # Before the job's time is over.
        assert "--lifetime 82m --lifetime-stagger 4m" in script
        assert "--memory-limit 0" in script
