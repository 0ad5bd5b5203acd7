"""Starts a cluster, says how to reach it, and stops it at Ctrl-C, SIGTERM or SIGHUP.

python -m benchmarks.cluster FOLDER [--cpus N] [--gpus N]
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.cluster.slurm import Cluster


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="configuration, state and logs")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpus", type=int, default=0)
    asked = parser.parse_args()
    wait = told_to_end()
    with Cluster(asked.folder, cpus=asked.cpus, gpus=asked.gpus) as cluster:
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        wait()
        print("ending all jobs")


def told_to_end() -> Callable[[], object]:
    """Heed signals that end a program from now on; return what waits for one.

    They raise nothing: between the start of a daemon and our knowing of it, or while all are
    being ended, an exception would leave daemons behind. One that comes during the start is
    heeded right after it.
    """
    reading, writing = os.pipe()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a script's background
            signal.signal(number, lambda *_: os.write(writing, b"."))
    return lambda: os.read(reading, 1)


if __name__ == "__main__":
    main()
