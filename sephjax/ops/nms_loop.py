"""Greedy NMS one box at a time: the way of a CPU.

A loop takes the next box that is still alive, writes it down and kills what it overlaps, so the
work is one pass over the boxes that are left for each box that is kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sephjax.ops.nms_rank import Ranked, iou_with

PARTS = 4
Removes = Callable[[jax.Array], jax.Array]  # IoUs -> which of them are too many


def take(ranked: Ranked, removes: Removes, most: int) -> tuple[jax.Array, jax.Array]:
    """Ranks of the first `most` survivors, int32 [most], 0 beyond them, and their number.

    The ranks go in four parts, and a box is compared with its own part and later ones: where all
    survive these are 5/8 of all pairs.
    """
    n = ranked.order.shape[0]
    count, taken = jnp.int32(0), jnp.zeros(most, jnp.int32)
    for part in range(PARTS):
        start, stop = n * part // PARTS, n * (part + 1) // PARTS
        count, taken, ranked = _take_part(ranked, removes, start, stop - start, count, taken)
    return taken, count


def _take_part(
    ranked: Ranked,
    removes: Removes,
    start: int,
    size: int,
    count: jax.Array,
    taken: jax.Array,
) -> tuple[jax.Array, jax.Array, Ranked]:
    """Takes from the first `size` boxes, of which the first has rank `start`; leaves the rest."""

    def turn(state):
        count, i, taken, alive = state
        taken = lax.dynamic_update_index_in_dim(taken, start + i, count, 0)
        alive = alive & ~removes(iou_with(ranked, i))
        return count + 1, _next_alive(alive, i + 1), taken, alive

    def more(state):
        count, i, taken, _ = state
        return (count < taken.shape[0]) & (i < size)

    first = _next_alive(ranked.alive, jnp.int32(0))
    count, _, taken, alive = lax.while_loop(more, turn, (count, first, taken, ranked.alive))
    rest = jax.tree.map(lambda leaf: leaf[size:], ranked._replace(alive=alive))
    return count, taken, rest


def survivors(
    ranked: Ranked, removes: Removes, most: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first `most` survivors as a mask over ranks, their number, and each box's decay.

    The decay is the product of `1 - IoU` over the survivors ranked before a box, float32 [n].
    """
    n = ranked.order.shape[0]
    rank = lax.iota(jnp.int32, n)

    def turn(state):
        number, i, alive, decay, kept = state
        iou = iou_with(ranked, i)
        decay = decay * jnp.where(rank > i, 1.0 - iou, 1.0)
        alive = alive & ~removes(iou)
        return number + 1, _next_alive(alive, i + 1), alive, decay, kept.at[i].set(True)

    def more(state):
        number, i, *_ = state
        return (number < most) & (i < n)

    first = _next_alive(ranked.alive, jnp.int32(0))
    start = (
        jnp.int32(0),
        first,
        ranked.alive,
        jnp.ones_like(ranked.area),
        jnp.zeros_like(ranked.alive),
    )
    number, _, _, decay, kept = lax.while_loop(more, turn, start)
    return kept, number, decay


def _next_alive(alive: jax.Array, i: jax.Array) -> jax.Array:
    """The first living rank at or after `i`, or `n`."""
    n = alive.shape[0]
    return lax.while_loop(lambda i: (i < n) & ~alive[i], lambda i: i + 1, i)
