"""Texts without the folders that files lie in: names of folders may tell of patients or sites.

What is written of a run passes one :class:`Redaction`, that of its job: reports, logs and
``run.json`` as values, what a person is told as text. File names stay.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

__all__ = ["LogLines", "Redaction"]

FOLDER = "[folder]"
"""What stands for a folder that is named without a file in it."""
_URL = re.compile(r"\b[A-Za-z][\w+.-]*://(?:[^\s\"'<>]*/)?([^\s\"'<>/?#]*)[^\s\"'<>]*")
_ANY_FOLDERS = re.compile(r"(?<![\w/.\]])/(?:[^\s/\"'`<>|:;,()]+/)+")
"""Absolute folders that nobody has named, such as those of libraries in a traceback."""


@dataclass(frozen=True, kw_only=True)
class Redaction:
    """Takes folders out of texts; by default it leaves every text alone."""

    folders: frozenset[str] = frozenset()
    """As they may appear in a text: as they were typed, absolute, and without symbolic links."""

    @classmethod
    def of(
        cls, *, files: Iterable[str | os.PathLike[str]], folders: Iterable[str | os.PathLike[str]]
    ) -> Redaction:
        """Return what takes out the folders of files, folders themselves, and the home folder.

        All folders around them go, too.
        """
        wanted = {os.fspath(folder) for folder in folders}
        wanted |= {os.path.dirname(os.fspath(file)) for file in files}  # noqa: PTH120 - also URLs
        home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() fails for a user without a name
        return cls(folders=_forms({*wanted, home}))

    @classmethod
    def of_run(
        cls,
        slides: Iterable[str | os.PathLike[str]],
        out: Path,
        folders: Iterable[str | os.PathLike[str] | None],
        *,
        wanted: bool,
    ) -> Redaction:
        """Return what takes the folders of a run out, if that is wanted, or was when it was begun.

        Args:
            slides: files, lists, folders and patterns, as they were named.
            out: the results folder, perhaps with a ``run.json`` that was redacted.
            folders: others that were named, of masks and models.
            wanted: whether it is asked for now.
        """
        if not wanted and not _was_redacted(out):
            return cls()
        named = [os.fspath(slide) for slide in slides]
        within = [name for name in named if Path(name).is_dir()]
        return cls.of(files=named, folders=[*within, *(own for own in folders if own), out])

    def including(self, *files: str | os.PathLike[str] | None) -> Redaction:
        """Return what takes the folders of these files out, too; nothing where nothing is."""
        if not self.folders:
            return self
        more = _forms({os.path.dirname(os.fspath(file)) for file in files if file})  # noqa: PTH120
        return Redaction(folders=self.folders | more)

    def text(self, text: str) -> str:
        """Return a text without folders; of a URL, the name alone is left."""
        if not self.folders:
            return text
        # Of an address nothing stays but its last name: not the key that signs it, either.
        if self._addresses is not None:
            text = self._addresses.sub(r"\1", text)
        text = self._known.sub(lambda match: "" if match[0].endswith("/") else FOLDER, text)
        return _ANY_FOLDERS.sub("", _URL.sub(r"\1", text))

    def value(self, value: Any) -> Any:  # noqa: ANN401 - any JSON value
        """Return a JSON value whose texts hold no folders."""
        if not self.folders:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.value(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(part) for part in value]
        return value

    @cached_property
    def _addresses(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.folders, key=len, reverse=True)
        known = [re.escape(folder) for folder in longest_first if "://" in folder]
        if not known:
            return None
        below = r"/+(?:[^\s\"'<>?#]*/)?([^\s\"'<>/?#]*)[^\s\"'<>]*"
        return re.compile(rf"(?:{'|'.join(known)}){below}")

    @cached_property
    def _known(self) -> re.Pattern[str]:
        longest_first = sorted(self.folders, key=len, reverse=True)
        whole = [folder for folder in longest_first if folder.startswith("/") or "://" in folder]
        absolute = [re.escape(folder) for folder in whole]
        relative = [re.escape(folder) for folder in longest_first if folder not in whole]
        # A folder ends where its name does: at a slash, or before what is no part of a name.
        parts = [rf"(?:{'|'.join(absolute)})(?:/+|(?![\w-]|\.\w))"]
        if relative:
            # Short words, perhaps; only as the beginning of a path.
            parts.append(rf"(?<![\w./-])(?:{'|'.join(relative)})/+")
        return re.compile("|".join(parts))


def _was_redacted(out: Path) -> bool:
    try:
        return bool(json.loads((out / "run.json").read_text())["options"]["redact_paths"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _forms(folders: Iterable[str]) -> frozenset[str]:
    """Return the ways in which folders, and those around them, may be written."""
    forms: set[str] = set()
    for folder in folders:
        typed = folder.rstrip("/")
        if "://" in folder:
            forms.add(typed)
            continue
        if not set(typed) <= {".", "/"}:
            forms.add(typed)
        for path in {os.path.abspath(folder), os.path.realpath(folder)}:  # noqa: PTH100
            own = Path(path)
            forms |= {str(part) for part in (own, *own.parents) if part != part.parent}
    return frozenset(forms)


class LogLines(logging.Formatter):
    """Log records as lines of text or JSON that name no folder; it may be sent to a process."""

    def __init__(self, *, json_lines: bool, redaction: Redaction) -> None:
        super().__init__(None if json_lines else logging.BASIC_FORMAT)
        self._json = json_lines
        self._redaction = redaction

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        text = self._redaction.text(super().format(record))
        if not self._json:
            return text
        facts = {"level": record.levelname.lower(), "logger": record.name, "message": text}
        return json.dumps({"event": "log", **facts})
