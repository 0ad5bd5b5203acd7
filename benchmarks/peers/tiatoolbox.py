"""TIAToolbox's ``MultiTaskSegmentor`` with a network of the comparison.

Patches as Cerberus has them, post-processing tile and margin as TIAToolbox's own models of
0.5 micrometres a pixel have them (2048 and 128), two loaders and two threads that post-process.
Labels come from the rules of Cerberus, records and merging from TIAToolbox. As in TIAToolbox's
own wrappers the tissue class is stitched and makes no records.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.peers.cerberus_objects import GLAND, LUMEN, label_nuclei, label_regions
from benchmarks.peers.networks import make_network, patch_class, patch_logits
from benchmarks.peers.operators import declare_missing
from benchmarks.peers.patches import KEPT_PX, MARGIN_PX, MPP, PATCH_PX
from benchmarks.peers.worker import Clock, parser, set_threads, write_result

OPERATORS = declare_missing()  # before torchvision is imported

import tiatoolbox  # noqa: E402
from tiatoolbox.models.architecture.hovernet import (  # noqa: E402
    HoVerNet,
    _inst_dict_for_dask_processing,
)
from tiatoolbox.models.engine.io_config import IOSegmentorConfig  # noqa: E402
from tiatoolbox.models.engine.multi_task_segmentor import MultiTaskSegmentor  # noqa: E402
from tiatoolbox.models.models_abc import ModelABC  # noqa: E402

TILE_PX, OVERLAP_PX = 2048, 128
BATCH, WORKERS = 8, 2
HEADS = 6
KINDS = {"nucleus": "nuclei", "gland": "gland", "lumen": "lumen"}
STAGES = {
    "infer_wsi": "inference",
    "post_process_wsi": "objects",
    "save_predictions": "write",
}


class EnoughError(Exception):
    """As many patches were timed as wanted."""


class Wrapped(ModelABC):
    """A network of the comparison as TIAToolbox wants models."""

    def __init__(self, network: nn.Module, limit: int | None) -> None:
        super().__init__()
        self.network = network
        self.tasks = list(KINDS.values())
        self.class_dict = dict.fromkeys(self.tasks)
        self.limit = limit
        self.patches = 0
        self.begun = 0.0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits by head."""
        return self.network(x)

    @staticmethod
    def infer_batch(model: Wrapped, batch_data: Tensor, *, device: str) -> tuple[Any, ...]:
        """Return the maps of the kept part of each patch, (B, H, W, C), cropped first."""
        if model.patches == 1 + BATCH:  # one to ask for the heads, one batch to warm up
            model.begun = time.perf_counter()
        if model.limit and model.patches >= 1 + BATCH + model.limit:
            raise EnoughError
        x_BCHW = batch_data.to(device=device, dtype=torch.float32).permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits = model(x_BCHW.contiguous())
            maps = [_kept(name, logits_BCHW) for name, logits_BCHW in logits.items()]
        model.patches += len(batch_data)
        return tuple(map_.permute(0, 2, 3, 1).contiguous().numpy() for map_ in maps)

    def postproc(
        self, raw_maps: list[Any], offset: tuple[int, int] = (0, 0)
    ) -> tuple[dict[str, Any], ...]:
        """Return the objects of a tile as TIAToolbox merges them."""
        import dask.array as da

        is_dask = isinstance(raw_maps[0], da.Array)
        nuclei, types, glands, gland_types, lumina, _ = (np.asarray(map_) for map_ in raw_maps)
        nucleus_labels = label_nuclei(nuclei[..., 0], nuclei[..., 1])
        gland_labels = label_regions(glands[..., 0], glands[..., 1], GLAND, scale=1)
        lumen_labels = label_regions(lumina[..., 0], lumina[..., 1], LUMEN, scale=1)
        lumen_labels *= gland_labels > 0
        return (
            _task("nuclei", nucleus_labels, types, offset, is_dask=is_dask),
            _task("gland", gland_labels, gland_types, offset, is_dask=is_dask),
            _task("lumen", lumen_labels, None, offset, is_dask=is_dask),
        )


