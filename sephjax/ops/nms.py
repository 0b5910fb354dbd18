"""Non-maximum suppression of one image's boxes: greedy, exact at every threshold.

The boxes are sorted once; a loop then takes the next box that is still alive, writes it down and
kills what it overlaps, so the work is one pass over the boxes for each box that is kept. That suits
a CPU. All loops work on `_Ranked`, so another form of the loop can stand beside this one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class _Ranked(NamedTuple):
    """Boxes by falling score; the place in this order is a box's rank."""

    order: jax.Array  # [n], the index of each ranked box
    corners: tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # x1, y1, x2, y2, each [n]
    area: jax.Array  # [n], 0 for a degenerate box
    alive: jax.Array  # bool [n]
    classes: jax.Array | None  # [n]


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n"],
    valid: Bool[Array, "n"],
    *,
    threshold: float,
    max_output: int,
    classes: Int[Array, "n"] | None = None,
    inclusive: bool = False,
) -> tuple[Int[Array, "{max_output}"], Bool[Array, "{max_output}"]]:
    """Greedy non-maximum suppression of one image; `jax.vmap` it over images.

    Boxes are taken by falling score (of equal scores the lower index first); a taken box removes
    all later ones whose IoU with it is above `threshold`. Invalid boxes are neither taken nor
    remove others. A degenerate box (no width or no height) has IoU 0 with everything. Nothing is
    differentiable: the results are indices.

    Args:
        boxes: corners `(x1, y1, x2, y2)`, continuous edges.
        scores: what the boxes are ranked by; any finite numbers.
        valid: which boxes exist.
        threshold: IoU above which a box is removed.
        max_output: size of the result; the search stops when it is full.
        classes: if given, only boxes of equal class remove each other.
        inclusive: removes at an IoU equal to `threshold` too (the published series), else only
            above it (torchvision, detectron2).

    Returns:
        Indices of the kept boxes by falling score, and which of them exist. Empty slots come last
        and hold the index of the best box; an image without valid boxes has only empty slots.
    """
    ranked = _rank(boxes, scores, valid, classes)
    removes = _comparison(threshold, inclusive)
    n = scores.shape[0]

    def take(state):
        count, i, alive, taken = state
        taken = lax.dynamic_update_index_in_dim(taken, i, count, 0)
        alive = alive & ~removes(_iou_with(ranked, i))
        return count + 1, _next_alive(alive, i + 1), alive, taken

    def more(state):
        count, i, _, _ = state
        return (count < max_output) & (i < n)

    first = _next_alive(ranked.alive, jnp.int32(0))
    start = (jnp.int32(0), first, ranked.alive, jnp.zeros(max_output, jnp.int32))
    count, _, _, taken = lax.while_loop(more, take, start)
    return ranked.order[taken], lax.iota(jnp.int32, max_output) < count


def nms_exactly_k(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n"],
    valid: Bool[Array, "n"],
    *,
    threshold: float,
    count: int,
) -> tuple[Int[Array, "{count}"], Bool[Array, "{count}"]]:
    """Greedy NMS that returns exactly `count` boxes wherever there are as many valid ones.

    Boxes at an IoU of `threshold` or more are removed. If more than `count` survive, the best are
    returned. If fewer survive, removed boxes come back: each has the score
    `score * prod(1 - IoU)` over the survivors ranked before it; again and again the highest comes
    back, and the scores of the rest are multiplied by `1 - IoU` with it. Up to `count` valid boxes
    are therefore all returned, as if no NMS was run.

    Args:
        boxes: corners `(x1, y1, x2, y2)`, continuous edges.
        scores: what the boxes are ranked by, and what decays; logits in the published series.
        valid: which boxes exist.
        threshold: IoU at and above which a box is removed.
        count: size of the result.

    Returns:
        Indices by falling score, and which of them exist (all, unless there are fewer than `count`
        valid boxes). Empty slots come last and hold the index of the best box.

    Source: the training proposals of the published series (its intended rule, not its stale index).
    """
    ranked = _rank(boxes, scores, valid, None)
    kept, decay, number = _survivors(ranked, threshold, count)
    ranked_scores = scores[ranked.order].astype(jnp.float32)

    def bring_back(state):
        number, candidates, decay, kept = state
        i = jnp.argmax(jnp.where(candidates, ranked_scores * decay, -jnp.inf)).astype(jnp.int32)
        decay = decay * (1.0 - _iou_with(ranked, i))
        return number + 1, candidates.at[i].set(False), decay, kept.at[i].set(True)

    def more(state):
        number, candidates, _, _ = state
        return (number < count) & jnp.any(candidates)

    candidates = ranked.alive & ~kept
    number, _, _, kept = lax.while_loop(more, bring_back, (number, candidates, decay, kept))
    places = jnp.nonzero(kept, size=count, fill_value=0)[0].astype(jnp.int32)
    return ranked.order[places], lax.iota(jnp.int32, count) < number


