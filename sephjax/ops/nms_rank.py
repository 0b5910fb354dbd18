"""Boxes in the order in which NMS takes them, and their overlaps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Ranked(NamedTuple):
    """Boxes by falling score; the place in this order is a box's rank."""

    order: jax.Array  # [n], the index of each ranked box
    corners: tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # x1, y1, x2, y2, each [n]
    area: jax.Array  # [n], 0 for a degenerate box
    alive: jax.Array  # bool [n]
    classes: jax.Array | None  # [n]


def rank(
    boxes: jax.Array, scores: jax.Array, valid: jax.Array, classes: jax.Array | None
) -> Ranked:
    """Sorts boxes [n, 4] by falling score; of equal scores the lower index comes first."""
    n = scores.shape[0]
    key = jnp.where(valid, -scores, jnp.inf)
    _, order = lax.sort((key, lax.iota(jnp.int32, n)), num_keys=1, is_stable=True)
    x1, y1, x2, y2 = boxes.astype(jnp.float32)[order].T
    area = jnp.maximum(x2 - x1, 0.0) * jnp.maximum(y2 - y1, 0.0)
    classes = None if classes is None else classes[order]
    return Ranked(order, (x1, y1, x2, y2), area, valid[order], classes)


def iou_with(ranked: Ranked, i: jax.Array) -> jax.Array:
    """IoU [n] of all ranked boxes with box `i`, 0 where the classes differ."""
    one = jax.tree.map(lambda leaf: leaf[i], (ranked.corners, ranked.area, ranked.classes))
    return _iou(one, (ranked.corners, ranked.area, ranked.classes))


def iou_with_tile(ranked: Ranked, start: jax.Array, size: int) -> jax.Array:
    """IoU [size, n] of the boxes of ranks `start`, `start + 1`, ... with all, likewise."""
    every = ranked.corners, ranked.area, ranked.classes
    tile = jax.tree.map(lambda leaf: lax.dynamic_slice(leaf, (start,), (size,))[:, None], every)
    return _iou(tile, jax.tree.map(lambda leaf: leaf[None], every))


def _iou(ours, theirs) -> jax.Array:
    (ax1, ay1, ax2, ay2), area, classes = ours
    (x1, y1, x2, y2), areas, all_classes = theirs
    width = jnp.maximum(jnp.minimum(x2, ax2) - jnp.maximum(x1, ax1), 0.0)
    height = jnp.maximum(jnp.minimum(y2, ay2) - jnp.maximum(y1, ay1), 0.0)
    shared = width * height
    union = areas + area - shared
    iou = jnp.where(union > 0, shared / jnp.where(union > 0, union, 1.0), 0.0)
    return iou if classes is None else jnp.where(all_classes == classes, iou, 0.0)
