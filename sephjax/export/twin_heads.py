"""RPN, box and mask heads of the PyTorch twin; `BOX_HEADS` is the menu of `roi.head.name`."""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sephjax.export import twin_backbone
from sephjax.export.twin_layers import (
    ConvNorm,
    Extents,
    LinearNorm,
    Norm,
    conv,
    extents_at,
    make_norm,
)

SIDE = 7  # cells a side of a pooled ROI of the box head


class LevelConv(nn.Module):
    """A 3x3 convolution shared by all levels, a norm of each level's own, ReLU if it needs one."""

    def __init__(self, channels: int, levels: Sequence[str], norm: str, *, bias: bool):
        super().__init__()
        self.conv = conv(channels, channels, 3, bias=bias)
        self.norms = nn.ModuleDict({name: make_norm(norm, channels) for name in levels})

    def forward(self, x: torch.Tensor, name: str, extents: Extents) -> torch.Tensor:
        """Applies it to the map of one level."""
        norm = self.norms[name]
        x = norm(self.conv(x, extents), extents)
        return x if norm.activates else F.relu(x)


def level_tower(
    channels: int, levels: Sequence[str], convs: int, norm: str, *, bias: bool
) -> nn.ModuleList:
    """`LevelConv`s."""
    return nn.ModuleList(LevelConv(channels, levels, norm, bias=bias) for _ in range(convs))


