"""Ways to run the slides of a batch; all of them end each slide in a report.

``here``: one after another in this process. ``devices``: in a process for each GPU. ``dasked``: on
the workers of a Dask cluster.
"""

from wsi_pipeline.engines.connection import require_scheduler
from wsi_pipeline.engines.dasked import run_on_dask
from wsi_pipeline.engines.devices import run_on_devices
from wsi_pipeline.engines.here import Only, run_slides
from wsi_pipeline.engines.watcher import Silent, Watcher

__all__ = [
    "Only",
    "Silent",
    "Watcher",
    "require_scheduler",
    "run_on_dask",
    "run_on_devices",
    "run_slides",
]
