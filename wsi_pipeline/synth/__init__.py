"""A synthetic H&E slide of colorectal mucosa, of any size, with its exact truth.

::

    noise -> fields -> glands -> nuclei -> world (a window: what is there, how it looks)
                                            |-> truth (polygons)  -> write (SVS + parquet)
"""

from wsi_pipeline.synth.write import write_slide

__all__ = ["write_slide"]
