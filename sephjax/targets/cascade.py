"""ROIs of a later stage of a cascade: refined boxes, labelled anew, not sampled again."""

import jax
import jax.numpy as jnp

from sephjax.ops import boxes as box_ops
from sephjax.ops import sampling
from sephjax.targets.rpn import Matcher
from sephjax.types import Array, Rois, Truth


def next_rois(
    keys: Array,
    boxes: Array,
    valid: Array,
    truth: Truth,
    *,
    matcher: Matcher,
    append: int,
    classes: int,
) -> Rois:
    """All boxes of the stage before and some ground truths (EXPERIMENTS 4.7).

    Args:
        keys: one PRNG key an image, [b].
        boxes: float32 [b, r, 4], as the stage before moved its ROIs.
        valid: bool [b, r]; a box that lost its area does not count either (detectron2).
        truth: ground truth, [b, m].
        matcher: (boxes, ground truths, valid) -> Match for one image; what it ignores is invalid.
        append: ground truths that join at the end, drawn and repeated as those of the first stage
            (`sampling.repeat_truth`); 0: none.
        classes: number of classes; the background's label.

    Returns:
        [b, r + append], in the order of `boxes`. An image without objects has background alone, and
        its last `append` rows are invalid.
    """
    one = lambda key, boxes, valid, gt: _one_image(key, boxes, valid, gt, matcher, append, classes)
    bare = Truth(truth.boxes, truth.labels, truth.valid, None)
    return jax.vmap(one)(keys, boxes, valid & box_ops.nonempty(boxes), bare)


def _one_image(
    key: Array,
    boxes: Array,
    valid: Array,
    truth: Truth,
    matcher: Matcher,
    append: int,
    classes: int,
) -> Rois:
    if append:
        chosen, there = sampling.repeat_truth(key, truth.valid, count=append)
        boxes = jnp.concatenate([boxes, truth.boxes[chosen]])
        valid = jnp.concatenate([valid, there])
    match = matcher(boxes, truth.boxes, truth.valid)
    valid &= match.positive | match.negative
    positive = match.positive & valid
    return Rois(
        boxes=jnp.where(valid[:, None], boxes, 0.0),
        labels=jnp.where(positive, truth.labels[match.index], classes),
        matched=match.index,
        targets=truth.boxes[match.index],
        iou=match.iou,
        positive=positive,
        valid=valid,
    )
