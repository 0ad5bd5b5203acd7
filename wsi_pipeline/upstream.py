"""What upstream Cerberus calls things: the classes of its release by id (its dataset.yml)."""

from __future__ import annotations

__all__ = ["CLASSES"]

CLASSES = {
    "nuclei-class": (
        "none", "neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective",
    ),
    "gland-class": ("none", "gland", "surface epithelium"),
    "tissue": (
        "background", "abnormal epithelium", "normal epithelium", "inflammatory", "muscle",
        "stroma", "debris", "mucous", "adipose",
    ),
}  # fmt: skip
"""By the head of ours that has them; id 0 of the first two means that there is no class."""
