"""What the published series puts around its pyramid (EXPERIMENTS 2.4): `fpn.before`, `fpn.after`.

A hook takes a dict of maps and gives it back with some of them changed or with one more. Numbers in
the names are powers of two: `c4`, `p4` and `f4` have 16 pixels a cell.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sephjax.nets import layers, norms

Maps = dict[str, Float[Array, "b _h _w _c"]]


def resize_bilinear(
    x: Float[Array, "b h w c"],
    shape: tuple[int, int],
    *,
    scale: float | None = None,
    extent: Int[Array, "b 2"] | None = None,
) -> Float[Array, "b _oh _ow c"]:
    """Bilinear resize of TensorFlow 1: `source = target * in / out`, no half pixels, no antialias.

    (`tf.compat.v1.image.resize_bilinear` with align_corners and half_pixel_centers False.) The
    last cell is repeated beyond the edge. Computed in float32.

    Args:
        x: Maps.
        shape: Height and width wanted.
        scale: Cells of `x` to a cell of the result, on both axes; by default in / out.
        extent: Height and width, in cells of `x`, of each picture on its canvas; what lies beyond
            is not read, the picture's own last cell is repeated instead. A picture without cells
            gives its first cell everywhere.
    """
    batch, *sides, _ = x.shape
    ends = jnp.broadcast_to(jnp.asarray(sides), (batch, 2)) if extent is None else extent
    steps = [scale or side / out for side, out in zip(sides, shape, strict=True)]
    rows, columns = (
        _taps(sides[axis], shape[axis], steps[axis], ends[:, axis] - 1) for axis in (0, 1)
    )
    wide = x.astype(jnp.float32)
    wide = jnp.einsum("boh,bhwc->bowc", rows, wide, precision="highest")
    return jnp.einsum("bow,bhwc->bhoc", columns, wide, precision="highest").astype(x.dtype)


def _taps(count: int, out: int, step: float, last: Int[Array, "b"]) -> Float[Array, "b _o _i"]:
    """Shares of the `count` cells in each of `out` results, of a picture that ends at `last`."""
    at = np.arange(out) * step
    low = np.floor(at)
    share = jnp.asarray(at - low, jnp.float32)[None, :, None]
    cells = jnp.arange(count)[None, None, :]

    def is_at(index: np.ndarray) -> Bool[Array, "b _o _i"]:
        within = jnp.clip(jnp.asarray(index, jnp.int32)[None, :], 0, jnp.maximum(last, 0)[:, None])
        return within[:, :, None] == cells

    return jnp.where(is_at(low), 1.0 - share, 0.0) + jnp.where(is_at(low + 1), share, 0.0)


def _resize_level(
    pyramid: Maps, source: str, target: str, size: Int[Array, "b 2"] | None
) -> Float[Array, "b _h _w _c"]:
    """The map `source` at the shape of `target`.

    With padding (`size`, pixels) the step is the ratio of their strides, so that it does not depend
    on the canvas; the two agree where the canvas is a multiple of the coarser stride.
    """
    shape = (pyramid[target].shape[1], pyramid[target].shape[2])
    if size is None:
        return resize_bilinear(pyramid[source], shape)
    stride, wanted = (2 ** int(level[1:]) for level in (source, target))
    extent = (size + (stride - 1)) // stride
    return resize_bilinear(pyramid[source], shape, scale=wanted / stride, extent=extent)


def attend(
    query: Float[Array, "b n q"],
    key: Float[Array, "b m q"],
    value: Float[Array, "b m v"],
    valid: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n v"]:
    """Dot-product attention of one head over the valid positions, softmax in float32.

    The scale is the root of the keys' width. (The series took that of its values, twice as large:
    an oversight that is not kept, EXPERIMENTS 8.3.) Without a valid position all count alike.
    """
    scores = jnp.einsum("bnq,bmq->bnm", query, key, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(key.shape[-1])
    if valid is not None:
        scores = jnp.where(valid[:, None, :], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bnm,bmv->bnv", jax.nn.softmax(scores).astype(value.dtype), value)


class NonLocal(nnx.Module):
    """Self-attention over a map: `x + gain * relu(norm(project(attention) + x))`.

    `gain` is a number that starts at 0: the block is the identity at first, and its convolutions
    and norm get no gradient until `gain`, which does get one, has moved.
    """

    def __init__(self, channels: int, *, init: layers.Init, rngs: nnx.Rngs):
        self.query = layers.Conv(channels, channels // 8, 1, init=init, rngs=rngs)
        self.key = layers.Conv(channels, channels // 8, 1, init=init, rngs=rngs)
        self.value = layers.Conv(channels, channels // 2, 1, init=init, rngs=rngs)
        self.project = layers.Conv(channels // 2, channels, 1, init=init, rngs=rngs)
        self.norm = norms.GroupNorm(channels)
        self.gain = nnx.Param(jnp.zeros((), jnp.float32))

    def __call__(
        self, x: Float[Array, "b h w c"], valid: Bool[Array, "b h w"] | None = None
    ) -> Float[Array, "b h w c"]:
        """Attends to the valid cells only; cells beyond them get numbers without meaning."""
        batch, height, width, _ = x.shape
        flat = lambda maps: maps.reshape(batch, height * width, -1)
        rows = attend(
            flat(self.query(x)),
            flat(self.key(x)),
            flat(self.value(x)),
            None if valid is None else valid.reshape(batch, -1),
        )
        found = self.project(rows.reshape(batch, height, width, -1))
        return x + self.gain[...].astype(x.dtype) * jax.nn.relu(self.norm(found + x, valid))


class NonLocalBefore(nnx.Module):
    """A `NonLocal` block on each of the backbone's maps from `c4` on (NonLocalBackboneHook)."""

    def __init__(self, channels: dict[str, int], *, init: layers.Init, rngs: nnx.Rngs):
        """`channels`: width of each of the pyramid's inputs."""
        self.levels = tuple(level for level in channels if int(level[1:]) >= 4)
        for level in self.levels:
            setattr(self, level, NonLocal(channels[level], init=init, rngs=rngs))

    def __call__(self, features: Maps, size: Int[Array, "b 2"] | None = None) -> Maps:
        """Changes `c4` and `c5`; `size` in pixels, None: no canvas is padded."""
        masks = layers.level_masks({level: features[level] for level in self.levels}, size)
        changed = {
            level: getattr(self, level)(features[level], masks[level]) for level in self.levels
        }
        return features | changed


