"""Where ROI pooling reads: for every output row and column the cells it takes, and their weights.

Both poolers of this project are bilinear and separable, so an output cell is the sum over its row
taps and column taps of `weight_y * weight_x * feature`. All that tells ROIAlign from
`crop_and_resize`, the border rule included, is in the taps; the loops that read features know only
them. Every index is inside its level, whatever the box; taps that read nothing have weight 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Axis(NamedTuple):
    """The taps along one axis."""

    cell: jax.Array  # int32 [b, n, out, taps], counted within the ROI's level
    weight: jax.Array  # float32 [b, n, out, taps]


class Taps(NamedTuple):
    """What the `n` ROIs of each image read."""

    level: jax.Array  # int32 [b, n], index into the pyramid
    valid: jax.Array  # bool [b, n]
    rows: Axis
    columns: Axis


def bilinear(position: jax.Array, inside: jax.Array, size: jax.Array) -> Axis:
    """The two neighbours of every sample, averaged over the samples of an output cell.

    Args:
        position: float32 [b, n, out, samples], in cells; 0 is the centre of the first cell.
        inside: bool [b, n, out, samples], which samples count; the others read 0.
        size: float32 [b, n], cells of the level along this axis; positions are clamped to them.
    """
    last = size[..., None, None] - 1.0
    position = jnp.clip(position, 0.0, last)
    low = jnp.floor(position)
    high = jnp.minimum(low + 1.0, last)
    far = position - low
    share = inside.astype(jnp.float32) / position.shape[-1]
    index = jnp.concatenate([low, high], axis=-1).astype(jnp.int32)
    return Axis(index, jnp.concatenate([(1.0 - far) * share, far * share], axis=-1))


def level_sizes(
    pyramid: Sequence[jax.Array],
    level: jax.Array,
    strides: Sequence[float],
    extent: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Height and width in cells, float32 [b, n], of the level of each ROI.

    With `extent`, [b, 2] pixels, a map ends with the picture, after ceil(extent / stride) cells,
    as in `layers.valid_mask`.
    """
    sizes = jnp.asarray([features.shape[1:3] for features in pyramid], jnp.float32)
    if extent is None:
        cells = sizes[level]
    else:
        pixels = jnp.asarray(strides, jnp.float32)[level][..., None]
        cells = jnp.ceil(extent.astype(jnp.float32)[:, None] / pixels)
        cells = jnp.clip(cells, 1.0, sizes[level])
    return cells[..., 0], cells[..., 1]