def _kept(name: str, logits_BCHW: Tensor) -> Tensor:
    if name == "tissue":
        tissue = patch_class(logits_BCHW).float()[:, None, None, None]
        return tissue.expand(-1, 1, KEPT_PX, KEPT_PX)
    kept_BCHW = patch_logits(logits_BCHW, first=MARGIN_PX, size=KEPT_PX)
    if name.endswith("-class"):
        return kept_BCHW.argmax(1, keepdim=True).float()
    return kept_BCHW.softmax(1)[:, 1:]


def _task(
    name: str,
    labels: NDArray[np.int32],
    types: NDArray[np.float32] | None,
    offset: tuple[int, int],
    *,
    is_dask: bool,
) -> dict[str, Any]:
    import dask.array as da

    classes = None if types is None else np.around(types[..., 0]).astype(np.uint8)
    objects = HoVerNet.get_instance_info(labels, classes, offset, verbose=False)
    if objects:
        columns = _inst_dict_for_dask_processing(
            inst_info_dict=objects, inst_info_dict_={}, is_dask=is_dask
        )
    else:
        empty = np.empty(0, np.int8)
        names = ("box", "centroid", "contours", "prob", "type")
        columns = {key: da.from_array(empty) if is_dask else empty.copy() for key in names}
    return {
        "task_type": name,
        "predictions": da.array(labels) if is_dask else labels,
        "info_dict": columns,
        "seg_type": "instance",
    }


def time_stages(clock: Clock) -> None:
    """Have the engine's stages measured."""

    def timed(method: Any, stage: str) -> Any:
        def call(*args: object, **options: object) -> object:
            with clock.stage(stage):
                return method(*args, **options)

        return call

    for name, stage in STAGES.items():
        setattr(MultiTaskSegmentor, name, timed(getattr(MultiTaskSegmentor, name), stage))


def configuration(tile_px: int) -> IOSegmentorConfig:
    """Return patches and tiles."""
    resolution = {"units": "mpp", "resolution": MPP}
    return IOSegmentorConfig(
        input_resolutions=[resolution],
        output_resolutions=[resolution] * HEADS,
        save_resolution=resolution,
        patch_input_shape=[PATCH_PX, PATCH_PX],
        patch_output_shape=[KEPT_PX, KEPT_PX],
        stride_shape=[KEPT_PX, KEPT_PX],
        tile_shape=[tile_px, tile_px],
        margin=OVERLAP_PX,
    )


def count_objects(out: Path) -> dict[str, int]:
    """Count the rows of the stores that were written, one a kind."""
    counts = {}
    for kind, task in KINDS.items():
        for path in out.rglob(f"*_{task}.db"):
            with sqlite3.connect(path) as store:
                [(counts[kind],)] = store.execute("select count(*) from annotations")
    return counts


def main() -> None:
    args = parser(__doc__).parse_args()
    set_threads(args.threads, args.network)
    tiatoolbox.logger.setLevel(logging.ERROR)
    tiatoolbox.rcParam["torch_compile_mode"] = "disable"
    shutil.rmtree(args.out, ignore_errors=True)  # the engine wants to make it
    clock = Clock()
    time_stages(clock)
    model = Wrapped(make_network(args.network), args.limit)
    engine = MultiTaskSegmentor(
        model=model, weights=None, batch_size=BATCH, num_workers=WORKERS, device="cpu",
        verbose=False,
    )  # fmt: skip
    tile_px = args.tile or TILE_PX
    facts: dict[str, Any] = {}
    try:
        engine.run(
            images=[args.slide], masks=[args.mask], ioconfig=configuration(tile_px),
            patch_mode=False, save_dir=args.out, output_type="annotationstore", device="cpu",
            num_workers=WORKERS, verbose=False,
        )  # fmt: skip
        facts["units"] = model.patches - 1
    except EnoughError:
        timed = model.patches - 1 - BATCH
        facts["seconds_a_unit"] = (time.perf_counter() - model.begun) / timed
        facts |= {"timed_units": timed, "units": len(engine.dataloader.dataset)}
    facts = {**clock.stop(), **facts, "objects": count_objects(args.out)}
    facts |= {"unit": "patch of 448", "tool_version": tiatoolbox.__version__, "tile": tile_px}
    write_result(args.result, **facts)


if __name__ == "__main__":
    main()
