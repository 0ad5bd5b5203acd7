"""What the tests of `wsi bench` share."""

from __future__ import annotations

from wsi_pipeline.synth import write_slide

SMALL = {"model": "stain-baseline", "device": "cpu", "tile_size": 256, "workers": 2}
"""Options that measure within seconds."""


class FakeClock:
    """Time passes only where it is told to."""

    def __init__(self, *, tick=0.0):
        self.now = 100.0
        self.tick = tick

    def __call__(self):
        self.now += self.tick
        return self.now

    def spend(self, seconds):
        self.now += seconds


def small_slide(path):
    """Write a slide of 9 tiles with tissue."""
    write_slide(path, width=1600, height=1200, mpp=0.25, seed=1, truth=False)
    return path
