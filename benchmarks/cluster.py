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

    python -m benchmarks.cluster FOLDER [--cpus N] [--gpus N]

starts one, says how to reach it, and stops it at Ctrl-C.
"""

from __future__ import annotations

import argparse
import getpass
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

__all__ = ["PREEMPTIBLE", "PROGRAMS", "URGENT", "Cluster", "Task", "missing_programs"]

PROGRAMS = "munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue"
PREEMPTIBLE, URGENT = "preemptible", "urgent"
"""The partitions: jobs of the second push those of the first (the default) from the node."""
DEFAULT_CONF = Path("/etc/slurm/slurm.conf")
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}
_POLL_S = 0.2
_SETTLED_S = 2.5
"""slurmd refuses to start a job again in the second in which it was killed."""
_SBIN = "/usr/sbin", "/sbin", "/usr/local/sbin"

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


@dataclass(frozen=True, kw_only=True)
class Task:
    """What Slurm says of a job, or of one task of an array."""

    job: int
    """The number ``sbatch`` gave to the job or the array."""
    index: int | None
    """Which task of the array; None where the job is none."""
    state: str
    """``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED``, ..."""
    reason: str
    """Why it waits, or why it ended."""
    exit_code: int
    """What its script returned."""
    restarts: int
    """How often it was requeued."""

    @property
    def name(self) -> str:
        """The name that ``scontrol`` and ``scancel`` take."""
        return str(self.job) if self.index is None else f"{self.job}_{self.index}"

    @property
    def ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in _ENDED


def missing_programs() -> list[str]:
    """Return which of the programs a cluster needs are not installed here."""
    return [name for name in PROGRAMS if _find(name) is None]


class Cluster:
    """One controller and one node; a context manager.

    Args:
        folder: a new or an empty folder for configuration, state and logs.
        cpus: CPUs that the node pretends to have.
        gpus: GPUs that it pretends to have.
        grace_s: how long a preempted job may go on after its signal.
        kill_wait_s: from SIGTERM to SIGKILL when a job is ended.
        max_array: largest number of tasks in an array.
        default: also make this the cluster of programs that do not know ``SLURM_CONF``, by a link
            at ``/etc/slurm/slurm.conf``. One cluster a machine can be that.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cpus: int = 4,
        gpus: int = 0,
        grace_s: int = 20,
        kill_wait_s: int = 5,
        max_array: int = 10_001,
        default: bool = False,
    ) -> None:
        self.folder = folder.absolute()
        self.conf = self.folder / "slurm.conf"
        self._default = default
        self._node_is_down = False
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._held_since: dict[str, float] = {}
        # The name of a socket has at most 107 bytes, and folders of tests are deep.
        self._sockets = Path(tempfile.mkdtemp(prefix="munge-"))
        self._socket = self._sockets / "socket"
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for own in (self.folder, self._sockets):
            own.chmod(0o755)
        self._configure(cpus, gpus, grace_s, kill_wait_s, max_array)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Slurm's commands, and jobs, find this cluster."""
        # Long lists of tasks are not to be cut short with "...".
        path = os.pathsep.join((os.environ.get("PATH", ""), *_SBIN))
        return {"SLURM_CONF": str(self.conf), "SLURM_BITSTR_LEN": "0", "PATH": path}

    def __enter__(self) -> Cluster:
        """Start the daemons."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all jobs and daemons."""
        self.stop()

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs.

        Raises:
            RuntimeError: a program is not installed, or the cluster does not come up.
        """
        missing = missing_programs()
        if missing:
            raise RuntimeError(f"not installed: {', '.join(missing)}")
        self._start_munge()
        self.start_controller()
        self.start_node()
        if self._default:
            _link_default(self.conf)

    def stop(self) -> None:
        """End all jobs and daemons; what they wrote stays in the folder."""
        if self._alive("slurmctld"):
            self.command("scancel", "--user", getpass.getuser(), check=False)
            self.command("scancel", "--user", getpass.getuser(), "--signal=KILL", check=False)
        self.kill_node()
        for name in ("slurmctld", "munged"):
            self._end(name, signal.SIGTERM)
        if self._default and _points_to(DEFAULT_CONF, self.conf):
            DEFAULT_CONF.unlink()
        shutil.rmtree(self._sockets, ignore_errors=True)

    # -- faults --------------------------------------------------------------------------------

    def kill_controller(self, by: signal.Signals = signal.SIGKILL) -> None:
        """Kill slurmctld; running jobs go on, and nothing new begins.

        SIGKILL loses what it was told since it last saved its state, jobs that have ended, say;
        SIGTERM lets it save.
        """
        self._end("slurmctld", by)

    def start_controller(self) -> None:
        """Start slurmctld from the state on disk, and wait until it answers."""
        self._spawn("slurmctld", "-D", "-f", str(self.conf))
        self._until_up("slurmctld", self._controller_is_up)

    def kill_node(self) -> None:
        """Kill slurmd and every process of every job at once, as a power cut does."""
        self._end("slurmd", signal.SIGKILL)
        for number in self._processes_of_jobs():
            _kill(number, signal.SIGKILL)
        if self._alive("slurmctld"):
            # Found out by itself after SlurmdTimeout, or at a boot if the job is not too young.
            self._update_node("State=DOWN", "Reason=power")
            self._node_is_down = True

    def start_node(self) -> None:
        """Start slurmd, as a boot does, and wait until the node takes jobs."""
        self._spawn("slurmd", "-D", "-b", "-f", str(self.conf))
        if self._node_is_down:
            self._update_node("State=RESUME")
            self._node_is_down = False
        self._until_up("slurmd", self._node_is_up)

    # -- jobs ----------------------------------------------------------------------------------

    def command(
        self,
        *arguments: str | Path,
        check: bool = True,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command that talks to this cluster; return what it printed.

        Raises:
            RuntimeError: it failed, and ``check`` is set.
        """
        done = subprocess.run(
            [os.fspath(argument) for argument in arguments],
            env={**os.environ, **self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def sbatch(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Submit a job; return its number."""
        where = cwd or self.folder
        out = self.command("sbatch", "--parsable", *arguments, cwd=where, environment=environment)
        return int(out.strip().partition(";")[0])

    def tasks(self, *jobs: int) -> list[Task]:
        """Return what Slurm knows of jobs and of all tasks of arrays; without a name, of all."""
        found = []
        told = self.command("scontrol", "--oneliner", "show", "job", check=False)
        for line in told.splitlines():
            found.extend(task for task in _parse(line) if not jobs or task.job in jobs)
        return sorted(found, key=lambda task: (task.job, -1 if task.index is None else task.index))

    def wait(self, *jobs: int, timeout_s: float = 300.0) -> list[Task]:
        """Wait until jobs have ended, requeued ones included, and return their tasks.

        Raises:
            TimeoutError: they have not ended in time.
        """

        def ended(tasks: Sequence[Task]) -> bool:
            return all(task.ended for task in tasks)

        return self.until(ended, *jobs, timeout_s=timeout_s)

    def until(
        self, holds: Callable[[Sequence[Task]], bool], *jobs: int, timeout_s: float = 300.0
    ) -> list[Task]:
        """Wait until something holds of the tasks of jobs, and return them.

        Slurm holds a requeued job back for two minutes; here it is let go after some seconds.

        Raises:
            TimeoutError: it does not hold in time.
        """
        end = time.monotonic() + timeout_s
        while True:
            tasks = self.tasks(*jobs)
            if tasks and holds(tasks):
                return tasks
            if time.monotonic() > end:
                told = ", ".join(f"{t.name} {t.state} ({t.reason})" for t in tasks)
                raise TimeoutError(f"after {timeout_s} s: {told or 'no such job'}")
            self.nudge(tasks)
            time.sleep(_POLL_S)

    def nudge(self, tasks: Sequence[Task] | None = None) -> None:
        """Let requeued jobs go that have been held back for some seconds; call it repeatedly."""
        now = time.monotonic()
        held = {
            task.name
            for task in (self.tasks() if tasks is None else tasks)
            if task.state == "PENDING" and task.reason == "BeginTime"
        }
        self._held_since = {name: self._held_since.get(name, now) for name in held}
        for name, since in self._held_since.items():
            if now - since > _SETTLED_S:
                self.command("scontrol", "update", f"JobId={name}", "StartTime=now", check=False)

    # -- inside --------------------------------------------------------------------------------

    def _configure(
        self, cpus: int, gpus: int, grace_s: int, kill_wait_s: int, max_array: int
    ) -> None:
        ports = _free_ports(2)
        memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 << 20) * 9 // 10
        self.conf.write_text(
            _CONF.format(
                host=_host(),
                user=getpass.getuser(),
                socket=self._socket,
                controller_port=ports[0],
                node_port=ports[1],
                folder=self.folder,
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
        devices = [self.folder / f"gpu{number}" for number in range(gpus)]
        for device in devices:
            _make_device(device)
        (self.folder / "gres.conf").write_text(
            "".join(f"Name=gpu File={device}\n" for device in devices)
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self._spawn(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self._socket}",
            f"--key-file={key}",
            f"--pid-file={self._sockets / 'pid'}",
            f"--seed-file={self.folder / 'munge' / 'seed'}",
            f"--log-file={self.folder / 'munge' / 'log'}",
        )
        self._until_up("munged", self._socket.exists)

    def _spawn(self, name: str, *arguments: str) -> None:
        program = _find(name)
        assert program is not None  # start() has looked
        with (self.folder / f"{name}.log").open("ab") as log:
            self._children[name] = subprocess.Popen(
                [program, *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, and we end them in order
            )

    def _until_up(self, name: str, up: Callable[[], bool], timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while not up():
            if not self._alive(name) or time.monotonic() > end:
                log = (self.folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} does not come up:\n{log[-2000:]}")
            time.sleep(0.05)

    def _update_node(self, *facts: str) -> None:
        self.command("scontrol", "update", f"NodeName={_host()}", *facts, check=False)

    def _controller_is_up(self) -> bool:
        return "is UP" in self.command("scontrol", "ping", check=False)

    def _node_is_up(self) -> bool:
        states = self.command("sinfo", "--noheader", "--format=%T", check=False).split()
        return bool(states) and all(state in {"idle", "mixed", "allocated"} for state in states)

    def _alive(self, name: str) -> bool:
        child = self._children.get(name)
        return child is not None and child.poll() is None

    def _end(self, name: str, number: signal.Signals) -> None:
        child = self._children.pop(name, None)
        if child is None:
            return
        child.send_signal(number)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _processes_of_jobs(self) -> list[int]:
        """Return the processes below this cluster's slurmd: their environment names its file."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or int(folder.name) == os.getpid():
                continue
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                stepd = (folder / "comm").read_text().startswith("slurmstepd")
            except OSError:
                continue  # it has ended, or is none of ours
            in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
            if mark in variables and (in_job or stepd):
                found.append(int(folder.name))
        return found


def _parse(line: str) -> list[Task]:
    """Read a line of ``scontrol --oneliner show job``: one task, or those that wait as one."""
    facts = dict(re.findall(r"(?:^| )([A-Za-z]+)=(\S*)", line))
    if "JobState" not in facts:
        return []
    spans = facts.get("ArrayTaskId")
    indices: list[int | None] = [None] if spans is None else [*_indices(spans)]
    return [
        Task(
            job=int(facts.get("ArrayJobId", facts["JobId"])),
            index=index,
            state=facts["JobState"],
            reason=facts["Reason"],
            exit_code=int(facts["ExitCode"].partition(":")[0]),
            restarts=int(facts["Restarts"]),
        )
        for index in indices
    ]


def _indices(text: str) -> list[int]:
    """Return what ``0-3,7,8-12:2%4`` stands for."""
    found: list[int] = []
    for span in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", span)
        if match is None:
            raise ValueError(f"no list of array tasks: {text!r}")
        first, last, step = match[1], match[2] or match[1], match[3] or "1"
        found.extend(range(int(first), int(last) + 1, int(step)))
    return found


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for own in sockets:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in sockets]
    finally:
        for own in sockets:
            own.close()


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *_SBIN)))


def _make_device(path: Path) -> None:
    """Make another /dev/null: Slurm asks a device for its numbers, and jobs never open it."""
    path.unlink(missing_ok=True)
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


def _kill(number: int, by: signal.Signals) -> None:
    try:
        os.kill(number, by)
    except ProcessLookupError:
        return


def _points_to(link: Path, target: Path) -> bool:
    return link.is_symlink() and link.readlink() == target


def _link_default(conf: Path) -> None:
    if DEFAULT_CONF.exists():
        raise RuntimeError(f"{DEFAULT_CONF} is there: this machine has a default cluster")
    DEFAULT_CONF.parent.mkdir(parents=True, exist_ok=True)
    DEFAULT_CONF.unlink(missing_ok=True)  # a link to a cluster that is gone
    DEFAULT_CONF.symlink_to(conf)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="configuration, state and logs")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpus", type=int, default=0)
    asked = parser.parse_args()
    with Cluster(asked.folder, cpus=asked.cpus, gpus=asked.gpus) as cluster:
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ending all jobs")


if __name__ == "__main__":
    _main()
