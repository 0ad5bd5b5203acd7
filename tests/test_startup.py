"""What is imported when: nothing heavy for a help text, no table reader before there are tables."""

import json
import subprocess
import sys

import pytest

from wsi_pipeline.synth import write_slide

HEAVY = {"torch", "numpy", "zarr", "numba", "openslide", "pyarrow", "pandas", "dask", "rich", "PIL"}


def imported(code):
    """Return the top-level modules that some code leaves behind in a fresh interpreter."""
    more = "import json, sys; print(); print(json.dumps(list(sys.modules)))"
    out = subprocess.check_output([sys.executable, "-c", f"{code}\n{more}"], text=True)
    return {name.partition(".")[0] for name in json.loads(out.splitlines()[-1])}


@pytest.mark.parametrize("command", ["main_run", "main_wsi"])
def test_help_imports_nothing_heavy(command):
    code = (
        f"from wsi_pipeline.cli import {command}\n"
        f"try:\n    {command}(['--help'])\nexcept SystemExit:\n    pass"
    )
    assert not imported(code) & HEAVY


def test_a_run_begins_without_what_only_reads_results():
    found = imported("import wsi_pipeline.api, wsi_pipeline.inference")
    assert not found & {"geopandas", "pandas", "dask", "matplotlib", "tiffslide", "rich"}
    assert "torch" in found


FIRST_BLOCK = """
from wsi_pipeline.api import execute, plan_run
before = set()
class Watcher:
    def start(self, job): pass
    def advance(self, job, stage, done, total):
        if stage == "predict" and done == 1:
            before.update(sys.modules)
    def finish(self, job, report, *, skipped):
        assert report.status == "done", report.reason
import sys
slide, out = sys.argv[1:]
execute(plan_run([slide], out, model="stain-baseline"), device="cpu", watcher=Watcher())
assert before and "pandas" not in before, "the first block waited for pandas"
"""


def test_a_run_does_without_what_reads_tables_and_its_first_block_without_what_writes_them(
    tmp_path,
):
    slide = tmp_path / "small.svs"
    write_slide(slide, width=1536, height=1536, mpp=0.25, seed=2, truth=False)
    code = f"import sys; sys.argv = ['', {str(slide)!r}, {str(tmp_path / 'out')!r}]\n{FIRST_BLOCK}"
    assert not imported(code) & {"geopandas", "pyproj", "matplotlib", "dask"}


@pytest.mark.parametrize("command", ["main_run", "main_wsi"])
def test_commands_seldom_look_for_cycles(command):
    code = (
        f"import gc\nfrom wsi_pipeline.cli import {command}\n"
        f"try:\n    {command}(['--version'])\nexcept SystemExit:\n    pass\n"
        "assert gc.isenabled() and gc.get_threshold()[0] == 10_000, gc.get_threshold()"
    )
    imported(code)


def test_the_library_leaves_the_collector_of_a_program_alone():
    imported(
        "import gc\nbefore = gc.get_threshold()\nimport wsi_pipeline.api, wsi_pipeline.inference\n"
        "assert gc.get_threshold() == before"
    )
