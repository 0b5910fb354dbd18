"""ResNet-18, 34, 50 and 101 in the three layouts that published weights come in.

They differ in where the stride sits, in the padding of the stem's pool, in which tensors the neck
taps and in the pixels they were trained on; weights of one layout are useless in another.
* `slim`: TF-slim's `resnet_v1`: the stride is in the 3x3 of the *last* unit of stages 1 to 3.
* `msra`: Caffe, Keras and detectron2's R-50.pkl: the stride is in the first 1x1 of stages 2 to 4.
* `torchvision`: the stride is in the 3x3 of the first unit of stages 2 to 4.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from sephjax.nets import functional, layers, norms


class Layout(NamedTuple):
    """What belongs to a set of ImageNet weights; `mean` and `std` are in `channel_order`."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channel_order: str  # rgb or bgr
    eps: float  # of batch norm
    pool_padding: layers.Padding
    stride_in_last_unit: bool  # else in the first, and stage 1 has none
    stride_in_first_conv: bool  # of a bottleneck; else in its 3x3
    trainable_affine: bool  # batch norm's gamma and beta train although its statistics are frozen
    init: layers.Init


# Keras writes eps 1e-3 for msra, detectron2's R-50.pkl 1e-5: see weights/keras.py.
LAYOUTS = {
    "slim": Layout(
        (123.68, 116.779, 103.939), (1.0, 1.0, 1.0), "rgb", 1e-5,
        "same_tf", True, False, True, "xavier_uniform",
    ),
    "msra": Layout(
        (103.939, 116.779, 123.68), (1.0, 1.0, 1.0), "bgr", 1e-5,
        "torch", False, True, False, "msra",
    ),
    "torchvision": Layout(
        (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "rgb", 1e-5,
        "torch", False, False, False, "kaiming_fan_out",
    ),
}  # fmt: skip

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def normalize_image(
    image: UInt8[Array, "b h w 3"], layout: str, dtype: Any = jnp.float32
) -> Float[Array, "b h w 3"]:
    """Turns RGB bytes into what the weights of a layout expect, computed in float32."""
    pixels = LAYOUTS[layout]
    x = image.astype(jnp.float32)
    if pixels.channel_order == "bgr":
        x = x[..., ::-1]
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None, :] for v in pixels[:2])
    return ((x - mean) / std).astype(dtype)


