"""RPN losses over the whole batch: named scalars with their normalisers."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sephjax.losses import elementwise
from sephjax.ops import boxes as box_ops
from sephjax.types import RpnOutputs, RpnTargets


def rpn_losses(
    outputs: RpnOutputs,
    targets: RpnTargets,
    anchors: Float[Array, "n 4"],
    *,
    box_loss: dict[str, Any],
    weights: tuple[float, float, float, float],
    samples: int,
    normalizer: str,
) -> dict[str, Float[Array, ""]]:
    """`rpn_cls` and `rpn_box`.

    Both are sums over the sampled anchors divided by images * samples ("images_times_samples":
    detectron2 and the series) or by the number really sampled ("sampled": torchvision). Without
    positives `rpn_box` is 0 with a zero gradient.
    """
    sampled = jnp.logical_or(targets.positive, targets.negative)
    if normalizer == "images_times_samples":
        count = jnp.float32(samples * sampled.shape[0])
    else:
        count = jnp.maximum(jnp.sum(sampled, dtype=jnp.float32), 1.0)
    entropy = elementwise.sigmoid_cross_entropy(
        outputs.logits, targets.positive.astype(jnp.float32)
    )
    rows = _box_rows(outputs, targets, anchors, box_loss, weights)
    return {
        "rpn_cls": jnp.sum(jnp.where(sampled, entropy, 0.0)) / count,
        "rpn_box": jnp.sum(jnp.where(targets.positive, rows, 0.0)) / count,
    }


def _box_rows(
    outputs: RpnOutputs, targets: RpnTargets, anchors: Array, box_loss: dict[str, Any], weights: Any
) -> Float[Array, "b n"]:
    shape = targets.boxes.shape
    references = jnp.broadcast_to(anchors[None], shape).reshape(-1, 4)
    # A row that is no positive is computed on its own anchor: finite, then masked.
    goal = jnp.where(targets.positive[:, :, None], targets.boxes, anchors[None]).reshape(-1, 4)
    deltas = outputs.deltas.reshape(-1, 4)
    if box_loss["name"] == "giou":
        rows = elementwise.giou_loss(box_ops.decode(references, deltas, weights=weights), goal)
    else:
        error = deltas - box_ops.encode(references, goal, weights=weights)
        rows = jnp.sum(elementwise.smooth_l1(error, beta=box_loss["beta"]), axis=-1)
    return rows.reshape(shape[:2])
