"""Small slides of every kind that the fast path reads, written by the tests themselves."""

from itertools import product

import imagecodecs
import numpy as np
import tifffile

APERIO = "Aperio Image Library v11|AppMag = 40|MPP = 0.25"
KINDS = ("jpeg-rgb", "jpeg-ycc444", "jpeg-ycc420", "jpeg2000-rgb", "jpeg2000-ycc", "deflate",
         "lzw", "raw")  # fmt: skip
_COMPRESSION = {"jpeg2000-rgb": 33005, "jpeg2000-ycc": 33003, "deflate": 8, "lzw": 5, "raw": 1}


def picture(width, height, seed=0):
    """A smooth random picture: JPEG keeps it well, and no two places look alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    channels = []
    for _ in range(3):
        waves = sum(
            np.sin(x / rng.uniform(6, 60) + y / rng.uniform(6, 60) + rng.uniform(0, 6))
            for _ in range(6)
        )
        channels.append(128 + 18 * waves)
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def rgb_to_ycc(rgb):
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ycc = np.stack([y, 128 + (b - y) * 0.564334, 128 + (r - y) * 0.713267], axis=-1)
    return np.clip(np.rint(ycc), 0, 255).astype(np.uint8)


def encode(tile, kind):
    """Compress one tile; JPEG at a quality that leaves the picture alone."""
    if kind == "jpeg-rgb":
        data = imagecodecs.jpeg8_encode(tile, level=95, colorspace="RGB", outcolorspace="RGB")
        return data
    if kind.startswith("jpeg-ycc"):
        return imagecodecs.jpeg8_encode(tile, level=95, subsampling=kind[-3:])
    if kind == "jpeg2000-rgb":
        return imagecodecs.jpeg2k_encode(tile, level=0, codecformat="j2k", reversible=True)
    if kind == "jpeg2000-ycc":
        ycc = rgb_to_ycc(tile)
        return imagecodecs.jpeg2k_encode(
            ycc, level=0, codecformat="j2k", reversible=True, mct=False
        )
    if kind == "deflate":
        return imagecodecs.zlib_encode(tile)
    return imagecodecs.lzw_encode(tile) if kind == "lzw" else tile.tobytes()


def write_slide(path, image, kind="jpeg-ycc420", *, tile=64, downsamples=(1, 4), bigtiff=False,
                description=APERIO, skip=(), spoil=(), spoil_level=0, fill="edge"):  # fmt: skip
    """Write a pyramid; `skip` and `spoil` are (column, row) of level-0 tiles.

    Skipped tiles are left out of the file (sparse); spoilt ones hold noise.
    """

    def tiles(level, index):
        rows, columns = -(-level.shape[0] // tile), -(-level.shape[1] // tile)
        for row, column in product(range(rows), range(columns)):
            part = level[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
            more = ((0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0))
            full = np.pad(part, more, mode=fill)
            data = encode(full, kind)
            if index == spoil_level and (spoil == "all" or (column, row) in spoil):
                data = b"\x00" * len(data)
            yield b"" if index == 0 and (column, row) in skip else data

    compression = _COMPRESSION.get(kind, 7)
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as tif:
        for index, downsample in enumerate(downsamples):
            level = image[::downsample, ::downsample]
            if index == 1 and description and description.startswith("Aperio"):
                tif.write(level, photometric="rgb", metadata=None, subfiletype=1)  # thumbnail
            tif.write(
                tiles(level, index), shape=level.shape, dtype=np.uint8, tile=(tile, tile),
                compression=compression, metadata=None, description=description or None,
                photometric="ycbcr" if compression == 7 else "rgb",
                subfiletype=1 if index and not description else 0,
            )  # fmt: skip
    if kind == "jpeg-rgb":
        retag(path, "PhotometricInterpretation", 2)
    return path


def retag(path, tag, value):
    """Overwrite a tag of every tiled directory."""
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for page in tif.pages:
            if page.is_tiled:
                page.tags[tag].overwrite(value)


def mean_blocks(image, factor):
    """Area average by an independent route: float means of padded blocks, ignoring padding."""
    height, width = image.shape[:2]
    more = (-height % factor, -width % factor)
    padded = np.pad(
        image.astype(float), ((0, more[0]), (0, more[1]), (0, 0)), constant_values=np.nan
    )
    blocks = padded.reshape(padded.shape[0] // factor, factor, -1, factor, 3)
    return np.nanmean(blocks, axis=(1, 3))


def psnr(a, b):
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)
