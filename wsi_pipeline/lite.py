"""``cerberus-lite``: Cerberus' design at a fifteenth of its arithmetic, for a CPU.

One shared residual encoder and one decoder a task, as in ``cerberus``; four things cost less.
The stem halves the image, so nothing learned runs at full resolution. The widths are small.
A decoder has its own, narrower widths and takes each encoder map through a 1 x 1 projection.
It stops at the scale its objects need: nuclei and lumina are told apart at half resolution,
glands at a quarter; whoever uses the logits enlarges them.

::

    x (B, 3, H, W) 0..255 -> stem + stage 0 -> stage 1 -> stage 2 -> stage 3
                             | 1/2             | 1/4      | 1/8      | 1/16
                             +-----------------+----------+----------+-> decoder, one a head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from wsi_pipeline.blocks import (
    BasicBlock,
    Logits,
    PixelShares,
    begin_undecided,
    check_input,
    conv_unit,
    cropped,
    enlarged,
    in_strips,
    initialise,
    stage_margins,
    summed,
)
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.spec import HeadSpec

__all__ = ["CerberusLite"]

SCALES = (2, 4, 8, 16)
"""Input pixels that a pixel of each encoder map spans."""


class CerberusLite(nn.Module):
    """Shared narrow encoder, one narrow decoder a head.

    Args:
        heads: the heads to build; instance, class and detect.
        widths: channels of the encoder at scales 2, 4, 8, 16.
        blocks: residual blocks there.
        decoder: channels of the decoders at scales 2, 4, 8, 16.
        scales: by head, input pixels a logit: 2, 4, 8 or 16; a head that is absent has 2.
    """

    def __init__(
        self,
        heads: Sequence[HeadSpec],
        *,
        widths: Sequence[int] = (32, 64, 128, 192),
        blocks: Sequence[int] = (1, 2, 3, 2),
        decoder: Sequence[int] = (32, 48, 64, 96),
        scales: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not len(widths) == len(blocks) == len(decoder) == len(SCALES):
            msg = (
                f"four widths, blocks and decoder widths wanted, not {widths}, {blocks}, {decoder}"
            )
            raise ModelBundleError(msg)
        scales = scales or {}
        _check_heads(heads, scales)
        self.shares = PixelShares()
        self.encoder = _Encoder(widths, blocks)
        self.heads = nn.ModuleDict()
        for head in heads:
            first = SCALES.index(scales.get(head.name, 2))
            self.heads[head.name] = _Decoder(widths[first:], decoder[first:], head.logit_channels)
        self.apply(initialise)
        for head in heads:
            logits = self.heads[head.name].get_submodule("logits")
            begin_undecided(logits, few=head.kind == "detect")

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
                them, the decoders only as far as they look (45 px at most).

        Returns:
            ``(n, C, H / scale, W / scale)`` logits a head, without the margin, or as much of it
            as are whole logits.
        """
        check_input(x_BCHW)
        maps = self.encoder(self.shares(x_BCHW))
        logits = {}
        for name, head in self.heads.items():
            if rows is not None and name not in rows:
                continue
            inputs = maps
            if rows is not None and len(rows[name]) < len(x_BCHW):
                inputs = [map_BCHW[rows[name]] for map_BCHW in maps]
            logits[name] = head(inputs, margin=margin)
        return logits


class _Encoder(nn.Module):
    """ResNet of basic blocks whose stem halves the input; total stride 16."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = conv_unit(3, widths[0], stride=2, bias=False)
        self.stages = nn.ModuleList()
        width_in = widths[0]
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = [BasicBlock(width_in, width, stride=1 if index == 0 else 2)]
            stage += [BasicBlock(width, width, stride=1) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*stage))
            width_in = width

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return the maps at scales 2, 4, 8 and 16."""
        maps = []
        x_BCHW = self.stem(x_BCHW)
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return maps


class _Decoder(nn.Module):
    """From the coarsest map: double the size, add a projected encoder map, one convolution."""

    def __init__(self, widths: Sequence[int], decoder: Sequence[int], channels: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Conv2d(width, out, 1, bias=False)
            for width, out in zip(widths, [*decoder[1:], decoder[-1]], strict=True)
        )
        self.units = nn.ModuleList(
            conv_unit(width_in, width_out, bias=False)
            for width_out, width_in in zip(decoder, [*decoder[1:], decoder[-1]], strict=True)
        )
        self.logits = Logits(decoder[0], channels, 1)

    def forward(self, maps: Sequence[Tensor], *, margin: int = 0) -> Tensor:
        count = len(self.project)
        scales, maps = SCALES[-count:], maps[-count:]
        # A stage sees a pixel around its result for the doubling and one for its convolution.
        margins = stage_margins(margin, scales, reach=2)
        steps: list[list[tuple[nn.Module, int]]] = [[(unit, 1)] for unit in self.units]
        steps[0].append((self.logits, 0))
        given = (
            cropped(map_BCHW, begin, scale)
            for map_BCHW, scale, (begin, _) in zip(maps, scales, margins, strict=True)
        )
        cuts = (cut for _, cut in margins)
        *finer, (project, taken, x_BCHW, cut) = zip(self.project, steps, given, cuts, strict=True)
        x_BCHW = project(x_BCHW)
        for step, _ in taken:
            x_BCHW = step(x_BCHW)
        x_BCHW = cropped(x_BCHW, cut, 1)
        for project, taken, map_BCHW, cut in reversed(finer):
            x_BCHW = in_strips(partial(_joined, project), taken, x_BCHW, map_BCHW, cut=cut)
        return x_BCHW


def _joined(project: nn.Module, coarse_BCHW: Tensor, fine_BCHW: Tensor) -> Tensor:
    """Return a coarse map at twice its size plus the projection of a fine one."""
    return summed(project, fine_BCHW, enlarged(coarse_BCHW, 2))


def _check_heads(heads: Sequence[HeadSpec], scales: Mapping[str, int]) -> None:
    names = {head.name for head in heads}
    patches = [head.name for head in heads if head.kind == "patch"]
    if patches:
        raise ModelBundleError(f"cerberus-lite has no patch heads, but {patches} are such")
    if unknown := sorted(set(scales) - names):
        raise ModelBundleError(f"scales: there are no heads {unknown}; there are {sorted(names)}")
    if wrong := {name: scale for name, scale in scales.items() if scale not in SCALES}:
        raise ModelBundleError(f"scales must be of {SCALES}, not {wrong}")