def _survivors(ranked: _Ranked, threshold: float, count: int):
    """The first `count` survivors as a mask over ranks, each box's decay, and their number."""
    removes = _comparison(threshold, inclusive=True)
    n = ranked.order.shape[0]
    rank = lax.iota(jnp.int32, n)

    def take(state):
        number, i, alive, decay, kept = state
        iou = _iou_with(ranked, i)
        decay = decay * jnp.where(rank > i, 1.0 - iou, 1.0)
        alive = alive & ~removes(iou)
        return number + 1, _next_alive(alive, i + 1), alive, decay, kept.at[i].set(True)

    def more(state):
        number, i, *_ = state
        return (number < count) & (i < n)

    first = _next_alive(ranked.alive, jnp.int32(0))
    start = (
        jnp.int32(0),
        first,
        ranked.alive,
        jnp.ones_like(ranked.area),
        jnp.zeros_like(ranked.alive),
    )
    number, _, _, decay, kept = lax.while_loop(more, take, start)
    return kept, decay, number


def _rank(boxes, scores, valid, classes) -> _Ranked:
    n = scores.shape[0]
    key = jnp.where(valid, -scores, jnp.inf)
    _, order = lax.sort((key, lax.iota(jnp.int32, n)), num_keys=1, is_stable=True)
    x1, y1, x2, y2 = boxes.astype(jnp.float32)[order].T
    area = jnp.maximum(x2 - x1, 0.0) * jnp.maximum(y2 - y1, 0.0)
    classes = None if classes is None else classes[order]
    return _Ranked(order, (x1, y1, x2, y2), area, valid[order], classes)


def _iou_with(ranked: _Ranked, i: jax.Array) -> jax.Array:
    """IoU [n] of all ranked boxes with box `i`, 0 where the classes differ."""
    x1, y1, x2, y2 = ranked.corners
    width = jnp.maximum(jnp.minimum(x2, x2[i]) - jnp.maximum(x1, x1[i]), 0.0)
    height = jnp.maximum(jnp.minimum(y2, y2[i]) - jnp.maximum(y1, y1[i]), 0.0)
    shared = width * height
    union = ranked.area + ranked.area[i] - shared
    iou = jnp.where(union > 0, shared / jnp.where(union > 0, union, 1.0), 0.0)
    if ranked.classes is None:
        return iou
    return jnp.where(ranked.classes == ranked.classes[i], iou, 0.0)


def _next_alive(alive: jax.Array, i: jax.Array) -> jax.Array:
    """The first living rank at or after `i`, or `n`."""
    n = alive.shape[0]
    return lax.while_loop(lambda i: (i < n) & ~alive[i], lambda i: i + 1, i)


def _comparison(threshold: float, inclusive: bool):  # noqa: FBT001 (private, passed by name)
    """The test of an IoU against the threshold."""
    if inclusive:
        return lambda iou: iou >= threshold
    # torchvision compares a float32 IoU with a double: `iou > 0.7` there is the same as
    # `iou > the greatest float32 that is not above 0.7`.
    limit = np.float32(threshold)
    if float(limit) > threshold:
        limit = np.nextafter(limit, np.float32(-np.inf))
    return lambda iou: iou > float(limit)
