"""The synthetic world: everything that lies in a window of it, and how that looks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.geometry import Box
from wsi_pipeline.synth import render, stain
from wsi_pipeline.synth.fields import EDGE, Fields, make_fields
from wsi_pipeline.synth.glands import CRYPT_REACH_UM, make_glands
from wsi_pipeline.synth.noise import make_texture
from wsi_pipeline.synth.nuclei import make_nuclei
from wsi_pipeline.synth.pen import Pen

__all__ = ["Scene", "World"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What lies in and around one window."""

    fields: Fields
    """Tissue and stain fields, with a wide margin."""
    glands: tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]
    """Skeletons, outer and lumen radii of the crypts that may reach into the window."""
    nuclei: NDArray[np.float64]
    """Nuclei and vacuoles that may reach into the window; all those of its crypts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A slide's worth of tissue; a function of the seed, drawn at some pixel size."""

    seed: int
    """Which world."""
    mpp: float
    """Micrometres per pixel of what is drawn."""
    texture: NDArray[np.float32]
    """Tileable noise."""
    grain: NDArray[np.float32]
    """Sensor noise."""
    light: NDArray[np.float32]
    """Light by optical density and channel."""
    pen: Pen
    """The pen mark."""

    @classmethod
    def make(cls, *, seed: int, mpp: float, size: tuple[int, int]) -> World:
        """Prepare a world; ``size`` (level-0 pixels) only decides where the pen mark goes."""
        return cls(
            seed=seed,
            mpp=mpp,
            texture=make_texture(seed),
            grain=stain.make_grain(seed),
            light=stain.make_light(),
            pen=Pen.make(seed=seed, extent_um=(size[0] * mpp, size[1] * mpp)),
        )

    def scene(self, box: Box) -> Scene | None:
        """Return what lies in a box of level-0 pixels, or None where all is bare glass."""
        mpp = self.mpp
        window = (box.x * mpp, box.y * mpp, box.x1 * mpp, box.y1 * mpp)
        if float(make_fields(self.seed, window).nodes[..., EDGE].max()) < -8.0:
            return None
        # Crypts decide where nuclei may lie, so they are made in a wider window.
        wide = _pad(window, 64.0)
        fields = make_fields(self.seed, _pad(wide, 2.0 * CRYPT_REACH_UM + 40.0))
        glands = make_glands(self.seed, fields, wide)
        nuclei = make_nuclei(self.seed, fields, glands, window)
        return Scene(fields=fields, glands=glands, nuclei=nuclei)

    def draw(self, box: Box, scene: Scene | None) -> NDArray[np.uint8]:
        """Draw a box of level-0 pixels as ``(H, W, 3)`` RGB."""
        corner = (box.x, box.y)
        dyes = np.zeros((2, box.height, box.width), np.float32)
        if scene is None:
            fields = Fields(nodes=np.zeros((2, 2, 8), np.float32), origin=(0, 0))
        else:
            fields = scene.fields
            nodes, origin = fields.nodes, fields.origin
            place = (corner, self.mpp, dyes)
            render.paint_stroma(self.seed, self.texture, nodes, origin, *place)
            render.paint_nuclei(self.texture, scene.nuclei, render.CYTOPLASM, *place)
            render.paint_crypts(self.texture, *scene.glands, *place)
            render.paint_nuclei(self.texture, scene.nuclei, render.MUCIN, *place)
            render.paint_nuclei(self.texture, scene.nuclei, render.NUCLEI, *place)
        image = np.empty((box.height, box.width, 3), np.uint8)
        stain.colour(
            dyes,
            fields.nodes,
            fields.origin,
            self.pen.draw(box, self.mpp, self.texture),
            np.array(self.pen.ink, np.float32),
            self.grain,
            self.light,
            corner,
            self.mpp,
            image,
        )
        return image

    def is_bare(self, box: Box, scene: Scene | None) -> bool:
        """Tell whether a box shows nothing but glass."""
        return scene is None and not self.pen.touches(box, self.mpp)


def _pad(
    window: tuple[float, float, float, float], margin: float
) -> tuple[float, float, float, float]:
    # Whole lattice nodes, so that no field depends on how a slide was cut into windows.
    return (
        math.floor(window[0] - margin),
        math.floor(window[1] - margin),
        math.ceil(window[2] + margin),
        math.ceil(window[3] + margin),
    )
