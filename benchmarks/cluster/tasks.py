"""What Slurm says of jobs and of the tasks of arrays."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Task", "parse_tasks", "task_indices"]

_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}


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


def parse_tasks(line: str) -> list[Task]:
    """Read a line of ``scontrol --oneliner show job``: one task, or those that wait as one."""
    facts = dict(re.findall(r"(?:^| )([A-Za-z]+)=(\S*)", line))
    if "JobState" not in facts:
        return []
    spans = facts.get("ArrayTaskId")
    indices: list[int | None] = [None] if spans is None else [*task_indices(spans)]
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


def task_indices(text: str) -> list[int]:
    """Return what ``0-3,7,8-12:2%4`` stands for."""
    found: list[int] = []
    for span in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", span)
        if match is None:
            raise ValueError(f"no list of array tasks: {text!r}")
        first, last, step = match[1], match[2] or match[1], match[3] or "1"
        found.extend(range(int(first), int(last) + 1, int(step)))
    return found