class _After(nnx.Module):
    """A 3x3 convolution without bias and EvoNorm-S0, on maps that are resized to one level."""

    def __init__(self, channels: int, *, init: layers.Init, rngs: nnx.Rngs):
        self.conv = layers.Conv(channels, channels, 3, bias=False, init=init, rngs=rngs)
        self.norm = norms.EvoNormS0(channels)

    def _refine(
        self, x: Float[Array, "b h w c"], level: str, size: Int[Array, "b 2"] | None
    ) -> Float[Array, "b h w c"]:
        valid = layers.level_masks({level: x}, size)[level]
        return self.norm(self.conv(x, valid), valid)

    def _mean(
        self, pyramid: Maps, sources: list[str], target: str, size: Int[Array, "b 2"] | None
    ) -> Float[Array, "b _h _w _c"]:
        resized = [_resize_level(pyramid, source, target, size) for source in sources]
        return sum(resized[1:], start=resized[0]) / len(resized)


class Fusion(_After):
    """Adds a map of twice the width: the finest level beside the mean of all others, refined.

    It is called `f3` where the finest level is `p3` (FusionBackboneHook from 911cd7b on).
    """

    def __init__(self, channels: int, *, init: layers.Init, rngs: nnx.Rngs):
        """`channels`: width of the pyramid."""
        super().__init__(2 * channels, init=init, rngs=rngs)

    def __call__(self, pyramid: Maps, size: Int[Array, "b 2"] | None = None) -> Maps:
        """Adds the map; `pyramid` runs fine to coarse, `size` in pixels."""
        finest, *others = pyramid
        mean = self._mean(pyramid, others, finest, size)
        both = jnp.concatenate([pyramid[finest], mean], axis=-1)
        return pyramid | {fused_level(finest): self._refine(both, finest, size)}


class Balance(_After):
    """Adds to every level one refined mean of all of them (BalanceBackboneHook).

    All levels are resized to the second one, averaged, refined and resized back. Like the balanced
    pyramid of Libra R-CNN (arXiv 1904.02701), with another resize, norm and level.
    """

    def __call__(self, pyramid: Maps, size: Int[Array, "b 2"] | None = None) -> Maps:
        """Changes every level; `pyramid` runs fine to coarse, `size` in pixels."""
        middle = list(pyramid)[1]
        shared = self._refine(self._mean(pyramid, list(pyramid), middle, size), middle, size)
        parts = pyramid | {middle: shared}
        return {
            level: x + _resize_level(parts, middle, level, size) for level, x in pyramid.items()
        }


def fused_level(finest: str) -> str:
    """The name of the map that `Fusion` adds: `f3` where the finest level is `p3`."""
    return f"f{finest[1:]}"
