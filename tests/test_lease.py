"""Who is at work on a slide: one process, on whatever machine, as long as it lives."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from wsi_pipeline import lease
from wsi_pipeline.durable import filesystem_time
from wsi_pipeline.errors import SlideBusyError
from wsi_pipeline.lease import DEAD_AFTER_S, Lease, alone, read_holder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / "a.lease"


def left_behind(path, *, age_s=0.0, **facts):
    """A lease as a process of another machine leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    elsewhere = {"host": "node7", "machine": "node7 x y", "pid": 5, "born": 1.0, "job": None}
    path.write_text(json.dumps({**elsewhere, "restart": 0, **facts}))
    now = path.stat().st_mtime
    os.utime(path, (now - age_s, now - age_s))
    return path


def test_one_holder_at_a_time(path):
    held = Lease.take(path)
    with pytest.raises(SlideBusyError, match=f"process {os.getpid()} on"):
        Lease.take(path)
    held.release()
    held.release()
    assert os.listdir(path.parent) == []
    Lease.take(path).release()


def test_of_many_who_ask_at_once_one_gets_it(path):
    left_behind(path, age_s=DEAD_AFTER_S + 1)  # one to be taken over, too
    got, refused, start = [], [], threading.Barrier(8)

    def ask():
        start.wait()
        try:
            got.append(Lease.take(path))
        except SlideBusyError:
            refused.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    assert not got[0].lost
    got[0].release()
    assert os.listdir(path.parent) == []


def test_a_killed_process_of_this_machine_is_known_to_be_dead(path):
    code = f"from pathlib import Path; from wsi_pipeline.lease import Lease; import os, signal; " \
        f"Lease.take(Path({str(path)!r})); os.kill(os.getpid(), signal.SIGKILL)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=False)
    assert read_holder(path).has_ended
    Lease.take(path).release()


def test_another_process_of_the_same_number_is_not_the_holder(path):
    Lease.take(path)
    own = read_holder(path)
    assert not own.has_ended
    facts = {**own.facts, "born": str(int(own.facts["born"]) - 100)}
    path.write_text(json.dumps(facts))
    assert read_holder(path).has_ended


def test_a_clock_that_was_put_right_makes_nobody_another(path, monkeypatch):
    """When a machine booted is told by its clock, and with it when its processes began."""
    with_old_clock = Lease.take(path)
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1.0, raising=False)
    assert not read_holder(path).has_ended
    with_old_clock.release()


