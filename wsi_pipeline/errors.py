"""The errors this package raises on purpose, and the stable code of each.

::

    WsiPipelineError                    code
    ├── SlideError                      unreadable_slide
    │   ├── UnsupportedFormatError      unsupported_format
    │   ├── MissingPixelSizeError       missing_mpp
    │   └── ImplausiblePixelSizeError   implausible_mpp
    ├── MaskError                       mask_mismatch
    ├── ModelBundleError                bad_model
    ├── ResourceError
    │   ├── OutOfMemoryError            out_of_memory
    │   └── DiskFullError               disk_full
    ├── StoreError                      internal
    │   └── FolderGoneError             internal (the same command goes on when it is back)
    ├── TableError                      internal
    ├── DatasetError                    internal (annotated images: nothing was trained on them)
    ├── RecipeError                     internal (what to train makes no sense)
    ├── JobError                        internal (mostly wrong use: nothing was started)
    │   └── SlideBusyError              internal (another process is at work on the slide)
    └── Interrupted                     asked to stop: run the same command again

A message says what was asked, what was found and what to do next.
"""

from __future__ import annotations

__all__ = [
    "DatasetError",
    "DiskFullError",
    "FolderGoneError",
    "ImplausiblePixelSizeError",
    "Interrupted",
    "JobError",
    "MaskError",
    "MissingPixelSizeError",
    "ModelBundleError",
    "OutOfMemoryError",
    "RecipeError",
    "ResourceError",
    "SlideBusyError",
    "SlideError",
    "StoreError",
    "TableError",
    "UnsupportedFormatError",
    "WsiPipelineError",
]


class WsiPipelineError(Exception):
    """The root of every error raised on purpose."""

    code = "internal"
    """Stable string for reports: scripts may compare it."""


class SlideError(WsiPipelineError):
    """A slide cannot be opened or read."""

    code = "unreadable_slide"


class UnsupportedFormatError(SlideError):
    """The file is readable but no reader here understands it as a slide."""

    code = "unsupported_format"


class MissingPixelSizeError(SlideError):
    """The slide does not say how large a pixel is, and nobody else did."""

    code = "missing_mpp"


class ImplausiblePixelSizeError(SlideError):
    """The stated pixel size is outside 0.05-5 micrometres."""

    code = "implausible_mpp"


class MaskError(WsiPipelineError):
    """A tissue mask given by the user does not fit its slide."""

    code = "mask_mismatch"


class ModelBundleError(WsiPipelineError):
    """A model bundle is missing, incomplete, or contradicts itself."""

    code = "bad_model"


class ResourceError(WsiPipelineError):
    """The machine has run out of something."""


class OutOfMemoryError(ResourceError):
    """Host or device memory ran out."""

    code = "out_of_memory"


class DiskFullError(ResourceError):
    """No space is left where the results go."""

    code = "disk_full"


class StoreError(WsiPipelineError):
    """A store of prediction maps is missing, unfinished, or belongs to another job."""


class FolderGoneError(StoreError):
    """The results folder, or a store in it, was there and is no more: not the slide's fault."""


class TableError(WsiPipelineError):
    """An objects or tissue table cannot be read or written."""


class DatasetError(WsiPipelineError):
    """Annotated images are missing, or contradict what their layout promises."""


class RecipeError(WsiPipelineError):
    """A training recipe is incomplete, contradicts itself, or names what is not there."""


class JobError(WsiPipelineError):
    """What was asked makes no sense, or cannot be begun now; nothing was started."""


class SlideBusyError(JobError):
    """Another process is at work on a slide in the same results folder."""


class Interrupted(WsiPipelineError):  # noqa: N818 - a request to stop, not a fault
    """A signal asked the run to stop; finished blocks are kept."""

    code = "interrupted"
