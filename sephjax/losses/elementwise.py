"""Losses by element: nothing here reduces."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sephjax.ops import boxes as box_ops


def sigmoid_cross_entropy(
    logits: Float[Array, "*s"], targets: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Binary cross-entropy on logits; targets in [0, 1]."""
    # max(x, 0) - x t + log(1 + exp(-|x|)): no overflow on either side.
    return jnp.maximum(logits, 0.0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def sigmoid_focal(
    logits: Float[Array, "*s"], targets: Float[Array, "*s"], *, alpha: float, gamma: float
) -> Float[Array, "*s"]:
    """Focal loss on logits (arXiv 1708.02002, section 3.2), `gamma` at least 1; targets in [0, 1].

    `alpha_t (1 - p_t)^gamma` times the cross-entropy, with `p_t = t p + (1 - t)(1 - p)` and
    `alpha_t = t alpha + (1 - t)(1 - alpha)`; `torchvision.ops.sigmoid_focal_loss`. With `gamma` 2 a
    target may also be below 0, a GIoU say; the loss is then not bounded below.
    """
    p = jax.nn.sigmoid(logits)
    miss = targets * (1.0 - p) + (1.0 - targets) * p  # 1 - p_t
    share = targets * alpha + (1.0 - targets) * (1.0 - alpha)
    return share * miss**gamma * sigmoid_cross_entropy(logits, targets)


def softmax_cross_entropy(
    logits: Float[Array, "*s k"], labels: Int[Array, "*s"]
) -> Float[Array, "*s"]:
    """Cross-entropy of integer labels."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def smooth_l1(error: Float[Array, "*s"], *, beta: float) -> Float[Array, "*s"]:
    """Huber-like loss of Fast R-CNN: quadratic below `beta`, linear above; beta 0 is |error|."""
    size = jnp.abs(error)
    if beta == 0.0:
        return size
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def giou_loss(predicted: Float[Array, "*s 4"], target: Float[Array, "*s 4"]) -> Float[Array, "*s"]:
    """1 - GIoU, in [0, 2] (Rezatofighi et al., 2019)."""
    return 1.0 - box_ops.giou(predicted, target)


def diou_loss(predicted: Float[Array, "*s 4"], target: Float[Array, "*s 4"]) -> Float[Array, "*s"]:
    """1 - DIoU, in [0, 2] (Zheng et al., 2020)."""
    return 1.0 - box_ops.diou(predicted, target)


def ciou_loss(predicted: Float[Array, "*s 4"], target: Float[Array, "*s 4"]) -> Float[Array, "*s"]:
    """1 - CIoU, in [0, 3] (Zheng et al., 2020)."""
    return 1.0 - box_ops.ciou(predicted, target)


# The losses that compare boxes, by the name that `rpn.box_loss` and `roi.box_loss` give them.
OVERLAP = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}
