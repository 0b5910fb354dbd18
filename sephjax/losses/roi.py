"""Losses of the box and mask heads over the whole batch: named scalars with their normalisers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sephjax.losses import elementwise
from sephjax.ops import boxes as box_ops
from sephjax.types import BoxOutputs, Rois


def class_weight(iou: Float[Array, "*s"], kind: str) -> Float[Array, "*s"]:
    """Weight of a ROI's class loss by its IoU with its best ground truth (EXPERIMENTS 4.5).

    quadratic: min(100 (IoU - 0.5)^2, 1), 0 at 0.5; linear: 4 |IoU - 0.5|, unclamped; none: 1.
    """
    if kind == "quadratic":
        return jnp.minimum(100.0 * jnp.square(iou - 0.5), 1.0)
    return 4.0 * jnp.abs(iou - 0.5) if kind == "linear" else jnp.ones_like(iou)


def box_losses(
    outputs: BoxOutputs,
    rois: Rois,
    *,
    box_loss: dict[str, Any],
    weights: tuple[float, float, float, float],
    class_weighting: str,
    size: Float[Array, "b 2"],
) -> dict[str, Float[Array, ""]]:
    """`roi_cls` and `roi_box`, both divided by the number of sampled ROIs (background included).

    Args:
        outputs: logits [b, r, k+1] and deltas [b, r, k or 1, 4].
        rois: the sampled ROIs.
        box_loss: {"name": "smooth_l1", "beta"} on deltas, or {"name": "giou"}, "diou" or "ciou" on
            boxes clipped to the image.
        weights: of the deltas.
        class_weighting: see `class_weight`; the sum is divided by the count, not by the weights.
        size: valid height and width of every image, pixels.

    No positives: `roi_box` is 0 with a zero gradient.
    """
    count = jnp.maximum(jnp.sum(rois.valid, dtype=jnp.float32), 1.0)
    entropy = elementwise.softmax_cross_entropy(outputs.logits, rois.labels)
    weight = jax.lax.stop_gradient(class_weight(rois.iou, class_weighting))
    rows = _box_rows(outputs, rois, box_loss, weights, size)
    return {
        "roi_cls": jnp.sum(jnp.where(rois.valid, weight * entropy, 0.0)) / count,
        "roi_box": jnp.sum(jnp.where(rois.positive, rows, 0.0)) / count,
    }


def _box_rows(
    outputs: BoxOutputs, rois: Rois, box_loss: dict[str, Any], weights: Any, size: Array
) -> Float[Array, "b r"]:
    kinds = outputs.deltas.shape[2]
    # Background ROIs point past the last class: they read row 0 and are masked by the caller.
    own = jnp.where(rois.positive & (kinds > 1), rois.labels, 0)
    deltas = jnp.take_along_axis(outputs.deltas, own[:, :, None, None], axis=2)[:, :, 0]
    goal = jnp.where(rois.positive[:, :, None], rois.targets, rois.boxes)
    flat = lambda boxes: boxes.reshape(-1, 4)
    if overlap := elementwise.OVERLAP.get(box_loss["name"]):
        decoded = box_ops.decode(flat(rois.boxes), flat(deltas), weights=weights).reshape(
            goal.shape
        )
        clipped = jax.vmap(box_ops.clip)(decoded, size)
        return overlap(clipped, goal)
    wanted = box_ops.encode(flat(rois.boxes), flat(goal), weights=weights).reshape(goal.shape)
    return jnp.sum(elementwise.smooth_l1(deltas - wanted, beta=box_loss["beta"]), axis=-1)


def mask_loss(
    logits: Float[Array, "b r s s"], targets: Float[Array, "b r s s"], positive: Bool[Array, "b r"]
) -> Float[Array, ""]:
    """Sum over positives of the mean binary cross-entropy of a mask's pixels.

    The caller divides by the number of positives of the whole batch.
    """
    rows = jnp.mean(elementwise.sigmoid_cross_entropy(logits, targets), axis=(-2, -1))
    return jnp.sum(jnp.where(positive, rows, 0.0))
