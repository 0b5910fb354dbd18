"""From raw RPN outputs to proposals: top-k, decode, clip, NMS, on fixed shapes. No parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sephjax.ops import boxes as box_ops
from sephjax.ops import nms as nms_ops
from sephjax.types import Proposals

Weights = tuple[float, float, float, float]
# Anonymous axes: the levels of a pyramid have different numbers.
Ranked = tuple[Float[Array, "_ 4"], Float[Array, "_"], Bool[Array, "_"]]


def _best_of_level(
    logits: Float[Array, "n"],
    deltas: Float[Array, "n 4"],
    anchors: Float[Array, "n 4"],
    inside: Bool[Array, "n"],
    size: Float[Array, "2"],
    *,
    count: int,
    weights: Weights,
    min_size: float,
) -> Ranked:
    """The `count` best anchors of a level, decoded and clipped to the picture, best first."""
    scores, order = jax.lax.top_k(jnp.where(inside, logits, -jnp.inf), min(count, logits.shape[0]))
    boxes = box_ops.decode(anchors[order], deltas[order], weights=weights)
    boxes = box_ops.clip(boxes, size)
    valid = inside[order] & box_ops.nonempty(boxes, min_size)
    return boxes, jnp.where(inside[order], scores, 0.0), valid


def joint(levels: Sequence[Ranked], *, nms: float, count: int) -> Proposals:
    """NMS by level, then the `count` best of all (detectron2, torchvision); one image."""
    boxes, scores, valid = (jnp.concatenate(part) for part in zip(*levels, strict=True))
    level = jnp.concatenate([jnp.full(row[1].shape, i, jnp.int32) for i, row in enumerate(levels)])
    kept, present = nms_ops.nms(
        boxes, scores, valid, threshold=nms, max_output=min(count, boxes.shape[0]), classes=level
    )
    return Proposals(boxes[kept], scores[kept], present)


def per_level(
    levels: Sequence[Ranked],
    *,
    nms: float,
    counts: Sequence[int],
    exactly: bool,
    logit_floor: float | None,
) -> Proposals:
    """A quota for every level, one after another, not ranked jointly (EXPERIMENTS 3.6); one image.

    Args:
        levels: ranked boxes, fine to coarse.
        nms: IoU at or above which a box is suppressed.
        counts: quota of each level.
        exactly: fill the quota with suppressed boxes (training; early rows at test time too).
        logit_floor: boxes at or under it go, but each level keeps its best (later rows).
    """
    parts = []
    for (boxes, scores, valid), count in zip(levels, counts, strict=True):
        count = min(count, boxes.shape[0])
        if exactly:
            kept, present = nms_ops.nms_exactly_k(boxes, scores, valid, threshold=nms, count=count)
        else:
            kept, present = nms_ops.nms(
                boxes, scores, valid, threshold=nms, max_output=count, inclusive=True
            )
        if logit_floor is not None:
            present &= (scores[kept] > logit_floor) | (jnp.arange(count) == 0)
        parts.append(Proposals(boxes[kept], scores[kept], present))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def above(levels: Sequence[Ranked], *, score: float, nms: float, count: int) -> Proposals:
    """RetinaNet's own detections as proposals (the series' sephv9 at test time); one image.

    Args:
        levels: ranked boxes, fine to coarse.
        score: a probability at or under it is none; there may be no proposal left.
        nms: IoU at or above which the lower score goes, whatever the levels.
        count: at most so many, best first.
    """
    boxes, scores, valid = (jnp.concatenate(part) for part in zip(*levels, strict=True))
    valid &= jax.nn.sigmoid(scores) > score
    count = min(count, boxes.shape[0])
    kept, present = nms_ops.nms(
        boxes, scores, valid, threshold=nms, max_output=count, inclusive=True
    )
    return Proposals(boxes[kept], scores[kept], present)


def valid_first(proposals: Proposals) -> Proposals:
    """The same proposals of one image with the valid ones in front, order kept."""
    order = jnp.argsort(~proposals.valid, stable=True)
    return jax.tree.map(lambda leaf: leaf[order], proposals)


def quotas(first: int, shrink: int, levels: int) -> tuple[int, ...]:
    """`first // shrink**i` for each level (the series: 1000, 333, 111, 37, 12)."""
    return tuple(first // shrink**i for i in range(levels))


def rank_levels(
    logits: Sequence[Float[Array, "_"]],
    deltas: Sequence[Float[Array, "_ 4"]],
    anchors: Sequence[Float[Array, "_ 4"]],
    inside: Sequence[Bool[Array, "_"]],
    size: Float[Array, "2"],
    *,
    counts: Sequence[int],
    weights: Weights,
    min_size: float = 0.0,
) -> list[Ranked]:
    """`_best_of_level` for every level of one image; a box with a side under `min_size` is none."""
    rule: Any = {"weights": weights, "min_size": min_size}
    rows = zip(logits, deltas, anchors, inside, counts, strict=True)
    return [
        _best_of_level(scores, moves, references, usable, size, count=count, **rule)
        for scores, moves, references, usable, count in rows
    ]
