"""What is imported when: nothing heavy for a help text, no table reader before there are tables."""

import json
import subprocess
import sys

import pytest

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
