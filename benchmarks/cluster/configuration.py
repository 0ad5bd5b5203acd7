"""The files from which Slurm's programs learn what cluster they are of."""

from __future__ import annotations

import getpass
import os
import socket
import stat
from pathlib import Path

__all__ = [
    "DEFAULT_CONF",
    "PREEMPTIBLE",
    "URGENT",
    "host_name",
    "link_default",
    "unlink_default",
    "write_configuration",
]

PREEMPTIBLE, URGENT = "preemptible", "urgent"
"""The partitions: jobs of the second push those of the first (the default) from the node."""
DEFAULT_CONF = Path("/etc/slurm/slurm.conf")
"""Where programs look that do not know ``SLURM_CONF``."""

_CONF = """\
ClusterName=rehearsal
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={socket}
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldDebug=info
SlurmdDebug=info
# Neither cgroups nor systemd are needed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
# Answers come quickly, and ended jobs are remembered: there is no database to ask.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,sched_interval=1,batch_sched_delay=0,defer_batch
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PriorityType=priority/basic
MinJobAge=86400
MaxJobCount=50000
MaxArraySize={max_array}
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/ended.log
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait={kill_wait}
ReturnToService=2
SlurmctldTimeout=120
SlurmdTimeout=300
SlurmdParameters=config_overrides
{gres_types}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} \
ThreadsPerCore=1 RealMemory={memory_mb} {gres} State=UNKNOWN
PartitionName={preemptible} Nodes={host} Default=YES MaxTime=1-00:00:00 DefaultTime=10 State=UP \
PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName={urgent} Nodes={host} Default=NO MaxTime=1-00:00:00 DefaultTime=10 State=UP \
PriorityTier=10 PreemptMode=OFF
"""


def write_configuration(
    folder: Path,
    *,
    munge: Path,
    cpus: int,
    gpus: int,
    grace_s: int,
    kill_wait_s: int,
    max_array: int,
) -> Path:
    """Write ``slurm.conf`` and what belongs to it into a cluster's folder; return its path.

    Args:
        folder: the cluster's.
        munge: the socket at which its munged listens.
        cpus: CPUs that the node pretends to have.
        gpus: GPUs that it pretends to have.
        grace_s: how long a preempted job may go on after its signal.
        kill_wait_s: from SIGTERM to SIGKILL when a job is ended.
        max_array: largest number of tasks in an array.
    """
    conf = folder / "slurm.conf"
    ports = _free_ports(2)
    memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 << 20) * 9 // 10
    conf.write_text(
        _CONF.format(
            host=host_name(),
            user=getpass.getuser(),
            socket=munge,
            controller_port=ports[0],
            node_port=ports[1],
            folder=folder,
            cpus=cpus,
            memory_mb=memory_mb,
            gres_types="GresTypes=gpu" if gpus else "",
            gres=f"Gres=gpu:{gpus}" if gpus else "",
            grace=grace_s,
            kill_wait=kill_wait_s,
            max_array=max_array,
            preemptible=PREEMPTIBLE,
            urgent=URGENT,
        )
    )
    devices = [folder / f"gpu{number}" for number in range(gpus)]
    for device in devices:
        _make_device(device)
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    return conf


def link_default(conf: Path) -> None:
    """Make this the configuration of programs that do not know ``SLURM_CONF``.

    Raises:
        RuntimeError: another is.
    """
    if DEFAULT_CONF.exists():
        raise RuntimeError(f"{DEFAULT_CONF} is there: this machine has a default cluster")
    DEFAULT_CONF.parent.mkdir(parents=True, exist_ok=True)
    DEFAULT_CONF.unlink(missing_ok=True)  # a link to a cluster that is gone
    DEFAULT_CONF.symlink_to(conf)


def unlink_default(conf: Path) -> None:
    """Undo :func:`link_default`, unless another has taken the place."""
    if DEFAULT_CONF.is_symlink() and DEFAULT_CONF.readlink() == conf:
        DEFAULT_CONF.unlink()


def host_name() -> str:
    """Return the name of this machine, as the node is called."""
    return socket.gethostname().partition(".")[0]


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for own in sockets:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in sockets]
    finally:
        for own in sockets:
            own.close()


def _make_device(path: Path) -> None:
    """Make another /dev/null: Slurm asks a device for its numbers, and jobs never open it."""
    path.unlink(missing_ok=True)
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
