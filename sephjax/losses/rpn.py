"""RPN losses over the whole batch: named scalars with their normalisers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sephjax.losses import elementwise
from sephjax.ops import boxes as box_ops
from sephjax.types import RpnOutputs, RpnTargets


def rpn_losses(  # noqa: PLR0913, what was said, what should be, and the choices of the loss
    outputs: RpnOutputs,
    targets: RpnTargets,
    anchors: Float[Array, "n 4"],
    *,
    class_loss: dict[str, Any] | None = None,
    box_loss: dict[str, Any],
    weights: tuple[float, float, float, float],
    samples: int,
    normalizer: str,
    size: Float[Array, "b 2"],
) -> dict[str, Float[Array, ""]]:
    """`rpn_cls` and `rpn_box`.

    Both are sums over the sampled anchors divided by images * samples ("images_times_samples":
    detectron2 and the series), by the number really sampled ("sampled": torchvision) or by that of
    the positives, at least 1 ("positives": RetinaNet). `class_loss` is `{"name": "sigmoid"}` (None:
    the same) or `{"name": "focal", "alpha", "gamma"}`. Without
    positives `rpn_box` is 0 with a zero gradient. With `box_loss` "giou", "diou" or "ciou" the
    decoded boxes are clipped to the picture, whose height and width are `size` (EXPERIMENTS 3.5).
    """
    sampled = jnp.logical_or(targets.positive, targets.negative)
    if normalizer == "images_times_samples":
        count = jnp.float32(samples * sampled.shape[0])
    else:
        counted = targets.positive if normalizer == "positives" else sampled
        count = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
    entropy = _entropy(class_loss, outputs.logits, targets.positive.astype(jnp.float32))
    if overlap := elementwise.OVERLAP.get(box_loss["name"]):
        rows = overlap(_decoded(outputs, anchors, weights, size), _goal(targets, anchors))
    else:
        rows = _smooth_l1_rows(outputs, targets, anchors, weights, box_loss["beta"])
    return {
        "rpn_cls": jnp.sum(jnp.where(sampled, entropy, 0.0)) / count,
        "rpn_box": jnp.sum(jnp.where(targets.positive, rows, 0.0)) / count,
    }


def _entropy(
    choice: dict[str, Any] | None, logits: Float[Array, "b n"], wanted: Float[Array, "b n"]
) -> Float[Array, "b n"]:
    if choice is None or choice["name"] == "sigmoid":
        return elementwise.sigmoid_cross_entropy(logits, wanted)
    return elementwise.sigmoid_focal(logits, wanted, alpha=choice["alpha"], gamma=choice["gamma"])


def _goal(targets: RpnTargets, anchors: Array) -> Float[Array, "b n 4"]:
    # A row that is no positive is computed on its own anchor: finite, then masked.
    return jnp.where(targets.positive[:, :, None], targets.boxes, anchors[None])


def _decoded(
    outputs: RpnOutputs, anchors: Array, weights: Any, size: Array
) -> Float[Array, "b n 4"]:
    references = jnp.broadcast_to(anchors[None], outputs.deltas.shape)
    decoded = box_ops.decode(references, outputs.deltas, weights=weights)
    return jax.vmap(box_ops.clip)(decoded, size)


def _smooth_l1_rows(
    outputs: RpnOutputs, targets: RpnTargets, anchors: Array, weights: Any, beta: float
) -> Float[Array, "b n"]:
    references = jnp.broadcast_to(anchors[None], outputs.deltas.shape)
    wanted = box_ops.encode(references, _goal(targets, anchors), weights=weights)
    return jnp.sum(elementwise.smooth_l1(outputs.deltas - wanted, beta=beta), axis=-1)
