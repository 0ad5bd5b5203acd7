import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

SOURCE = """
import numpy as np
from wsi_pipeline.compiled import compiled

@compiled
def total(values):
    found = 0
    for value in values:
        found += value
    return found
"""


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    path = tmp_path / "loops.py"
    path.write_text(SOURCE)
    return path


def process(source: Path):
    """What another process would get: the module anew, with the same files."""
    spec = spec_from_file_location("loops", source)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.total


INTS, FLOATS = np.arange(5), np.arange(5) / 2


def test_two_processes_that_compile_at_once_do_not_take_each_others_code(source, monkeypatch):
    first, second = process(source), process(source)
    files = type(first._cache._cache_file)
    save_data, load_index = files._save_data, files._load_index

    def while_the_other_compiles(self, name, data):
        # Both have looked at an index that is empty; the second is done before the first writes.
        with monkeypatch.context() as patch:
            patch.setattr(files, "_save_data", save_data)
            patch.setattr(files, "_load_index", lambda _: {})
            assert second(FLOATS) == 5.0
        save_data(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_save_data", while_the_other_compiles)
        assert first(INTS) == 10
    assert load_index(first._cache._cache_file)
    third = process(source)
    assert third(FLOATS) == 5.0
    assert third(INTS) == 10


def test_code_is_compiled_once_a_machine(source):
    first, second = process(source), process(source)
    assert first(INTS) == 10
    assert first(FLOATS) == 5.0
    assert second(FLOATS) == 5.0
    assert second(INTS) == 10
    assert sum(first.stats.cache_misses.values()) == 2
    assert sum(second.stats.cache_hits.values()) == 2


def test_code_of_an_older_source_is_not_used(source):
    assert process(source)(INTS) == 10
    source.write_text(SOURCE.replace("found = 0", "found = 100"))
    os.utime(source, (1, 1))
    assert process(source)(INTS) == 110


def test_without_a_folder_to_write_to_it_compiles_anyway(source):
    # As root every folder can be written to, so numba is told that there is none.
    script = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from loops import total\n"
        "import numpy as np\n"
        "print(total(np.arange(5)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source.parent)], capture_output=True, text=True
    )
    assert done.stdout == "10\n", done.stderr


def test_numba_can_be_switched_off(source):
    done = subprocess.run(
        [sys.executable, "-c", "import loops; print(loops.total([1, 2]))"],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        cwd=source.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "3\n", done.stderr
