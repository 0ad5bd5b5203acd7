"""The command line of window.py."""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manifest import Entry, ManifestError, parse_bytes, read_manifest, select

__all__ = ["Asked", "find_asked", "find_entries", "parse"]

log = logging.getLogger("window")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says."""

    name: str
    """Of the manifest: tells tasks in one folder apart."""
    download: Sequence[str]
    """The command that fetches a slide; ``{id}``, ``{dir}`` and ``{path}`` are filled in."""
    run: Sequence[str]
    """The command that processes a list, before its arguments."""
    options: Sequence[str]
    """Its arguments after the list."""
    out: Path
    """The results folder, which is among them."""
    tries: int
    """How often a download, and a slide that fails, is tried."""
    wait_s: float
    """Before the second download of a slide; doubled each time."""
    drop_failed: bool
    """Whether slides that fail every time are removed."""


def find_entries(words: argparse.Namespace) -> list[Entry]:
    """Return the slides of the manifest.

    Raises:
        ManifestError: it is of no use, or a slide is larger than the window.
    """
    entries, out = select(read_manifest([words.manifest]))
    for entry, reason in out:
        log.info("left out: %s, %s", entry.filename, reason)
    for entry in entries:
        if entry.size > words.disk:
            raise ManifestError(f"{entry.filename} has {entry.size} bytes: say more --disk")
    return entries


def find_asked(words: argparse.Namespace) -> Asked:
    """Return what the command line says.

    Raises:
        ManifestError: a command is not on the PATH.
    """
    download, run = shlex.split(words.download), shlex.split(words.wsi_run)
    for command in (download[0], run[0]):
        if shutil.which(command) is None:
            raise ManifestError(f"there is no {command} on the PATH")
    return Asked(
        name=words.manifest.stem,
        download=download,
        run=run,
        options=["--out", str(words.out), *words.options],
        out=words.out,
        tries=words.tries,
        wait_s=words.wait,
        drop_failed=words.drop_failed,
    )


def parse(arguments: Sequence[str], description: str | None) -> argparse.Namespace:
    """Take a command line apart; ends the process where it makes no sense."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("--slides", type=Path, required=True, metavar="DIR", help="for downloads")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS")
    parser.add_argument(
        "--disk", type=_size, required=True, metavar="SIZE", help="for slides alone, such as 200G"
    )
    parser.add_argument(
        "--download",
        default="gdc-client download --no-related-files --no-annotations --dir {dir} {id}",
        help="{id}, {dir} and {path} are filled in; {path} is to be the slide  [%(default)s]",
    )
    parser.add_argument("--wsi-run", default="wsi-run", help="how it is called  [%(default)s]")
    parser.add_argument(
        "--tries", type=int, default=4, help="of a download, of a slide that fails  [%(default)s]"
    )
    parser.add_argument(
        "--wait", type=float, default=30, help="seconds before a second download  [%(default)s]"
    )
    parser.add_argument(
        "--drop-failed", action="store_true", help="also remove slides that fail every time"
    )
    asked = parser.parse_args(words[:cut])
    asked.options = words[cut + 1 :]
    return asked


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
