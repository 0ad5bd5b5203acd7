"""How near each stage of the pipeline comes to what this machine allows.

::

    subject  one slide, its tissue tiles, a network on a device, and the maps of a first run
    stages   tissue | read | network | maps | objects: each alone, each with its limit
    whole    the pipeline as it runs, and how busy it keeps the device
    rounds   each work and its limit in turn, so that both see the same machine
    advice   the slowest stage, and what to do about it

A limit does the least that the stage's result needs, on the same tiles and in the same
round: decode them once, multiply matrices as often, compress and write the same bytes, look
at each pixel once.
"""

from wsi_pipeline.bench.run import BenchOptions, bench

__all__ = ["BenchOptions", "bench"]
