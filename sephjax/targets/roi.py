"""Proposals labelled by the ground truth and sampled for the box and mask heads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sephjax.ops import sampling
from sephjax.targets.rpn import Matcher
from sephjax.types import Array, Proposals, Rois, Truth


def sample_rois(
    keys: Array,
    proposals: Proposals,
    truth: Truth,
    *,
    matcher: Matcher,
    sampler: Callable[..., tuple[Array, Array]],
    append: int,
    classes: int,
    positive_iou: float = 0.0,
) -> Rois:
    """A fixed number of ROIs an image, positives first.

    Args:
        keys: one PRNG key an image, [b].
        proposals: candidates, [b, n].
        truth: ground truth, [b, m].
        matcher: (boxes, ground truths, valid) -> Match for one image.
        sampler: `sampling.sample_rois` with its options bound.
        append: ground truths that join the proposals: 0 = each once (detectron2, torchvision),
            k = exactly k, drawn at random and repeated when there are fewer (the series: 16).
        classes: number of classes; the background's label.
        positive_iou: 0, or the IoU that a box must exceed to be sampled as a positive (EXPERIMENTS
            4.2, POS_LABELS_THRESHOLD). A box that the matcher labels positive and that does not is
            drawn with the negatives (the document does not say that it is left out); it keeps its
            label, its target and `positive`, which the box and mask losses go by. The class loss
            takes it for background by a key of its own, `losses.roi.box_losses`.

    An image without objects gives background ROIs; without proposals, invalid ones.
    """
    one = lambda key, boxes, valid, gt: _one_image(
        key,
        boxes,
        valid,
        gt,
        matcher=matcher,
        sampler=sampler,
        append=append,
        classes=classes,
        positive_iou=positive_iou,
    )
    bare = Truth(truth.boxes, truth.labels, truth.valid, None)
    return jax.vmap(one)(keys, proposals.boxes, proposals.valid, bare)


def _one_image(  # noqa: PLR0913, the columns of an image and what `sample_rois` binds
    key: Array,
    boxes: Array,
    valid: Array,
    truth: Truth,
    *,
    matcher: Matcher,
    sampler: Any,
    append: int,
    classes: int,
    positive_iou: float,
) -> Rois:
    append_key, sample_key = jax.random.split(key)
    if append:
        chosen, present = sampling.repeat_truth(append_key, truth.valid, count=append)
        extra, extra_valid = truth.boxes[chosen], present
    else:
        extra, extra_valid = truth.boxes, truth.valid
    boxes = jnp.concatenate([boxes, extra])
    valid = jnp.concatenate([valid, extra_valid])
    match = matcher(boxes, truth.boxes, truth.valid)
    high = match.positive & (match.iou > positive_iou) if positive_iou else match.positive
    indices, sampled = sampler(
        sample_key,
        positive=high & valid,
        negative=(match.negative | (match.positive & ~high)) & valid,
        iou=match.iou,
        matched=match.index,
    )
    positive = match.positive[indices] & sampled
    matched = match.index[indices]
    return Rois(
        boxes=jnp.where(sampled[:, None], boxes[indices], 0.0),
        labels=jnp.where(positive, truth.labels[matched], classes),
        matched=matched,
        targets=truth.boxes[matched],
        iou=match.iou[indices],
        positive=positive,
        valid=sampled,
    )
