"""The networks: RGB tiles in, one map of logits a head out.

::

    architecture      what it is
    cerberus          ResNet-34 with a stride-1 stem, one U-Net decoder a head, and a
                      dense patch classifier at the bottleneck
    cerberus-lite     the same design, narrow and coarser; see ``lite.py``
    stain-baseline    colour deconvolution and local contrast; see ``stain.py``
    unet, segnet      U-Net and SegNet, for a comparison; see ``comparison.py``
    medt              Medical Transformer, likewise; see ``medt.py``

    x (B, 3, H, W) 0..255 -> stem -> stage 0 -> stage 1 -> stage 2 -> stage 3
                              | 1     | 1/2      | 1/4      | 1/8      | 1/16
                              |       |          |          |          +-> patch head
                              |       |          |          |        1x1 projection
                              +-------+----------+----------+-> (+) decoder, one a head

Every network takes ``(B, 3, H, W)`` floats 0..255, RGB, with H and W multiples of 16, and
returns ``{head name: logits}``. In training, ``rows`` says which samples of the batch each head
is computed for; heads it does not name do not run at all. (Nothing of ``stain-baseline`` is
learned, so it has no ``rows``.) The logits' scale (input pixels a logit) divides the head's
stride: 1 for the segmentation heads of ``cerberus`` and the comparison networks, 16 for
``cerberus``' patch heads, 1 or 2 for ``stain-baseline``. Those of ``cerberus-lite`` are coarser
than the stored maps and are enlarged (``enlarged`` in ``blocks.py``). Suffixes name the axes:
``x_BCHW``.

``cerberus`` is the network of Graham et al., "One model is all you need" (Medical Image
Analysis 2023); ResNet is He et al. (CVPR 2016).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.blocks import (
    INPUT_MULTIPLE,
    BasicBlock,
    DoubledSum,
    Logits,
    PixelShares,
    begin_undecided,
    check_input,
    conv_unit,
    cropped,
    in_strips,
    initialise,
    stage_margins,
)
from wsi_pipeline.comparison import SegNet, UNet
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.lite import CerberusLite
from wsi_pipeline.medt import MedT
from wsi_pipeline.spec import HeadSpec, ModelSpec
from wsi_pipeline.stain import StainBaseline
from wsi_pipeline.steady import settle_vector_math

__all__ = ["INPUT_MULTIPLE", "Cerberus", "build_network"]

MOST_OPTION = 4096
"""The largest number among a network's options: eight times the widest layer of ResNet-34."""
MOST_OPTIONS = 64
PATCH_CELLS = 9
"""Bottleneck cells a side that a patch prediction averages: 144 input pixels."""
SCALES = (1, 2, 4, 8, 16)
"""Input pixels that a pixel of each encoder map spans."""


def build_network(spec: ModelSpec) -> nn.Module:
    """Build the network that a spec describes, with fresh weights, in training mode.

    Args:
        spec: architecture, its options and the heads.

    Returns:
        A module that maps ``(B, 3, H, W)`` floats 0..255 to ``{head name: logits}``.

    Raises:
        ModelBundleError: unknown architecture, or options it does not take.
    """
    settle_vector_math()  # before anything is computed on several threads
    architectures: dict[str, Callable[..., nn.Module]] = {
        "cerberus": Cerberus,
        "cerberus-lite": CerberusLite,
        "stain-baseline": StainBaseline,
        "unet": UNet,
        "segnet": SegNet,
        "medt": MedT,
    }
    if spec.architecture not in architectures:
        msg = f"architecture {spec.architecture!r} is none of {sorted(architectures)}"
        raise ModelBundleError(msg)
    if not _is_modest(spec.options):
        msg = f"options of {spec.architecture!r}: numbers up to {MOST_OPTION}, and few of them"
        raise ModelBundleError(msg)
    try:
        return architectures[spec.architecture](spec.heads, **spec.options)
    # KeyError: torch reserves some names; the others: of numbers it cannot make layers of
    except (TypeError, KeyError, ValueError, IndexError, RuntimeError, ArithmeticError) as error:
        msg = f"options or head names of {spec.architecture!r}: {error}"
        raise ModelBundleError(msg) from error


def _is_modest(value: object) -> bool:
    """Tell whether options hold nothing that a network could be built of for hours."""
    if isinstance(value, Mapping):
        return len(value) <= MOST_OPTIONS and all(map(_is_modest, value.values()))
    if isinstance(value, list | tuple):
        return len(value) <= MOST_OPTIONS and all(map(_is_modest, value))
    return not isinstance(value, int | float) or abs(value) <= MOST_OPTION


