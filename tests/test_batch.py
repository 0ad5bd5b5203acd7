"""Slide lists, shards, and the record of a run."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.batch import collect_slides, freeze_run, parse_shard, read_run, take_shard
from wsi_pipeline.cohort import slide_states
from wsi_pipeline.errors import JobError
from wsi_pipeline.job import RunReport


@pytest.fixture
def folder(tmp_path):
    for name in ("b.svs", "a.tiff", "notes.md", "c.SVS"):
        (tmp_path / name).touch()
    (tmp_path / "c").mkdir()
    return tmp_path


def ids(entries):
    return [entry.slide_id for entry in entries]


def test_files_folders_and_globs(folder):
    assert ids(collect_slides([str(folder)])) == ["a", "b", "c"]
    assert ids(collect_slides([str(folder / "*.svs")])) == ["b"]
    assert ids(collect_slides([str(folder / "b.svs"), str(folder / "a.tiff")])) == ["a", "b"]
    # The same file twice is one slide.
    assert ids(collect_slides([str(folder / "b.svs"), str(folder / "*.svs")])) == ["b"]


def test_hidden_companions_in_folders_are_no_slides(folder):
    (folder / "._b.svs").touch()
    assert ids(collect_slides([str(folder)])) == ["a", "b", "c"]


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(JobError, match="variable unset"):
        collect_slides([""])


def test_urls_are_taken_as_they_are():
    (entry,) = collect_slides(["s3://bucket/deep/x.y.svs"])
    assert (entry.path, entry.slide_id) == ("s3://bucket/deep/x.y.svs", "x.y")


def test_text_list(folder):
    (folder / "list.txt").write_text("# mine\nb.svs\n\n" + str(folder / "a.tiff") + "\n")
    entries = collect_slides([str(folder / "list.txt")])
    assert [e.path for e in entries] == [str(folder / "a.tiff"), str(folder / "b.svs")]


def test_csv_list(folder):
    (folder / "list.csv").write_text(
        "\ufeffpath,slide_id,mpp,mask\r\nb.svs, patient-1 ,0.4,m.png\r\n   \r\n\r\na.tiff,,,\r\n"
    )
    first, second = collect_slides([str(folder / "list.csv")])
    assert (first.slide_id, first.mpp, first.mask) == ("a", None, None)
    assert (second.slide_id, second.mpp) == ("patient-1", 0.4)
    assert second.mask == str(folder / "m.png")


def test_a_comment_in_a_text_list_is_no_file(folder):
    (folder / "#1.svs").touch()
    (folder / "list.txt").write_text("#1.svs\n#b.svs\n# 1.svs\n#\nb.svs\n")
    assert ids(collect_slides([str(folder / "list.txt")])) == ["#1", "b"]


@pytest.mark.parametrize(
    ("suffix", "strange"),
    [
        *((kind, sign) for kind in ("txt", "csv") for sign in "\x85\u2028\x1e\x0c\udcfc"),
        *(("csv", ends) for ends in ("\n", "\r\n", "\r")),
    ],
)
def test_names_of_folders_may_hold_what_looks_like_the_end_of_a_line(folder, suffix, strange):
    name = f"{strange}a{strange}b/x.svs".lstrip("\r\n")
    (folder / name).parent.mkdir()
    (folder / name).touch()
    text = f"{name}\nb.svs\n" if suffix == "txt" else f'path,mpp\n"{name}",0.3\nb.svs,0.4\n'
    path = folder / f"list.{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    found = [entry.path for entry in collect_slides([str(path)])]
    assert found == [str(folder / "b.svs"), str(folder / name)]


@pytest.mark.parametrize("text", ["path\nM\xfcller.svs\n", "path,mask\nb.svs,M\xfcller.png\n"])
def test_a_list_in_latin_1_is_refused_in_words(folder, text):
    path = folder / "list.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(JobError, match=r"not UTF-8.*xfcller.*Save the list"):
        collect_slides([str(path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,mpp\nb.svs,1\n", "needs 'path'"),
        ("path,colour\nb.svs,red\n", "needs 'path'"),
        ("path,mpp\nb.svs,small\n", "line 2: mpp 'small'"),
        ("path,slide_id\nb.svs,up/down\n", "no folder"),
        ("path,mpp,mpp\nb.svs,1,2\n", "needs 'path'"),
        ("path,mpp\nb,1.svs,2\n", "more cells than columns"),
        ("path,mpp\nb.svs,nan\n", "positive number"),
        ("path,mpp\nb.svs,-1\n", "positive number"),
    ],
)
def test_bad_lists_name_the_fault(folder, text, message):
    (folder / "list.csv").write_text(text)
    with pytest.raises(JobError, match=message):
        collect_slides([str(folder / "list.csv")])


def test_what_cannot_be_found_is_refused(folder, tmp_path):
    with pytest.raises(JobError, match="nothing found"):
        collect_slides([str(folder / "none.svs")])
    with pytest.raises(JobError, match="holds no slide"):
        collect_slides([str(folder / "c")])
    with pytest.raises(JobError, match="no slides given"):
        collect_slides([])
    with pytest.raises(JobError, match="cannot be read"):
        collect_slides([str(folder / "none.csv")])


def test_two_slides_of_one_id_are_refused(folder):
    (folder / "b.tiff").touch()
    with pytest.raises(JobError, match="two slides have the id 'b'"):
        collect_slides([str(folder)])


def test_a_slide_named_twice_keeps_what_is_said_of_it(folder):
    (folder / "list.csv").write_text("path,mpp\nb.svs,0.3\n")
    entries = collect_slides([str(folder), str(folder / "list.csv")])
    assert [e.mpp for e in entries] == [None, 0.3, None]
    (folder / "other.csv").write_text("path,mpp\nb.svs,0.4\n")
    with pytest.raises(JobError, match="different mpp"):
        collect_slides([str(folder / "list.csv"), str(folder / "other.csv")])
    os.symlink(folder / "b.svs", folder / "same.svs")
    relative = os.path.relpath(folder / "b.svs")
    assert len(collect_slides([relative, str(folder / "b.svs")])) == 1


@pytest.mark.parametrize("name", ["_a.svs", ".a.svs", "a\nb.svs", 190 * "a" + ".svs"])
def test_names_that_table_readers_pass_over_are_refused(folder, name):
    (folder / name).touch()
    with pytest.raises(JobError, match="another slide_id"):
        collect_slides([str(folder / name)])


def test_masks_are_found_or_missed_aloud(folder):
    masks = folder / "masks"
    masks.mkdir()
    (masks / "a.png").touch()
    (entry,) = collect_slides([str(folder / "a.tiff")], mask_dir=masks)
    assert entry.mask == str(masks / "a.png")
    # One without a mask is a slide that fails later; none at all is the wrong folder.
    assert [e.mask for e in collect_slides([str(folder)], mask_dir=masks)] == [
        str(masks / f"{name}.png") for name in "abc"
    ]
    with pytest.raises(JobError, match="a mask for no slide"):
        collect_slides([str(folder / "b.svs")], mask_dir=masks)


@given(st.integers(0, 40), st.integers(1, 7))
def test_shards_partition_the_list(number, count):
    slides = tuple(range(number))
    shards = [take_shard(slides, (index, count)) for index in range(count)]
    assert sorted(s for shard in shards for s in shard) == list(slides)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_shard_forms():
    array = {
        "SLURM_ARRAY_TASK_ID": "12",
        "SLURM_ARRAY_TASK_COUNT": "5",
        "SLURM_ARRAY_TASK_MIN": "10",
    }
    assert parse_shard(None, {}) == (0, 1)
    assert parse_shard("2/5", {}) == (2, 5)
    assert parse_shard("auto", array) == (2, 5)
    for text in ("5/5", "1", "-1/3", "a/b", "1/0"):
        with pytest.raises(JobError, match="--shard"):
            parse_shard(text, {})
    with pytest.raises(JobError, match="SLURM_ARRAY_TASK_ID"):
        parse_shard("auto", {})


def test_run_record_grows_with_slides_but_keeps_its_model(folder, tmp_path):
    entries = collect_slides([str(folder)])
    model = {"name": "m", "sha256": "0" * 64}
    freeze_run(tmp_path, entries[:1], model=model, options={}, overwrite=False)
    freeze_run(tmp_path, entries[1:], model=model, options={}, overwrite=False)
    assert [slide["slide_id"] for slide in read_run(tmp_path)["slides"]] == ["a", "b", "c"]
    other = {"name": "n", "sha256": "1" * 64}
    with pytest.raises(JobError, match="Use another --out"):
        freeze_run(tmp_path, entries, model=other, options={}, overwrite=False)
    freeze_run(tmp_path, entries, model=other, options={}, overwrite=True)
    assert read_run(tmp_path)["model"] == other


def test_a_folder_does_not_mix_8_bits_with_other_arithmetic(folder, tmp_path):
    entries = collect_slides([str(folder)])
    plain = {"name": "m", "sha256": "a" * 64}
    coarse = {**plain, "arithmetic": "int8"}
    how = {"options": {}, "overwrite": False}
    freeze_run(tmp_path / "plain", entries, model=plain, **how)
    with pytest.raises(JobError, match=r"holds results of model m \(a{12}\).*a{12}, int8\)"):
        freeze_run(tmp_path / "plain", entries, model=coarse, **how)
    freeze_run(tmp_path / "coarse", entries, model=coarse, **how)
    freeze_run(tmp_path / "coarse", entries, model=coarse, **how)
    with pytest.raises(JobError, match=r"a{12}, int8\), and this run uses m \(a{12}\)"):
        freeze_run(tmp_path / "coarse", entries, model=plain, **how)
    freeze_run(tmp_path / "coarse", entries, model=plain, options={}, overwrite=True)
    assert "arithmetic" not in read_run(tmp_path / "coarse")["model"]


def test_another_model_does_all_slides_again_or_none(folder, tmp_path):
    entries = collect_slides([str(folder)])
    model, other = ({"name": name, "sha256": name * 64} for name in "mn")
    freeze_run(tmp_path, entries, model=model, options={}, overwrite=False)
    before = (tmp_path / "run.json").read_bytes()
    for some in (entries[:1], entries[1:]):
        with pytest.raises(JobError, match=r"Of its slides \d would keep .*: (a|b, c)\."):
            freeze_run(tmp_path, some, model=other, options={}, overwrite=True)
    assert (tmp_path / "run.json").read_bytes() == before
    freeze_run(tmp_path, entries[:1], model=model, options={}, overwrite=True)
    freeze_run(tmp_path, entries, model=other, options={}, overwrite=True)
    assert read_run(tmp_path)["model"] == other


def test_what_another_model_did_is_not_done(folder, tmp_path):
    """Two shards do a folder again by another model; the first has ended."""
    entries = collect_slides([str(folder)])
    model, other = ({"name": name, "sha256": name * 64} for name in "mn")

    def report(slide_id, own, status="done"):
        path = tmp_path / "reports" / f"{slide_id}.json"
        RunReport(slide_id=slide_id, path="", job_id="", status=status, model=own).write(path)

    freeze_run(tmp_path, entries, model=model, options={}, overwrite=False)
    for slide_id, status in (("a", "done"), ("b", "done"), ("c", "failed")):
        report(slide_id, model, status)
    assert [own.state for own in slide_states(tmp_path)] == ["done", "done", "failed"]
    freeze_run(tmp_path, entries, model=other, options={}, overwrite=True)
    report("a", other)
    states = slide_states(tmp_path)
    assert [own.state for own in states] == ["done", "missing", "missing"]
    assert "of model m;" in states[1].reason


def test_the_same_call_leaves_the_record_alone(folder, tmp_path):
    entries = collect_slides([str(folder)])
    model = {"name": "m", "sha256": "0"}
    freeze_run(tmp_path, entries, model=model, options={"a": 1}, overwrite=False)
    before = os.stat(tmp_path / "run.json")
    freeze_run(tmp_path, entries, model=model, options={"a": 1}, overwrite=False)
    assert os.stat(tmp_path / "run.json").st_ino == before.st_ino


def test_a_broken_record_is_named(tmp_path):
    assert read_run(tmp_path) is None
    for text in ("{", "[]", json.dumps({"slides": []})):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(JobError, match=r"run\.json cannot be read"):
            read_run(tmp_path)
