"""Feature pyramid network, arXiv 1612.03144, as torchvision, detectron2 and the series have it."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sephjax.nets import layers, norms


def resize_nearest(
    x: Float[Array, "b h w c"], shape: tuple[int, int]
) -> Float[Array, "b _oh _ow c"]:
    """Nearest-neighbour resize, `source = floor(target * in / out)` (TF1, align_corners false)."""
    for axis, out in enumerate(shape, 1):
        size = x.shape[axis]
        if out % size == 0:  # the usual factor 2: a broadcast, whose gradient is a plain sum
            x = jnp.repeat(x, out // size, axis=axis)
        else:
            x = jnp.take(x, np.arange(out) * size // out, axis=axis)
    return x


class FPN(nnx.Module):
    """Lateral 1x1 convolutions, a top-down sum, one 3x3 output convolution a level, and `p6`.

    The maps that are merged are not normalised by the output norm. No activation follows, except
    EvoNorm-S0's own. A convolution with a norm has no bias, one without has.
    """

    def __init__(
        self,
        *,
        in_channels: dict[str, int],
        channels: int = 256,
        norm: str | norms.NormFactory = "none",
        lateral_norm: str | norms.NormFactory = "none",
        extra: str = "max_pool",
        init: layers.Init = "kaiming_uniform_a1",
        rngs: nnx.Rngs,
    ):
        """Builds the neck.

        Args:
            in_channels: Width of each input, fine to coarse and without gaps: `c2` or `c3` to `c5`.
            channels: Width of each output.
            norm: After the output convolutions and the extra level's.
            lateral_norm: After the lateral convolutions (detectron2 with GN or BN).
            extra: How `p6` is made: `max_pool` takes every second cell of `p5` (detectron2,
                torchvision); `conv_c5` is a 3x3 convolution of stride 2 on `c5`, padded as TF SAME
                (the series): its alignment depends on whether the canvas of `c5` is odd.
            init: Of all kernels; the series has xavier_uniform.
            rngs: Where the kernels are drawn from.
        """
        if extra not in ("max_pool", "conv_c5"):
            raise ValueError(f"Unknown extra level {extra!r}: use max_pool or conv_c5.")
        self.levels = tuple(in_channels)
        make, lateral = norms.norm_factory(norm), norms.norm_factory(lateral_norm)
        bias, lateral_bias = not norms.has_norm(norm), not norms.has_norm(lateral_norm)
        for level, width in in_channels.items():
            i = level[1:]
            conv = layers.Conv(width, channels, 1, bias=lateral_bias, init=init, rngs=rngs)
            setattr(self, f"lateral{i}", conv)
            setattr(self, f"lateral_norm{i}", lateral(channels, rngs=rngs))
            conv = layers.Conv(channels, channels, 3, bias=bias, init=init, rngs=rngs)
            setattr(self, f"output{i}", conv)
            setattr(self, f"output_norm{i}", make(channels, rngs=rngs))
        self.has_conv = extra == "conv_c5"
        if self.has_conv:
            self.extra = layers.Conv(
                in_channels["c5"],
                channels,
                3,
                stride=2,
                padding="same_tf",
                bias=bias,
                init=init,
                rngs=rngs,
            )
            self.extra_norm = make(channels, rngs=rngs)

    def __call__(
        self,
        features: dict[str, Float[Array, "b _h _w _c"]],
        size: Int[Array, "b 2"] | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Float[Array, "b _h _w _o"]]:
        """Computes `p2` or `p3` to `p6` of the maps `c2` or `c3` to `c5`.

        Args:
            features: The backbone's maps; others than the inputs are not looked at.
            size: Height and width of each picture on its canvas; None: no canvas is padded.
            train: Whether `bn` uses and moves its statistics.
        """
        masks = layers.level_masks({level: features[level] for level in self.levels}, size)
        pyramid, merged = {}, None
        for level in reversed(self.levels):
            i, x, valid = level[1:], features[level], masks[level]
            lateral = getattr(self, f"lateral{i}")(x)
            lateral = getattr(self, f"lateral_norm{i}")(lateral, valid, train=train)
            if merged is not None:
                lateral = lateral + resize_nearest(merged, lateral.shape[1:3])
            merged = lateral
            out = getattr(self, f"output{i}")(merged, valid)
            pyramid[f"p{i}"] = getattr(self, f"output_norm{i}")(out, valid, train=train)
        pyramid = dict(reversed(pyramid.items()))
        if not self.has_conv:
            return pyramid | {"p6": pyramid["p5"][:, ::2, ::2]}
        p6 = self.extra(features["c5"], masks["c5"])
        valid = layers.level_masks({"p6": p6}, size)["p6"]
        return pyramid | {"p6": self.extra_norm(p6, valid, train=train)}
