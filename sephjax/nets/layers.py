"""Convolution and linear layers with float32 parameters, computed in the type of their input.

A convolution that looks at neighbours can be told which part of a padded canvas is the picture; it
then reads zeros elsewhere, so that features do not depend on how much padding the canvas has.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sephjax.ops import conv as conv_ops

Init = str | tuple[str, float]
Pads = tuple[tuple[int, int], tuple[int, int]]
Padding = Literal["torch", "same_tf"] | Pads


def initializer(init: Init) -> jax.nn.initializers.Initializer:
    """The weight initialiser of a name, for kernels whose last axes are input, output.

    * `xavier_uniform`: slim's and TensorFlow's default.
    * `kaiming_fan_out`: normal, std sqrt(2 / fan_out); torchvision's ResNet.
    * `msra`: the same under fvcore's name, `c2_msra_fill`.
    * `kaiming_uniform_a1`: uniform within sqrt(3 / fan_in); torchvision's FPN, `c2_xavier_fill`.
    * `torch_linear`: uniform within sqrt(1 / fan_in); the default of `torch.nn.Linear`.
    * `("normal", std)`.

    Raises:
        ValueError: no such name.
    """
    make = jax.nn.initializers
    match init:
        case "xavier_uniform":
            return make.variance_scaling(1.0, "fan_avg", "uniform")
        case "kaiming_fan_out" | "msra":
            return make.variance_scaling(2.0, "fan_out", "normal")
        case "kaiming_uniform_a1":
            return make.variance_scaling(1.0, "fan_in", "uniform")
        case "torch_linear":
            return make.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
        case ("normal", float(std)):
            return make.normal(std)
    raise ValueError(
        f"Unknown initialiser {init!r}: use xavier_uniform, kaiming_fan_out, msra, "
        "kaiming_uniform_a1, torch_linear or ('normal', std)."
    )


def same_tf(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding `(before, after)` of one axis: the odd pixel goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pads(padding: Padding, shape: tuple[int, int], kernel: int, stride: int) -> Pads:
    """Explicit padding of both axes; `torch` is `kernel // 2` on every side."""
    if padding == "torch":
        return ((kernel // 2, kernel // 2), (kernel // 2, kernel // 2))
    if padding == "same_tf":
        return (same_tf(shape[0], kernel, stride), same_tf(shape[1], kernel, stride))
    return padding


def valid_mask(
    size: Int[Array, "b 2"], shape: tuple[int, int], stride: int
) -> Bool[Array, "b h w"]:
    """True where a feature map shows the picture: its first ceil(size / stride) cells.

    Args:
        size: Height and width of each picture, in pixels of the canvas.
        shape: Height and width of the feature map.
        stride: Pixels of the canvas to a cell.
    """
    extent = (size + (stride - 1)) // stride
    rows = jnp.arange(shape[0])[None, :] < extent[:, :1]
    columns = jnp.arange(shape[1])[None, :] < extent[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def level_masks(
    maps: Mapping[str, Float[Array, "b _h _w _c"]],
    size: Int[Array, "b 2"] | None,
    strides: Mapping[str, float] | None = None,
) -> dict[str, Bool[Array, "b _h _w"] | None]:
    """The `valid_mask` of every level of a pyramid, None each where `size` is None.

    Without `strides` a level's is what its name says: `c3` and `p3` have 8 = 2 ** 3.
    """
    if size is None:
        return dict.fromkeys(maps)
    steps = strides or {level: 2 ** int(level[1:]) for level in maps}
    return {
        level: valid_mask(size, (x.shape[1], x.shape[2]), int(steps[level]))
        for level, x in maps.items()
    }


def blank(
    x: Float[Array, "b h w c"], valid: Bool[Array, "b h w"] | None
) -> Float[Array, "b h w c"]:
    """Zeroes what lies outside `valid`; also in the gradient."""
    return x if valid is None else jnp.where(valid[..., None], x, 0)


class Conv(nnx.Module):
    """A square convolution: `kernel` [k, k, in, out], `bias` [out] unless `bias=False`."""

    def __init__(
        self,
        channels: int,
        features: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: Padding = "torch",
        bias: bool = True,
        init: Init = "xavier_uniform",
        rngs: nnx.Rngs,
    ):
        shape = (kernel, kernel, channels, features)
        self.kernel = nnx.Param(initializer(init)(rngs.params(), shape, jnp.float32))
        self.bias: Any = nnx.Param(jnp.zeros((features,), jnp.float32)) if bias else None
        self.stride = stride
        self.padding: Padding = padding

    def __call__(
        self, x: Float[Array, "b h w c"], valid: Bool[Array, "b h w"] | None = None
    ) -> Float[Array, "b _oh _ow _o"]:
        """Convolves; a kernel larger than 1 reads zeros outside `valid`."""
        kernel = self.kernel[...].astype(x.dtype)
        width = kernel.shape[0]
        if width > 1:
            x = blank(x, valid)
        padding = pads(self.padding, (x.shape[1], x.shape[2]), width, self.stride)
        y = conv_ops.conv2d(x, kernel, stride=self.stride, padding=padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, None, None, :]


class Linear(nnx.Module):
    """A dense layer: `kernel` [in, out], `bias` [out] unless `bias=False`."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        bias: bool = True,
        init: Init = "xavier_uniform",
        rngs: nnx.Rngs,
    ):
        shape = (channels, features)
        self.kernel = nnx.Param(initializer(init)(rngs.params(), shape, jnp.float32))
        self.bias: Any = nnx.Param(jnp.zeros((features,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n _o"]:
        """Multiplies by the kernel and adds the bias."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, :]


class ConvTranspose2x2(nnx.Module):
    """Doubles height and width, a cell becomes 2x2; `kernel` [2, 2, in, out], `bias` [out]."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        bias: bool = True,
        init: Init = "msra",
        rngs: nnx.Rngs,
    ):
        shape = (2, 2, channels, features)
        self.kernel = nnx.Param(initializer(init)(rngs.params(), shape, jnp.float32))
        self.bias: Any = nnx.Param(jnp.zeros((features,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n _oh _ow _o"]:
        """`out[2i + a, 2j + b] = x[i, j] @ kernel[a, b] + bias`."""
        y = conv_ops.conv_transpose2d(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, None, None, :]


def max_pool_3x3(
    x: Float[Array, "b h w c"], valid: Bool[Array, "b h w"] | None, padding: Padding
) -> Float[Array, "b _oh _ow c"]:
    """3x3 max-pool of stride 2 over the valid cells; 0 where a window holds none."""
    lowest: Any = jnp.finfo(x.dtype).min
    if valid is not None:
        x = jnp.where(valid[..., None], x, lowest)
    (top, bottom), (left, right) = pads(padding, (x.shape[1], x.shape[2]), 3, 2)
    y = jax.lax.reduce_window(
        x,
        np.asarray(
            -np.inf, x.dtype
        ),  # concrete: only then is it seen as a max-pool with a gradient
        jax.lax.max,
        (1, 3, 3, 1),
        (1, 2, 2, 1),
        ((0, 0), (top, bottom), (left, right), (0, 0)),
    )
    return y if valid is None else jnp.where(y > lowest, y, 0)


def act(x: Float[Array, "..."], norm: Any) -> Float[Array, "..."]:
    """ReLU, unless the normaliser before it is an activation itself."""
    return x if norm.activates else jax.nn.relu(x)
