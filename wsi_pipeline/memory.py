"""What a run holds on the host at its most, and the sizes that keep it below a cap.

::

    peak = program + weights + the larger of
             predicting:  a pass of the network, batches of pixels, canvases of the slide, blocks
             extracting:  chunks of maps, the windows of each thread, rows on their way

On CUDA the pass is not on the host, and both happen at once. Where the network has a device of
its own, the next slide is ready meanwhile, with canvases and batches of its own. Nothing here
grows with the slide, except rows: those of a million objects are in the figure. The figures are
measured by ``python -m benchmarks.memory`` (``--network``, ``--full``), those of CUDA are not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from wsi_pipeline.errors import JobError
from wsi_pipeline.machine import memory_limit
from wsi_pipeline.spec import ModelSpec

__all__ = ["Demand", "Sizes", "default_cap", "fit_sizes", "parse_size"]

log = logging.getLogger(__name__)

MIB = 1 << 20
DEFAULT_CPU = 3 << 30
"""Cap of a run on a CPU where none is given: so results do not depend on the machine's memory."""
PROGRAM = 500 * MIB
"""The interpreter, all libraries and compiled loops, one slide open; with some heap in pieces."""
PROGRAM_CUDA = 2048 * MIB
"""The same with CUDA's libraries."""
EXTRACTION = 270 * MIB
"""Cached chunks, and rows and outlines of a large slide."""
EXTRACTOR = 60 * MIB
"""A thread that turns windows of maps into objects."""
CANVASES = 192 * MIB
"""At most for the bands that the slide is decoded into; see ``Slide.band_bytes``."""
SMALL_CANVASES = 64 * MIB
BATCHES = 4
"""Batches of pixels at once: being filled, two waiting, with the network."""
AHEAD_BATCHES = 3
"""Those of a slide that is ready: being filled, two waiting."""
OVERVIEW = 160 * MIB
"""What reading the overview of such a slide holds, on which its tissue is found, before that."""
HALVES = 8 * MIB
"""Of each map at most: halved chunks that wait for their neighbours in its pyramid."""
BLOCKS = 4
"""Blocks of maps at once: being made, two waiting, being written."""
SMALLER_TILES = (768, 512, 256)
"""Sides tried where the preferred one is too large."""
RANGES = 288 * MIB
"""What drawing the fixed images and a float32 pass over them hold before a network is in 8 bits."""
MARGIN = 1.05
"""What a run may hold over the figures."""

