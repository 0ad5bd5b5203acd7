"""Files are complete or absent."""

import errno
import os
import socket
import threading

import pytest

from wsi_pipeline.durable import (
    durable_file,
    publish_directory,
    remove_tree,
    sweep,
    sweep_shared,
    sync_all,
    sync_threads,
    sync_tree,
)
from wsi_pipeline.errors import DiskFullError


def test_success_renames_and_leaves_nothing_beside(tmp_path):
    with durable_file(tmp_path / "a" / "b.txt") as beside:
        beside.write_text("whole")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert (tmp_path / "a" / "b.txt").read_text() == "whole"
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_failure_keeps_the_old_file_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), durable_file(path) as beside:  # noqa: PT012
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["b.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path, number):
    with pytest.raises(DiskFullError, match="Free some space"), durable_file(tmp_path / "b"):
        raise OSError(number, "full")


def test_other_disk_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), durable_file(tmp_path / "b"):
        raise PermissionError(errno.EACCES, "no")


def test_directories_replace_each_other_whole(tmp_path):
    for text in ("one", "two"):
        beside = tmp_path / "beside"
        beside.mkdir()
        (beside / text).write_text(text)
        publish_directory(beside, tmp_path / "final")
        assert os.listdir(tmp_path / "final") == [text]
    assert os.listdir(tmp_path) == ["final"]


def test_a_removal_takes_the_name_first(tmp_path, monkeypatch):
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    (folder / "file").touch()

    def fail(_path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", fail)
        with pytest.raises(KeyboardInterrupt):
            remove_tree(folder)
    assert not folder.exists()
    sweep(folder)
    assert os.listdir(tmp_path) == []


def test_sweep_takes_what_any_process_left_of_this_one_file(tmp_path):
    keep = [
        f".a.b.parquet~{socket.gethostname()}.5.partial",  # slide a.b
        ".a.parquet~x.parquet~elsewhere.5.partial",  # slide a.parquet~x
        ".a.zarr.partial",
        "a.parquet",
    ]
    left = [
        f".a.parquet~{socket.gethostname()}.5.partial",
        ".a.parquet~node-7.cluster.5.partial",
        ".a.parquet.trash.partial",
        ".a.parquet.partial.trash.partial",
    ]
    for name in keep + left:
        (tmp_path / name).mkdir() if "trash" in name else (tmp_path / name).touch()
    sweep(tmp_path / "a.parquet")
    assert sorted(os.listdir(tmp_path)) == sorted(keep)
    sweep(tmp_path / "absent" / "a")


def test_sweep_finds_what_a_killed_process_leaves(tmp_path):
    path = tmp_path / "a.b.parquet"
    beside = durable_file(path)
    beside.__enter__().write_text("half")
    (left,) = os.listdir(tmp_path)
    sweep(tmp_path / "a.parquet")
    assert os.listdir(tmp_path) == [left]
    sweep(path)
    assert os.listdir(tmp_path) == []


def test_of_a_shared_file_only_what_ended_processes_left_goes(tmp_path):
    here, dead = socket.gethostname(), 2**22 + 1
    keep = [
        f".run.json~{here}.{os.getpid()}.0123abcd.partial",
        f".run.json~elsewhere.{dead}.0123abcd.partial",
        f".a.json~{here}.{dead}.0123abcd.partial",
    ]
    left = [
        f".run.json~{here}.{dead}.0123abcd.partial",
        f".run.json~elsewhere.{dead + 1}.0123abcd.partial",
    ]
    for name in keep + left:
        (tmp_path / name).touch()
    os.utime(tmp_path / left[1], (0, 0))
    sweep_shared(tmp_path / "run.json")
    assert sorted(os.listdir(tmp_path)) == sorted(keep)
    sweep_shared(tmp_path / "absent" / "run.json")


def test_every_file_is_synced_before_any_folder(tmp_path, monkeypatch):
    files = [tmp_path / "a" / "b" / f"{n}" for n in range(20)] + [tmp_path / "a" / "c"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    synced = []
    monkeypatch.setattr("wsi_pipeline.durable.sync", synced.append)
    sync_tree(tmp_path / "a")
    assert sorted(synced[: len(files)]) == sorted(files)
    assert sorted(synced[len(files) :]) == [tmp_path / "a", tmp_path / "a" / "b"]


def test_an_error_of_one_sync_is_told(tmp_path, monkeypatch):
    def fail(path):
        if path.name == "3":
            raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr("wsi_pipeline.durable.sync", fail)
    with pytest.raises(OSError, match="bad sector"):
        sync_all([tmp_path / str(n) for n in range(9)])


def test_syncs_can_share_their_threads(tmp_path, monkeypatch):
    seen = set()

    def note(_):
        seen.add(threading.current_thread())

    monkeypatch.setattr("wsi_pipeline.durable.sync", note)
    with sync_threads() as threads:
        for _ in range(3):
            sync_all([tmp_path / str(n) for n in range(40)], threads)
        assert seen <= set(threads._threads)


def test_folders_that_are_on_the_disk_are_left_out(tmp_path, monkeypatch):
    for name in ("a/b/1", "a/c/2", "3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    synced = []
    monkeypatch.setattr("wsi_pipeline.durable.sync", synced.append)
    sync_tree(tmp_path, [tmp_path / "a" / "b"])
    expected = ["3", "a/c/2", ".", "a", "a/c"]
    assert sorted(synced) == sorted(tmp_path / name for name in expected)
