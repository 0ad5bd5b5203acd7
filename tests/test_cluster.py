"""The pretended cluster itself: what it reads from Slurm, and that two of them do not meet."""

import os

import pytest

from benchmarks.cluster import DEFAULT_CONF, Cluster, _indices, _parse, missing_programs

needs_slurm = pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can pretend GPUs")


@pytest.mark.parametrize(
    ("text", "indices"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("0-1,5,8-12:2%4", [0, 1, 5, 8, 10, 12])],
)
def test_lists_of_tasks(text, indices):
    assert _indices(text) == indices


def test_a_list_that_was_cut_short_is_no_list():
    with pytest.raises(ValueError, match="no list of array tasks"):
        _indices("0,2,4,...")


def test_tasks_that_wait_as_one_are_told_one_by_one():
    line = (
        "JobId=9 ArrayJobId=9 ArrayTaskId=2-3%1 JobName=a b JobState=PENDING "
        "Reason=JobArrayTaskLimit Restarts=0 ExitCode=0:0 Comment=x"
    )
    assert [(task.name, task.state, task.ended) for task in _parse(line)] == [
        ("9_2", "PENDING", False),
        ("9_3", "PENDING", False),
    ]
    ended = "JobId=4 JobState=FAILED Reason=NonZeroExitCode Restarts=2 ExitCode=137:0"
    (task,) = _parse(ended)
    assert (task.name, task.ended, task.exit_code, task.restarts) == ("4", True, 137, 2)
    assert _parse("No jobs in the system") == []


@needs_slurm
@needs_root
def test_two_clusters_run_beside_each_other(tmp_path):
    before = DEFAULT_CONF.exists()
    with (
        Cluster(tmp_path / "one", cpus=3, gpus=2) as one,
        Cluster(tmp_path / "two", cpus=2) as two,
    ):
        show = "--wrap=echo $SLURM_CONF $CUDA_VISIBLE_DEVICES; sleep 1"
        first = one.sbatch("--array=0-1", "--gres=gpu:1", "--output=%a", show)
        second = two.sbatch("--output=said", show)
        assert {task.state for task in one.wait(first)} == {"COMPLETED"}
        assert [task.state for task in two.wait(second)] == ["COMPLETED"]
        assert len(two.tasks()) == 1
        with pytest.raises(RuntimeError, match="sbatch"):
            two.sbatch("--gres=gpu:1", show)
    said = {(one.folder / name).read_text().strip() for name in ("0", "1")}
    assert said == {f"{one.conf} 0", f"{one.conf} 1"}
    assert (two.folder / "said").read_text().strip() == str(two.conf)
    assert DEFAULT_CONF.exists() == before
