"""The same bytes in every run on a CPU, and on any number of its processors."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.inference import TorchPredictor

VECTOR_MATH = {
    *("acos", "asin", "atan", "cos", "sin", "tan", "tanh", "erf", "erfc", "erfinv", "exp", "expm1"),
    *("log", "log10", "log2", "log1p", "sqrt", "rsqrt", "sigmoid", "trunc", "pow"),
}
"""What torch computes by a vector function of MKL's on some build or other."""


class Recorder(TorchDispatchMode):
    """Which operations were called, and of how many values."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.calls.append((func._schema.name.removeprefix("aten::"), args[0].numel()))
        return func(*args, **(kwargs or {}))


def compute(predictor, side):
    pixels = np.random.default_rng(4).integers(0, 256, (1, side, side, 3), np.uint8)
    return predictor._compute(torch.from_numpy(pixels))


def test_the_first_vector_function_of_a_process_runs_on_one_thread():
    """MKL finds out about the processor in the first call, and threads in it may meet."""
    with Recorder() as recorder:
        predictor = TorchPredictor.load(find_bundle("stain-baseline"), device="cpu", tile_size=256)
        compute(predictor, 256 + 2 * predictor.halo_px)
    vector = [call for call in recorder.calls if call[0].rstrip("_") in VECTOR_MATH]
    assert max(size for _, size in vector) > 1 << 15, "torch shares less out on no threads"
    assert vector[0][1] == 1


@pytest.mark.parametrize("model", ["stain-baseline", "cerberus-lite"])
def test_logits_do_not_depend_on_the_number_of_threads(model):
    predictor = TorchPredictor.load(find_bundle(model), device="cpu", precision="fp32")
    pixels = np.random.default_rng(4).integers(0, 256, (1, 3, 128, 128), np.uint8)
    x = torch.from_numpy(pixels).float().to(memory_format=torch.channels_last)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found.append(predictor._network(x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, logits in found[0].items():
            assert torch.equal(logits, other[name]), name
