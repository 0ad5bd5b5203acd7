"""From the manifest of the GDC to lists, and slides through a window of disk; all made up."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from slide_fixtures import picture, write_slide

from wsi_pipeline.batch import collect_slides

FOLDER = Path(__file__).parents[1] / "workflows" / "tcga-crc"
COLUMNS = ("id", "filename", "md5", "size", "state")
KB = 1000

CLIENT = """#!{python} -SE
# Stands for gdc-client: takes files from a vault; the first tries at some of them fail.
import json, os, shutil, sys
from pathlib import Path
vault = Path("{vault}")
slides, name = Path(sys.argv[sys.argv.index("--dir") + 1]), sys.argv[-1]
source = next((vault / name).iterdir(), None)
held = sum(max(f.stat().st_size for f in d.iterdir() if f.is_file())
           for d in slides.iterdir() if d.is_dir() and any(d.iterdir()))
tries = vault / f"{{name}}.tries"
tries.write_text((tries.read_text() if tries.exists() else "") + f"{{held}}\\n")
plan = json.loads((vault / "plan.json").read_text()).get(name, [])
number = len(tries.read_text().split()) - 1
how = plan[min(number, len(plan) - 1)] if plan else "well"
target = slides / name / source.name
partial = target.with_name(target.name + ".partial")
if how == "hang":
    partial.write_bytes(b"")
    os.fork()  # the real client has helpers, which outlive it when it is killed
    import time; time.sleep(60)
if how == "fail":
    partial.write_bytes(source.read_bytes()[:10])
    sys.exit(1)
shutil.copy(source, partial)
if how == "damage":
    partial.write_bytes(bytes(len(source.read_bytes())))
os.replace(partial, target)
"""

RUN = """#!{python} -SE
# Stands for wsi-run: a slide is done if its bytes begin with "good", and called done if its
# report says so and it has a table.
import csv, json, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
(out / "reports").mkdir(parents=True, exist_ok=True)
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: stop.append(number))
if "--refused" in sys.argv and "--dry-run" in sys.argv:
    sys.exit(2)
if "--dry-run" in sys.argv:
    assert "--overwrite" not in sys.argv
    for row in csv.DictReader(open(sys.argv[1])):
        report, table = (out / kind / row["slide_id"] for kind in ("reports", "objects"))
        try:
            state = json.loads(report.with_name(report.name + ".json").read_text())["status"]
        except OSError:
            state = "missing"
        state = "missing" if state == "done" and not table.exists() else state
        print(json.dumps({{"event": "slide", "slide_id": row["slide_id"], "state": state}}))
    sys.exit(0)
with (out / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[2:]) + "\\n")
worst = 0
for row in csv.DictReader(open(sys.argv[1])):
    end = time.monotonic() + float({seconds})
    while time.monotonic() < end and not stop:
        time.sleep(0.01)
    if stop:
        (out / "signals").write_text(str(int(stop[0])))
        sys.exit(75)
    good = Path(row["path"]).read_bytes().startswith(b"good")
    report = out / "reports" / f"{{row['slide_id']}}.json"
    (out / "objects").mkdir(exist_ok=True)
    (out / "objects" / row["slide_id"]).write_text("table")
    status = "done" if good else "failed"
    report.write_text(json.dumps({{"status": status, "started": time.time_ns()}}))
    worst |= not good
