"""Slides on this machine by a Dask LocalCluster: some processes, each on its share of it.

    python workflows/dask/local.py 'slides/*.svs' results/ --workers 4 --threads 2

Done slides are skipped, so the same command goes on.
"""

from __future__ import annotations

import argparse
import signal
import sys

from distributed import LocalCluster

from wsi_pipeline.cli import main_run
from wsi_pipeline.machine import available_cpus, memory_limit


def dask_setup(_worker: object) -> None:
    """Let a terminal's Ctrl-C reach the command alone, which then tells the workers to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Start a cluster, run the slides on it, and end it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", nargs="+", help="as of wsi-run")
    parser.add_argument("out", help="results folder")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, help="of each; default: its share of the processors")
    arguments, others = parser.parse_known_args()
    threads = arguments.threads or max(1, available_cpus() // arguments.workers)
    # A quarter stays for the system and its cache of files.
    share_mib = int(0.75 * memory_limit() / arguments.workers) >> 20
    # Dask's own limit is off: it counts the cached pixels of a slide as a leak.
    with LocalCluster(
        n_workers=arguments.workers,
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address=None,
        preload=[__file__],  # for dask_setup
    ) as cluster:
        main_run(
            [
                *arguments.slides,
                *("--out", arguments.out, "--dask", cluster.scheduler_address),
                *("--workers", str(threads), "--memory", f"{share_mib}M"),
                *others,  # whatever else wsi-run takes; the last one of an option counts
            ]
        )


if __name__ == "__main__":  # the workers import this file
    sys.exit(main())
