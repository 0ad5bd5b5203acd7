"""Maps to objects: labels, owned objects, valid polygons, rows of the table."""

from wsi_pipeline.instances.extract import Extraction, extract_objects, outline_polygons

__all__ = ["Extraction", "extract_objects", "outline_polygons"]
