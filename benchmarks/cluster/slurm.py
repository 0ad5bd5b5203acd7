"""The cluster: its jobs, and the faults that befall it."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.cluster.configuration import (
    host_name,
    link_default,
    unlink_default,
    write_configuration,
)
from benchmarks.cluster.daemons import Daemons, kill_jobs, missing_programs, search_path
from benchmarks.cluster.tasks import Task, parse_tasks

__all__ = ["Cluster"]

_POLL_S = 0.2
_LAUNCH_FAILED = "launch_failed_requeued_held"
_SETTLED_S = 2.5
"""slurmd refuses to start a job again in the second in which it was killed."""


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
        self._default = default
        self._node_is_down = False
        self._held_since: dict[str, float] = {}
        # The name of a socket has at most 107 bytes, and folders of tests are deep.
        self._sockets = Path(tempfile.mkdtemp(prefix="munge-"))
        self._socket = self._sockets / "socket"
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for own in (self.folder, self._sockets):
            own.chmod(0o755)
        self.conf = write_configuration(
            self.folder,
            munge=self._socket,
            cpus=cpus,
            gpus=gpus,
            grace_s=grace_s,
            kill_wait_s=kill_wait_s,
            max_array=max_array,
        )
        self._daemons = Daemons(self.folder, self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Slurm's commands, and jobs, find this cluster."""
        # Long lists of tasks are not to be cut short with "...".
        return {"SLURM_CONF": str(self.conf), "SLURM_BITSTR_LEN": "0", "PATH": search_path()}

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
            link_default(self.conf)

    def stop(self) -> None:
        """End all jobs and daemons; what they wrote stays in the folder."""
        if self._daemons.alive("slurmctld"):
            self.command("scancel", "--user", getpass.getuser(), check=False)
            self.command("scancel", "--user", getpass.getuser(), "--signal=KILL", check=False)
        self.kill_node()
        for name in ("slurmctld", "munged"):
            self._daemons.end(name, signal.SIGTERM)
        if self._default:
            unlink_default(self.conf)
        shutil.rmtree(self._sockets, ignore_errors=True)

    # -- faults --------------------------------------------------------------------------------

    def kill_controller(self, by: signal.Signals = signal.SIGKILL) -> None:
        """Kill slurmctld; running jobs go on, and nothing new begins.

        SIGKILL loses what it was told since it last saved its state, jobs that have ended, say;
        SIGTERM lets it save.
        """
        self._daemons.end("slurmctld", by)

    def start_controller(self) -> None:
        """Start slurmctld from the state on disk, and wait until it answers."""
        self._daemons.start("slurmctld", "-D", "-f", str(self.conf))
        self._daemons.wait("slurmctld", self._controller_is_up)

    def kill_node(self) -> None:
        """Kill slurmd and every process of every job at once, as a power cut does."""
        self._daemons.end("slurmd", signal.SIGKILL)
        kill_jobs(self.conf)
        if self._daemons.alive("slurmctld"):
            # Found out by itself after SlurmdTimeout, or at a boot if the job is not too young.
            self._update_node("State=DOWN", "Reason=power")
            self._node_is_down = True

    def start_node(self) -> None:
        """Start slurmd, as a boot does, and wait until the node takes jobs."""
        self._daemons.start("slurmd", "-D", "-b", "-f", str(self.conf))
        if self._node_is_down:
            self._update_node("State=RESUME")
            self._node_is_down = False
        self._daemons.wait("slurmd", self._node_is_up)

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
            found.extend(task for task in parse_tasks(line) if not jobs or task.job in jobs)
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
        """Let requeued jobs go that have been held back for some seconds; call it repeatedly.

        Started again too soon for slurmd, a job is held and its node drained ("Duplicate jobid"):
        what an administrator would put right.
        """
        now = time.monotonic()
        pending = {
            task.name: task.reason
            for task in (self.tasks() if tasks is None else tasks)
            if task.state == "PENDING" and task.reason in ("BeginTime", _LAUNCH_FAILED)
        }
        self._held_since = {name: self._held_since.get(name, now) for name in pending}
        for name, since in self._held_since.items():
            if now - since <= _SETTLED_S:
                continue
            if pending[name] == _LAUNCH_FAILED:
                self._update_node("State=RESUME")
                self.command("scontrol", "release", name, check=False)
            self.command("scontrol", "update", f"JobId={name}", "StartTime=now", check=False)

    # -- inside --------------------------------------------------------------------------------

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self._daemons.start(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self._socket}",
            f"--key-file={key}",
            f"--pid-file={self._sockets / 'pid'}",
            f"--seed-file={self.folder / 'munge' / 'seed'}",
            f"--log-file={self.folder / 'munge' / 'log'}",
        )
        self._daemons.wait("munged", self._socket.exists)

    def _update_node(self, *facts: str) -> None:
        self.command("scontrol", "update", f"NodeName={host_name()}", *facts, check=False)

    def _controller_is_up(self) -> bool:
        return "is UP" in self.command("scontrol", "ping", check=False)

    def _node_is_up(self) -> bool:
        states = self.command("sinfo", "--noheader", "--format=%T", check=False).split()
        return bool(states) and all(state in {"idle", "mixed", "allocated"} for state in states)