class RPN(nn.Module):
    """What both kinds share: logits [b, n] and deltas [b, n, 4] of all anchors.

    A kind says in `maps` what a cell's anchors get, [b, a, h, w] and [b, 4 a, h, w].
    """

    def maps(
        self, x: torch.Tensor, name: str, extents: Extents
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and deltas of one level."""
        raise NotImplementedError  # every kind has its own

    def forward(
        self, pyramid: Mapping[str, torch.Tensor], sizes: Extents
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Level by level, row by row, anchors innermost."""
        logits, deltas = [], []
        for name, x in pyramid.items():
            scores, moves = self.maps(x, name, extents_at(sizes, 2 ** int(name[1:])))
            logits.append(scores.permute(0, 2, 3, 1).reshape(len(x), -1))
            deltas.append(moves.permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)


class RPNHead(RPN):
    """3x3 convolutions on every level, then 1x1 to a logit and four deltas an anchor."""

    def __init__(self, channels: int, anchors: int, levels: Sequence[str], convs: int, norm: str):
        """The 3x3 convolutions keep their bias under a norm too."""
        super().__init__()
        self.convs = level_tower(channels, levels, convs, norm, bias=True)
        self.logits = conv(channels, anchors, 1)
        self.deltas = conv(channels, 4 * anchors, 1)

    def maps(
        self, x: torch.Tensor, name: str, extents: Extents
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both from the same features."""
        for layer in self.convs:
            x = layer(x, name, extents)
        return self.logits(x), self.deltas(x)


class RetinaNetHead(RPN):
    """3x3 convolutions for the class and others for the box, a 3x3 at the end of each."""

    def __init__(self, channels: int, anchors: int, levels: Sequence[str], convs: int, norm: str):
        super().__init__()
        bias = norm == "none"
        self.classify = level_tower(channels, levels, convs, norm, bias=bias)
        self.refine = level_tower(channels, levels, convs, norm, bias=bias)
        self.logits = conv(channels, anchors, 3)
        self.deltas = conv(channels, 4 * anchors, 3)

    def maps(
        self, x: torch.Tensor, name: str, extents: Extents
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A tower each."""
        scores = moves = x
        for layer in self.classify:
            scores = layer(scores, name, extents)
        for layer in self.refine:
            moves = layer(moves, name, extents)
        return self.logits(scores, extents), self.deltas(moves, extents)


RPNS = {"rpn": RPNHead, "retinanet": RetinaNetHead}


def conv_tower(
    channels: int, dims: Sequence[int], norm: Norm, *, padded: bool = True
) -> nn.Sequential:
    """3x3 convolutions, at constant size if they are padded."""
    widths = itertools.pairwise([channels, *dims])
    return nn.Sequential(*(ConvNorm(a, b, 3, norm, padded=padded) for a, b in widths))


def fc_tower(channels: int, dims: Sequence[int], norm: Norm) -> nn.Sequential:
    """Dense layers."""
    widths = [channels, *dims]
    return nn.Sequential(*(LinearNorm(a, b, norm) for a, b in itertools.pairwise(widths)))


class BoxHead(nn.Module):
    """What all box heads share: class logits (background last) and deltas of pooled features.

    A kind of head says in `features` what each of the predictors reads.
    """

    def predict_from(self, wide: tuple[int, int], classes: int, agnostic: bool) -> None:  # noqa: FBT001
        """Adds the predictors; `wide` is what they read, for the class and for the box."""
        self.logits = nn.Linear(wide[0], classes + 1)
        self.deltas = nn.Linear(wide[1], 4 * (1 if agnostic else classes))
        self.iou: nn.Module | None = None

    def add_iou(self) -> None:
        """Adds the IoU branch; it reads what the deltas read, unless a head has more for it."""
        self.iou = nn.Linear(self.deltas.in_features, 1)

    def features(self, *views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Vectors [n, c] for the class and for the box, and for the IoU if it has its own.

        Of a crop of each ROI; heads with a tower each take a second one for the box.
        """
        raise NotImplementedError  # every head has its own

    def forward(
        self, *views: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What is said of crops [n, c, 7, 7].

        Logits [n, k + 1], deltas [n, k, 4] ([n, 1, 4] if class-agnostic) and, with an IoU branch,
        its logits [n].
        """
        for_class, for_box, *more = self.features(*views)
        iou = None if self.iou is None else self.iou((more or [for_box])[0])[:, 0]
        return self.logits(for_class), self.deltas(for_box).unflatten(1, (-1, 4)), iou


class FastRCNNConvFC(BoxHead):
    """Convolutions, then dense layers, shared by class and box."""

    def __init__(
        self,
        channels: int,
        classes: int,
        agnostic: bool,  # noqa: FBT001
        *,
        conv_dims: Sequence[int] = (),
        fc_dims: Sequence[int] = (1024, 1024),
        conv_norm: Norm = "none",
        fc_norm: Norm = "none",
    ):
        super().__init__()
        self.tower = conv_tower(channels, conv_dims, conv_norm)
        flat = [channels, *conv_dims][-1] * SIDE**2
        self.dense = fc_tower(flat, fc_dims, fc_norm)
        wide = [flat, *fc_dims][-1]
        self.predict_from((wide, wide), classes, agnostic)

    def features(self, *views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for both."""
        (pooled,) = views
        x = self.dense(self.tower(pooled).flatten(1))
        return x, x


class Separate(BoxHead):
    """Two towers of convolutions."""

    def __init__(
        self,
        channels: int,
        classes: int,
        agnostic: bool,  # noqa: FBT001
        *,
        conv_dims: Sequence[int] = (256,) * 4,
        norm: Norm = "evonorm_s0",
    ):
        super().__init__()
        self.classify = conv_tower(channels, conv_dims, norm)
        self.refine = conv_tower(channels, conv_dims, norm)
        wide = conv_dims[-1] * SIDE**2
        self.predict_from((wide, wide), classes, agnostic)

    def features(self, *views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A tower each."""
        return self.classify(views[0]).flatten(1), self.refine(views[-1]).flatten(1)


class SeparateV2(BoxHead):
    """Dense layers for the class, convolutions for the box."""

    def __init__(
        self,
        channels: int,
        classes: int,
        agnostic: bool,  # noqa: FBT001
        *,
        fc_dims: Sequence[int] = (1024, 1024),
        conv_dims: Sequence[int] = (256,) * 4,
        norm: Norm = "evonorm_s0",
    ):
        super().__init__()
        self.classify = fc_tower(channels * SIDE**2, fc_dims, norm)
        self.refine = conv_tower(channels, conv_dims, norm)
        self.predict_from((fc_dims[-1], conv_dims[-1] * SIDE**2), classes, agnostic)
        self.before = conv_dims[-2] if len(conv_dims) > 1 else channels
        self.last, self.norm = conv_dims[-1], norm

    def add_iou(self) -> None:
        """Adds the IoU branch, with a convolution beside the last one of the box."""
        super().add_iou()
        self.overlap = conv_tower(self.before, (self.last,), self.norm)

    def features(self, *views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A tower each."""
        before = self.refine[:-1](views[-1])
        found = self.classify(views[0].flatten(1)), self.refine[-1](before).flatten(1)
        return found if self.iou is None else (*found, self.overlap(before).flatten(1))


class SharedConv(BoxHead):
    """Convolutions for both, then one for each that takes a cell off every side."""

    def __init__(
        self,
        channels: int,
        classes: int,
        agnostic: bool,  # noqa: FBT001
        *,
        conv_dims: Sequence[int] = (384,) * 4,
        branch_dim: int = 256,
        norm: Norm = "evonorm_s0",
    ):
        super().__init__()
        self.tower = conv_tower(channels, conv_dims, norm)
        shared = [channels, *conv_dims][-1]
        self.classify = conv_tower(shared, (branch_dim,), norm, padded=False)
        self.refine = conv_tower(shared, (branch_dim,), norm, padded=False)
        wide = branch_dim * (SIDE - 2) ** 2
        self.predict_from((wide, wide), classes, agnostic)

    def features(self, *views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the same maps."""
        (pooled,) = views
        x = self.tower(pooled)
        return self.classify(x).flatten(1), self.refine(x).flatten(1)


class Res5(BoxHead):
    """Bottlenecks of stride 1 and the mean over their cells; the mask head may read `map`."""

    def __init__(
        self,
        channels: int,
        classes: int,
        agnostic: bool,  # noqa: FBT001
        *,
        blocks: int = 3,
        width: int = 512,
        norm: str = "bn",
        eps: float = 1e-5,
        decay: float = 0.999,
    ):
        super().__init__()
        del decay
        layout, wide = twin_backbone.LAYOUTS["slim"], 4 * width
        self.blocks = nn.ModuleList(
            twin_backbone.Block(wide if i else channels, width, 1, 50, layout, (norm, eps))
            for i in range(blocks)
        )
        self.channels = wide
        self.predict_from((wide, wide), classes, agnostic)

    def map(self, pooled: torch.Tensor) -> torch.Tensor:
        """[n, c, 7, 7]."""
        for block in self.blocks:
            pooled = block(pooled, None, None)
        return pooled

    def features(self, *views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for both."""
        means = self.map(*views).mean(dim=(2, 3))
        return means, means


BOX_HEADS = {
    "fast_rcnn_conv_fc": FastRCNNConvFC,
    "separate": Separate,
    "separate_v2": SeparateV2,
    "shared_conv": SharedConv,
    "res5": Res5,
}


class MaskHead(nn.Module):
    """3x3 convolutions, a transposed one that doubles the size, a mask for every class."""

    def __init__(
        self, channels: int, classes: int, convs: int, dim: int, norm: Norm, deconv_norm: Norm
    ):
        super().__init__()
        self.tower = conv_tower(channels, (dim,) * convs, norm)
        channels = dim if convs else channels
        self.deconv = nn.ConvTranspose2d(channels, dim, 2, 2, bias=deconv_norm == "none")
        self.deconv_norm = make_norm(deconv_norm, dim)
        self.predictor = conv(dim, classes, 1)

    def forward(self, pooled: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [n, 2 s, 2 s] of each ROI's own class, of [n, c, s, s]."""
        x = self.deconv_norm(self.deconv(self.tower(pooled)))
        masks = self.predictor(x if self.deconv_norm.activates else F.relu(x))
        return masks[torch.arange(len(labels), device=labels.device), labels]