PASS_VALUES = {
    "cerberus": (190, 64),
    "cerberus-lite": (66, 32),
    "stain-baseline": (26, 1),
}
"""By architecture: values of the network's precision that a pass holds a pixel it sees, and the
number of channels at full resolution for which that is so; it is in proportion to them."""
CHANGING_SIZES = 1.4
"""What a pass holds on the host where windows are fitted to the tissue, over what it holds where
all have one size: memory that is kept for the next maps does not fit others as well."""
OTHER_PASS_VALUES = (425, 64)
"""Of networks that are not measured, sizes as they come: Cerberus without strips."""
_FACTORS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What of the memory a model decides."""

    spec: ModelSpec
    """Heads, halo, architecture."""
    weights: int
    """Numbers that were learned."""
    value_bytes: int
    """Bytes of a value in the network's precision."""
    on_host: bool
    """Whether the network computes in the host's memory."""
    in_bytes: bool = False
    """Whether it computes in 8-bit integers."""
    ahead: bool = False
    """Whether the next slide is made ready meanwhile."""

    def peak(self, sizes: Sizes) -> int:
        """Return the bytes that a run needs at its most on the host.

        It keeps more for the next maps where the cap leaves room: see :meth:`enough`.
        """
        window = (sizes.tile_px + 2 * self.spec.halo_px) ** 2
        maps = sum(
            (len(head.prob_channels) + head.has_class_map) * (sizes.tile_px // head.stride) ** 2
            for head in self.spec.heads
        )
        loading = 8 * self.weights  # the file's, and the network's, in float32
        predicting = BATCHES * sizes.batch_size * window * 3 + sizes.canvas_bytes + BLOCKS * maps
        predicting += HALVES * len(self.spec.maps)
        if self.ahead:
            waiting = AHEAD_BATCHES * sizes.batch_size * window * 3
            predicting += max(OVERVIEW, sizes.canvas_bytes + waiting)
        extracting = EXTRACTION + sizes.extractors * EXTRACTOR
        if self.in_bytes:
            loading += RANGES
        if not self.on_host:
            return int(MARGIN * (PROGRAM_CUDA + loading + predicting + extracting))
        predicting += int(self._pass_bytes(sizes) * self._kept_share)
        kept = 4 * self.weights
        return int(MARGIN * (PROGRAM + max(loading, kept + max(predicting, extracting))))

    def enough(self, sizes: Sizes, *, cap: str | int | None, share: int = 1) -> int:
        """Return the bytes above which a run gives back what it keeps for the next pass' maps.

        Half of what :data:`CHANGING_SIZES` allows is for what is kept, half for what the next pass
        needs beside it. Where the cap leaves more, it is as much as leaves room for a whole pass
        to which nothing of what is kept is of use (and :data:`MARGIN` for what else grows).

        Args:
            sizes: how much is done at a time.
            cap: as of :func:`fit_sizes`.
            share: likewise.
        """
        most, a_pass = _most(cap, share, on_host=self.on_host), self._pass_bytes(sizes)
        beside = a_pass * (self._kept_share - 1) / 2
        return max(int(self.peak(sizes) / MARGIN - beside), int(most / MARGIN) - a_pass)

    def _pass_bytes(self, sizes: Sizes) -> int:
        """Return what a pass of whole tiles holds."""
        architecture, options = self.spec.architecture, self.spec.options
        values, channels = PASS_VALUES.get(architecture, OTHER_PASS_VALUES)
        widths = options.get("widths", (options.get("width", channels),))
        wide = widths[0] if architecture != "stain-baseline" else channels
        window = (sizes.tile_px + 2 * self.spec.halo_px) ** 2
        return int(window * values * max(0.25, wide / channels)) * self.value_bytes

    @property
    def _kept_share(self) -> float:
        return CHANGING_SIZES if self.spec.architecture in PASS_VALUES else 1.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done at a time."""

    tile_px: int
    """Side of a write box."""
    batch_size: int
    """Tiles a pass."""
    extractors: int
    """Threads that extract objects."""
    canvas_bytes: int = CANVASES
    """For the canvases of the slide."""


def parse_size(text: str | int) -> int:
    """Return the bytes that a text such as ``8G``, ``3.5GiB`` or ``900MB`` means.

    K, M, G and T are powers of 1024, with or without ``B`` or ``iB``.

    Raises:
        JobError: no unit, or not a size. (Numbers that are no text are bytes.)
    """
    if not isinstance(text, str):
        if isinstance(text, bool) or not isinstance(text, int) or text < 1:
            raise JobError(f"memory must be a text or a positive number of bytes, not {text!r}")
        return text
    match = re.fullmatch(
        r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([KMGT])(?:i?B)?\s*", text, re.IGNORECASE | re.ASCII
    )
    if match is None or not float(match[1]):
        raise JobError(f"memory must be a size with its unit, such as 8G or 900M, not {text!r}")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def default_cap(*, on_host: bool) -> int:
    """Return the bytes that a run holds at most where nobody said how many."""
    share = int(0.75 * memory_limit())
    return min(DEFAULT_CPU, share) if on_host else share


def fit_sizes(
    demand: Demand,
    wanted: Sizes,
    *,
    cap: str | int | None,
    fixed: Sequence[str] = (),
    share: int = 1,
) -> Sizes:
    """Return the largest sizes, up to the wanted ones, with which a run stays below a cap.

    Args:
        demand: of the model.
        wanted: what suits the device.
        cap: bytes, or text for :func:`parse_size`; None: :func:`default_cap`, below which no
            promise is made: where even the smallest sizes need more, they are taken.
        fixed: fields of ``wanted`` that somebody asked for and that stay.
        share: processes like this one that divide the cap among them.

    Raises:
        JobError: the cap that was given is not a size, or less than the least that is needed.
    """
    most = _most(cap, share, on_host=demand.on_host)
    for sizes in _candidates(demand, wanted, fixed):
        if demand.peak(sizes) <= most:
            return sizes
    least = demand.peak(sizes)
    stay = [f"--{_OPTIONS[name]} {getattr(sizes, name)}" for name in fixed]
    asked = f" with {' and '.join(stay)}" if stay else ""
    asked += f" in each of {share} processes" if share > 1 else ""
    if cap is None:
        log.warning("this run%s may need %s, %s are there", asked, _mib(least), _mib(most))
        return sizes
    msg = (
        f"--memory {cap} is too little: {demand.spec.name}{asked} needs at least {_mib(least)}. "
        "Give it more, leave --tile-size, --batch-size and --workers to be chosen, or name a "
        "narrower --model."
    )
    raise JobError(msg)


def _most(cap: str | int | None, share: int, *, on_host: bool) -> int:
    return (default_cap(on_host=on_host) if cap is None else parse_size(cap)) // share


_OPTIONS = {"tile_px": "tile-size", "batch_size": "batch-size", "extractors": "workers"}


def _candidates(demand: Demand, wanted: Sizes, fixed: Sequence[str]) -> Iterator[Sizes]:
    """Yield sizes to try: small canvases cost least, then few threads, small batches, tiles."""
    tiles, batches = [wanted.tile_px], [wanted.batch_size]
    threads = [wanted.extractors]
    if "tile_px" not in fixed:
        strides = [head.stride for head in demand.spec.heads]
        smaller = [side for side in SMALLER_TILES if side < wanted.tile_px]
        tiles += [side for side in smaller if not any(side % stride for stride in strides)]
    while "batch_size" not in fixed and batches[-1] > 1:
        batches.append(batches[-1] // 2)
    if "extractors" not in fixed:
        threads += range(wanted.extractors - 1, 0, -1)
    canvases = [wanted.canvas_bytes, SMALL_CANVASES]
    for tile_px, batch_size, extractors, canvas_bytes in product(tiles, batches, threads, canvases):
        yield Sizes(
            tile_px=tile_px,
            batch_size=batch_size,
            extractors=extractors,
            canvas_bytes=canvas_bytes,
        )


def _mib(size: int) -> str:
    return f"{-(-size // MIB):,} MiB"
