"""ROI pooling for an accelerator: all ROIs of an image at once, from one table of all its cells.

A row of output cells at a time: one gather of all its taps, weighted and summed; the gradient is
one scatter-add into a float32 table. A turn of 512 ROIs takes 57,000 rows of the table, work enough
for a chip, in a seventh or a fourteenth of the memory that all need. Images are a batch dimension
throughout, so a sharded batch stays where it is.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sephjax.ops.roi_taps import Axis, Taps


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
    terms = _terms(taps, shapes)

    def row_of_cells(axis):
        cells, weight = terms(*axis)
        read = table.at[cells].get(mode="promise_in_bounds")
        return jnp.sum(read.astype(jnp.float32) * weight[..., None], axis=(1, 3))

    return jnp.moveaxis(jax.lax.map(row_of_cells, _by_row(taps)), 0, 1)


def _spread_image(shapes, taps: Taps, cotangent: jax.Array) -> jax.Array:
    terms = _terms(taps, shapes)
    size = sum(shape[1] * shape[2] for shape in shapes)

    def row_of_cells(table, row):
        axis, slope = row
        cells, weight = terms(*axis)
        slope = slope.astype(jnp.float32)[:, None, :, None] * weight[..., None]
        return table.at[cells].add(slope, mode="promise_in_bounds"), None

    table = jnp.zeros((size, cotangent.shape[-1]), jnp.float32)
    rows = _by_row(taps), jnp.moveaxis(cotangent, 1, 0)
    return jax.lax.scan(row_of_cells, table, rows)[0]


def _by_row(taps: Taps) -> Axis:
    """The row taps, [oh, n, taps]."""
    return jax.tree.map(lambda part: jnp.moveaxis(part, 1, 0), taps.rows)


def _terms(taps: Taps, shapes: Sequence[tuple[int, ...]]):
    """From the row taps of one row of output cells, [n, i], to the rows of the table that it reads
    and their weights, [n, i, ow, j] with its column taps."""
    first = jnp.asarray(_offsets(shapes), jnp.int32)[taps.level][:, None]
    stride = jnp.asarray([shape[2] for shape in shapes], jnp.int32)[taps.level][:, None]
    cell, weight = (part[:, None] for part in (taps.columns.cell, taps.columns.weight))

    def terms(row: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jnp.where(taps.valid[:, None], y, 0.0)
        return (first + row * stride)[:, :, None, None] + cell, y[:, :, None, None] * weight

    return terms


def _offsets(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The row of the table at which each level begins."""
    sizes = [shape[1] * shape[2] for shape in shapes]
    return [sum(sizes[:i]) for i in range(len(sizes))]
