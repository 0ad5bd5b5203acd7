"""Ways to run the slides of a batch; all of them end each slide in a report."""

from wsi_pipeline.engines.here import Only, Watcher, run_slides

__all__ = ["Only", "Watcher", "run_slides"]
