"""ResNet and FPN of the PyTorch twin."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sephjax.export.twin_layers import (
    ConvNorm,
    Extents,
    conv,
    extents_at,
    fill_beyond,
    make_norm,
)


class Layout(NamedTuple):
    """Conventions of a family of ImageNet weights; `mean` and `std` are in their channel order."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool
    stride_at_end: bool  # stages 1 to 3 end with their stride (slim); else 2 to 4 start with it
    stride_in_1x1: bool  # of a bottleneck; else in its 3x3
    same_pool: bool  # the stem's pool is padded as TensorFlow's SAME
    eps: float


LAYOUTS = {
    "slim": Layout(
        mean=(123.68, 116.779, 103.939),
        std=(1.0, 1.0, 1.0),
        bgr=False,
        stride_at_end=True,
        stride_in_1x1=False,
        same_pool=True,
        eps=1e-5,
    ),
    "msra": Layout(
        mean=(103.939, 116.779, 123.68),
        std=(1.0, 1.0, 1.0),
        bgr=True,
        stride_at_end=False,
        stride_in_1x1=True,
        same_pool=False,
        eps=1e-5,
    ),
    "torchvision": Layout(
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        bgr=False,
        stride_at_end=False,
        stride_in_1x1=False,
        same_pool=False,
        eps=1e-5,
    ),
}
UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def pad_same(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """Pads `x` as TensorFlow's SAME: ceil(side / stride) outputs, the odd pixel goes after."""
    sides = []
    for side in (x.shape[3], x.shape[2]):  # F.pad starts with the last axis
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=value)


class Block(nn.Module):
    """A residual unit: 3x3, 3x3 (depth 18, 34) or 1x1, 3x3, 1x1 (50, 101)."""

    def __init__(
        self, channels: int, width: int, stride: int, depth: int, layout: Layout, norm: tuple
    ):
        super().__init__()
        kernels = (1, 3, 1) if depth >= 50 else (3, 3)
        features = width * expansion(depth)
        widths = [channels, *[width] * (len(kernels) - 1), features]
        strided = 1 if depth >= 50 and not layout.stride_in_1x1 else 0
        self.stride = stride
        for i, kernel in enumerate(kernels):
            step = stride if i == strided else 1
            layer = conv(widths[i], widths[i + 1], kernel, stride=step, bias=False)
            setattr(self, f"conv{i + 1}", layer)
            setattr(self, f"norm{i + 1}", make_norm(norm, widths[i + 1]))
        self.layers = len(kernels)
        self.projects = channels != features
        if self.projects:
            self.shortcut_conv = conv(channels, features, 1, stride=stride, bias=False)
            self.shortcut_norm = make_norm(norm, features)

    def forward(self, x: torch.Tensor, before: Extents, after: Extents) -> torch.Tensor:
        """Applies the unit; `before` and `after` are the extents of its input and output."""
        if self.projects:
            shortcut = self.shortcut_norm(self.shortcut_conv(x), after)
        else:
            shortcut = x[:, :, :: self.stride, :: self.stride]
        extents = before
        for i in range(1, self.layers + 1):
            layer, norm = getattr(self, f"conv{i}"), getattr(self, f"norm{i}")
            x = layer(x, extents)
            if layer.stride[0] > 1:
                extents = after
            x = norm(x, extents)
            if i < self.layers and not norm.activates:
                x = F.relu(x)
        return F.relu(x + shortcut)


def expansion(depth: int) -> int:
    """Channels of a unit's output to those of its 3x3."""
    return 4 if depth >= 50 else 1


