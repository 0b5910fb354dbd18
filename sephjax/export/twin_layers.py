"""The layers of the PyTorch twin. Feature maps are NCHW, float32.

A batch of pictures lies top-left on one canvas. `extents` says how many cells (h, w) of a feature
map each picture fills; None: nothing is padded. What lies beyond a picture is 0 to a convolution
that looks at neighbours, and does not count in the statistics of a norm.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

Extents = Sequence[tuple[int, int]] | None
Norm = str | tuple[str, float]


def extents_at(sizes: Extents, stride: int) -> Extents:
    """Cells that each picture fills, of a map with `stride` pixels a cell; `sizes` in pixels."""
    if sizes is None:
        return None
    return [(math.ceil(height / stride), math.ceil(width / stride)) for height, width in sizes]


def fill_beyond(x: torch.Tensor, extents: Extents, value: float) -> torch.Tensor:
    """`x` [b, c, h, w] with `value` in all cells beyond each picture."""
    if extents is None:
        return x
    filled = torch.full_like(x, value)
    for i, (height, width) in enumerate(extents):
        filled[i, :, :height, :width] = x[i, :, :height, :width]
    return filled


class MaskedConv2d(nn.Conv2d):
    """A convolution that reads zeros beyond the picture."""

    def forward(self, input: torch.Tensor, extents: Extents = None) -> torch.Tensor:
        """Convolves `input` [b, c, h, w], whose extents are given."""
        if max(self.kernel_size) > 1:
            input = fill_beyond(input, extents, 0.0)
        return super().forward(input)


def conv(
    channels: int, features: int, kernel: int, *, stride: int = 1, bias: bool = True
) -> MaskedConv2d:
    """A square convolution padded by half its kernel on every side."""
    return MaskedConv2d(channels, features, kernel, stride=stride, padding=kernel // 2, bias=bias)


def group_moments(
    x: torch.Tensor, groups: int, extents: Extents
) -> tuple[torch.Tensor, torch.Tensor]:
    """Biased variance and mean of each sample's channel groups, shaped to broadcast against `x`.

    Args:
        x: [n, c, h, w], or [n, c] after a dense layer.
        groups: Groups of neighbouring channels.
        extents: The cells that count; a sample without any counts everywhere.
    """
    if extents is None or x.ndim == 2:
        parts = [x]
    else:
        parts = [
            x[i : i + 1, :, :h, :w] if h * w else x[i : i + 1] for i, (h, w) in enumerate(extents)
        ]
    rows = []
    for part in parts:
        cells = math.prod(part.shape[1:]) // groups  # not -1: there may be no sample
        grouped = part.reshape(len(part), groups, cells)
        mean = grouped.mean(dim=2, keepdim=True)
        rows.append(((grouped - mean).square().mean(dim=2), mean[:, :, 0]))
    shape = (len(x), x.shape[1], *[1] * (x.ndim - 2))
    variance, mean = (
        torch.cat(part).repeat_interleave(x.shape[1] // groups, 1).view(shape)
        for part in zip(*rows, strict=True)
    )
    return variance, mean


def default_groups(channels: int) -> int:
    """32, or for narrow layers the largest power of two that leaves two channels to a group."""
    groups = 32
    while groups > 1 and (channels % groups or channels <= groups):
        groups //= 2
    return groups


class NoNorm(nn.Module):
    """Stands where no norm is."""

    activates = False

    def forward(self, x: torch.Tensor, extents: Extents = None) -> torch.Tensor:
        """Returns `x`."""
        del extents
        return x


class Affine(nn.Module):
    """What all norms share: a scale and an offset for each channel, and the eps under the root.

    Attributes:
        activates: The norm is a non-linearity too: no ReLU follows.
    """

    activates = False

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups = default_groups(channels)
        self.eps = eps

    def scale_and_shift(self, x: torch.Tensor) -> torch.Tensor:
        """`x * weight + bias`, channel by channel."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        return x * self.weight.view(shape) + self.bias.view(shape)


class GroupNorm(Affine):
    """arXiv 1803.08494."""

    def forward(self, x: torch.Tensor, extents: Extents = None) -> torch.Tensor:
        """Centres and scales `x`."""
        if extents is None:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        variance, mean = group_moments(x, self.groups, extents)
        return self.scale_and_shift((x - mean) / torch.sqrt(variance + self.eps))


class EvoNormS0(Affine):
    """arXiv 2004.02967, table 2: `x * sigmoid(v * x) / std * weight + bias`."""

    activates = True

    def __init__(self, channels: int, eps: float):
        super().__init__(channels, eps)
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor, extents: Extents = None) -> torch.Tensor:
        """Normalises and activates `x`."""
        variance, _ = group_moments(x, self.groups, extents)
        gate = torch.sigmoid(self.v.view(1, -1, *[1] * (x.ndim - 2)) * x)
        return self.scale_and_shift(x * gate / torch.sqrt(variance + self.eps))


class BatchNorm(Affine):
    """Batch norm by its stored statistics: `frozen_bn`, and `bn` after training."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, eps: float):
        super().__init__(channels, eps)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor, extents: Extents = None) -> torch.Tensor:
        """Normalises `x`; padding makes no difference."""
        del extents
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False, eps=self.eps)


NORMS = {"evonorm_s0": EvoNormS0, "gn": GroupNorm, "frozen_bn": BatchNorm, "bn": BatchNorm}


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The norm of a name in a config, or of a name and an eps; else that is 1e-5."""
    name, eps = (norm, 1e-5) if isinstance(norm, str) else norm
    return NoNorm() if name == "none" else NORMS[name](channels, eps)


class ConvNorm(nn.Module):
    """A convolution, its norm and, unless the norm activates or `relu` is False, a ReLU."""

    def __init__(
        self,
        channels: int,
        features: int,
        kernel: int,
        norm: Norm,
        *,
        relu: bool = True,
        padded: bool = True,
    ):
        """The convolution has a bias if no norm follows."""
        super().__init__()
        self.conv = conv(channels, features, kernel, bias=norm == "none")
        if not padded:
            self.conv.padding = (0, 0)
        self.norm = make_norm(norm, features)
        self.relu = relu and not self.norm.activates

    def forward(self, x: torch.Tensor, extents: Extents = None) -> torch.Tensor:
        """Applies all of it."""
        x = self.norm(self.conv(x, extents), extents)
        return F.relu(x) if self.relu else x


class LinearNorm(nn.Module):
    """A dense layer, its norm and, unless the norm activates, a ReLU."""

    def __init__(self, channels: int, features: int, norm: Norm):
        super().__init__()
        self.fc = nn.Linear(channels, features, bias=norm == "none")
        self.norm = make_norm(norm, features)
        self.relu = not self.norm.activates

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies all of it to `x` [n, c]."""
        x = self.norm(self.fc(x))
        return F.relu(x) if self.relu else x