JUNK = {
    "nested": b"[" * 1024,
    "nested objects": b'{"a":' * 200,
    "no text": bytes(range(256)) * 4,
    "nothing": b"",
    "zeros": bytes(1024),
    "born is a word": {"machine": lease._machine(), "pid": os.getpid(), "born": "x"},
    "born is null": {"machine": lease._machine(), "pid": os.getpid(), "born": None},
    "pid is a word": {"machine": "z", "pid": "abc"},
    "pid is huge": {"machine": lease._machine(), "pid": 10**30},
    "pid is large": {"machine": lease._machine(), "pid": 2**62},
    "pid is negative": {"machine": lease._machine(), "pid": -5},
    "pid is endless": b'{"machine": "z", "pid": Infinity, "for_s": Infinity, "done": NaN}',
    "lists": {"machine": [1], "pid": [1], "for_s": "x", "stage": ["predict"]},
    "restart is a word": {"job": "77", "restart": "x", "machine": "z"},
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_somebody_unknown_until_it_is_old(path, monkeypatch, name):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path.parent.mkdir()
    content = JUNK[name]
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    holder = read_holder(path)
    assert json.loads(json.dumps(holder.facts)) == dict(holder.facts)
    assert holder.name
    if not holder.has_ended:
        with pytest.raises(SlideBusyError):
            Lease.take(path)
        os.utime(path, (0, 0))
    Lease.take(path).release()


def test_a_link_is_nobody_and_leads_nowhere(path, tmp_path):
    path.parent.mkdir()
    victim = tmp_path / "victim"
    for exists in (False, True):
        if exists:
            victim.write_text("mine")
        path.symlink_to(victim)
        assert read_holder(path) is None
        Lease.take(path).release()
    assert victim.read_text() == "mine"


def test_what_is_no_file_is_an_error_and_no_endless_wait(path):
    path.mkdir(parents=True)
    assert read_holder(path) is None
    with pytest.raises(OSError, match="directory"):
        Lease.take(path)
    path.rmdir()
    os.mkfifo(path)
    assert read_holder(path) is None
    with pytest.raises(OSError):  # noqa: PT011 - seek on a pipe, as each system names it
        Lease.take(path)


def test_a_sign_of_life_from_the_future_counts_from_when_it_was_seen(path, monkeypatch):
    left_behind(path, age_s=-86400)
    clock = [0.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
    for now in (0.0, DEAD_AFTER_S - 1):
        clock[0] = now
        with pytest.raises(SlideBusyError, match=f"last alive {now:.0f} s ago"):
            lease.remove_if_dead(path)
    os.utime(path, (9e9, 9e9))  # it lives
    clock[0] = DEAD_AFTER_S + 1
    with pytest.raises(SlideBusyError, match="last alive 0 s ago"):
        lease.remove_if_dead(path)
    clock[0] += DEAD_AFTER_S
    lease.remove_if_dead(path)
    assert not path.exists()


def test_elsewhere_the_last_sign_of_life_decides(path):
    left_behind(path, age_s=DEAD_AFTER_S - 30)
    with pytest.raises(SlideBusyError, match="process 5 on node7, last alive 90 s ago"):
        Lease.take(path)
    left_behind(path, age_s=DEAD_AFTER_S + 1)
    Lease.take(path).release()


def test_a_job_that_slurm_started_again_takes_over_at_once(path, monkeypatch):
    left_behind(path, job="77", restart=1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(SlideBusyError, match="Slurm job 77"):
        Lease.take(path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    Lease.take(path).release()


def test_a_wrong_local_clock_makes_nobody_dead(path, monkeypatch):
    left_behind(path)
    monkeypatch.setattr(time, "time", lambda: 9e9)
    with pytest.raises(SlideBusyError):
        Lease.take(path)
    assert filesystem_time(path.parent) == pytest.approx(path.stat().st_mtime, abs=60)


def test_who_was_taken_over_knows_and_leaves_the_new_lease_alone(path):
    slow = Lease.take(path)
    assert not slow.lost
    path.unlink()
    new = Lease.take(path)
    assert slow.lost
    assert not new.lost
    slow.release()
    assert not new.lost
    new.release()
    assert not path.exists()


def test_signs_of_life_and_progress_reach_the_file(path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    held = Lease.take(path)
    os.utime(path, (0, 0))
    held.note("predict", 7, 40)
    deadline = time.monotonic() + 20
    while read_holder(path).facts["stage"] != "predict" and time.monotonic() < deadline:
        time.sleep(0.01)
    holder = read_holder(path)
    assert (holder.facts["done"], holder.facts["total"]) == (7, 40)
    assert holder.beat > 0
    held.release()
    assert read_holder(path) is None


def test_a_lease_that_is_not_written_yet_is_a_holder_of_no_name(path):
    path.parent.mkdir(parents=True)
    path.touch()
    assert not read_holder(path).has_ended
    with pytest.raises(SlideBusyError):
        Lease.take(path)


def test_a_lease_says_whose_it_is_from_its_first_moment_on(path, monkeypatch):
    """Whoever is killed while taking one leaves none, or one of a dead process."""
    link, seen = os.link, []

    def watched(source, target):
        seen.append(path.exists())
        link(source, target)
        seen.append(read_holder(path).facts["pid"])

    monkeypatch.setattr(os, "link", watched)
    held = Lease.take(path)
    assert seen == [False, os.getpid()]
    assert os.listdir(path.parent) == [path.name]
    held.release()


def test_a_link_that_was_made_and_asked_for_again_is_ours(path, monkeypatch):
    """A file server whose answer is lost is asked again, and says that it is there."""
    link = os.link

    def repeated(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    held = Lease.take(path)
    assert not held.lost
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(SlideBusyError):
        Lease.take(path)
    held.release()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOENT, errno.ENOTSUP])
def test_a_lease_needs_no_links(path, monkeypatch, number):
    def none(*_):
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", none)
    held = Lease.take(path)
    assert read_holder(path).facts["pid"] == os.getpid()
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(SlideBusyError):
        Lease.take(path)
    held.release()
    Lease.take(path).release()


def test_a_full_disk_leaves_no_lease(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full"):
        Lease.take(path)
    assert os.listdir(path.parent) == []


def test_one_after_another_does_what_only_one_may_do(path):
    inside, most = [], []

    def work():
        with alone(path):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    assert os.listdir(path.parent) == []


def test_a_lease_that_was_released_while_its_folder_was_away_is_free(path, tmp_path):
    held = Lease.take(path)
    path.parent.rename(tmp_path / "away")
    held.release()
    (tmp_path / "away").rename(path.parent)
    assert read_holder(path).has_ended
    Lease.take(path).release()