class ResNet(nn.Module):
    """A ResNet; gives the maps `c2` to `c5` of strides 4 to 32.

    Attributes:
        channels: Width of each map.
    """

    def __init__(self, depth: int, layout: str, norm: str, eps: float | None, width: int):
        """Builds the network; `eps` None is the layout's."""
        super().__init__()
        self.layout = LAYOUTS[layout]
        choice = (norm, eps or self.layout.eps)
        self.stem = nn.ModuleDict(
            {
                "conv": conv(3, width, 7, stride=2, bias=False),
                "norm": make_norm(choice, width),
            }
        )
        channels = width
        for stage, units in enumerate(UNITS[depth], 1):
            blocks = []
            for stride in self._strides(stage, units):
                blocks.append(
                    Block(channels, width * 2 ** (stage - 1), stride, depth, self.layout, choice)
                )
                channels = width * 2 ** (stage - 1) * expansion(depth)
            setattr(self, f"layer{stage}", nn.ModuleList(blocks))
        stages = (1, 1, 2, 4) if self.layout.stride_at_end else (1, 2, 3, 4)
        wide = {stage: width * 2 ** (stage - 1) * expansion(depth) for stage in range(1, 5)}
        self.channels = {f"c{i}": wide[stage] for i, stage in enumerate(stages, 2)}

    def _strides(self, stage: int, units: int) -> list[int]:
        if self.layout.stride_at_end:
            return [1] * (units - 1) + [2 if stage < 4 else 1]
        return [2 if stage > 1 else 1] + [1] * (units - 1)

    def normalize(self, images: torch.Tensor, pictures: Extents = None) -> torch.Tensor:
        """Uint8 RGB [b, h, w, 3] as the weights want it, [b, 3, h, w]; 0 beyond the pictures."""
        x = images.permute(0, 3, 1, 2).float()
        if self.layout.bgr:
            x = x.flip(1)
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (self.layout.mean, self.layout.std))
        return fill_beyond((x - mean) / std, pictures, 0.0)

    def forward(self, x: torch.Tensor, sizes: Extents = None) -> dict[str, torch.Tensor]:
        """The feature maps that a detector taps.

        Args:
            x: What `normalize` returns.
            sizes: Height and width of each picture in pixels; None: no canvas is padded.
        """
        x = self.stem["conv"](x, sizes)
        extents = extents_at(sizes, 2)
        norm = self.stem["norm"]
        x = norm(x, extents)
        x = self._pool(x if norm.activates else F.relu(x), extents)
        stride, ends = 4, {}
        for stage in range(1, 5):
            blocks = getattr(self, f"layer{stage}")
            for i, block in enumerate(blocks):
                before, stride = extents_at(sizes, stride), stride * block.stride
                x = block(x, before, extents_at(sizes, stride))
                ends[stage, i - len(blocks)] = x  # counted from the end: -1 is the last
        if self.layout.stride_at_end:  # the last map of each resolution; stage 3 is not tapped
            taps = [(1, -2), (1, -1), (2, -1), (4, -1)]
        else:
            taps = [(1, -1), (2, -1), (3, -1), (4, -1)]
        return {f"c{i}": ends[tap] for i, tap in enumerate(taps, 2)}

    def _pool(self, x: torch.Tensor, extents: Extents) -> torch.Tensor:
        """3x3 max-pool of stride 2 over the cells of the picture; 0 where there are none."""
        lowest = float("-inf")
        x = fill_beyond(x, extents, lowest)
        if self.layout.same_pool:
            x = F.max_pool2d(pad_same(x, 3, 2, lowest), 3, 2)
        else:
            x = F.max_pool2d(x, 3, 2, padding=1)
        return x.masked_fill(x == lowest, 0.0)


class FPN(nn.Module):
    """Feature pyramid, arXiv 1612.03144: laterals, top-down sum, 3x3 outputs and `p6`."""

    def __init__(
        self, channels: Mapping[str, int], width: int, norm: str, lateral_norm: str, extra: str
    ):
        """Builds the neck.

        Args:
            channels: Width of each input, fine to coarse: `c2` or `c3` to `c5`.
            width: Of every level.
            norm: After the output convolutions and that of `p6`; no ReLU follows it.
            lateral_norm: After the lateral convolutions; no ReLU either.
            extra: `max_pool`: `p6` is every second cell of `p5`; `conv_c5`: a 3x3 convolution of
                stride 2 on `c5`, padded as TensorFlow's SAME.
        """
        super().__init__()
        bias = lateral_norm == "none"
        self.lateral = nn.ModuleDict(
            {name[1:]: conv(c, width, 1, bias=bias) for name, c in channels.items()}
        )
        self.lateral_norm = nn.ModuleDict(
            {name[1:]: make_norm(lateral_norm, width) for name in channels}
        )
        self.output = nn.ModuleDict(
            {name[1:]: ConvNorm(width, width, 3, norm, relu=False) for name in channels}
        )
        self.extra = None
        if extra == "conv_c5":
            self.extra = ConvNorm(channels["c5"], width, 3, norm, relu=False)
            self.extra.conv.stride, self.extra.conv.padding = (2, 2), (0, 0)

    def forward(
        self, features: Mapping[str, torch.Tensor], sizes: Extents = None
    ) -> dict[str, torch.Tensor]:
        """The levels `p2` or `p3` to `p6`, fine to coarse; `sizes` in pixels."""
        pyramid, merged = {}, None
        for number in reversed(list(self.lateral)):
            extents = extents_at(sizes, 2 ** int(number))
            lateral = self.lateral[number](features[f"c{number}"])
            lateral = self.lateral_norm[number](lateral, extents)
            if merged is not None:
                lateral = lateral + F.interpolate(merged, size=lateral.shape[2:], mode="nearest")
            merged = lateral
            pyramid[f"p{number}"] = self.output[number](merged, extents)
        pyramid = dict(sorted(pyramid.items()))
        pyramid["p6"] = self._p6(features["c5"], pyramid["p5"], sizes)
        return pyramid

    def _p6(self, c5: torch.Tensor, p5: torch.Tensor, sizes: Extents) -> torch.Tensor:
        if self.extra is None:
            return F.max_pool2d(p5, 1, 2)
        x = pad_same(fill_beyond(c5, extents_at(sizes, 32), 0.0), 3, 2)
        return self.extra.norm(self.extra.conv(x), extents_at(sizes, 64))
