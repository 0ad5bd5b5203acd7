"""Pixels of a whole-slide image at any pixel size, whatever the file format."""

from wsi_pipeline.slide.pixel_size import PixelSize
from wsi_pipeline.slide.slide import PyramidLevel, Slide

__all__ = ["PixelSize", "PyramidLevel", "Slide"]
