"""Non-maximum suppression of one image's boxes: greedy, exact at every threshold.

The boxes are sorted once. What follows is chosen by platform where the program is lowered: one box
at a time on a CPU (`nms_loop`), a tile of boxes at a time elsewhere (`nms_tiled`); both keep the
same boxes.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sephjax.ops import nms_loop, nms_tiled
from sephjax.ops.nms_rank import Ranked, iou_with, rank


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
    ranked = rank(boxes, scores, valid, classes)
    removes = _comparison(threshold, inclusive)
    taken, count = _by_platform(nms_loop.take, nms_tiled.take, ranked, removes, max_output)
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
    ranked = rank(boxes, scores, valid, None)
    ways = nms_loop.survivors, nms_tiled.survivors
    removes = _comparison(threshold, inclusive=True)
    kept, number, decay = _by_platform(*ways, ranked, removes, count)
    ranked_scores = scores[ranked.order].astype(jnp.float32)

    def bring_back(state):
        number, candidates, decay, kept = state
        i = jnp.argmax(jnp.where(candidates, ranked_scores * decay, -jnp.inf)).astype(jnp.int32)
        decay = decay * (1.0 - iou_with(ranked, i))
        return number + 1, candidates.at[i].set(False), decay, kept.at[i].set(True)

    def more(state):
        number, candidates, _, _ = state
        return (number < count) & jnp.any(candidates)

    candidates = ranked.alive & ~kept
    number, _, _, kept = lax.while_loop(more, bring_back, (number, candidates, decay, kept))
    places = jnp.nonzero(kept, size=count, fill_value=0)[0].astype(jnp.int32)
    return ranked.order[places], lax.iota(jnp.int32, count) < number


def _by_platform(loop: Any, tiled: Any, ranked: Ranked, removes: Any, most: int) -> Any:
    ways = (functools.partial(way, removes=removes, most=most) for way in (loop, tiled))
    return lax.platform_dependent(ranked, **dict(zip(("cpu", "default"), ways, strict=True)))


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