class Cerberus(nn.Module):
    """Shared ResNet encoder, one decoder a segmentation head, dense patch classifiers.

    Args:
        heads: the heads to build.
        widths: channels of the four encoder stages. The decoders add encoder maps to
            their own, so these numbers set every width of theirs.
        blocks: residual blocks of the four stages; (3, 4, 6, 3) is ResNet-34.
        head_width: hidden channels before a segmentation head's logits.
        patch_width: hidden channels before a patch head's logits.
    """

    def __init__(
        self,
        heads: Sequence[HeadSpec],
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (3, 4, 6, 3),
        head_width: int = 96,
        patch_width: int = 256,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or len(blocks) != 4:
            raise ModelBundleError(f"four widths and blocks wanted, not {widths} and {blocks}")
        self.shares = PixelShares()
        self.encoder = _Encoder(widths, blocks)
        self.project = nn.Conv2d(widths[3], widths[2], 1, bias=False)
        self.heads = nn.ModuleDict()
        for head in heads:
            if head.kind == "patch":
                module: nn.Module = _PatchHead(widths[3], patch_width, head.logit_channels)
            else:
                module = _SegmentationHead(widths, head_width, head.logit_channels)
            self.heads[head.name] = module
        self.apply(initialise)
        for head in heads:
            last = "conv2" if head.kind == "patch" else "output.logits"
            begin_undecided(self.heads[head.name].get_submodule(last), few=head.kind == "detect")

    takes_margin = True
    """Whether :meth:`forward` can be told which logits nobody wants."""

    def forward(
        self, x_BCHW: Tensor, rows: Mapping[str, Tensor] | None = None, *, margin: int = 0
    ) -> dict[str, Tensor]:
        """Compute the logits of the heads.

        Args:
            x_BCHW: ``(B, 3, H, W)`` floats 0..255, RGB.
            rows: for each wanted head, ``(n,)`` int64 indices of the samples it is computed
                for. None: every head for every sample.
            margin: input pixels on every side of which no logits are wanted: the encoder sees
                them, the decoders only as far as they look (45 px).

        Returns:
            ``(n, C, H, W)`` logits a segmentation head, ``(n, C, H/16, W/16)`` a patch head,
            both without the margin, or as much of it as are whole logits.
        """
        check_input(x_BCHW)
        *skips, inner = self.encoder(self.shares(x_BCHW))
        wanted = {n: head for n, head in self.heads.items() if rows is None or n in rows}
        patches = [isinstance(head, _PatchHead) for head in wanted.values()]
        mapped = inner if all(patches) else self.project(inner)
        logits = {}
        for name, head in wanted.items():
            inputs = [inner] if isinstance(head, _PatchHead) else [mapped, *skips]
            if rows is not None and len(rows[name]) < len(x_BCHW):
                inputs = [map_BCHW[rows[name]] for map_BCHW in inputs]
            logits[name] = head(*inputs, margin=margin)
        return logits


class _Encoder(nn.Module):
    """ResNet of basic blocks whose stem keeps the input's resolution; total stride 16."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = conv_unit(3, widths[0], kernel=7, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        width_in = widths[0]
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = [BasicBlock(width_in, width, stride=1 if index == 0 else 2)]
            stage += [BasicBlock(width, width, stride=1) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*stage))
            width_in = width

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return the maps at scales 1, 2, 4, 8 and 16."""
        maps = [self.stem(x_BCHW)]
        x_BCHW = self.pool(maps[0])
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return maps


class _SegmentationHead(nn.Module):
    """Four times: double the size, add the encoder's map, two convolutions."""

    def __init__(self, widths: Sequence[int], head_width: int, channels: int) -> None:
        super().__init__()
        stem, middle, deep, _ = widths
        self.stages = nn.ModuleList(
            nn.Sequential(conv_unit(width_in, width_in), conv_unit(width_in, width_out))
            for width_in, width_out in ((deep, middle), (middle, stem), (stem, stem), (stem, stem))
        )
        self.joints = nn.ModuleList(DoubledSum(width) for width in (deep, middle, stem, stem))
        hidden = conv_unit(stem, head_width, kernel=1)
        self.output = nn.Sequential(
            OrderedDict(hidden=hidden, logits=Logits(head_width, channels, 1))
        )

    def forward(self, mapped_BCHW: Tensor, *skips: Tensor, margin: int = 0) -> Tensor:
        # A stage sees a pixel around its result for the doubling and one for each convolution.
        scales = SCALES[:-1]
        margins = stage_margins(margin, scales, reach=3)
        steps = [[(unit, 1) for unit in stage.children()] for stage in self.stages]
        steps[-1].append((self.output, 0))
        x_BCHW = cropped(mapped_BCHW, margins[-1][0], SCALES[-1])
        given = list(zip(skips, scales, margins, strict=True))
        for (skip_BCHW, scale, (begin, cut)), joint, taken in zip(
            reversed(given), self.joints, steps, strict=True
        ):
            x_BCHW = in_strips(joint, taken, x_BCHW, cropped(skip_BCHW, begin, scale), cut=cut)
        return x_BCHW


class _PatchHead(nn.Module):
    """The class of the 144-pixel patch around each bottleneck cell.

    Upstream averages the middle 9 x 9 cells of a patch and classifies the mean; here
    every cell does so with its own 9 x 9 neighbours, so that cell (13, 13) of a 448-pixel
    input holds upstream's answer. Near the border the mean is over the cells that exist.
    """

    def __init__(self, width: int, hidden: int, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.3)
        self.conv1 = nn.Conv2d(width, hidden, 1)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.conv2 = Logits(hidden, channels, 1)

    def forward(self, x_BCHW: Tensor, *, margin: int = 0) -> Tensor:
        x_BCHW = functional.avg_pool2d(
            x_BCHW, PATCH_CELLS, stride=1, padding=PATCH_CELLS // 2, count_include_pad=False
        )
        x_BCHW = self.dropout(functional.relu(self.norm1(x_BCHW)))
        logits_BCHW: Tensor = self.conv2(functional.relu(self.norm2(self.conv1(x_BCHW))))
        return cropped(logits_BCHW, margin, SCALES[-1])
