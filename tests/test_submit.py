"""workflows/slurm/submit with stand-ins for Slurm: which jobs it asks for, over which slides."""

import csv
import importlib.machinery
import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from wsi_pipeline.batch import collect_slides

SLURM = Path(__file__).parents[1] / "workflows" / "slurm"
BIN = Path(sys.executable).parent
HELP = subprocess.run([BIN / "wsi-run", "--help"], capture_output=True, text=True).stdout


class Login:
    """A login node: a folder with stand-ins that write down how they are called."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "my home"
        self.home.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.planned: list[dict] = []
        (self.bin / "help").write_text(HELP)
        self.put("wsi-run", f'[ "$1" = --help ] && exec cat {self.bin}/help; cat {self.bin}/plan')
        self.put("scontrol", "echo 'MaxArraySize            = 4'")
        self.put("squeue", "")
        self.put("scancel", "")
        self.put("sbatch", f"echo >> {self.bin}/number; wc -l < {self.bin}/number")

    def put(self, name: str, body: str) -> None:
        path = self.bin / name
        words = f'for w; do printf "%s\\n" "$w"; done > {self.bin}/$$.call\n'
        record = f"{words}mv {self.bin}/$$.call {self.bin}/$(date +%s%N).{name}\n"
        path.write_text(f"#!/bin/bash\n{record}{body}\n")
        path.chmod(0o755)

    def slide(self, slide_id: str, path: str, *, state="missing", mpp=None, mask=None, error=None):
        asked = {"mpp": mpp, "mask": mask}
        facts = {"slide_id": slide_id, "path": path, "asked": asked, "state": state, "error": error}
        self.planned.append({"event": "slide", **facts})

    def submit(self, *arguments: str) -> subprocess.CompletedProcess:
        lines = [json.dumps(event) for event in [*self.planned, {"event": "plan"}]]
        (self.bin / "plan").write_text("\n".join(lines))
        return subprocess.run(
            [sys.executable, SLURM / "submit", *arguments],
            env={**os.environ, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"},
            cwd=self.home,
            capture_output=True,
            text=True,
        )

    def calls(self, name: str) -> list[list[str]]:
        return [path.read_text().splitlines() for path in sorted(self.bin.glob(f"*.{name}"))]

    def script(self, call: list[str]) -> tuple[list[str], list[str]]:
        """Split a call of sbatch before the script."""
        at = next(i for i, word in enumerate(call) if word.endswith(".sbatch"))
        return call[:at], call[at:]

    def listed(self) -> list[dict[str, str]]:
        (path,) = (self.home / "out" / "slurm").glob("slides-*.csv")
        with open(path, newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def login(tmp_path):
    return Login(tmp_path)


def test_an_array_and_a_gather_behind_it(login):
    for name in "abc":
        login.slide(name, f"slides/{name}.svs")
    done = login.submit(
        *("--model", "m", "slides/a.svs", "-o", "out", "slides/b.svs", "--mpp=0.5"),
        *("--at-once", "2", "--sbatch", "--qos=long --account='my lab'", "--drop-maps"),
        *("--sbatch-array", "--gres=gpu:1", "--sbatch-gather", "--mem=9G", "slides/c.svs"),
    )
    assert done.returncode == 0, done.stderr
    (_, asked) = login.calls("wsi-run")
    assert asked[-4:] == ["--", "slides/a.svs", "slides/b.svs", "slides/c.svs"]
    assert asked[:6] == ["--model", "m", "--mpp", "0.5", "--drop-maps", "--out"]
    assert "--dry-run" in asked
    array, gather = map(login.script, login.calls("sbatch"))
    out = str(login.home / "out")
    (listed,) = (login.home / "out" / "slurm").glob("*.csv")
    assert array[0] == [
        *("--parsable", "--job-name=wsi-out", f"--output={out}/slurm/logs/array-%A_%a.log"),
        *("--qos=long", "--account=my lab", "--gres=gpu:1", "--array=0-2%2"),
    ]
    own = [str(SLURM / "array.sbatch"), str(listed), out]
    assert array[1] == [*own, "--model", "m", "--mpp", "0.5", "--drop-maps"]
    assert gather[0][-4:] == [
        "--qos=long",
        "--account=my lab",
        "--mem=9G",
        "--dependency=afterany:1",
    ]
    assert gather[1] == [str(SLURM / "gather.sbatch"), out]
    assert "squeue --jobs=1,2" in done.stdout
    assert f"wsi status {shlex.quote(out)}" in done.stdout


def test_the_list_means_the_same_from_everywhere(login):
    login.slide("a", "slides/a, b.svs", mpp=0.25)
    login.slide("c", "s3://bucket/c.svs", mask="masks/c.png")
    assert login.submit("slides", "--out", "out").returncode == 0
    first, second = login.listed()
    assert (first["path"], first["mpp"]) == (str(login.home / "slides/a, b.svs"), "0.25")
    assert (second["path"], second["mpp"]) == ("s3://bucket/c.svs", "")
    assert (first["mask"], second["mask"]) == ("", str(login.home / "masks/c.png"))
    assert [first["slide_id"], second["slide_id"]] == ["a", "c"]


def test_a_list_that_cannot_be_written_leaves_nothing_behind(login):
    login.slide("a", "a.svs")
    assert login.submit("slides", "--out", "out").returncode == 0
    (listed,) = (login.home / "out" / "slurm").glob("slides-*.csv")
    listed.unlink()
    listed.mkdir()
    done = login.submit("slides", "--out", "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot be written" in done.stderr
    assert len(login.calls("sbatch")) == 2
    assert not list((login.home / "out" / "slurm").glob(".*"))


def test_names_that_are_no_utf_8_lead_to_the_slides(login):
    folder = os.fsdecode(b"M\xfcller\n")
    (login.home / folder).mkdir()
    (login.home / folder / "a.svs").touch()
    login.slide("a", f"{folder}/a.svs")
    done = login.submit(folder, "--out", "out")
    assert done.returncode == 0, done.stderr
    (listed,) = (login.home / "out" / "slurm").glob("slides-*.csv")
    (entry,) = collect_slides([str(listed)])
    assert Path(entry.path).samefile(login.home / folder / "a.svs")


@pytest.mark.parametrize(
    ("options", "todo"), [((), "b"), (("--overwrite",), "ab"), (("--drop-maps",), "ab")]
)
def test_slides_that_are_done_are_left_out(login, options, todo):
    login.slide("a", "a.svs", state="done")
    login.slide("b", "b.svs", state="interrupted")
    done = login.submit(".", "--out", "out", *options)
    assert "".join(row["slide_id"] for row in login.listed()) == todo
    assert "1 of them done before" in done.stdout


def test_nothing_is_submitted_where_all_is_done(login):
    login.slide("a", "a.svs", state="done")
    done = login.submit(".", "--out", "out")
    assert (done.returncode, login.calls("sbatch")) == (0, [])
    assert "wsi summary" in done.stdout
    assert not (login.home / "out").exists()


@pytest.mark.parametrize(
    ("options", "array"),
    [((), "0-3"), (("--tasks", "2"), "0-1"), (("--tasks", "100", "--at-once", "3"), "0-3%3")],
)
def test_no_more_tasks_than_slides_or_than_slurm_takes(login, options, array):
    for number in range(9):
        login.slide(f"s{number}", f"s{number}.svs")
    assert login.submit(".", "--out", "out", *options).returncode == 0
    assert f"--array={array}" in login.calls("sbatch")[0]


def test_another_list_does_not_change_what_waiting_tasks_mean(login):
    login.slide("a", "a.svs")
    login.submit(".", "--out", "out")
    before = {p: p.read_text() for p in (login.home / "out/slurm").glob("*.csv")}
    login.slide("b", "b.svs")
    login.submit(".", "--out", "out")
    after = {p: p.read_text() for p in (login.home / "out/slurm").glob("*.csv")}
    assert before.items() < after.items()


@pytest.mark.parametrize("place", ["slurm", "slurm/logs"])
def test_a_file_in_the_place_of_its_folder_is_told_in_a_line(login, place):
    login.slide("a", "a.svs")
    (login.home / "out" / place).parent.mkdir(parents=True)
    (login.home / "out" / place).touch()
    done = login.submit("slides", "--out", "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not login.calls("sbatch")


def test_a_list_that_was_written_in_part_goes(tmp_path):
    source = importlib.machinery.SourceFileLoader("submit", str(SLURM / "submit"))
    spec = importlib.util.spec_from_loader("submit", source)
    submit = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "dont_write_bytecode", True):
        source.exec_module(submit)
    for error, told in (
        (OSError("no space"), submit.WrongUse),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with mock.patch("os.fsync", side_effect=error), pytest.raises(told):
            submit.write_whole(tmp_path / "slides-0.csv", "text")
        assert list(tmp_path.iterdir()) == []


def test_what_dead_calls_left_half_written_is_swept_up_and_no_more(login):
    login.slide("a", "a.svs")
    folder, here = login.home / "out" / "slurm", socket.gethostname()
    folder.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = {  # whose, how old, and whether it stays
        f"{here}.{dead.pid}": (0, False),
        f"{here}.{os.getpid()}": (7200, True),
        "node.lab.4711": (60, True),
        "node.lab.4712": (7200, False),
        f"{dead.pid}": (60, True),  # as they were called before
        "12": (7200, False),
    }
    now = time.time()
    for name, (age_s, _) in left.items():
        path = folder / f".slides-0123456789ab.csv.{name}.partial"
        path.write_text("half")
        os.utime(path, (now - age_s, now - age_s))
    assert login.submit(".", "--out", "out").returncode == 0
    stays = {path.name[25:-8] for path in folder.glob(".*.partial")}
    assert stays == {name for name, (_, kept) in left.items() if kept}


def test_a_second_submission_waits_for_the_first(login):
    login.slide("a", "a.svs")
    login.submit(".", "--out", "out")
    login.put("squeue", "echo 1; echo 1; echo 77")
    done = login.submit(".", "--out", "out")
    assert "--dependency=afterany:1" in login.calls("sbatch")[2]
    assert "earlier jobs" in done.stdout
    login.put("squeue", "echo 77")
    login.submit(".", "--out", "out")
    assert not any(word.startswith("--dependency") for word in login.calls("sbatch")[4])


def test_split_makes_tables_task_by_task(login):
    if "--only" not in HELP:
        (login.bin / "help").write_text(f"{HELP}\n  --only [maps|objects]  A part of the work.\n")
    login.slide("a", "a.svs")
    login.slide("b", "b.svs")
    done = login.submit(
        *(".", "--out", "out", "--split", "--sbatch-array", "--gres=gpu:1"),
        *("--sbatch-objects", "--partition=cpu", "--model", "m"),
    )
    assert done.returncode == 0, done.stderr
    maps, objects, gather = map(login.script, login.calls("sbatch"))
    assert {"--gres=gpu:1", "--array=0-1"} <= set(maps[0])
    assert maps[1][1:] == [*objects[1][1:-1], "maps"]
    assert objects[1][-4:] == ["--model", "m", "--only", "objects"]
    assert {"--partition=cpu", "--array=0-1", "--dependency=aftercorr:1"} <= set(objects[0])
    assert "--kill-on-invalid-dep=yes" in objects[0]
    assert "--gres=gpu:1" not in objects[0]
    assert "--dependency=afterany:1:2" in gather[0]


def test_what_slurm_refuses_leaves_nothing_behind(login):
    login.slide("a", "a.svs")
    login.put("sbatch", 'case "$*" in *gather*) echo "no such account" >&2; exit 1;; esac; echo 5')
    done = login.submit(".", "--out", "out")
    assert done.returncode == 1
    assert "no such account" in done.stderr
    assert login.calls("scancel") == [["5"]]
    assert not (login.home / "out/slurm/jobs.jsonl").exists()


def test_dry_run_says_the_lines_and_does_nothing(login):
    login.slide("a", "a.svs", error={"code": "missing_mpp", "message": "no pixel size"})
    done = login.submit(".", "--out", "out", "--dry-run")
    assert done.returncode == 0
    assert "a will fail: missing_mpp" in done.stdout
    assert "--array=0-0" in done.stdout
    assert "--dependency=afterany:ARRAY" in done.stdout
    assert login.calls("sbatch") == []
    assert not (login.home / "out").exists()


def test_the_login_node_need_not_have_the_device(login):
    login.slide("a", "a.svs")
    assert login.submit("--device", "cuda", ".", "--out", "out").returncode == 0
    (_, asked) = login.calls("wsi-run")
    assert "--device" not in asked
    assert login.calls("sbatch")[0][-2:] == ["--device", "cuda"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], "--out"),
        ([".", "--out"], "takes a value"),
        ([".", "--out", "out", "--nonsense"], "--nonsense"),
        ([".", "--out", "out", "--shard", "0/2"], "--tasks"),
        ([".", "--out", "out", "--only", "maps"], "--split"),
        ([".", "--out", "out", "--tasks", "0"], "positive whole number"),
        ([".", "--out", "out", "--at-once=some"], "positive whole number"),
        ([".", "--out", "out", "--overwrite=yes"], "takes no value"),
        ([".", "--out", "out", "--metrics-file", "50%a/all.prom"], "say %a for its number"),
        ([".", "--out", "out", "--metrics-file=%a", "--metrics-file=x"], "say %a for its number"),
    ],
)
def test_wrong_use_submits_nothing(login, arguments, message):
    login.slide("a", "a.svs")
    done = login.submit(*arguments)
    assert (done.returncode, login.calls("sbatch")) == (2, [])
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.svs"], "nothing found at 'nowhere.svs'"),
        (["here.svs", "--memory", "much"], "size with its unit"),
    ],
)
def test_what_wsi_run_refuses_is_told_in_its_words(login, arguments, message):
    (login.home / "here.svs").write_bytes(b"no slide")
    login.put("wsi-run", f'exec {BIN}/wsi-run "$@"')
    done = login.submit(*arguments, "--out", "out")
    assert (done.returncode, login.calls("sbatch")) == (2, [])
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_another_model_than_that_of_the_folder_is_wrong_use(login):
    (login.home / "here.svs").write_bytes(b"no slide")
    login.put("wsi-run", f'exec {BIN}/wsi-run "$@"')
    (login.home / "out").mkdir()
    of_another = {"name": "other", "sha256": "0" * 64}
    record = {"slides": [{"slide_id": "gone"}], "options": {}, "model": of_another}
    (login.home / "out" / "run.json").write_text(json.dumps(record))
    for more, says in ((), "holds results of model other"), (("--overwrite",), "gone. Name them"):
        done = login.submit("here.svs", "--out", "out", "--model", "stain-baseline", *more)
        assert (done.returncode, login.calls("sbatch")) == (2, [])
        assert says in done.stderr
    assert sorted(path.name for path in (login.home / "out").iterdir()) == ["run.json"]


def test_it_needs_wsi_run_on_the_path(login):
    (login.bin / "wsi-run").unlink()
    python = Path(sys.executable).resolve()
    done = subprocess.run(
        [python, SLURM / "submit", ".", "--out", "out"],
        env={"PATH": str(login.bin)},
        cwd=login.home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "wsi-run is not on the PATH" in done.stderr
