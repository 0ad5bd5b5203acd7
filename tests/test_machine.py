import subprocess
import sys

import pytest

from wsi_pipeline.machine import available_cpus, keep_freed_memory, peak_rss_mb, total_memory

FAULTS = """
import resource, sys
import numpy as np
from wsi_pipeline.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(100 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(100 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_without_asking_the_system():
    # Huge pages may make the usual way cheap in faults; kept memory has none in either case.
    assert faults("keep") < 200
    assert faults("keep") <= faults("usual")


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert keep_freed_memory() is False


def test_what_the_machine_has():
    assert available_cpus() >= 1
    assert 10 < peak_rss_mb() < total_memory() / (1 << 20)


def test_the_memory_of_the_parent_is_not_this_process_own():
    held = bytearray(b"x") * (300 << 20)
    code = "from wsi_pipeline.machine import peak_rss_mb; print(peak_rss_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_rss_mb() > 300
    assert 5 < float(done.stdout) < 200
    del held
