"""Which slides a run is about: from files, globs, folders and lists to one frozen list.

The list and the options that decide results are kept in ``run.json`` of the results
folder, so that every shard and every later call of the same command means the same run.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wsi_pipeline.checked import fits, parse_json
from wsi_pipeline.durable import durable_file, sweep_shared
from wsi_pipeline.errors import JobError
from wsi_pipeline.job import versions
from wsi_pipeline.lease import alone
from wsi_pipeline.redaction import Redaction

__all__ = [
    "SlideEntry",
    "collect_slides",
    "freeze_run",
    "parse_shard",
    "read_run",
    "require_model",
    "require_size",
    "take_shard",
]

SLIDE_SUFFIXES = frozenset(
    # One line a family: Aperio and generic TIFF; Hamamatsu; MIRAX, Leica, Ventana, Zeiss, DICOM.
    {
        *(".svs", ".tif", ".tiff", ".btf", ".svslide"),
        *(".ndpi", ".vms", ".vmu"),
        *(".mrxs", ".scn", ".bif", ".czi", ".dcm"),
    }
)
"""What counts as a slide in a folder. A file named on the command line may be anything."""
LONGEST_ID = 180
"""Bytes: file names have at most 255, and temporary ones are longer than final ones."""
LIST_SUFFIXES = frozenset({".txt", ".csv"})
_BLANKS = " \t\r\n"
"""What may surround a name in a list and is no part of it."""
_MODEL = {"name": str, "sha256": str}
"""What a run's record says of its model, at least."""


@dataclass(frozen=True, kw_only=True)
class SlideEntry:
    """One line of the slide list."""

    path: str
    """File name or URL."""
    slide_id: str
    """Unique in the run."""
    mpp: float | None = None
    """Pixel size of level 0, if the list gives one."""
    mask: str | None = None
    """Own tissue mask, if there is one."""


def collect_slides(
    inputs: Sequence[str], *, mask_dir: Path | None = None
) -> tuple[SlideEntry, ...]:
    """Turn what the user typed into the list of slides, sorted by id.

    Args:
        inputs: files, globs, folders, URLs, and ``.txt`` or ``.csv`` lists. A CSV has a
            header with ``path`` and, if wanted, ``slide_id``, ``mpp`` and ``mask``; a ``.txt``
            has a slide a line, and comments that begin with ``#`` (unless a file is called so).
            Relative paths in a list start at the list's folder.
        mask_dir: folder with ``<slide_id>.png``. A slide without one there, or in the list,
            fails later by itself.

    Raises:
        JobError: nothing found, an unusable list, a missing mask, or two slides of one id.
    """
    entries = [entry for item in inputs for entry in _expand(item)]
    if not entries:
        msg = "no slides given; name files, globs, folders, or a .txt or .csv list"
        raise JobError(msg)
    for entry in entries:
        _require_file_name(entry)
    if mask_dir is not None:
        entries = _with_masks(entries, mask_dir)
    by_id: dict[str, SlideEntry] = {}
    for entry in entries:
        other = by_id.setdefault(entry.slide_id, entry)
        if _place(other.path) == _place(entry.path):
            by_id[entry.slide_id] = _merged(other, entry)
        else:
            msg = (
                f"two slides have the id {entry.slide_id!r}: {other.path} and {entry.path}. "
                "Results are named by id: rename one, or give slide_id in a CSV list."
            )
            raise JobError(msg)
    return tuple(by_id[slide_id] for slide_id in sorted(by_id))


