"""A real Slurm cluster of one node on this machine, for tests and rehearsals.

    with Cluster(folder, cpus=4, gpus=2) as cluster:
        job = cluster.sbatch("--array=0-9", "array.sbatch", "slides/", "results/")
        cluster.wait(job)
        states = cluster.tasks(job)

munged, slurmctld and slurmd run in the foreground as children of this process, with ports, keys
and state of their own, so several clusters may run beside each other. Nothing outside ``folder``
is touched, except with ``default=True``. CPUs and GPUs are pretended: a task gets what it asked
for in its environment, and nothing holds it to that; memory is not counted. Only root can pretend
GPUs. The programs are in Debian's and Ubuntu's packages slurmctld, slurmd, slurm-client and munge;
tried with Slurm 22.05.
"""

from benchmarks.cluster.configuration import DEFAULT_CONF, PREEMPTIBLE, URGENT
from benchmarks.cluster.daemons import PROGRAMS, missing_programs
from benchmarks.cluster.slurm import Cluster
from benchmarks.cluster.tasks import Task

__all__ = [
    "DEFAULT_CONF",
    "PREEMPTIBLE",
    "PROGRAMS",
    "URGENT",
    "Cluster",
    "Task",
    "missing_programs",
]
