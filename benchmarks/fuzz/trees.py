"""Folders of small files, held in memory."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_tree", "write_tree"]


def write_tree(folder: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder, by their names in it."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return what :func:`write_tree` would write."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
