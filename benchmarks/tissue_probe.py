"""How far do a few tiles of nine tissues carry? A linear probe of a bundle's encoder.

    python -m benchmarks.tissue_probe BUNDLE TILES

TILES is a folder of Kather's tiles. Each tile becomes the means and standard deviations of the
encoder's two coarsest maps; a logistic regression learns from all tiles but one and names that
one (tiles of one case are left out together). Prints JSON: how many are right, with a 95 % Wilson
interval, for the encoder and, to compare with, for the mean colours alone.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wsi_pipeline.blocks import INPUT_MULTIPLE
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.training.annotation import PatchLabel
from wsi_pipeline.training.conform import resampled
from wsi_pipeline.training.layouts import read_dataset


def main() -> None:
    """Print how many tiles are named rightly."""
    parser = argparse.ArgumentParser(prog="tissue_probe", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="a name of the zoo, or a folder")
    parser.add_argument("tiles", type=Path, help="a folder of Kather's tiles")
    options = parser.parse_args()
    bundle = find_bundle(options.bundle)
    encoder = bundle.load_network().encoder
    deep, colour, classes, cases = [], [], [], []
    for item in read_dataset(options.tiles, "kather").items:
        image = resampled(item.load(), bundle.spec.mpp)
        label = image.labels["tissue"]
        assert isinstance(label, PatchLabel)
        deep.append(deep_features(encoder, image.image))
        colour.append(colour_features(image.image))
        classes.append(label.classes[label.id])
        cases.append(item.patient)
    result = {
        "tiles": len(classes),
        "by class": dict(Counter(classes)),
        "encoder": probe(np.stack(deep), classes, cases),
        "colours": probe(np.stack(colour), classes, cases),
    }
    print(json.dumps({"bundle": bundle.name, "sha256": bundle.digest, **result}, indent=2))


@torch.inference_mode()
def deep_features(encoder: torch.nn.Module, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return means and standard deviations of the encoder's two coarsest maps."""
    height, width = (side - side % INPUT_MULTIPLE for side in image.shape[:2])
    x_BCHW = torch.from_numpy(image[:height, :width]).movedim(2, 0)[None].float() / 255
    maps = encoder(x_BCHW)[-2:]
    return torch.cat([part for map_BCHW in maps for part in _summary(map_BCHW[0])]).numpy()


def _summary(map_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return map_CHW.mean((1, 2)), map_CHW.std((1, 2))


def colour_features(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return means and standard deviations of R, G and B."""
    pixels = image.reshape(-1, 3).astype(np.float32)
    return np.concatenate([pixels.mean(0), pixels.std(0)])


def probe(
    features: NDArray[np.float32], classes: list[str], cases: list[str]
) -> dict[str, float | int | list[str]]:
    """Name each tile by the tiles of all other cases."""
    named = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
        features,
        classes,
        groups=cases,
        cv=LeaveOneGroupOut(),
    )
    wrong = [f"{own} as {other}" for own, other in zip(classes, named, strict=True) if own != other]
    right = len(classes) - len(wrong)
    interval = binomtest(right, len(classes)).proportion_ci(method="wilson")
    return {
        "right": right,
        "accuracy": round(right / len(classes), 3),
        "low": round(interval.low, 3),
        "high": round(interval.high, 3),
        "wrong": sorted(wrong),
    }


if __name__ == "__main__":
    main()
