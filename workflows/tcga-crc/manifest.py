"""The manifest of the GDC: which files there are, and whether they lie here undamaged.

A manifest is a table with tabs: ``id  filename  md5  size  state``. ``gdc-client download`` lays a
file at ``DIR/<id>/<filename>``; until it is whole, it is called ``<filename>.partial``.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Entry",
    "ManifestError",
    "damage",
    "parse_bytes",
    "read_manifest",
    "select",
    "split",
    "write_manifest",
]

COLUMNS = ("id", "filename", "md5", "size", "state")
RELEASED = frozenset({"released", "live", "validated"})
"""States of files that can be had; manifests of earlier years say the other two."""
_BARCODE = re.compile(r"TCGA-\w\w-\w{4}-\d\d[A-Z]-\d\d-(?P<kind>[A-Z]{2})\w+\.")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_CHUNK = 1 << 22


class ManifestError(ValueError):
    """A manifest is of no use as it is."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file of a manifest."""

    id: str
    """UUID of the file at the GDC."""
    filename: str
    """Name such as ``TCGA-AA-3488-01Z-00-DX1.<UUID>.svs``."""
    md5: str
    """Of the whole file, in hexadecimal digits."""
    size: int
    """Bytes."""
    state: str
    """Whether the GDC hands it out."""

    @property
    def slide_id(self) -> str:
        """The name of the results: the file name without its last extension, as in wsi-run."""
        return Path(self.filename).stem

    @property
    def patient(self) -> str:
        """The first three parts of the barcode."""
        return self.filename[:12]

    def folder(self, slides: Path) -> Path:
        """Return where gdc-client lays the file and what belongs to it."""
        return slides / self.id

    def path(self, slides: Path) -> Path:
        """Return where the file lies once it is whole."""
        return slides / self.id / self.filename


def read_manifest(paths: Iterable[Path]) -> list[Entry]:
    """Read manifests as one, in their order; a file that they name twice counts once.

    Raises:
        ManifestError: a column is missing, a value makes no sense, or two files would have the
            same slide_id.
    """
    by_slide: dict[str, Entry] = {}
    for path in paths:
        for entry in _read_one(path):
            other = by_slide.setdefault(entry.slide_id, entry)
            if other != entry:
                raise ManifestError(
                    f"{path}: two files have the slide_id {entry.slide_id}: {other.id} and "
                    f"{entry.id}. Results are named by it, so take one of them out."
                )
    if not by_slide:
        raise ManifestError("the manifest names no file")
    return list(by_slide.values())


def write_manifest(path: Path, entries: Iterable[Entry]) -> None:
    """Write a manifest that gdc-client takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(COLUMNS)]
    lines += [f"{e.id}\t{e.filename}\t{e.md5}\t{e.size}\t{e.state}" for e in entries]
    path.write_text("\n".join(lines) + "\n")


def select(
    entries: Iterable[Entry], *, one_per_patient: bool = False
) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """Keep the diagnostic slides; return them, and what was left out with the reason."""
    kept: list[Entry] = []
    out: list[tuple[Entry, str]] = []
    patients: set[str] = set()
    for entry in sorted(entries, key=lambda entry: entry.slide_id):
        barcode = _BARCODE.match(entry.filename)
        if not entry.filename.lower().endswith(".svs"):
            out.append((entry, "no .svs file"))
        elif barcode is None:
            out.append((entry, "the name is no barcode of a TCGA slide"))
        elif barcode["kind"] != "DX":
            out.append((entry, f"no diagnostic slide (DX) but {barcode['kind']}"))
        elif entry.state not in RELEASED:
            out.append((entry, f"its state is {entry.state}, so it cannot be had"))
        elif one_per_patient and entry.patient in patients:
            out.append((entry, f"{entry.patient} has a slide already"))
        else:
            patients.add(entry.patient)
            kept.append(entry)
    return kept, out


def split(entries: Sequence[Entry], number: int) -> list[list[Entry]]:
    """Deal files out to shards of about equal bytes: the largest first, to the least loaded.

    The same files and number always give the same shards; none is empty.
    """
    shards: list[list[Entry]] = [[] for _ in range(min(number, len(entries)))]
    loads = [0] * len(shards)
    for entry in sorted(entries, key=lambda entry: (-entry.size, entry.slide_id)):
        least = loads.index(min(loads))
        shards[least].append(entry)
        loads[least] += entry.size
    return [sorted(shard, key=lambda entry: entry.slide_id) for shard in shards]


def damage(
    entry: Entry, slides: Path, *, digest: bool = True, stop: Callable[[], bool] = lambda: False
) -> str | None:
    """Say what is wrong with a downloaded file; None where nothing is.

    A checksum that was right is noted beside the file with its size and time, and not computed
    again before they change.

    Args:
        entry: the file.
        slides: gdc-client's folder.
        digest: compute the checksum, too.
        stop: polled while it is computed; the file then counts as not checked.
    """
    path = entry.path(slides)
    try:
        facts = path.stat()
    except OSError:
        partial = path.with_name(f"{path.name}.partial").exists()
        return "download not finished" if partial else "missing"
    if facts.st_size != entry.size:
        return f"{facts.st_size} bytes, the manifest says {entry.size}"
    note = path.with_name(f".{path.name}.md5-ok")
    proof = f"{entry.md5} {facts.st_size} {facts.st_mtime_ns}\n"
    if not digest or (note.exists() and note.read_text() == proof):
        return None
    found = _md5(path, stop)
    if found is None:
        return "not checked"
    if found != entry.md5:
        return f"md5 {found}, the manifest says {entry.md5}"
    note.write_text(proof)
    return None


def parse_bytes(text: str) -> int:
    """Read a size such as ``200G`` (decimal, as disks are sold and manifests are added up).

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no size; say it like 200G or 1.5T")
    return int(float(match[1]) * _UNITS[match[2]])


def _read_one(path: Path) -> Iterable[Entry]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    rows = csv.DictReader(lines, delimiter="\t")
    lacking = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if lacking:
        raise ManifestError(
            f"{path} is no manifest of the GDC: it lacks {', '.join(lacking)}, and has "
            f"{', '.join(rows.fieldnames or ()) or 'nothing'}"
        )
    return [_entry(row, f"{path}, line {number}") for number, row in enumerate(rows, start=2)]


def _entry(row: dict[str, str | None], where: str) -> Entry:
    values = {name: (row[name] or "").strip() for name in COLUMNS}
    if not re.fullmatch(r"[0-9a-f-]{36}", values["id"]):
        raise ManifestError(f"{where}: {values['id']!r} is no UUID")
    # Names become paths here: none may lead out of its folder.
    if not re.fullmatch(r"\w[\w.-]*", values["filename"]):
        raise ManifestError(f"{where}: {values['filename']!r} is no plain file name")
    if not re.fullmatch(r"[0-9a-f]{32}", values["md5"]):
        raise ManifestError(f"{where}: {values['md5']!r} is no md5")
    if not values["size"].isdecimal() or int(values["size"]) == 0:
        raise ManifestError(f"{where}: {values['size']!r} is no size in bytes")
    return Entry(**{**values, "size": int(values["size"])})


def _md5(path: Path, stop: Callable[[], bool]) -> str | None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if stop():
                return None
            digest.update(chunk)
    return digest.hexdigest()
