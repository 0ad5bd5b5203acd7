"""Slides on a Slurm cluster by dask-jobqueue: jobs with a GPU make maps, jobs without make tables.

    python workflows/dask/slurm.py slides/ results/ --model cerberus-open --gpu-jobs 4 --cpu-jobs 8

Run it where it may live for hours (a login node that allows it, or a small job of its own) and
where the nodes can reach it. It holds the scheduler: if it dies, the workers stop with their
finished blocks kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

from dask_jobqueue import SLURMCluster
from distributed import Client

from wsi_pipeline.cli import main_run


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the options of the cluster from those of wsi-run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", nargs="+", help="as of wsi-run")
    parser.add_argument("out", help="results folder, on a disk that all nodes see")
    parser.add_argument("--gpu-jobs", type=int, default=1, help="jobs with one GPU each")
    parser.add_argument(
        "--cpu-jobs", type=int, default=1, help="jobs for the tables; 0: on the GPUs"
    )
    parser.add_argument("--gpu-directive", default="--gres=gpu:1", help="how a job asks for a GPU")
    parser.add_argument("--cores", type=int, default=8, help="processors of a job")
    parser.add_argument("--memory", default="24GB", help="memory of a job")
    parser.add_argument("--walltime", type=int, default=240, help="minutes of a job")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--interface", help="network interface that nodes and this machine share")
    return parser.parse_known_args(arguments)


class Jobs(SLURMCluster):
    """Jobs of two kinds, on one scheduler that runs here."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Take the options; jobs are submitted by ``adapt``."""
        self.wanted = {"gpu": options.gpu_jobs, "objects": options.cpu_jobs}
        # Workers retire before their time is over, and not all at once. Dask's own limit of memory
        # is off: it counts the cached pixels of a slide as a leak, and Slurm's is the guard.
        lifetime_min = max(1, options.walltime - 8)
        retire = ["--lifetime", f"{lifetime_min}m", "--lifetime-stagger", "4m"]
        every = [*retire, "--memory-limit", "0"]
        self.kinds: dict[str, dict[str, Any]] = {
            "gpu": {
                "job_extra_directives": [options.gpu_directive],
                "worker_extra_args": [*every, "--resources", "GPU=1"],
            },
            "objects": {"worker_extra_args": [*every, "--resources", "objects=1"]},
        }
        super().__init__(
            cores=1,  # one slide at a time; the processors of a job are asked for by job_cpu
            processes=1,
            job_cpu=options.cores,
            memory=options.memory,
            walltime=f"{options.walltime // 60:02d}:{options.walltime % 60:02d}:00",
            queue=options.partition,
            account=options.account,
            interface=options.interface,
            log_directory=f"{options.out}/logs/dask",
            death_timeout=600,
            scheduler_options={"dashboard_address": ":0"},
        )
        total = sum(self.wanted.values())
        # A job whose time is over is replaced.
        self.adapt(minimum_jobs=total, maximum_jobs=total)

    def new_worker_spec(self) -> dict[str, Any]:
        """Describe the next job: of the kind of which most are missing."""
        there = Counter(str(name).partition("-")[0] for name in self.worker_spec)
        kind = max(self.kinds, key=lambda kind: self.wanted[kind] - there[kind])
        ((name, spec),) = super().new_worker_spec().items()
        options = {**spec["options"], **self.kinds[kind]}
        return {f"{kind}-{name}": {**spec, "options": options}}


def main() -> None:
    """Start the jobs, wait for one of each kind, run the slides, end the jobs."""
    options, others = parse(sys.argv[1:])
    with Jobs(options) as cluster:
        kinds = {"GPU"} | ({"objects"} if options.cpu_jobs else set())
        with Client(cluster) as client:
            # What workers offer when a run begins decides whether slides go there in halves.
            sys.stderr.write(f"waiting for workers that offer {' and '.join(sorted(kinds))}\n")
            while not kinds <= offered(client):
                time.sleep(1)
        main_run(
            [
                *options.slides,
                *("--out", options.out, "--dask", cluster.scheduler_address),
                *("--workers", str(options.cores)),
                *others,
            ]
        )


def offered(client: Client) -> set[str]:
    """Return the resources that workers offer now."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return {name for worker in workers for name in worker["resources"]}


if __name__ == "__main__":  # the workers import this file
    sys.exit(main())
