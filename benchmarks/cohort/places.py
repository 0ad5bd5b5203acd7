"""A results folder on a small disk that can be filled and taken away; slides whose reads fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

__all__ = ["ReadErrors", "SmallDisk"]


class SmallDisk:
    """A tmpfs that is mounted on a folder; Linux, and root.

    Args:
        folder: made if it is not there; the disk's content is gone when it is unmounted.
        size_mb: how much it holds.
    """

    def __init__(self, folder: Path, size_mb: int) -> None:
        self.folder = folder.absolute()
        self._away = self.folder.with_name(self.folder.name + ".away")
        self._ballast = self.folder / "ballast"
        self._size_mb = size_mb

    def __enter__(self) -> SmallDisk:
        """Mount it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._away.mkdir(exist_ok=True)
        options = f"size={self._size_mb}m"
        _mount("-t", "tmpfs", "-o", options, "tmpfs", str(self.folder))
        # A mount point that others share cannot be moved.
        _mount("--make-private", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        """Unmount it, wherever it is."""
        for place in (self.folder, self._away):
            if place.is_mount():
                subprocess.run(["umount", "--lazy", str(place)], check=False)

    def fill(self) -> None:
        """Leave no byte free."""
        descriptor = os.open(self._ballast, os.O_CREAT | os.O_WRONLY)
        try:
            for size in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while True:
                        os.write(descriptor, bytes(size))
        finally:
            os.close(descriptor)

    def relieve(self) -> None:
        """Give the space back."""
        self._ballast.unlink(missing_ok=True)

    def take_away(self) -> None:
        """Leave an empty folder where the results were."""
        _mount("--move", str(self.folder), str(self._away))

    def bring_back(self) -> None:
        """Put the results where they were; what was written meanwhile lies hidden below."""
        _mount("--move", str(self._away), str(self.folder))


class ReadErrors:
    """Reads of slides that fail with EIO, in the programs that are started in :attr:`environment`.

    Args:
        folder: for the library that is compiled, and the flag that switches it on.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._flag = folder / "read-errors.on"
        self._library = folder / "read-errors.so"
        compiler = shutil.which("cc")
        self.available = compiler is not None
        """Whether there is a C compiler."""
        if compiler:
            source = Path(__file__).with_name("read_errors.c")
            call = [compiler, "-shared", "-fPIC", "-O1", "-o", self._library, source, "-ldl"]
            subprocess.run(call, check=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to be struck; nothing where there is no compiler."""
        if not self.available:
            return {}
        return {"LD_PRELOAD": str(self._library), "WSI_READ_ERRORS": str(self._flag)}

    def begin(self) -> None:
        """Let all reads of slides fail."""
        self._flag.touch()

    def end(self) -> None:
        """Let them succeed again."""
        self._flag.unlink(missing_ok=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