def parse_shard(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return ``(index, count)`` of ``I/N``; ``auto`` reads the Slurm array's variables.

    Raises:
        JobError: not of that form, or the variables are not there.
    """
    if text is None:
        return 0, 1
    if text == "auto":
        try:
            index = int(environment["SLURM_ARRAY_TASK_ID"])
            count = int(environment["SLURM_ARRAY_TASK_COUNT"])
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        except (KeyError, ValueError) as error:
            msg = (
                "--shard auto needs SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, which a "
                "Slurm array job sets; elsewhere say --shard I/N"
            )
            raise JobError(msg) from error
        index -= first
    else:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise JobError(f"--shard must look like 0/8 or be 'auto', not {text!r}")
        index, count = int(match[1]), int(match[2])
    if not 0 <= index < count:
        msg = f"--shard {index}/{count}: the index counts from 0, so it must be 0 to {count - 1}"
        raise JobError(msg)
    return index, count


def take_shard(entries: Sequence[SlideEntry], shard: tuple[int, int]) -> tuple[SlideEntry, ...]:
    """Return every ``count``-th slide of the list, from ``index`` on."""
    index, count = shard
    return tuple(entries[index::count])


def freeze_run(
    out: Path,
    entries: Sequence[SlideEntry],
    *,
    model: Mapping[str, str],
    options: Mapping[str, Any],
    overwrite: bool,
    redaction: Redaction = Redaction(),  # noqa: B008 - it is frozen
) -> None:
    """Write ``run.json``, or check that this call belongs to the run that is there.

    More slides may be added, and a slide may be given another pixel size or mask; another
    model is refused, because the folder's tables would no longer be comparable, unless all its
    slides are done again. Of shards that begin a run together, one decides on the model.

    Args:
        out: the results folder.
        entries: the slides of this call, those of other shards included.
        model: ``name``, ``sha256``, ``folder`` if it is not in the zoo, and ``arithmetic`` where
            that is so coarse (``int8``) that it makes another model of it.
        options: how it is run; they are noted, not compared.
        overwrite: the slides are done again, by whatever model.
        redaction: takes the folders out of what is noted.

    Raises:
        JobError: the folder belongs to another model, and ``overwrite`` is not set or ``entries``
            lack some of its slides.
    """

    def merged(before: Mapping[str, Any] | None) -> dict[str, Any]:
        _require_all_again(out, before, entries, model, overwrite=overwrite)
        slides = {slide["slide_id"]: slide for slide in (before or {}).get("slides", [])}
        slides |= {entry.slide_id: asdict(entry) for entry in entries}
        return {
            "slides": redaction.value([slides[slide_id] for slide_id in sorted(slides)]),
            "options": dict(options),
            "model": dict(model),
            "versions": versions(),
        }

    before = read_run(out)
    if before is not None and before == merged(before):
        return  # as for nearly every shard
    with alone(out / ".run.lease"):
        sweep_shared(out / "run.json")
        content = merged(read_run(out))
        with durable_file(out / "run.json") as beside:
            beside.write_text(json.dumps(content, indent=2) + "\n")


def require_model(
    out: Path, entries: Sequence[SlideEntry], *, model: Mapping[str, str], overwrite: bool
) -> None:
    """Refuse what :func:`freeze_run` would refuse, and write nothing; the same arguments.

    Raises:
        JobError: the folder belongs to another model, and ``overwrite`` is not set or ``entries``
            lack some of its slides.
    """
    _require_all_again(out, read_run(out), entries, model, overwrite=overwrite)


def read_run(out: Path) -> dict[str, Any] | None:
    """Read ``run.json`` of a results folder; None where there is none.

    Raises:
        JobError: there is one, and it cannot be read.
    """
    path = out / "run.json"
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = parse_json(path.read_text())
        if not fits(content, {"slides": list[Any], "options": dict[str, Any], "model": Any}):
            raise ValueError("it is no record of a run")
        if not fits(content["model"], _MODEL) or not fits(content["model"], dict[str, str]):
            raise ValueError("it does not say by which model")
        if not all(fits(slide, {"slide_id": str}) for slide in content["slides"]):
            raise ValueError("it does not say of which slides")
    except (OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read ({error}); use another --out") from error
    return content


def _require_all_again(
    out: Path,
    before: Mapping[str, Any] | None,
    entries: Sequence[SlideEntry],
    model: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    """Refuse to do only some of a folder's slides again, by another model than the others."""
    if before is None or all(
        before["model"].get(key) == model.get(key) for key in ("sha256", "arithmetic")
    ):
        return
    said = (
        f"{out} holds results of model {_full_name(before['model'])}, and this run uses "
        f"{_full_name(model)}. "
    )
    if not overwrite:
        raise JobError(f"{said}Use another --out, or --overwrite to do its slides again.")
    named = {entry.slide_id for entry in entries}
    others = [str(slide["slide_id"]) for slide in before["slides"]]
    others = [slide_id for slide_id in others if slide_id not in named]
    if others:
        some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        msg = (
            f"{said}Of its slides {len(others)} would keep what the other model found: {some}. "
            "Name them too, so that all are done again, or use another --out."
        )
        raise JobError(msg)


def _full_name(model: Mapping[str, str]) -> str:
    arithmetic = f", {model['arithmetic']}" if "arithmetic" in model else ""
    return f"{model['name']} ({model['sha256'][:12]}{arithmetic})"


def _require_file_name(entry: SlideEntry) -> None:
    """Refuse ids that cannot name files which every reader finds again."""
    slide_id = entry.slide_id
    problem = None
    if not slide_id or slide_id.startswith((".", "_")):
        problem = "readers of a folder of tables pass over names that begin with '.' or '_'"
    elif os.sep in slide_id or not slide_id.isprintable():
        problem = "a slide_id is the name of a file: printable characters and no folder"
    elif len(slide_id.encode(errors="replace")) > LONGEST_ID:
        problem = f"a slide_id has at most {LONGEST_ID} bytes"
    if problem:
        msg = f"{entry.path!r} would have the slide_id {slide_id!r}, but {problem}. Rename the "
        raise JobError(msg + "file, or give another slide_id in a CSV list.")


def _place(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


def _merged(one: SlideEntry, other: SlideEntry) -> SlideEntry:
    """Return what two namings of one slide say together.

    Raises:
        JobError: they contradict each other.
    """
    for name in ("mpp", "mask"):
        said = {getattr(entry, name) for entry in (one, other)} - {None}
        if len(said) > 1:
            msg = f"{one.path} is named twice, with different {name}: {sorted(map(str, said))}"
            raise JobError(msg)
    return replace(one, mpp=one.mpp or other.mpp, mask=one.mask or other.mask)


def _expand(item: str) -> Iterable[SlideEntry]:
    if not item:
        raise JobError("an empty name was given for a slide; is a variable unset?")
    if "://" in item:
        return [_entry(item)]
    path = Path(item)
    if path.is_dir():
        # A slide of some vendors is a file with a folder of the same name beside it.
        found = sorted(
            p
            for p in path.iterdir()
            # Some systems put hidden companions beside files.
            if p.is_file() and p.suffix.lower() in SLIDE_SUFFIXES and not p.name.startswith(".")
        )
        if not found:
            msg = f"folder {item} holds no slide ({', '.join(sorted(SLIDE_SUFFIXES))})"
            raise JobError(msg)
        return [_entry(str(p)) for p in found]
    if path.suffix.lower() in LIST_SUFFIXES:
        return _read_list(path)
    if path.exists():
        return [_entry(item)]
    matches = sorted(p for p in glob.glob(item, recursive=True) if Path(p).is_file())  # noqa: PTH207
    if not matches:
        raise JobError(f"nothing found at {item!r}: no file, folder or matching name")
    return [_entry(match) for match in matches]


def _read_list(path: Path) -> list[SlideEntry]:
    try:
        # Names of files are bytes, and need be no UTF-8; see _require_encoded.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise JobError(f"the slide list {path} cannot be read: {error}") from error
    if "\0" in text:
        raise JobError(f"the slide list {path} is no text: it holds zero bytes")
    try:
        found = (
            _read_lines(text, path) if path.suffix.lower() == ".txt" else _read_table(text, path)
        )
        entries = list(found)
    except csv.Error as error:
        raise JobError(f"the slide list {path} is no CSV table: {error}") from error
    for entry in entries:
        _require_encoded(entry, path)
    return entries


def _read_lines(text: str, path: Path) -> Iterator[SlideEntry]:
    # Not splitlines(), which ends lines at characters that are part of names.
    for line in re.split(r"\r\n|\r|\n", text):
        name = line.strip(_BLANKS)
        is_comment = name.startswith("#") and not Path(_resolve(name, path)).is_file()
        if name and not is_comment:
            yield _entry(_resolve(name, path))


def _require_encoded(entry: SlideEntry, source: Path) -> None:
    """Refuse a list in another encoding than UTF-8, unless files are called so.

    Raises:
        JobError: it is.
    """
    for name in (entry.path, entry.mask or ""):
        if not _is_utf8(name) and not os.path.exists(name):  # noqa: PTH110 - a plain system call
            msg = (
                f"the slide list {source} cannot be read: it is not UTF-8, and there is no file "
                f"of exactly the bytes {os.fsencode(name)!r}. Save the list as UTF-8."
            )
            raise JobError(msg)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_table(text: str, path: Path) -> Iterator[SlideEntry]:
    rows = csv.DictReader(io.StringIO(text, newline=""), restkey="", skipinitialspace=True)
    columns = rows.fieldnames or ()
    unknown = set(columns) - {"path", "slide_id", "mpp", "mask"}
    if "path" not in columns or unknown or len(set(columns)) < len(columns):
        msg = (
            f"the slide list {path} has the columns {sorted(columns)}; it needs 'path' and may "
            "have 'slide_id', 'mpp' and 'mask'"
        )
        raise JobError(msg)
    for row in rows:
        if (row["path"] or "").strip(_BLANKS):
            yield _row(row, rows.line_num, path)


def require_size(mpp: float | None, where: str) -> None:
    """Refuse a pixel size that is no size at all; whether it is plausible, each slide tells.

    Raises:
        JobError: it is not a positive number.
    """
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise JobError(f"{where}: mpp must be a positive number of micrometres, not {mpp}")


def _row(row: Mapping[str, str | None], line: int, source: Path) -> SlideEntry:
    if "" in row:
        raise JobError(f"{source}, line {line}: more cells than columns; quote names with commas")
    entry = _entry(_resolve(str(row["path"]).strip(_BLANKS), source))
    mpp, mask, slide_id = (
        str(row.get(k) or "").strip(_BLANKS) for k in ("mpp", "mask", "slide_id")
    )
    try:
        size = float(mpp) if mpp else None
    except ValueError as error:
        raise JobError(f"{source}, line {line}: mpp {mpp!r} is not a number") from error
    require_size(size, f"{source}, line {line}")
    return replace(
        entry,
        mpp=size,
        mask=_resolve(mask, source) if mask else None,
        slide_id=slide_id or entry.slide_id,
    )


def _resolve(text: str, source: Path) -> str:
    return text if "://" in text else str(source.parent / text)


def _entry(path: str) -> SlideEntry:
    name = path.rstrip("/").rsplit("/", 1)[-1] if "://" in path else Path(path).name
    return SlideEntry(path=path, slide_id=Path(name).stem.strip())


def _with_masks(entries: Sequence[SlideEntry], mask_dir: Path) -> list[SlideEntry]:
    masks = [entry.mask or str(mask_dir / f"{entry.slide_id}.png") for entry in entries]
    if not any(Path(mask).is_file() for mask in masks):
        msg = f"--mask-dir {mask_dir} has a mask for no slide; looked for {Path(masks[0]).name}"
        raise JobError(msg)
    return [replace(entry, mask=mask) for entry, mask in zip(entries, masks, strict=True)]
