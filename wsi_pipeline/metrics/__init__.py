"""Scores of objects, pixels, patches and detections, from arrays alone.

::

    label images -> compare -> Overlap -> counts of the image -+-> pooled -> score
    points, boxes, classes -------------> counts of the image -+   bootstrap -> interval

Each score names its source and says what it is where nothing is true and nothing predicted.
"""

from __future__ import annotations

from wsi_pipeline.metrics.bootstrap import Interval, bootstrap
from wsi_pipeline.metrics.counts import (
    DetectionCounts,
    mean_defined,
    pooled,
    pooled_classes,
)
from wsi_pipeline.metrics.curves import (
    CAMELYON_RATES,
    DIGESTPATH_RATES,
    Froc,
    ScoredDetections,
    average_precision,
    froc,
    score_boxes,
    score_points,
)
from wsi_pipeline.metrics.hausdorff import HausdorffSums, object_hausdorff
from wsi_pipeline.metrics.instances import (
    EnsembleDiceSums,
    JaccardSums,
    ObjectDiceSums,
    PanopticCounts,
    aggregated_jaccard,
    aggregated_jaccard_plus,
    class_panoptic_counts,
    ensemble_dice,
    glas_detection,
    majority_classes,
    mean_pq,
    mpq,
    mpq_plus,
    object_dice,
    panoptic_counts,
)
from wsi_pipeline.metrics.matching import Matches, Overlap, compare
from wsi_pipeline.metrics.patches import Confusion, confusion, macro_auc, one_vs_rest_auc
from wsi_pipeline.metrics.pixels import (
    PixelCounts,
    class_pixel_counts,
    mean_dice,
    mean_jaccard,
    pixel_counts,
)
from wsi_pipeline.metrics.points import TypedCounts, match_points, typed_counts

__all__ = [
    "CAMELYON_RATES",
    "DIGESTPATH_RATES",
    "Confusion",
    "DetectionCounts",
    "EnsembleDiceSums",
    "Froc",
    "HausdorffSums",
    "Interval",
    "JaccardSums",
    "Matches",
    "ObjectDiceSums",
    "Overlap",
    "PanopticCounts",
    "PixelCounts",
    "ScoredDetections",
    "TypedCounts",
    "aggregated_jaccard",
    "aggregated_jaccard_plus",
    "average_precision",
    "bootstrap",
    "class_panoptic_counts",
    "class_pixel_counts",
    "compare",
    "confusion",
    "ensemble_dice",
    "froc",
    "glas_detection",
    "macro_auc",
    "majority_classes",
    "match_points",
    "mean_defined",
    "mean_dice",
    "mean_jaccard",
    "mean_pq",
    "mpq",
    "mpq_plus",
    "object_dice",
    "object_hausdorff",
    "one_vs_rest_auc",
    "panoptic_counts",
    "pixel_counts",
    "pooled",
    "pooled_classes",
    "score_boxes",
    "score_points",
    "typed_counts",
]
