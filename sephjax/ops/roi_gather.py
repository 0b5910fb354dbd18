"""ROI pooling for an accelerator: all ROIs at once, from one table of all levels' cells.

Every pair of a row tap and a column tap is one gather of `[n, oh, ow]` rows of the table, weighted
and summed by the compiler in one pass; the gradient is as many scatter-adds into one float32 table.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sephjax.ops.roi_taps import Taps


def pool(pyramid: Sequence[jax.Array], taps: Taps) -> jax.Array:
    """Output float32 [n, oh, ow, c]; zeros for invalid ROIs."""
    channels = pyramid[0].shape[-1]
    table = jnp.concatenate([features.reshape(-1, channels) for features in pyramid])
    n, height, _ = taps.rows.index.shape
    total = jnp.zeros((n, height, taps.columns.index.shape[1], channels), jnp.float32)
    for cells, weight in _terms(taps, [features.shape for features in pyramid]):
        total += table.at[cells].get(mode="clip").astype(jnp.float32) * weight[..., None]
    return total


def spread(
    shapes: Sequence[tuple[int, ...]], taps: Taps, cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    """The transpose of `pool`: float32 gradients of levels of these shapes."""
    cells = [shape[0] * shape[1] * shape[2] for shape in shapes]
    table = jnp.zeros((sum(cells), shapes[0][3]), jnp.float32)
    cotangent = cotangent.astype(jnp.float32)
    for index, weight in _terms(taps, shapes):
        table = table.at[index].add(cotangent * weight[..., None], mode="clip")
    parts = jnp.split(table, [sum(cells[:i]) for i in range(1, len(cells))])
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def _terms(taps: Taps, shapes: Sequence[tuple[int, ...]]):
    """For each pair of a row tap and a column tap: rows of the table and weights, [n, oh, ow]."""
    cells = [shape[0] * shape[1] * shape[2] for shape in shapes]
    offset = jnp.asarray([sum(cells[:i]) for i in range(len(cells))], jnp.int32)[taps.level]
    height = jnp.asarray([shape[1] for shape in shapes], jnp.int32)[taps.level]
    width = jnp.asarray([shape[2] for shape in shapes], jnp.int32)[taps.level]
    first = (taps.image * height)[:, None, None]
    rows = offset[:, None, None] + (first + taps.rows.index) * width[:, None, None]
    columns = taps.columns.index
    y = jnp.where(taps.valid[:, None, None], taps.rows.weight, 0.0)
    x = taps.columns.weight
    return [
        (rows[:, :, None, i] + columns[:, None, :, j], y[:, :, None, i] * x[:, None, :, j])
        for i in range(rows.shape[2])
        for j in range(columns.shape[2])
    ]
