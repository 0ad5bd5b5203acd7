"""The Cerberus network on a device: as right as float32 on the CPU, and how near the floor.

    python benchmarks/gpu.py [--device cuda] [--tiles 1024 2048 4096] [--precisions fp32 bf16]
    python benchmarks/gpu.py --device cpu --widths 8 16 16 32 --tiles 256   (a smoke test)

Random weights of the full size. The floor is the dense network's FLOPs (counted by torch on the
tile that is read) over the rate of a large matrix product measured here at the same precision.
Prints JSON: for each precision the largest and mean difference of the maps in 1/255, and for each
tile size megapixels a second of the write boxes, with reading from memory (no slide decoding),
and the share of the floor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wsi_pipeline.bench.rates import dense_flops, matrix_rate
from wsi_pipeline.bundle import ModelBundle, save_bundle
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.tiling import TileGrid


class NoiseSlide:
    """Windows of one noise image, repeated without end: nothing is decoded."""

    def __init__(self, side: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)

    def read_windows(
        self, _grid: PixelGrid, boxes: Sequence[Box], **_how: object
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield a window of the right size for each box."""
        for box in boxes:
            yield self.pixels[: box.height, : box.width]


def make_bundle(folder: Path, widths: list[int]) -> ModelBundle:
    """Write the network of the paper with random weights whose logits vary."""
    rules = RunRules()
    cells, glands = tuple("nabcdef"), tuple("nab")
    spec = ModelSpec(
        name="random",
        architecture="cerberus",
        mpp=0.5,
        halo_px=160,
        options={"widths": widths},
        heads=(
            HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
            HeadSpec(name="nuclei-class", kind="class", classes=cells, classifies="nuclei"),
            HeadSpec(name="gland", kind="instance", stride=2, object_kind="gland", rules=rules),
            HeadSpec(
                name="gland-class", kind="class", stride=2, classes=glands, classifies="gland"
            ),
            HeadSpec(name="lumen", kind="instance", stride=2, object_kind="lumen", rules=rules),
            HeadSpec(name="tissue", kind="patch", stride=16, classes=tuple("abcdefghi")),
        ),
    )
    torch.manual_seed(0)
    network = build_network(spec).eval()
    standardise(network, torch.randint(0, 256, (1, 3, 256, 256)).float())
    return save_bundle(folder / "random", spec, network, card="random weights")


def standardise(network: nn.Module, pixels_BCHW: torch.Tensor) -> None:
    """Give every last convolution outputs of mean 0 and deviation 1 on some pixels.

    Random weights saturate the softmax otherwise, and saturated maps agree whatever is wrong.
    """
    with torch.no_grad():
        for name, out in network(pixels_BCHW).items():
            head = network.get_submodule(f"heads.{name}")
            last = [module for module in head.modules() if isinstance(module, nn.Conv2d)][-1]
            mean, deviation = out.mean((0, 2, 3)), out.std((0, 2, 3)).clamp(min=1e-6)
            last.weight /= deviation[:, None, None, None]
            last.bias.sub_(mean).div_(deviation)


def run(predictor: TorchPredictor, count: int) -> tuple[float, list[dict[str, NDArray[np.uint8]]]]:
    """Predict ``count`` tiles; return seconds and the maps."""
    side = predictor.tile_px
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(count * side, side))
    tiles = TileGrid.cover(grid, tile_px=side, halo_px=predictor.halo_px)
    slide = NoiseSlide(tiles.read_px)
    begun = time.perf_counter()
    blocks = [dict(block.arrays) for block in predictor.predict(slide, tiles)]
    return time.perf_counter() - begun, blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--tiles", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--widths", type=int, nargs=4, default=[64, 128, 256, 512])
    parser.add_argument("--count", type=int, default=16, help="tiles a measurement")
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    options = parser.parse_args()
    result: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder), options.widths)
        small = {"tile_size": 256, "batch_size": 1}
        reference = TorchPredictor.load(bundle, device="cpu", precision="fp32", **small)
        _, expected = run(reference, 1)
        for precision in options.precisions:
            how = {"device": options.device, "precision": precision}
            _, found = run(TorchPredictor.load(bundle, **how, **small), 1)
            result[precision] = differences(found[0], expected[0])
            rate = matrix_rate(options.device, precision, clock=time.perf_counter)
            result[precision]["matrix_tflops"] = rate / 1e12
            for tile in options.tiles:
                predictor = TorchPredictor.load(bundle, **how, tile_size=tile)
                run(predictor, 2 * predictor.batch_size)
                seconds, _ = run(predictor, options.count)
                side = tile + 2 * predictor.halo_px
                floor = dense_flops(bundle.spec, [(side, side)]) * options.count / rate
                result[precision][f"tile_{tile}"] = {
                    "batch": predictor.batch_size,
                    "mpx_per_s": options.count * tile**2 / 1e6 / seconds,
                    "share_of_floor": floor / seconds,
                }
    print(json.dumps(result, indent=None if options.json else 2))


def differences(
    found: dict[str, NDArray[np.uint8]], expected: dict[str, NDArray[np.uint8]]
) -> dict[str, object]:
    """Compare the probability maps of one tile, in steps of 1/255."""
    keys = [key for key in expected if key.endswith("/prob")]
    apart = np.concatenate([np.abs(found[key].astype(int) - expected[key]).ravel() for key in keys])
    return {
        "largest_difference": int(apart.max()),
        "mean_difference": float(apart.mean()),
        "within_1": float((apart <= 1).mean()),
    }


if __name__ == "__main__":
    main()
