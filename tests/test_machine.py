import os
import platform
import subprocess
import sys

import pytest

from wsi_pipeline.machine import (
    available_cpus,
    keep_freed_memory,
    peak_rss_mb,
    total_memory,
    use_few_heaps,
)

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

THREADS = """
import sys, threading
import numpy as np
from wsi_pipeline import machine
from wsi_pipeline.machine import keep_freed_memory, release_memory, resident_bytes
machine.available_cpus = lambda: 2
if sys.argv[1] == "several":
    machine.use_few_heaps = lambda: True
keep_freed_memory()
before = resident_bytes()
together = threading.Barrier(8)
def work():
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(20)]
    together.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
release_memory()
print((resident_bytes() - before) >> 20)
"""


def left_by_threads(how: str) -> int:
    command = [sys.executable, "-c", THREADS, how]
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=usual)
    return int(done.stdout)


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_what_threads_have_freed_goes_back_where_they_have_one_heap():
    assert left_by_threads("one") < 30  # of 160
    assert left_by_threads("several") > 40


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
    assert use_few_heaps() is False


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
