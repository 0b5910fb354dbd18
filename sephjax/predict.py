"""From the box head's raw outputs to detections, on fixed shapes; one image at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sephjax.ops import boxes as box_ops
from sephjax.ops import nms as nms_ops
from sephjax.types import BoxOutputs, Detections, Proposals

Weights = tuple[float, float, float, float]


def detections(  # noqa: PLR0913, the keys of config.test
    outputs: BoxOutputs,
    proposals: Proposals,
    size: Float[Array, "2"],
    *,
    weights: Weights,
    score_threshold: float,
    nms: float,
    nms_inclusive: bool,
    detections: int,
    candidates: int,
    one_class_per_box: bool,
) -> Detections:
    """Scores, thresholds, decodes and suppresses by class; one image.

    Args:
        outputs: logits [n, k+1] (background last), deltas [n, k or 1, 4].
        proposals: [n].
        size: valid height and width; boxes are clipped to it.
        weights: of the deltas.
        score_threshold: a probability at or under it is no detection.
        nms: IoU beyond which the lower score of the same class goes.
        nms_inclusive: suppress at IoU equal to `nms` too.
        detections: rows of the result, best first.
        candidates: best (box, class) pairs that enter NMS; what lies beyond is never detected.
        one_class_per_box: keep only the best foreground class of a proposal.

    No valid proposal gives no valid detection.
    """
    classes = outputs.logits.shape[-1] - 1
    scores = jax.nn.softmax(outputs.logits, axis=-1)[:, :classes]
    usable = proposals.valid[:, None] & (scores > score_threshold)
    if one_class_per_box:
        usable &= jax.nn.one_hot(jnp.argmax(scores, axis=-1), classes, dtype=bool)
    ranked = jnp.where(usable, scores, -1.0).reshape(-1)
    best, order = jax.lax.top_k(ranked, min(candidates, ranked.shape[0]))
    row, label = order // classes, (order % classes).astype(jnp.int32)
    column = jnp.zeros_like(label) if outputs.deltas.shape[1] == 1 else label
    boxes = box_ops.decode(proposals.boxes[row], outputs.deltas[row, column], weights=weights)
    boxes = box_ops.clip(boxes, size)
    alive = (best > score_threshold) & box_ops.nonempty(boxes)
    rows = min(detections, best.shape[0])
    kept, valid = nms_ops.nms(
        boxes, best, alive, threshold=nms, max_output=rows, classes=label, inclusive=nms_inclusive
    )
    blank = lambda leaf: jnp.where(valid[:, None] if leaf.ndim == 2 else valid, leaf[kept], 0)
    return Detections(blank(boxes), blank(best), blank(label), valid, None)
