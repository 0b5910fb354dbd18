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


class Logits(layers.Linear):
    """Class logits, background last."""

    def __init__(self, channels: int, spec: Predictors, *, rngs: nnx.Rngs):
        super().__init__(channels, spec.classes + 1, init=spec.logits_init, rngs=rngs)


class Deltas(layers.Linear):
    """Box deltas of every class, or of one box for all."""

    def __init__(self, channels: int, spec: Predictors, *, rngs: nnx.Rngs):
        boxes = 1 if spec.class_agnostic else spec.classes
        super().__init__(channels, 4 * boxes, init=spec.deltas_init, rngs=rngs)


class Iou(layers.Linear):
    """One logit of the IoU that the predicted box has."""

    def __init__(self, channels: int, spec: Predictors, *, rngs: nnx.Rngs):
        super().__init__(channels, 1, init=spec.logits_init, rngs=rngs)


def cells(
    valid: Bool[Array, "n"] | None, x: Float[Array, "n h w c"]
) -> Bool[Array, "n h w"] | None:
    """Which cells of pooled ROIs count in batch statistics: all of a valid ROI's."""
    return None if valid is None else jnp.broadcast_to(valid[:, None, None], x.shape[:3])


def _flat(x: Float[Array, "n h w c"]) -> Float[Array, "n _o"]:
    return x.reshape(x.shape[0], -1)


def outputs_of(
    logits: Float[Array, "n _k1"],
    deltas: Float[Array, "n _k4"],
    iou: Float[Array, "n 1"] | None = None,
    features: Float[Array, "n _h _w _c"] | None = None,
) -> BoxOutputs:
    """What predictors say, as float32; `features` is what a mask head may read."""
    deltas = deltas.reshape(deltas.shape[0], -1, 4)
    one = None if iou is None else iou[:, 0].astype(jnp.float32)
    return BoxOutputs(logits.astype(jnp.float32), deltas.astype(jnp.float32), one, features)


class FastRCNNConvFC(nnx.Module):
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
        self.logits = Logits(features, predictors, rngs=rngs)
        self.deltas = Deltas(features, predictors, rngs=rngs)
        self.iou = Iou(features, predictors, rngs=rngs) if predictors.iou else None

    def __call__(
        self,
        pooled: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> BoxOutputs:
        """Float32 logits `[n, k + 1]` and deltas `[n, k, 4]` (`[n, 1, 4]` if class-agnostic)."""
        x = self.dense(_flat(self.tower(pooled, valid, train=train)), valid, train=train)
        return outputs_of(self.logits(x), self.deltas(x), self.iou and self.iou(x))


class SeparateFastRCNNConvFCHead(nnx.Module):
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
        self.logits = Logits(features, predictors, rngs=rngs)
        self.deltas = Deltas(features, predictors, rngs=rngs)
        self.iou = Iou(features, predictors, rngs=rngs) if predictors.iou else None

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
        return outputs_of(self.logits(classes), self.deltas(boxes), self.iou and self.iou(boxes))


class SeparateFastRCNNConvFCHeadV2(nnx.Module):
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
        self.logits = Logits(fc_dims[-1], predictors, rngs=rngs)
        flat = height * width * conv_dims[-1]
        self.deltas = Deltas(flat, predictors, rngs=rngs)
        self.iou = Iou(flat, predictors, rngs=rngs) if predictors.iou else None
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
        logits, deltas = self.logits(classes), self.deltas(_flat(last))
        if self.iou is None:
            return outputs_of(logits, deltas)
        overlap = self.overlap(before, valid, train=train)
        return outputs_of(logits, deltas, self.iou(_flat(overlap)))


class FastRCNNConvHead(nnx.Module):
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
        self.logits = Logits(features, predictors, rngs=rngs)
        self.deltas = Deltas(features, predictors, rngs=rngs)
        self.iou = Iou(features, predictors, rngs=rngs) if predictors.iou else None

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
        return outputs_of(self.logits(classes), self.deltas(boxes), self.iou and self.iou(boxes))
