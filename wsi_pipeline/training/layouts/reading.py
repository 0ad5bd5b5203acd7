"""What every layout needs: images, masks, listings of a folder, and one wording of errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from wsi_pipeline.errors import DatasetError

__all__ = [
    "IMAGE_SUFFIXES",
    "about",
    "as_ids",
    "files",
    "image_files",
    "pair",
    "pixel_size",
    "read_ids",
    "read_mat",
    "read_npy",
    "read_rgb",
    "read_xml",
    "require",
]

IMAGE_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
"""What :func:`image_files` takes for an image, in lower case."""

_RGB_MODES = ("RGB", "RGBA", "RGBX", "L", "P", "1")
_ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3) RGB; grey is repeated, an alpha channel is dropped.

    Raises:
        DatasetError: the file cannot be read, or its samples are not 8 bit.
    """
    with _opened(path) as image:
        if image.mode not in _RGB_MODES:
            msg = f"{path}: an 8-bit RGB image wanted, found the pixel format {image.mode!r}"
            raise DatasetError(msg)
        return np.array(_decoded(path, image).convert("RGB"), np.uint8)


def read_ids(path: Path) -> NDArray[np.int32]:
    """Read a mask of one channel as (H, W) numbers: 1, 8, 16 or 32 bit, or palette indices.

    Raises:
        DatasetError: the file cannot be read, or holds colours instead of one number a pixel.
    """
    with _opened(path) as image:
        if image.mode not in _ID_MODES:
            msg = (
                f"{path}: a mask of one channel with a number per pixel wanted, "
                f"found the pixel format {image.mode!r}; convert the colours to numbers"
            )
            raise DatasetError(msg)
        return np.array(_decoded(path, image)).astype(np.int32)


def read_mat(path: Path, *names: str) -> list[NDArray[np.generic]]:
    """Read the named arrays of a MATLAB file, in that order.

    Raises:
        DatasetError: unreadable, of version 7.3 (which is HDF5), or an array is missing.
    """
    try:
        with path.open("rb") as file:
            content = loadmat(file)
    except NotImplementedError as error:
        msg = f"{path} is a MATLAB file of version 7.3; save it again with the option '-v7'"
        raise DatasetError(msg) from error
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing") from error
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise DatasetError(f"{path} cannot be read as a MATLAB file: {error}") from error
    missing = [name for name in names if name not in content]
    if missing:
        found = sorted(name for name in content if not name.startswith("__"))
        raise DatasetError(f"{path} holds no {' and no '.join(missing)}; found: {found}")
    return [content[name] for name in names]


def read_npy(path: Path) -> NDArray[np.generic]:
    """Map the array of a ``.npy`` file into memory.

    Raises:
        DatasetError: unreadable, several arrays (``.npz``), or an array of Python objects, which
            would have to be unpickled.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path} cannot be read as a NumPy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise DatasetError(f"{path} cannot be read as a NumPy array: it is an archive of files")
    return array


def read_xml(path: Path) -> ElementTree.Element:
    """Read an XML file and return its root.

    Raises:
        DatasetError: unreadable or malformed.
    """
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise DatasetError(f"{path} cannot be read as XML: {error}") from error


def as_ids(array: NDArray[np.generic]) -> NDArray[np.int32]:
    """Return an array of whole numbers of any type, such as MATLAB's doubles, as int32.

    Raises:
        DatasetError: not numbers, fractions, or negative or huge numbers.
    """
    if array.dtype.kind not in "buif":
        raise DatasetError(f"whole numbers wanted, found {array.dtype}")
    ids = array.astype(np.int64) if np.isfinite(array).all() else None
    if ids is None or (ids != array).any() or ids.min(initial=0) < 0 or ids.max(initial=0) >> 31:
        raise DatasetError("whole numbers from 0 wanted, found fractions, negative or huge ones")
    return ids.astype(np.int32)


def pixel_size(mpp: float | None, *, published: float) -> float:
    """Return the micrometres per pixel the user states, or those of the publication.

    Raises:
        DatasetError: not from 0.05 to 5, as of slides.
    """
    if mpp is None:
        return published
    if not 0.05 <= mpp <= 5:
        raise DatasetError(f"mpp must be micrometres per pixel, from 0.05 to 5, not {mpp}")
    return mpp


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Name the file in every ``DatasetError`` from within that does not name it yet."""
    try:
        yield
    except DatasetError as error:
        if str(path) in str(error):
            raise
        raise DatasetError(f"{path}: {error}") from error


def require(folder: Path, *patterns: str) -> None:
    """Refuse a folder in which one of the patterns (as of ``Path.glob``) matches nothing.

    Raises:
        DatasetError: not a folder, or without what a pattern asks for.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder")
    missing = [pattern for pattern in patterns if next(folder.glob(pattern), None) is None]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise DatasetError(f"{folder} has no {' and no '.join(missing)}; found: {found}")


def files(folder: Path, *patterns: str) -> list[Path]:
    """Return the files that match any of the patterns, each once, sorted by path.

    Hidden files are left out: archives made on macOS carry a ``._name`` beside every file.
    """
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """Return the images that lie directly in a folder, sorted; none where it is missing."""
    return [path for path in files(folder, "*") if path.suffix.lower() in IMAGE_SUFFIXES]


def pair(
    images: Iterable[Path], masks: Iterable[Path], key: Callable[[Path], str]
) -> list[tuple[Path, Path]]:
    """Join images and their labels by what ``key`` makes of both paths, in the images' order.

    Raises:
        DatasetError: a key twice on one side, or a file of either side without its other.
    """
    by_key, labels = _by_key(images, key), _by_key(masks, key)
    _no_singles("image", "label", [by_key[k] for k in by_key if k not in labels])
    _no_singles("label", "image", [labels[k] for k in labels if k not in by_key])
    return [(path, labels[k]) for k, path in by_key.items()]


def _by_key(paths: Iterable[Path], key: Callable[[Path], str]) -> dict[str, Path]:
    keyed: dict[str, Path] = {}
    for path in paths:
        name = key(path)
        if name in keyed:
            raise DatasetError(f"{keyed[name]} and {path} both stand for {name!r}: keep one")
        keyed[name] = path
    return keyed


def _no_singles(have: str, lack: str, paths: Sequence[Path]) -> None:
    if paths:
        msg = f"{len(paths)} {have}(s) without their {lack}, the first is {paths[0]}"
        raise DatasetError(msg)


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path} cannot be read as an image: {error}") from error


def _decoded(path: Path, image: Image.Image) -> Image.Image:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:  # a cut PNG is a SyntaxError to PIL
        raise DatasetError(f"{path} is damaged: {error}") from error
    return image