class Block(nnx.Module):
    """A residual unit: two 3x3 convolutions (depth 18, 34) or 1x1, 3x3, 1x1 (50, 101).

    Attributes:
        stride: Of the whole unit; an identity shortcut is then sub-sampled.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        stride: int,
        bottleneck: bool,
        layout: Layout,
        norm: norms.NormFactory,
        rngs: nnx.Rngs,
    ):
        features = 4 * width if bottleneck else width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = (channels, *[width] * (len(kernels) - 1), features)
        strided = 1 if not bottleneck or layout.stride_in_first_conv else 2
        self.convs = len(kernels)
        self.stride = stride
        for i, kernel in enumerate(kernels, 1):
            conv = layers.Conv(
                widths[i - 1],
                widths[i],
                kernel,
                stride=stride if i == strided else 1,
                bias=False,
                init=layout.init,
                rngs=rngs,
            )
            setattr(self, f"conv{i}", conv)
            setattr(self, f"norm{i}", norm(widths[i], rngs=rngs))
        self.projects = channels != features
        if self.projects:
            self.shortcut_conv = layers.Conv(
                channels, features, 1, stride=stride, bias=False, init=layout.init, rngs=rngs
            )
            self.shortcut_norm = norm(features, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        masks: tuple[Bool[Array, "b h w"] | None, Bool[Array, "b _oh _ow"] | None],
        *,
        train: bool,
    ) -> Float[Array, "b _oh _ow _o"]:
        """Applies the unit; `masks` are the valid parts of its input and of its output."""
        shortcut = x[:, :: self.stride, :: self.stride]
        if self.projects:
            shortcut = self.shortcut_norm(self.shortcut_conv(x), masks[1], train=train)
        valid = masks[0]
        for i in range(1, self.convs + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"norm{i}")
            x = conv(x, valid)
            valid = masks[1] if conv.stride > 1 else valid
            x = norm(x, valid, train=train)
            if i < self.convs:
                x = layers.act(x, norm)
        return nnx.relu(x + shortcut)


class Stem(nnx.Module):
    """7x7 convolution of stride 2 with 3 pixels of padding on every side, its norm, a max pool."""

    def __init__(self, width: int, *, layout: Layout, norm: norms.NormFactory, rngs: nnx.Rngs):
        self.conv = layers.Conv(3, width, 7, stride=2, bias=False, init=layout.init, rngs=rngs)
        self.norm = norm(width, rngs=rngs)
        self.pool_padding: layers.Padding = layout.pool_padding

    def __call__(
        self, image: Float[Array, "b h w 3"], size: Int[Array, "b 2"] | None, *, train: bool
    ) -> Float[Array, "b _h _w _c"]:
        """A map of stride 4; `size` as in `ResNet`."""
        x = self.conv(image, _mask(image.shape[1:3], size, 1))
        valid = _mask(x.shape[1:3], size, 2)
        x = layers.act(self.norm(x, valid, train=train), self.norm)
        return layers.max_pool_3x3(x, valid, self.pool_padding)


class Stage(nnx.Module):
    """A row of units `block0`, `block1`, ...; the first or the last of them has the stride."""

    def __init__(
        self,
        channels: int,
        width: int,
        strides: tuple[int, ...],
        *,
        bottleneck: bool,
        layout: Layout,
        norm: norms.NormFactory,
        rngs: nnx.Rngs,
    ):
        self.strides = strides
        for i, stride in enumerate(strides):
            block = Block(
                channels,
                width,
                stride=stride,
                bottleneck=bottleneck,
                layout=layout,
                norm=norm,
                rngs=rngs,
            )
            setattr(self, f"block{i}", block)
            channels = 4 * width if bottleneck else width

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        size: Int[Array, "b 2"] | None,
        *,
        stride: int,
        units: tuple[int, ...],
        train: bool,
    ) -> tuple[Float[Array, "b _h _w _o"], ...]:
        """The maps after some of the units; `stride` is that of `x`, `size` as in `ResNet`."""
        maps = []
        for i, step in enumerate(self.strides):
            height, width = x.shape[1:3]
            shape = (-(-height // step), -(-width // step))
            masks = (_mask((height, width), size, stride), _mask(shape, size, stride * step))
            x = getattr(self, f"block{i}")(x, masks, train=train)
            stride *= step
            maps.append(x)
        return tuple(maps[unit] for unit in units)


class ResNet(nnx.Module):
    """A ResNet whose `c2`...`c5` are the feature maps that the layout's detectors tap.

    In `slim`, whose stages end with their stride, `c2` is stage 1 before its last unit, `c3` stage
    1, `c4` stage 2 and `c5` stage 4 (stage 3 is not tapped); else they are stages 1 to 4.

    Attributes:
        channels: Width of each map.
        strides: Pixels to a cell of each map.
    """

    def __init__(
        self,
        *,
        depth: int,
        layout: str,
        norm: str | norms.NormFactory = "frozen_bn",
        norm_eps: float | None = None,
        width: int = 64,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds the network.

        Args:
            depth: 18, 34, 50 or 101.
            layout: A key of `LAYOUTS`.
            norm: A name of `norms.make_norm`, or a factory.
            norm_eps: Overrides the layout's.
            width: Channels of the stem; 64 for published weights.
            remat: In training keep only what passes between the stem and the stages; the backward
                pass computes the inside of each again.
            rngs: Where the kernels are drawn from.
        """
        if depth not in DEPTHS or layout not in LAYOUTS:
            raise ValueError(
                f"No ResNet-{depth} in layout {layout!r}: the depths are {list(DEPTHS)}, "
                f"the layouts {list(LAYOUTS)}."
            )
        spec = LAYOUTS[layout]
        make = norms.norm_factory(
            norm,
            eps=spec.eps if norm_eps is None else norm_eps,
            trainable_affine=spec.trainable_affine,
        )
        bottleneck = depth >= 50
        self.layout = layout
        self.remat = remat
        self.outputs = [(4 if bottleneck else 1) * width * 2**i for i in range(4)]
        self.stem = Stem(width, layout=spec, norm=make, rngs=rngs)
        channels = width
        for i, units in enumerate(DEPTHS[depth]):
            at_end = spec.stride_in_last_unit
            stride = 2 if i != (3 if at_end else 0) else 1
            still = (1,) * (units - 1)
            stage = Stage(
                channels,
                width * 2**i,
                (*still, stride) if at_end else (stride, *still),
                bottleneck=bottleneck,
                layout=spec,
                norm=make,
                rngs=rngs,
            )
            setattr(self, f"stage{i + 1}", stage)
            channels = self.outputs[i]

    @property
    def channels(self) -> dict[str, int]:
        """Width of each map."""
        return {level: self.outputs[stage - 1] for level, (stage, _) in self._taps().items()}

    @property
    def strides(self) -> dict[str, int]:
        """Pixels to a cell of each map, the same in every layout."""
        return {"c2": 4, "c3": 8, "c4": 16, "c5": 32}

    def __call__(
        self,
        image: Float[Array, "b h w 3"],
        size: Int[Array, "b 2"] | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Computes the feature maps of normalised images.

        Args:
            image: What `normalize_image` returns.
            size: Height and width of each picture on its canvas; None: no canvas is padded.
            train: Whether `bn` uses and moves its statistics.
        """
        taps, maps, stride = self._taps(), {}, 4
        x = self._run(self.stem, image, size, train=train)
        for i in range(1, 5):
            stage = getattr(self, f"stage{i}")
            last = len(stage.strides) - 1
            units = tuple(sorted({unit for of, unit in taps.values() if of == i} | {last}))
            found = self._run(stage, x, size, stride=stride, units=units, train=train)
            maps |= {(i, unit): y for unit, y in zip(units, found, strict=True)}
            x, stride = found[-1], stride * math.prod(stage.strides)
        return {level: maps[unit] for level, unit in taps.items()}

    def _run(self, part: Any, x: Any, size: Any, *, train: bool, **static: Any) -> Any:
        if self.remat and train:
            return functional.rematerialized(part, x, size, train=train, **static)
        return part(x, size, train=train, **static)

    def _taps(self) -> dict[str, tuple[int, int]]:
        """Stage and unit of each map."""
        last = [(i, len(getattr(self, f"stage{i}").strides) - 1) for i in range(1, 5)]
        if LAYOUTS[self.layout].stride_in_last_unit:
            last = [(1, last[0][1] - 1), last[0], last[1], last[3]]
        return dict(zip(("c2", "c3", "c4", "c5"), last, strict=True))


def _mask(
    shape: tuple[int, ...], size: Int[Array, "b 2"] | None, stride: int
) -> Bool[Array, "b h w"] | None:
    return None if size is None else layers.valid_mask(size, (shape[0], shape[1]), stride)
