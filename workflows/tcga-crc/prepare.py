"""From a manifest of the GDC to a checked slide list, and to shards of about equal size.

python prepare.py split MANIFEST... --shards N --out shards/
    before anything is downloaded: manifests shards/000.txt, ... for gdc-client and window.py

python prepare.py list MANIFEST... --slides DIR --out slides.csv [--shards N]
    after the download: what is missing or damaged; the others as a list for wsi-run, and with
    --shards as lists slides.shards/000.csv, ...

Both keep diagnostic slides alone, and with --one-per-patient one of each patient.

Exit codes: 0 all is there, 1 something is missing or damaged (the lists have the others, and
slides.missing.txt is a manifest to download again), 2 wrong use.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from manifest import (
    Entry,
    ManifestError,
    damage,
    read_manifest,
    select,
    split,
    write_manifest,
)

log = logging.getLogger("prepare")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; return the exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    asked = _parse(arguments)
    try:
        entries, out = select(read_manifest(asked.manifests), one_per_patient=asked.one_per_patient)
    except ManifestError as error:
        log.error("Error: %s", error)
        return 2
    for reason, number in Counter(reason for _, reason in out).items():
        log.info("left out: %d, %s", number, reason)
    log.info("%d slides of %d patients, %s", len(entries), _patients(entries), _size(entries))
    if not entries:
        log.error("Error: no diagnostic slide is left")
        return 2
    if asked.command == "split":
        return _split(entries, asked.shards, asked.out)
    return _list(entries, asked)


def _split(entries: list[Entry], number: int, out: Path) -> int:
    _clear(out, ".txt")
    for index, shard in enumerate(split(entries, number)):
        path = out / f"{index:03d}.txt"
        write_manifest(path, shard)
        log.info("%s: %d slides, %s", path, len(shard), _size(shard))
    return 0


def _list(entries: list[Entry], asked: argparse.Namespace) -> int:
    def check(entry: Entry) -> str | None:
        return damage(entry, asked.slides, digest=not asked.sizes_only)

    with ThreadPoolExecutor(asked.workers) as threads:
        problems = dict(zip(entries, threads.map(check, entries), strict=True))
    good = [entry for entry, problem in problems.items() if problem is None]
    bad = [entry for entry, problem in problems.items() if problem is not None]
    for entry in bad:
        log.warning("%s/%s: %s", entry.id, entry.filename, problems[entry])
    _write_list(asked.out, good, asked.slides)
    _write_facts(asked.out.with_suffix(".facts.csv"), good)
    shards = asked.out.with_suffix(".shards")
    _clear(shards, ".csv")
    for index, shard in enumerate(split(good, asked.shards) if asked.shards else ()):
        _write_list(shards / f"{index:03d}.csv", shard, asked.slides)
    log.info("%s: %d slides, %s", asked.out, len(good), _size(good))
    missing = asked.out.with_suffix(".missing.txt")
    missing.unlink(missing_ok=True)
    if bad:
        write_manifest(missing, bad)
        log.warning(
            "%d missing or damaged, %s: remove what is damaged, then "
            "gdc-client download -m %s -d %s, and this command again",
            *(len(bad), _size(bad), missing, asked.slides),
        )
    return 1 if bad else 0


def _clear(folder: Path, suffix: str) -> None:
    """Remove the shards of an earlier call: there may have been more of them."""
    for path in folder.glob(f"[0-9][0-9][0-9]*{suffix}"):
        path.unlink()


def _write_list(path: Path, entries: Sequence[Entry], slides: Path) -> None:
    """Write a slide list as wsi-run takes it: no further column is allowed there."""
    rows = [(str(entry.path(slides).absolute()), entry.slide_id) for entry in entries]
    _write_rows(path, ("path", "slide_id"), rows)


def _write_facts(path: Path, entries: Sequence[Entry]) -> None:
    rows = [(e.slide_id, e.patient, e.size, e.md5, e.id, e.state) for e in entries]
    _write_rows(path, ("slide_id", "patient", "bytes", "md5", "file_id", "state"), rows)


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _patients(entries: Sequence[Entry]) -> int:
    return len({entry.patient for entry in entries})


def _size(entries: Sequence[Entry]) -> str:
    return f"{sum(entry.size for entry in entries):,} bytes"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST")
    both.add_argument("--one-per-patient", action="store_true", help="keep the first by name")
    dealt = commands.add_parser("split", parents=[both], help="manifests of about equal bytes")
    dealt.add_argument("--shards", type=_positive, required=True)
    dealt.add_argument("--out", type=Path, required=True, metavar="DIR")
    listed = commands.add_parser("list", parents=[both], help="a checked list of what is here")
    listed.add_argument("--slides", type=Path, required=True, metavar="DIR", help="gdc-client's")
    listed.add_argument("--out", type=Path, required=True, metavar="CSV")
    listed.add_argument("--shards", type=_positive, help="also lists of about equal bytes")
    listed.add_argument("--sizes-only", action="store_true", help="compute no checksums")
    listed.add_argument("--workers", type=_positive, default=4, help="files checked at a time")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
