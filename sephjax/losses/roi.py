"""Losses of the box and mask heads over the whole batch: named scalars with their normalisers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sephjax.losses import elementwise
from sephjax.ops import boxes as box_ops
from sephjax.types import BoxOutputs, Rois

# The losses that compare boxes, by the name that `roi.box_loss` gives them.
OVERLAP = elementwise.OVERLAP | {"weighted_giou": elementwise.giou_loss}
FOCAL = {"alpha": 0.25, "gamma": 2.0}  # of the IoU branch


def class_weight(iou: Float[Array, "*s"], kind: str) -> Float[Array, "*s"]:
    """Weight of a ROI's class loss by its IoU with its best ground truth (EXPERIMENTS 4.5).

    quadratic: min(100 (IoU - 0.5)^2, 1), 0 at 0.5; linear: 4 |IoU - 0.5|, unclamped; none: 1.
    """
    if kind == "quadratic":
        return jnp.minimum(100.0 * jnp.square(iou - 0.5), 1.0)
    return 4.0 * jnp.abs(iou - 0.5) if kind == "linear" else jnp.ones_like(iou)


def iou_loss_v0(
    logits: Float[Array, "b r"], rois: Rois, giou: Float[Array, "b r"]
) -> Float[Array, ""]:
    """IoU branch, version 0 (EXPERIMENTS 4.5): each ROI's own IoU with its best ground truth.

    Mean over all valid ROIs of the focal cross-entropy on that soft label. 0 without any.
    """
    del giou  # it asks about the ROI, not about the predicted box
    return _mean(elementwise.sigmoid_focal(logits, rois.iou, **FOCAL), rois.valid)


def iou_loss_v1(
    logits: Float[Array, "b r"], rois: Rois, giou: Float[Array, "b r"], *, negative_weight: float
) -> Float[Array, ""]:
    """IoU branch, version 1 (EXPERIMENTS 4.5): GIoU of the predicted box with its ground truth.

    Mean focal cross-entropy over the matcher's positives, whose label is the GIoU, not clamped and
    without a gradient, plus `negative_weight` times its mean over the other valid ROIs, whose label
    is 0. A mean over nothing is 0.
    """
    label = jnp.where(rois.positive, jax.lax.stop_gradient(giou), 0.0)
    rows = elementwise.sigmoid_focal(logits, label, **FOCAL)
    negatives = _mean(rows, rois.valid & ~rois.positive)
    return _mean(rows, rois.positive) + negative_weight * negatives


def _mean(rows: Float[Array, "b r"], counted: Bool[Array, "b r"]) -> Float[Array, ""]:
    count = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
    return jnp.sum(jnp.where(counted, rows, 0.0)) / count


# (IoU logits, ROIs, GIoU of the predicted boxes) -> loss, by the name that `roi.iou_branch` gives.
IOU_LOSSES = {"v0": iou_loss_v0, "v1": iou_loss_v1}


def box_losses(
    outputs: BoxOutputs,
    rois: Rois,
    *,
    box_loss: dict[str, Any],
    weights: tuple[float, float, float, float],
    class_weighting: str,
    size: Float[Array, "b 2"],
    positive_iou: float = 0.0,
    iou_loss: Callable[..., Float[Array, ""]] | None = None,
) -> dict[str, Float[Array, ""]]:
    """`roi_cls` and `roi_box`, both divided by the number of sampled ROIs (background included).

    With an IoU branch also `roi_iou`, see `IOU_LOSSES`.

    Args:
        outputs: logits [b, r, k+1], deltas [b, r, k or 1, 4], IoU logits [b, r] if `iou_loss`.
        rois: the sampled ROIs.
        box_loss: {"name": "smooth_l1", "beta"} on deltas, or {"name": "giou"}, "diou" or "ciou" on
            boxes clipped to the image; "weighted_giou" multiplies a ROI whose IoU is 0.5 or less by
            that IoU.
        weights: of the deltas.
        class_weighting: see `class_weight`; the sum is divided by the count, not by the weights.
        size: valid height and width of every image, pixels.
        positive_iou: 0, or the IoU up to which a positive is background to the class loss
            (EXPERIMENTS 4.2); the box loss takes every positive.
        iou_loss: of the IoU branch, with its options bound; None: there is no branch.

    No positives: `roi_box` is 0 with a zero gradient.
    """
    count = jnp.maximum(jnp.sum(rois.valid, dtype=jnp.float32), 1.0)
    labels = rois.labels
    if positive_iou:
        labels = jnp.where(rois.iou > positive_iou, labels, outputs.logits.shape[-1] - 1)
    entropy = elementwise.softmax_cross_entropy(outputs.logits, labels)
    weight = jax.lax.stop_gradient(class_weight(rois.iou, class_weighting))
    rows = _box_rows(outputs, rois, box_loss, weights, size)
    terms = {
        "roi_cls": jnp.sum(jnp.where(rois.valid, weight * entropy, 0.0)) / count,
        "roi_box": jnp.sum(jnp.where(rois.positive, rows, 0.0)) / count,
    }
    if iou_loss is not None:
        decoded = _decoded(rois, _own(outputs, rois), weights, size)
        terms["roi_iou"] = iou_loss(outputs.iou, rois, box_ops.giou(decoded, _goal(rois)))
    return terms


def _box_rows(
    outputs: BoxOutputs, rois: Rois, box_loss: dict[str, Any], weights: Any, size: Array
) -> Float[Array, "b r"]:
    deltas, goal, name = _own(outputs, rois), _goal(rois), box_loss["name"]
    if overlap := OVERLAP.get(name):
        rows = overlap(_decoded(rois, deltas, weights, size), goal)
        return rows * jnp.where(rois.iou > 0.5, 1.0, rois.iou) if name == "weighted_giou" else rows
    flat = lambda boxes: boxes.reshape(-1, 4)
    wanted = box_ops.encode(flat(rois.boxes), flat(goal), weights=weights).reshape(goal.shape)
    return jnp.sum(elementwise.smooth_l1(deltas - wanted, beta=box_loss["beta"]), axis=-1)


def _own(outputs: BoxOutputs, rois: Rois) -> Float[Array, "b r 4"]:
    """The deltas of each ROI's own class."""
    kinds = outputs.deltas.shape[2]
    # Background ROIs point past the last class: they read row 0 and are masked by the caller.
    own = jnp.where(rois.positive & (kinds > 1), rois.labels, 0)
    return jnp.take_along_axis(outputs.deltas, own[:, :, None, None], axis=2)[:, :, 0]


def _goal(rois: Rois) -> Float[Array, "b r 4"]:
    return jnp.where(rois.positive[:, :, None], rois.targets, rois.boxes)


def _decoded(rois: Rois, deltas: Array, weights: Any, size: Array) -> Float[Array, "b r 4"]:
    """The predicted boxes, clipped to the picture."""
    flat = lambda boxes: boxes.reshape(-1, 4)
    decoded = box_ops.decode(flat(rois.boxes), flat(deltas), weights=weights)
    return jax.vmap(box_ops.clip)(decoded.reshape(deltas.shape), size)


def mask_loss(
    logits: Float[Array, "b r s s"], targets: Float[Array, "b r s s"], positive: Bool[Array, "b r"]
) -> Float[Array, ""]:
    """Sum over positives of the mean binary cross-entropy of a mask's pixels.

    The caller divides by the number of positives of the whole batch.
    """
    rows = jnp.mean(elementwise.sigmoid_cross_entropy(logits, targets), axis=(-2, -1))
    return jnp.sum(jnp.where(positive, rows, 0.0))
