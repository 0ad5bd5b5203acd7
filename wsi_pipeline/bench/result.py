"""What was measured: a document for machines, and lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wsi_pipeline.bench.advice import Advice
from wsi_pipeline.bench.timing import Measured

__all__ = ["SCHEMA_VERSION", "BenchResult"]

SCHEMA_VERSION = 1
"""Of :meth:`BenchResult.to_json`; raised when a key changes its meaning or goes."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """One run of ``wsi bench``."""

    facts: dict[str, dict[str, Any]]
    """What was measured with what: ``machine``, ``slide``, ``model``, ``options``, ``rates``."""
    mpx: float
    """Million pixels at the model's pixel size: what rates count."""
    mm2: float
    """Tissue."""
    stages: Sequence[Measured]
    """Each alone."""
    whole: Measured
    """Its limit is the slowest stage alone."""
    whole_stages: dict[str, float]
    """Seconds of the whole by stage, as a report has them."""
    device_busy: float | None
    """Share of the whole's time in which the device worked; None where it cannot be told."""
    peak_rss_mb: float
    """Most memory that the process has held, MiB."""
    advice: Advice
    """The bottleneck."""

    def to_json(self) -> dict[str, Any]:
        """Return the document of ``--json``."""
        return {
            "schema": "wsi-bench",
            "schema_version": SCHEMA_VERSION,
            **self.facts,
            "mpx": round(self.mpx, 6),
            "mm2": round(self.mm2, 6),
            "stages": [self._stage(stage) for stage in self.stages],
            "whole": {
                **self._stage(self.whole),
                "mm2_per_s": _per(self.mm2, self.whole.seconds),
                "stages_s": self.whole_stages,
                "device_busy": self.device_busy,
            },
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "bottleneck": {
                "stage": self.advice.stage,
                "finding": self.advice.finding,
                "remedy": self.advice.remedy,
            },
        }

    def lines(self) -> Iterator[str]:
        """Yield the lines of the table, with what was measured above and the verdict below."""
        yield from self._header()
        yield ""
        yield f"{'stage':<9}{'seconds':>9}{'Mpx/s':>9}{'limit s':>9}{'share':>7}  limit"
        for stage in (*self.stages, self.whole):
            rate = _per(self.mpx, stage.seconds)
            yield (
                f"{stage.name:<9}{stage.seconds:>9.3f}{rate:>9.1f}{stage.limit.seconds:>9.3f}"
                f"{stage.share:>7.0%}  {stage.limit.name}"
            )
        yield ""
        busy = "unknown" if self.device_busy is None else f"{self.device_busy:.0%}"
        who = "processors" if self.facts["options"]["device"] == "cpu" else "device"
        yield f"{who} busy {busy} of the whole; peak memory {self.peak_rss_mb:,.0f} MiB"
        yield f"Bottleneck: {self.advice.stage}. {_sentence(self.advice.finding)}"
        yield f"Remedy: {_sentence(self.advice.remedy)}"

    def _header(self) -> Iterator[str]:
        slide, model, options = (self.facts[name] for name in ("slide", "model", "options"))
        machine, rates = self.facts["machine"], self.facts["rates"]
        yield (
            f"{'slide':<9}{slide['name']}, {slide['width']} x {slide['height']} px at "
            f"{slide['mpp']:.4g} um, read by {slide['reader']}"
        )
        yield f"{'model':<9}{model['name']}, {model['flops_per_px'] / 1e3:,.1f} kFLOP a pixel"
        yield (
            f"{'device':<9}{options['device']}, {options['precision']}: {machine['device']}; "
            f"matrix product {rates['matrix_tflops']:.3g} TFLOP/s, "
            f"memory {rates['memory_gb_per_s']:.3g} GB/s"
        )
        yield (
            f"{'threads':<9}{options['decode_threads']} decode, {options['object_threads']} "
            f"extract objects; {machine['cpus']} processors"
        )
        yield (
            f"{'work':<9}{options['tiles']} tiles of {options['tile_px']} + 2 x "
            f"{options['halo_px']} px in batches of {options['batch_size']}, "
            f"{options['computed_share']:.0%} of them computed (each pixel read "
            f"{options['redundancy']:.2f} times, its arithmetic done "
            f"{options['flops_redundancy']:.2f} times): {self.mpx:.2f} Mpx, "
            f"{self.mm2:.3f} mm2 of tissue"
        )

    def _stage(self, stage: Measured) -> dict[str, Any]:
        return {
            "name": stage.name,
            "seconds": stage.seconds,
            "rounds_s": list(stage.rounds),
            "mpx_per_s": _per(self.mpx, stage.seconds),
            "limit": {
                "name": stage.limit.name,
                "seconds": stage.limit.seconds,
                "rounds_s": [limit.seconds for limit in stage.limits],
            },
            "share_of_limit": stage.share,
        }


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
