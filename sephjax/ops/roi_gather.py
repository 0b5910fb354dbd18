"""ROI pooling for an accelerator: all ROIs of an image at once, from one table of all its cells.

Every pair of a row tap and a column tap is one gather of `[n, oh, ow]` rows of the table, weighted
and summed by the compiler in one pass; the gradient is as many scatter-adds into one float32 table.
Images are a batch dimension throughout, so a sharded batch stays where it is.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sephjax.ops.roi_taps import Taps


def pool(pyramid: Sequence[jax.Array], taps: Taps) -> jax.Array:
    """Output float32 [b, n, oh, ow, c]; zeros for invalid ROIs."""
    cells = [features.reshape(features.shape[0], -1, features.shape[-1]) for features in pyramid]
    table = jnp.concatenate(cells, axis=1)
    shapes = [features.shape for features in pyramid]
    return jax.vmap(functools.partial(_pool_image, shapes))(table, taps)


def spread(
    shapes: Sequence[tuple[int, ...]], taps: Taps, cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    """The transpose of `pool`: float32 gradients of levels of these shapes."""
    table = jax.vmap(functools.partial(_spread_image, shapes))(taps, cotangent)
    parts = jnp.split(table, _offsets(shapes)[1:], axis=1)
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def _pool_image(shapes, table: jax.Array, taps: Taps) -> jax.Array:
    n, height, _ = taps.rows.cell.shape
    width = taps.columns.cell.shape[1]
    total = jnp.zeros((n, height, width, table.shape[-1]), jnp.float32)
    for cells, weight in _terms(taps, shapes):
        read = table.at[cells].get(mode="promise_in_bounds")
        total += read.astype(jnp.float32) * weight[..., None]
    return total


def _spread_image(shapes, taps: Taps, cotangent: jax.Array) -> jax.Array:
    size = sum(shape[1] * shape[2] for shape in shapes)
    table = jnp.zeros((size, cotangent.shape[-1]), jnp.float32)
    cotangent = cotangent.astype(jnp.float32)
    for cells, weight in _terms(taps, shapes):
        table = table.at[cells].add(cotangent * weight[..., None], mode="promise_in_bounds")
    return table


def _terms(taps: Taps, shapes: Sequence[tuple[int, ...]]):
    """For each pair of a row and a column tap: rows of the table and weights, [n, oh, ow]."""
    first = jnp.asarray(_offsets(shapes), jnp.int32)[taps.level]
    stride = jnp.asarray([shape[2] for shape in shapes], jnp.int32)[taps.level]
    rows = first[:, None, None] + taps.rows.cell * stride[:, None, None]
    columns = taps.columns.cell
    y = jnp.where(taps.valid[:, None, None], taps.rows.weight, 0.0)
    x = taps.columns.weight
    return [
        (rows[:, :, None, i] + columns[:, None, :, j], y[:, :, None, i] * x[:, None, :, j])
        for i in range(rows.shape[2])
        for j in range(columns.shape[2])
    ]


def _offsets(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The row of the table at which each level begins."""
    sizes = [shape[1] * shape[2] for shape in shapes]
    return [sum(sizes[:i]) for i in range(len(sizes))]
