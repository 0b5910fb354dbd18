"""What the series puts around its pyramid, in the PyTorch twin: menus of `fpn.before`, `fpn.after`.

Maps are [b, c, h, w], by name and fine to coarse; `sizes` are the pictures' heights and widths in
pixels, None: no canvas is padded.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sephjax.export.twin_layers import Extents, GroupNorm, conv, extents_at, make_norm

Maps = dict[str, torch.Tensor]


def stride_of(level: str) -> int:
    """Pixels a cell: 16 for `c4`, `p4` and `f4`."""
    return 2 ** int(level[1:])


def resize(
    maps: Mapping[str, torch.Tensor], source: str, target: str, sizes: Extents
) -> torch.Tensor:
    """The map `source` at the shape of `target`: TensorFlow 1's bilinear resize.

    Cell i of the result is read at `i * step`; the last cell of a picture is repeated beyond it.
    """
    x, (height, width) = maps[source], maps[target].shape[2:]
    if sizes is None:
        steps = (x.shape[2] / height, x.shape[3] / width)
    else:
        steps = (stride_of(target) / stride_of(source),) * 2
    extents = extents_at(sizes, stride_of(source)) or [(x.shape[2], x.shape[3])] * len(x)
    pictures = (x[i : i + 1, :, :h, :w] for i, (h, w) in enumerate(extents))
    return torch.cat([_read(picture, (height, width), steps) for picture in pictures])


def _read(x: torch.Tensor, shape: Sequence[int], steps: Sequence[float]) -> torch.Tensor:
    """`grid_sample` at multiples of `steps`; the border is repeated."""
    axes = [
        torch.arange(count, device=x.device) * step * (2 / max(cells - 1, 1)) - 1
        for count, step, cells in zip(shape, steps, x.shape[2:], strict=True)
    ]
    down, right = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([right, down], dim=-1)[None]
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


class NonLocal(nn.Module):
    """Self-attention over a map."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key = (conv(channels, channels // 8, 1) for _ in range(2))
        self.value = conv(channels, channels // 2, 1)
        self.project = conv(channels // 2, channels, 1)
        self.norm = GroupNorm(channels, 1e-5)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, extents: Extents) -> torch.Tensor:
        """Attends to the cells of each picture; `extents` in cells."""
        query, key, value = (
            layer(x).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        inside = x.new_zeros(len(x), *x.shape[2:], dtype=torch.bool)
        for i, (height, width) in enumerate(extents or [(x.shape[2], x.shape[3])] * len(x)):
            inside[i, :height, :width] = True
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=inside.flatten(1)[:, None]
        )
        found = self.project(found.transpose(1, 2).unflatten(2, x.shape[2:])) + x
        return x + self.gain * F.relu(self.norm(found, extents))


class NonLocalBefore(nn.ModuleDict):
    """A block on `c4` and one on `c5`."""

    def __init__(self, channels: Mapping[str, int]):
        super().__init__({name: NonLocal(channels[name]) for name in ("c4", "c5")})

    def forward(self, maps: Maps, sizes: Extents) -> Maps:
        """Changes both maps."""
        changed = {
            name: block(maps[name], extents_at(sizes, stride_of(name)))
            for name, block in self.items()
        }
        return maps | changed


class After(nn.Module):
    """A 3x3 convolution and EvoNorm-S0 on a mean of levels."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels, 3, bias=False)
        self.norm = make_norm("evonorm_s0", channels)

    def refine(self, x: torch.Tensor, level: str, sizes: Extents) -> torch.Tensor:
        """Applies both to a map of the size of `level`."""
        extents = extents_at(sizes, stride_of(level))
        return self.norm(self.conv(x, extents), extents)


class Fusion(After):
    """One more map, twice as wide: the finest level beside the mean of the others."""

    def __init__(self, channels: int):
        super().__init__(2 * channels)

    def forward(self, maps: Maps, sizes: Extents) -> Maps:
        """Adds `f3` where the finest level is `p3`."""
        finest, *others = maps
        mean = torch.stack([resize(maps, name, finest, sizes) for name in others]).mean(dim=0)
        fused = self.refine(torch.cat([maps[finest], mean], dim=1), finest, sizes)
        return maps | {finest.replace("p", "f"): fused}


class Balance(After):
    """The mean of all levels at the second one, refined, is added to each."""

    def forward(self, maps: Maps, sizes: Extents) -> Maps:
        """Changes every level."""
        middle = list(maps)[1]
        mean = torch.stack([resize(maps, name, middle, sizes) for name in maps]).mean(dim=0)
        shared = maps | {middle: self.refine(mean, middle, sizes)}
        return {name: x + resize(shared, middle, name, sizes) for name, x in maps.items()}


BEFORE = {"none": None, "non_local": NonLocalBefore}
AFTER = {"none": None, "fusion": Fusion, "balance": Balance}