sys.exit(worst)
"""


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The scripts import each other as they do when they are called."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in ("asked", "manifest", "prepare", "shelf", "window"):
        sys.modules.pop(name, None)


def barcode(number, kind="DX1", patient=None):
    who = f"TCGA-AA-{3000 + (number if patient is None else patient)}"
    return f"{who}-01Z-00-{kind}.{uuid.UUID(int=number)}.svs"


def row(number, content=b"good", **other):
    values = {
        "id": str(uuid.UUID(int=100 + number)),
        "filename": barcode(number),
        "md5": hashlib.md5(content).hexdigest(),
        "size": str(len(content)),
        "state": "released",
        **other,
    }
    return values


def write_manifest(path, rows, columns=COLUMNS):
    lines = ["\t".join(columns)] + ["\t".join(r[c] for c in columns) for r in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def put(slides, entry, content, name=None):
    folder = slides / entry["id"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (name or entry["filename"])).write_bytes(content)


def stem(entry):
    return Path(entry["filename"]).stem


# -- the manifest ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "../../etc"}, "no UUID"),
        ({"filename": "../TCGA.svs"}, "no plain file name"),
        ({"filename": ".hidden.svs"}, "no plain file name"),
        ({"md5": "123"}, "no md5"),
        ({"size": "-5"}, "no size"),
        ({"size": "0"}, "no size"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_its_line(tmp_path, change, says):
    from manifest import ManifestError, read_manifest

    path = write_manifest(tmp_path / "m.txt", [row(1), row(2, **change)])
    with pytest.raises(ManifestError, match=f"line 3.*{says}"):
        read_manifest([path])


def test_manifests_without_a_column_and_with_two_files_of_one_name_are_refused(tmp_path):
    from manifest import ManifestError, read_manifest

    path = write_manifest(tmp_path / "m.txt", [row(1)], columns=COLUMNS[:3])
    with pytest.raises(ManifestError, match="lacks size, state"):
        read_manifest([path])
    one, other = row(1), row(1, id=str(uuid.UUID(int=999)))
    path = write_manifest(tmp_path / "m.txt", [one, other])
    with pytest.raises(ManifestError, match=f"slide_id {stem(one)}"):
        read_manifest([path])
    # COAD and READ may be two manifests; the same line twice is one file.
    first = write_manifest(tmp_path / "coad.txt", [row(1), row(2)])
    second = write_manifest(tmp_path / "read.txt", [row(3), row(1)])
    assert [e.id[-3:] for e in read_manifest([first, second])] == ["065", "066", "067"]


def test_only_diagnostic_slides_that_can_be_had_are_kept(tmp_path):
    from manifest import read_manifest, select

    rows = [
        row(1),
        row(2, filename=barcode(2, "TS1")),
        row(3, filename="TCGA-notes.svs"),
        row(4, filename=barcode(4).replace(".svs", ".txt")),
        row(5, state="submitted"),
        row(6, filename=barcode(6, "DX2", patient=1)),
        row(7, state="live"),
    ]
    entries = read_manifest([write_manifest(tmp_path / "m.txt", rows)])
    kept, out = select(entries)
    assert [int(entry.id[-2:], 16) - 100 for entry in kept] == [1, 6, 7]
    assert {int(e.id[-2:], 16) - 100: why.split(",")[0] for e, why in out} == {
        2: "no diagnostic slide (DX) but TS",
        3: "the name is no barcode of a TCGA slide",
        4: "no .svs file",
        5: "its state is submitted",
    }
    kept, _ = select(entries, one_per_patient=True)
    assert [entry.filename[20:23] for entry in kept] == ["DX1", "DX1"]


def test_shards_are_balanced_by_bytes_and_always_the_same(tmp_path):
    from manifest import read_manifest, split

    sizes = [(7919 * n) % 900 + 100 for n in range(40)] + [9000]
    rows = [row(n, size=str(size)) for n, size in enumerate(sizes, start=1)]
    entries = read_manifest([write_manifest(tmp_path / "m.txt", rows)])
    shards = split(entries, 5)
    assert sorted(e.id for shard in shards for e in shard) == sorted(e.id for e in entries)
    loads = sorted(sum(entry.size for entry in shard) for shard in shards)
    assert loads[-1] == 9000  # the one large slide has a shard alone
    assert loads[-2] - loads[0] < 1000  # less than a slide
    assert split(entries[::-1], 5) == shards
    assert [len(shard) for shard in split(entries[:2], 5)] == [1, 1]


def test_a_checksum_is_computed_once_until_the_file_changes(tmp_path):
    from manifest import damage, read_manifest

    entry = read_manifest([write_manifest(tmp_path / "m.txt", [row(1, b"good")])])[0]
    put(tmp_path, row(1), b"good")
    asked = []
    assert damage(entry, tmp_path, stop=lambda: asked.append(1)) is None
    assert damage(entry, tmp_path, stop=lambda: asked.append(1)) is None
    assert len(asked) == 1
    put(tmp_path, row(1), b"evil")
    os.utime(entry.path(tmp_path), ns=(1, 1))
    assert "md5" in damage(entry, tmp_path)
    assert damage(entry, tmp_path, digest=False) is None


# -- the list --------------------------------------------------------------------------------------


def test_the_list_has_what_is_whole_and_a_manifest_the_rest(tmp_path):
    from prepare import main

    slides, rows = tmp_path / "slides", [row(n, b"good" + bytes(n * 50)) for n in range(1, 8)]
    whole = {entry["id"]: b"good" + bytes(n * 50) for n, entry in enumerate(rows, start=1)}
    for entry in rows[:4]:
        put(slides, entry, whole[entry["id"]])
    put(slides, rows[4], b"evil" + whole[rows[4]["id"]][4:])
    put(slides, rows[5], b"good")
    put(slides, rows[6], whole[rows[6]["id"]], name=f"{rows[6]['filename']}.partial")
    manifest = write_manifest(tmp_path / "m.txt", rows)
    out = tmp_path / "lists" / "slides.csv"
    command = ["list", str(manifest), "--slides", str(slides), "--out", str(out), "--shards", "3"]
    assert main(command) == 1
    found = collect_slides([str(out)])  # as wsi-run reads it
    assert [entry.slide_id for entry in found] == sorted(stem(entry) for entry in rows[:4])
    assert all(Path(entry.path).is_file() for entry in found)
    missing = out.with_name("slides.missing.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in missing[1:]] == [entry["id"] for entry in rows[4:]]
    facts = list(csv.DictReader(out.with_name("slides.facts.csv").open()))
    assert [fact["bytes"] for fact in facts] == [entry["size"] for entry in rows[:4]]

    for entry in rows[4:]:
        put(slides, entry, whole[entry["id"]])
    assert main(command) == 0
    assert not out.with_name("slides.missing.txt").exists()
    shards = sorted(out.with_name("slides.shards").iterdir())
    named = [entry.slide_id for shard in shards for entry in collect_slides([str(shard)])]
    assert len(shards) == 3
    assert sorted(named) == sorted(stem(entry) for entry in rows)
    assert main([*command[:-1], "2"]) == 0
    assert len(list(out.with_name("slides.shards").iterdir())) == 2


def test_split_writes_manifests_and_wrong_use_is_told(tmp_path):
    from manifest import read_manifest
    from prepare import main

    manifest = write_manifest(tmp_path / "m.txt", [row(n, bytes(n)) for n in range(1, 9)])
    assert main(["split", str(manifest), "--shards", "3", "--out", str(tmp_path / "s")]) == 0
    shards = sorted((tmp_path / "s").iterdir())
    assert [path.name for path in shards] == ["000.txt", "001.txt", "002.txt"]
    assert len(read_manifest(shards)) == 8
    assert main(["split", "absent.txt", "--shards", "3", "--out", str(tmp_path / "s")]) == 2


def test_the_filters_ask_for_the_diagnostic_slides_of_both_projects():
    content = json.loads((FOLDER / "filters.json").read_text())["content"]
    asked = {part["content"]["field"]: part["content"]["value"] for part in content}
    assert asked["cases.project.project_id"] == ["TCGA-COAD", "TCGA-READ"]
    assert asked["experimental_strategy"] == ["Diagnostic Slide"]
    assert asked["data_format"] == ["SVS"]


# -- the window ------------------------------------------------------------------------------------


class Cohort:
    """Files in a vault, a manifest of them, and stand-ins for the two programs."""

    def __init__(self, folder, contents, *, plan=None, seconds=0.0):
        self.folder, self.slides, self.out = folder, folder / "slides", folder / "results"
        self.vault = folder / "vault"
        self.rows = [row(n, content) for n, content in enumerate(contents, start=1)]
        for entry, content in zip(self.rows, contents, strict=True):
            put(self.vault, entry, content)
        plan = {self.rows[n]["id"]: how for n, how in (plan or {}).items()}
        (self.vault / "plan.json").write_text(json.dumps(plan))
        self.manifest = write_manifest(folder / "007.txt", self.rows)
        for name, text in (("client", CLIENT), ("run", RUN)):
            path = folder / name
            path.write_text(text.format(python=sys.executable, vault=self.vault, seconds=seconds))
            path.chmod(0o755)

    def words(self, *options, disk="10M", run=None):
        words = [self.manifest, "--slides", self.slides, "--out", self.out, "--disk", disk]
        words += ["--download", f"{self.folder}/client download --dir {{dir}} {{id}}"]
        return [*words, "--wsi-run", run or f"{self.folder}/run", "--wait", "0.05", *options]

    def start(self, *options, **how):
        command = [sys.executable, FOLDER / "window.py", *map(str, self.words(*options, **how))]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def call(self, *options, **how):
        process = self.start(*options, **how)
        told = process.communicate(timeout=120)[1]
        return process.returncode, told

    def states(self):
        reports = [self.out / "reports" / f"{stem(entry)}.json" for entry in self.rows]
        return [json.loads(r.read_text())["status"] if r.exists() else None for r in reports]

    def left(self):
        """Slides that lie on the disk still."""
        folders = {path.name for path in self.slides.iterdir() if path.is_dir()}
        return [n for n, entry in enumerate(self.rows) if entry["id"] in folders]

    def tries(self, number):
        """Bytes that lay on the disk when a download of a slide began, try by try."""
        path = self.vault / f"{self.rows[number]['id']}.tries"
        return [int(word) for word in path.read_text().split()] if path.exists() else []


def until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def test_all_slides_pass_through_a_small_window_whatever_downloads_do(tmp_path):
    contents = [b"good" + bytes(100 * KB + n) for n in range(6)]
    plan = {1: ["fail", "well"], 3: ["damage", "damage", "well"]}
    cohort = Cohort(tmp_path, contents, plan=plan)
    code, told = cohort.call("--", "--device", "cpu", disk="250K")
    assert code == 0, told
    assert cohort.states() == ["done"] * 6
    assert cohort.left() == []
    # Every other download found room for itself beside what lay there.
    assert max(held for n in range(6) for held in cohort.tries(n)) <= 150 * KB
    assert [len(cohort.tries(n)) for n in range(6)] == [1, 2, 1, 3, 1, 1]
    for line in (cohort.out / "calls").read_text().splitlines():
        assert line == f"--out {cohort.out} --device cpu"
    code, _ = cohort.call(disk="250K")  # nothing is left to do
    assert code == 0
    assert [len(cohort.tries(n)) for n in range(6)] == [1, 2, 1, 3, 1, 1]


def test_results_that_are_damaged_since_are_no_results(tmp_path):
    cohort = Cohort(tmp_path, [b"good one", b"good two"])
    assert cohort.call()[0] == 0
    (cohort.out / "objects" / stem(cohort.rows[1])).unlink()
    put(cohort.slides, cohort.rows[1], b"good two")  # and must not be removed for its report
    code, told = cohort.call()
    assert code == 0, told
    assert (cohort.out / "objects" / stem(cohort.rows[1])).exists()
    assert "2 of 2 slides are done" in told
    assert len((cohort.out / "calls").read_text().splitlines()) == 2 + 1


def test_a_slide_that_wsi_run_has_found_done_is_done(tmp_path):
    cohort = Cohort(tmp_path, [b"good one"])
    assert cohort.call()[0] == 0
    (cohort.out / "objects" / stem(cohort.rows[0])).unlink()
    as_it_is = tmp_path / "as-it-is"  # somebody has brought the table back meanwhile
    as_it_is.write_text(
        f'#!/bin/bash\n[[ "$*" == *--dry-run* ]] || exit 0\nexec {tmp_path}/run "$@"\n'
    )
    as_it_is.chmod(0o755)
    code, told = cohort.call("--tries", "1", run=as_it_is)
    assert code == 0, told


def test_overwriting_does_each_slide_once_and_goes_on_after_an_interruption(tmp_path):
    cohort = Cohort(tmp_path, [b"good one", b"good two"])
    assert cohort.call()[0] == 0
    reports = [cohort.out / "reports" / f"{stem(entry)}.json" for entry in cohort.rows]

    def texts():
        return [path.read_text() for path in reports]

    first, slow = texts(), RUN.format(python=sys.executable, seconds="len(sys.argv[1]) and 1.5")
    (tmp_path / "run").write_text(slow)
    smallest = str(max(int(entry["size"]) for entry in cohort.rows))  # one slide at a time
    process = cohort.start("--", "--overwrite", disk=smallest)
    until(lambda: reports[0].read_text() != first[0] and len(cohort.tries(1)) == 2)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=20)[1]
    assert process.returncode == 75, told
    second = texts()
    assert second[0] != first[0]
    assert second[1] == first[1]
    (tmp_path / "run").write_text(RUN.format(python=sys.executable, seconds=0))
    code, told = cohort.call("--", "--overwrite", disk=smallest)
    assert code == 0, told
    third = texts()
    assert third[0] == second[0]  # it was done anew already
    assert third[1] != first[1]
    code, told = cohort.call("--", "--overwrite", disk=smallest)  # all were: a new wish
    assert code == 0, told
    assert not set(texts()) & set(third)


def test_an_overwriting_call_that_was_given_up_or_changed_begins_anew(tmp_path):
    from manifest import read_manifest
    from shelf import Anew, Shelf

    entries = read_manifest([write_manifest(tmp_path / "m.txt", [row(1)])])
    shelf = Shelf(entries, slides=tmp_path / "slides", out=tmp_path, disk=1)
    report, note = tmp_path / "reports" / f"{entries[0].slide_id}.json", tmp_path / "w" / "note"
    report.parent.mkdir()
    report.write_text("1")

    def is_old(options):
        anew = Anew(note, options)
        anew.begin(shelf)
        return anew.is_old(entries[0], report.read_text())

    assert is_old(["--overwrite"])
    report.write_text("2")
    assert not is_old(["--overwrite"])
    assert is_old(["--overwrite", "--drop-maps"])
    report.write_text("3")
    assert not is_old(["--overwrite", "--drop-maps"])
    Anew(note, []).end()
    assert is_old(["--overwrite", "--drop-maps"])
    note.write_text("torn")
    assert is_old(["--overwrite", "--drop-maps"])


def test_what_never_succeeds_is_given_up_and_told(tmp_path):
    contents = [b"good", b"evil", b"good again", b"good as well"]
    cohort = Cohort(tmp_path, contents, plan={2: ["fail"], 3: ["damage"]})
    code, told = cohort.call("--tries", "2")
    assert code == 1
    assert cohort.states() == ["done", "failed", None, None]
    assert [len(cohort.tries(n)) for n in range(4)] == [1, 1, 2, 2]
    assert f"{stem(cohort.rows[1])}: failed, see its report" in told
    assert told.count("could not be downloaded") == 2
    assert cohort.left() == [1]  # to be looked at
    code, _ = cohort.call("--tries", "2", "--drop-failed")
    assert code == 1
    assert cohort.left() == []
    cohort.call("--tries", "1", "--drop-failed")
    assert len(cohort.tries(1)) == 1  # what was dropped is not fetched again


def test_failed_slides_that_fill_the_window_are_named_as_the_reason(tmp_path):
    cohort = Cohort(tmp_path, [b"evil" + bytes(90 * KB), b"good" + bytes(90 * KB)])
    code, told = cohort.call("--tries", "1", disk="100K")
    assert code == 1
    assert "--drop-failed, or more --disk" in told
    code, told = cohort.call("--tries", "1", "--drop-failed", disk="100K")
    assert code == 1
    assert cohort.states() == ["failed", "done"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_same_line_goes_on(tmp_path, number):
    cohort = Cohort(tmp_path, [b"good one", b"good two"], plan={1: ["hang", "well"]}, seconds=30)
    process = cohort.start()
    until(lambda: (cohort.out / "calls").exists() and cohort.tries(1))
    time.sleep(0.1)
    process.send_signal(number)
    told = process.communicate(timeout=20)[1]
    assert process.returncode == (130 if number == signal.SIGINT else 75), told
    assert (cohort.out / "signals").read_text() == str(int(number))
    assert cohort.left() == [0, 1]
    (tmp_path / "run").write_text(RUN.format(python=sys.executable, seconds=0))
    code, told = cohort.call()
    assert code == 0
    assert "waiting" not in told
    assert (len(cohort.tries(0)), len(cohort.tries(1))) == (1, 2)
    assert cohort.left() == []


def test_after_a_kill_it_waits_for_the_children_that_are_left_and_goes_on(tmp_path):
    cohort = Cohort(tmp_path, [b"good one", b"good two"], seconds=1.5)
    process = cohort.start()
    until(lambda: (cohort.out / "calls").exists())
    process.kill()
    process.wait()
    process.stderr.close()
    code, told = cohort.call()
    assert code == 0, told
    assert "waiting: another call, or what it left" in told
    assert cohort.states() == ["done"] * 2
    assert (len(cohort.tries(0)), len(cohort.tries(1))) == (1, 1)


@pytest.mark.parametrize("kills", [2, 9])
def test_a_killed_wsi_run_is_called_again_but_not_forever(tmp_path, kills):
    cohort = Cohort(tmp_path, [b"good one"])
    killed = tmp_path / "killed"
    killed.write_text(
        f'#!/bin/bash\nif [[ "$*" == *--dry-run* ]]; then\n'
        f"  [ -e {tmp_path}/looked ] || {{ touch {tmp_path}/looked; kill -KILL $$; }}\n"
        f'  exec {tmp_path}/run "$@"\nfi\necho >> {tmp_path}/kills\n'
        f'[ "$(wc -l < {tmp_path}/kills)" -gt {kills} ] || kill -KILL $$\n'
        f'exec {tmp_path}/run "$@"\n'
    )
    killed.chmod(0o755)
    code, told = cohort.call("--tries", "3", run=killed)
    assert code == (0 if kills == 2 else 1)
    assert (tmp_path / "kills").read_text().count("\n") == 3
    assert ("killed again and again" in told) == (kills == 9)


def test_wrong_use_is_told_before_or_as_soon_as_it_is_known(tmp_path):
    cohort = Cohort(tmp_path, [b"good" + bytes(90 * KB)])
    for options, how, says in (
        ((), {"disk": "50K"}, "say more --disk"),
        ((), {"disk": "much"}, "no size"),
        ((), {"run": "no-such-program"}, "no-such-program"),
        (("--", "--refused"), {}, "wsi-run refuses"),
    ):
        code, told = cohort.call(*options, **how)
        assert code == 2
        assert says in told
    assert cohort.tries(0) == []  # nothing was downloaded


def test_an_array_task_takes_its_manifest_and_goes_back_into_the_queue(tmp_path):
    cohort = Cohort(tmp_path, [b"good one"], seconds=30)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/requeued; exit 1\n')
    (tools / "scontrol").chmod(0o755)
    words = [tmp_path, *cohort.words()[1:]]
    process = subprocess.Popen(
        ["bash", FOLDER / "window.sbatch", *map(str, words)],
        env={
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_ARRAY_JOB_ID": "5",
            "SLURM_ARRAY_TASK_ID": "7",  # the manifest is 007.txt
            "WSI_WINDOW_DIR": str(FOLDER),
        },
    )
    until(lambda: (cohort.out / "calls").exists())
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 5_7\n"
    assert (cohort.out / "signals").read_text() == str(int(signal.SIGUSR1))


def test_real_slides_through_a_window_that_holds_one(tmp_path):
    path, contents = tmp_path / "slide.svs", []
    for seed in range(2):
        write_slide(path, picture(256, 256, seed))
        contents.append(path.read_bytes())
    cohort = Cohort(tmp_path, contents)
    real = Path(sys.prefix) / "bin" / "wsi-run"
    largest = max(map(len, contents))
    code, told = cohort.call("--", "--model", "stain-baseline", disk=f"{largest}", run=real)
    assert code == 0, told
    assert cohort.states() == ["done"] * 2
    assert cohort.left() == []
    tables = {path.stem for path in (cohort.out / "objects").iterdir()}
    assert tables == {stem(entry) for entry in cohort.rows}
    before = [len(cohort.tries(n)) for n in range(2)]
    # Another model would need all slides at once, which a window never has.
    code, told = cohort.call("--", "--model", "cerberus-lite", "--overwrite", run=real)
    assert code == 2
    assert "holds results of model stain-baseline" in told
    assert [len(cohort.tries(n)) for n in range(2)] == before
    lost = cohort.out / "objects" / f"{stem(cohort.rows[1])}.parquet"
    lost.unlink()
    code, told = cohort.call("--", disk=f"{largest}", run=real)
    assert code == 0, told
    assert lost.exists()
    assert [len(cohort.tries(n)) for n in range(2)] == [before[0], before[1] + 1]
    slides = json.loads((cohort.out / "run.json").read_text())["slides"]
    assert {slide["slide_id"] for slide in slides} == tables
