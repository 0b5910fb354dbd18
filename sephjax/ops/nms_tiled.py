"""Greedy NMS a tile of boxes at a time: the way of an accelerator, where a loop's turn is dear.

Within a tile `alive = candidates & ~(alive kills it)` is repeated until nothing changes. After k
turns the first k boxes are as the greedy rule says, whatever the start, so the fixed point is its
result, exactly; real boxes need a few turns. What is left of the tile then kills among all later
boxes at once. The work is one IoU for each pair of boxes.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sephjax.ops.nms_loop import Removes
from sephjax.ops.nms_rank import Ranked, iou_with_tile

TILE = 256  # boxes


def take(
    ranked: Ranked, removes: Removes, most: int, tile: int = TILE
) -> tuple[jax.Array, jax.Array]:
    """As `nms_loop.take`."""
    kept, number, _ = survivors(ranked, removes, most, tile)
    places = jnp.nonzero(kept, size=most, fill_value=0)[0].astype(jnp.int32)
    return places, number


def survivors(
    ranked: Ranked, removes: Removes, most: int, tile: int = TILE
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `nms_loop.survivors`; only the order of the factors of a decay differs."""
    n = ranked.order.shape[0]
    tile = min(tile, n)
    ranked = _padded(ranked, -n % tile)
    padded = ranked.order.shape[0]
    later = lax.iota(jnp.int32, padded)
    within = lax.iota(jnp.int32, tile)
    before = within[:, None] < within[None]

    def turn(state):
        start, number, alive, decay = state
        iou = iou_with_tile(ranked, start, tile)
        kills = removes(iou)
        inside = lax.dynamic_slice(kills, (jnp.int32(0), start), (tile, tile)) & before
        candidates = lax.dynamic_slice(alive, (start,), (tile,))
        kept = _settle(candidates, inside)
        # No more than asked for, so that the others do not decay anything.
        kept = kept & (jnp.cumsum(kept, dtype=jnp.int32) <= most - number)
        rank_after = later[None] > (start + within)[:, None]
        acts = kept[:, None] & rank_after
        alive = alive & ~jnp.any(kills & acts & (later >= start + tile)[None], axis=0)
        alive = lax.dynamic_update_slice(alive, kept, (start,))
        decay = decay * jnp.prod(jnp.where(acts, 1.0 - iou, 1.0), axis=0)
        return start + tile, number + jnp.sum(kept, dtype=jnp.int32), alive, decay

    def more(state):
        start, number, _, _ = state
        return (number < most) & (start < padded)

    start = (jnp.int32(0), jnp.int32(0), ranked.alive, jnp.ones_like(ranked.area))
    end, number, alive, decay = lax.while_loop(more, turn, start)
    return (alive & (later < end))[:n], number, decay[:n]


def _settle(candidates: jax.Array, kills: jax.Array) -> jax.Array:
    """Which candidates of a tile, bool [t], are kept; `kills` [t, t]: whom each kills after it."""

    def turn(state):
        _, alive = state
        return alive, candidates & ~jnp.any(kills & alive[:, None], axis=0)

    def unsettled(state):
        return jnp.any(state[0] != state[1])

    first = candidates & ~jnp.any(kills & candidates[:, None], axis=0)
    return lax.while_loop(unsettled, turn, (candidates, first))[1]


def _padded(ranked: Ranked, more: int) -> Ranked:
    """With dead boxes without area at the end."""
    return jax.tree.map(lambda leaf: jnp.pad(leaf, (0, more)), ranked)
