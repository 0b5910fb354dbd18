"""Box heads on pooled features: one class per kind, all ending in logits and deltas.

With an IoU branch (`Predictors.iou`) also in `iou`, one logit a ROI.

Pooled features are flattened row by row, channels innermost; PyTorch's order is another (see
`weights/table.py`). A layer with a norm has no bias, one without has.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sephjax.nets import layers, norms
from sephjax.types import BoxOutputs

Norm = str | norms.NormFactory
Pooled = tuple[int, int, int]  # height, width and channels of a pooled ROI
VALID = ((0, 0), (0, 0))  # no padding


class Predictors(NamedTuple):
    """The last layers of a box head; the initialisers are detectron2's, the series has Xavier."""

    classes: int
    class_agnostic: bool = False
    logits_init: layers.Init = ("normal", 0.01)
    deltas_init: layers.Init = ("normal", 0.001)
    iou: bool = False  # whether there is an IoU branch; drawn as the logits are


class ConvTower(nnx.Module):
    """3x3 convolutions `conv0`, `conv1`, ... each with norm and activation.

    They keep the size, or without padding (VALID) each takes a cell off every side.
    """

    def __init__(
        self,
        channels: int,
        dims: Sequence[int],
        *,
        norm: Norm,
        padding: layers.Padding = "torch",
        init: layers.Init,
        rngs: nnx.Rngs,
    ):
        make = norms.norm_factory(norm)
        self.convs = len(dims)
        for i, dim in enumerate(dims):
            bias = not norms.has_norm(norm)
            conv = layers.Conv(channels, dim, 3, padding=padding, bias=bias, init=init, rngs=rngs)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"norm{i}", make(dim, rngs=rngs))
            channels = dim

    def __call__(
        self,
        x: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "n _h _w _o"]:
        """Applies the tower; `valid` says which ROIs count in batch statistics."""
        return self.maps(x, valid, train=train)[-1]

    def maps(
        self,
        x: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> list[Float[Array, "n _h _w _o"]]:
        """What each convolution reads, then the result."""
        found = [x]
        for i in range(self.convs):
            norm = getattr(self, f"norm{i}")
            x = getattr(self, f"conv{i}")(x)
            x = layers.act(norm(x, cells(valid, x), train=train), norm)
            found.append(x)
        return found


class FCTower(nnx.Module):
    """Dense layers `fc0`, `fc1`, ... each with norm and activation."""

    def __init__(
        self,
        channels: int,
        dims: Sequence[int],
        *,
        norm: Norm,
        init: layers.Init,
        rngs: nnx.Rngs,
    ):
        make = norms.norm_factory(norm)
        self.fcs = len(dims)
        for i, dim in enumerate(dims):
            bias = not norms.has_norm(norm)
            setattr(self, f"fc{i}", layers.Linear(channels, dim, bias=bias, init=init, rngs=rngs))
            setattr(self, f"norm{i}", make(dim, rngs=rngs))
            channels = dim

    def __call__(
        self,
        x: Float[Array, "n c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "n _o"]:
        """Applies the tower; `valid` says which ROIs count in batch statistics."""
        for i in range(self.fcs):
            norm = getattr(self, f"norm{i}")
            x = layers.act(norm(getattr(self, f"fc{i}")(x), valid, train=train), norm)
        return x


def cells(
    valid: Bool[Array, "n"] | None, x: Float[Array, "n h w c"]
) -> Bool[Array, "n h w"] | None:
    """Which cells of pooled ROIs count in batch statistics: all of a valid ROI's."""
    return None if valid is None else jnp.broadcast_to(valid[:, None, None], x.shape[:3])


def _flat(x: Float[Array, "n h w c"]) -> Float[Array, "n _o"]:
    return x.reshape(x.shape[0], -1)


class BoxHead(nnx.Module):
    """What all box heads end in: `logits`, `deltas` and, with an IoU branch, `iou`."""

    logits: layers.Linear
    deltas: layers.Linear
    iou: layers.Linear | None

    def end(self, for_class: int, for_box: int, spec: Predictors, *, rngs: nnx.Rngs) -> None:
        """Adds the predictors.

        Args:
            for_class: numbers that the class is predicted from (background is the last logit).
            for_box: numbers that the deltas of every class, or of one box for all, and the IoU of
                the predicted box are.
            spec: kinds and initialisers.
            rngs: Where the kernels are drawn from.
        """
        boxes = 1 if spec.class_agnostic else spec.classes
        line = layers.Linear
        self.logits = line(for_class, spec.classes + 1, init=spec.logits_init, rngs=rngs)
        self.deltas = line(for_box, 4 * boxes, init=spec.deltas_init, rngs=rngs)
        self.iou = line(for_box, 1, init=spec.logits_init, rngs=rngs) if spec.iou else None

    def say(
        self,
        for_class: Float[Array, "n _c"],
        for_box: Float[Array, "n _d"],
        for_iou: Float[Array, "n _d"] | None = None,
        features: Float[Array, "n _h _w _f"] | None = None,
    ) -> BoxOutputs:
        """What the predictors say, as float32.

        Args:
            for_class: what the class is predicted from.
            for_box: what the deltas are.
            for_iou: what the IoU is; None: as the deltas.
            features: what a mask head may read.
        """
        logits, deltas, iou = self.logits(for_class), self.deltas(for_box), None
        if self.iou is not None:
            iou = self.iou(for_box if for_iou is None else for_iou)[:, 0].astype(jnp.float32)
        deltas = deltas.reshape(deltas.shape[0], -1, 4)
        return BoxOutputs(logits.astype(jnp.float32), deltas.astype(jnp.float32), iou, features)


class FastRCNNConvFC(BoxHead):
    """Convolutions, then dense layers, shared by class and box.

    detectron2 and torchvision v1: two FC of 1024 with ReLU; torchvision v2 and LSJ: four
    convolutions and one FC; the series: two FC with GN and ReLU, whatever the norm elsewhere.
    """

    def __init__(
        self,
        pooled: Pooled,
        predictors: Predictors,
        *,
        conv_dims: Sequence[int] = (),
        fc_dims: Sequence[int] = (1024, 1024),
        conv_norm: Norm = "none",
        fc_norm: Norm = "none",
        init: layers.Init = "kaiming_uniform_a1",
        rngs: nnx.Rngs,
    ):
        height, width, channels = pooled
        self.tower = ConvTower(channels, conv_dims, norm=conv_norm, init=init, rngs=rngs)
        flat = height * width * (conv_dims[-1] if conv_dims else channels)
        self.dense = FCTower(flat, fc_dims, norm=fc_norm, init=init, rngs=rngs)
        features = fc_dims[-1] if fc_dims else flat
        self.end(features, features, predictors, rngs=rngs)

    def __call__(
        self,
        pooled: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> BoxOutputs:
        """Float32 logits `[n, k + 1]` and deltas `[n, k, 4]` (`[n, 1, 4]` if class-agnostic)."""
        x = self.dense(_flat(self.tower(pooled, valid, train=train)), valid, train=train)
        return self.say(x, x)


class SeparateFastRCNNConvFCHead(BoxHead):
    """Two convolution towers, one for the class and one for the box; they share nothing (seph)."""

    def __init__(
        self,
        pooled: Pooled,
        predictors: Predictors,
        *,
        conv_dims: Sequence[int] = (256,) * 4,
        norm: Norm = "evonorm_s0",
        init: layers.Init = "xavier_uniform",
        rngs: nnx.Rngs,
    ):
        height, width, channels = pooled
        self.classify = ConvTower(channels, conv_dims, norm=norm, init=init, rngs=rngs)
        self.refine = ConvTower(channels, conv_dims, norm=norm, init=init, rngs=rngs)
        features = height * width * conv_dims[-1]
        self.end(features, features, predictors, rngs=rngs)

    def __call__(
        self,
        pooled: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        for_box: Float[Array, "n h w c"] | None = None,
        *,
        train: bool = False,
    ) -> BoxOutputs:
        """Float32 logits `[n, k + 1]` and deltas `[n, k, 4]` (`[n, 1, 4]` if class-agnostic).

        `for_box` are features that the box tower reads in the place of `pooled`.
        """
        classes = _flat(self.classify(pooled, valid, train=train))
        boxes = _flat(self.refine(pooled if for_box is None else for_box, valid, train=train))
        return self.say(classes, boxes)


class SeparateFastRCNNConvFCHeadV2(BoxHead):
    """Dense layers for the class, convolutions for the box, nothing shared (sephv2 and after).

    The IoU branch has a convolution of its own, which reads what the last one of the box reads
    (EXPERIMENTS 4.4: the third of four).
    """

    def __init__(
        self,
        pooled: Pooled,
        predictors: Predictors,
        *,
        fc_dims: Sequence[int] = (1024, 1024),
        conv_dims: Sequence[int] = (256,) * 4,
        norm: Norm = "evonorm_s0",
        init: layers.Init = "xavier_uniform",
        rngs: nnx.Rngs,
    ):
        height, width, channels = pooled
        flat = height * width * channels
        self.classify = FCTower(flat, fc_dims, norm=norm, init=init, rngs=rngs)
        self.refine = ConvTower(channels, conv_dims, norm=norm, init=init, rngs=rngs)
        self.end(fc_dims[-1], height * width * conv_dims[-1], predictors, rngs=rngs)
        if predictors.iou:
            before, last = (channels, *conv_dims)[-2:]
            self.overlap = ConvTower(before, (last,), norm=norm, init=init, rngs=rngs)

    def __call__(
        self,
        pooled: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        for_box: Float[Array, "n h w c"] | None = None,
        *,
        train: bool = False,
    ) -> BoxOutputs:
        """Float32 logits `[n, k + 1]` and deltas `[n, k, 4]` (`[n, 1, 4]` if class-agnostic).

        `for_box` are features that the box tower reads in the place of `pooled`.
        """
        classes = self.classify(_flat(pooled), valid, train=train)
        for_box = pooled if for_box is None else for_box
        *_, before, last = self.refine.maps(for_box, valid, train=train)
        if self.iou is None:
            return self.say(classes, _flat(last))
        overlap = self.overlap(before, valid, train=train)
        return self.say(classes, _flat(last), _flat(overlap))


class FastRCNNConvHead(BoxHead):
    """Convolutions that class and box share, then one without padding for each (sephv10)."""

    def __init__(
        self,
        pooled: Pooled,
        predictors: Predictors,
        *,
        conv_dims: Sequence[int] = (384,) * 4,
        branch_dim: int = 256,
        norm: Norm = "evonorm_s0",
        init: layers.Init = "xavier_uniform",
        rngs: nnx.Rngs,
    ):
        height, width, channels = pooled
        shared = [channels, *conv_dims][-1]
        branch = lambda: ConvTower(
            shared, (branch_dim,), norm=norm, padding=VALID, init=init, rngs=rngs
        )
        self.tower = ConvTower(channels, conv_dims, norm=norm, init=init, rngs=rngs)
        self.classify, self.refine = branch(), branch()
        features = (height - 2) * (width - 2) * branch_dim
        self.end(features, features, predictors, rngs=rngs)

    def __call__(
        self,
        pooled: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> BoxOutputs:
        """Float32 logits `[n, k + 1]` and deltas `[n, k, 4]` (`[n, 1, 4]` if class-agnostic)."""
        x = self.tower(pooled, valid, train=train)
        classes = _flat(self.classify(x, valid, train=train))
        boxes = _flat(self.refine(x, valid, train=train))
        return self.say(classes, boxes)
