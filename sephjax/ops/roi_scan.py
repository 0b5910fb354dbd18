"""ROI pooling for a CPU: one ROI after the other, level by level.

The ROIs are sorted by level, so that each loop reads one level only and the gradient of that level
is its carry, updated in place. A ROI's work is one fused loop over its output, small enough for the
cache; nothing is stored but the output (or the gradient). Invalid ROIs are sorted behind the last
loop and cost nothing. Loops have a dynamic length and so no derivative of their own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from sephjax.ops.roi_taps import Taps


def pool(pyramid: Sequence[jax.Array], taps: Taps) -> jax.Array:
    """Output float32 [b, n, oh, ow, c]; zeros for invalid ROIs."""
    images, n, height, _ = taps.rows.cell.shape
    width, channels = taps.columns.cell.shape[2], pyramid[0].shape[-1]
    order, edges = _by_level(taps, len(pyramid))
    output = _zeros((images * n, height, width, channels), taps)
    for level, features in enumerate(pyramid):
        table = features.reshape(-1, channels)

        def read(i, output, table=table, shape=features.shape):
            roi = order[i]
            total = jnp.zeros((height, width, channels), jnp.float32)
            for cells, weight in _terms(taps, roi, shape):
                read = table.at[cells].get(mode="promise_in_bounds")
                total += read.astype(jnp.float32) * weight[:, :, None]
            return lax.dynamic_update_index_in_dim(output, total, roi, 0)

        output = lax.fori_loop(edges[level], edges[level + 1], read, output)
    return output.reshape(images, n, height, width, channels)


def spread(
    shapes: Sequence[tuple[int, ...]], taps: Taps, cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    """The transpose of `pool`: float32 gradients of levels of these shapes."""
    order, edges = _by_level(taps, len(shapes))
    cotangent = cotangent.reshape(-1, *cotangent.shape[2:])
    gradients = []
    for level, shape in enumerate(shapes):

        def add(i, gradient, shape=shape):
            roi = order[i]
            cells, weights = zip(*_terms(taps, roi, shape), strict=True)
            weight = jnp.stack(weights)[..., None]
            update = cotangent[roi].astype(jnp.float32)[None] * weight
            return gradient.at[jnp.stack(cells)].add(update, mode="promise_in_bounds")

        start = _zeros((shape[0] * shape[1] * shape[2], shape[3]), taps)
        total = lax.fori_loop(edges[level], edges[level + 1], add, start)
        gradients.append(total.reshape(shape))
    return tuple(gradients)


def _zeros(shape: tuple[int, ...], taps: Taps) -> jax.Array:
    """Zeros that begin a loop; made from an input, so that they vary over devices as it does."""
    return jnp.broadcast_to(jnp.zeros_like(taps.level[0, 0], jnp.float32), shape)


def _by_level(taps: Taps, levels: int) -> tuple[jax.Array, jax.Array]:
    """All ROIs by level, invalid ones last, and the bounds [levels + 1] of the levels there."""
    level = jnp.where(taps.valid, taps.level, levels).reshape(-1)
    order = jnp.argsort(level, stable=True).astype(jnp.int32)
    below = level[:, None] < lax.iota(jnp.int32, levels + 1)[None]
    return order, jnp.sum(below, axis=0, dtype=jnp.int32)


def _terms(taps: Taps, roi: jax.Array, shape: tuple[int, ...]):
    """For each pair of a row and a column tap: cells of the flat level and weights, [oh, ow]."""
    image, i = jnp.divmod(roi, taps.level.shape[1])
    rows = (image * shape[1] + taps.rows.cell[image, i]) * shape[2]
    columns = taps.columns.cell[image, i]
    y, x = taps.rows.weight[image, i], taps.columns.weight[image, i]
    return [
        (rows[:, None, a] + columns[None, :, b], y[:, None, a] * x[None, :, b])
        for a in range(rows.shape[1])
        for b in range(columns.shape[1])
    ]
