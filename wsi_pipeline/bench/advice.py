"""Which stage sets the time, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wsi_pipeline.bench.timing import Measured

__all__ = ["NEAR", "Advice", "Circumstances", "advise"]

NEAR = 0.7
"""Share of its limit from which a stage counts as being at it."""
APART = 0.6
"""Share of the whole's time below which its slowest stage does not explain it."""
ADDED_UP = 0.5
"""Share of the whole's time below which not even all stages together do."""


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a remedy depends on."""

    device: str
    """As a predictor has it."""
    precision: str
    """Likewise."""
    half_pays: bool
    """Whether the network gains by half precision."""
    int8_runs: bool = False
    """Whether it runs in 8-bit integers here."""
    decoders: int
    """Threads that decode."""
    cpus: int
    """Processors that this process may use."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The bottleneck, in words."""

    stage: str
    """The slowest stage alone; ``overlap`` where none explains the time of the whole by itself,
    ``rest`` where not even all together do."""
    finding: str
    """One sentence with the numbers."""
    remedy: str
    """One sentence: what to do."""


def advise(stages: Sequence[Measured], whole: Measured, where: Circumstances) -> Advice:
    """Name the bottleneck of a whole.

    Args:
        stages: its stages alone.
        whole: measured in the same rounds.
        where: what it was measured with.
    """
    slowest = max(stages, key=lambda stage: stage.seconds)
    alone = (
        f"alone, {slowest.name} needs {slowest.seconds:.3g} s, at {slowest.share:.0%} of its "
        f"limit ({slowest.limit.name}); the whole takes {whole.seconds:.3g} s"
    )
    together = sum(stage.seconds for stage in stages)
    if together < ADDED_UP * whole.seconds:
        return Advice(stage="rest", finding=alone, remedy=_rest(together, where))
    remedies = {
        "tissue": _tissue,
        "read": _read,
        "network": _network,
        "maps": _maps,
        "objects": _objects,
    }
    remedy = remedies[slowest.name](slowest.share >= NEAR, where)
    if whole.share < APART:
        return Advice(stage="overlap", finding=alone, remedy=_overlap(slowest.name, remedy, where))
    return Advice(stage=slowest.name, finding=alone, remedy=remedy)


def _rest(together: float, where: Circumstances) -> str:
    return (
        f"all stages alone add up to {together:.3g} s; the rest is opening, the preview, checksums "
        "and tables, which hardly grow with the slide: measure a larger one, and leave the "
        "machine alone meanwhile"
    )


def _overlap(slowest: str, remedy: str, where: Circumstances) -> str:
    if where.device == "cpu":
        return (
            "the stages share the processors, so their times add up, and more processors help all "
            f"of them; for {slowest}, the first of them: {remedy}"
        )
    return (
        "the stages wait for each other: give several slides to one run (the tables of one are "
        f"made beside the network of the next), or a larger slide; for {slowest}, the slowest: "
        f"{remedy}"
    )


def _tissue(near: bool, where: Circumstances) -> str:
    return "give masks of your own (--mask-dir), or measure a larger slide: this one is tiny"


def _read(near: bool, where: Circumstances) -> str:
    if near and where.decoders < where.cpus:
        return (
            f"the decoder itself is at work: raise --workers (now {where.decoders}, of "
            f"{where.cpus} processors)"
        )
    if near:
        return "the decoder itself is at work: more processors, or JPEG instead of JPEG 2000"
    return (
        "the time goes elsewhere than into decoding: copy the slide to a local disk; a pixel size "
        "that is no power-of-two fraction of the model's is resampled, at two to three times the "
        "cost"
    )


def _network(near: bool, where: Circumstances) -> str:
    cpu = where.device == "cpu"
    if where.precision == "fp32" and where.half_pays:
        return "try half precision (--precision bf16), where the device has it"
    if near and where.int8_runs and where.precision != "int8":
        return "the device is at its limit: 8-bit integers (--precision int8) cost it half"
    if near:
        faster = "a GPU (--device cuda)" if cpu else "a faster device"
        return f"the device is at its limit: {faster} or a narrower network (--model) helps"
    if cpu:
        return (
            "a larger --tile-size computes less halo; other work on the processors slows the "
            "network, so leave them to it"
        )
    return "the device is not filled: raise --batch-size or --tile-size"


def _maps(near: bool, where: Circumstances) -> str:
    if near:
        return "codec and disk are the limit: put --out on a faster local disk"
    return "many small files cost more than their bytes: raise --tile-size"


def _objects(near: bool, where: Circumstances) -> str:
    return (
        f"raise --workers up to the processors there are ({where.cpus}); a crowded slide takes "
        "longer, since objects cost more than pixels"
    )
