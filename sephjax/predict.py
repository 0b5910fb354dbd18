"""From the box head's raw outputs to detections, on fixed shapes; one image at a time."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sephjax.ops import boxes as box_ops
from sephjax.ops import nms as nms_ops
from sephjax.types import BoxOutputs, Detections, Proposals

Weights = tuple[float, float, float, float]
IouScore = Literal["none", "product", "order"]


def detections(  # noqa: PLR0913, the keys of config.test
    outputs: BoxOutputs,
    proposals: Proposals,
    size: Float[Array, "2"],
    *,
    weights: Weights,
    score_threshold: float,
    nms: float,
    nms_inclusive: bool,
    min_size: float,
    detections: int,
    candidates: int,
    one_class_per_box: bool,
    iou_score: IouScore = "none",
) -> Detections:
    """Scores, thresholds, decodes and suppresses by class; one image.

    Args:
        outputs: logits [n, k+1] (background last), deltas [n, k or 1, 4], with an IoU branch its
            logits [n].
        proposals: [n].
        size: valid height and width; boxes are clipped to it.
        weights: of the deltas.
        score_threshold: a probability at or under it is no detection.
        nms: IoU beyond which the lower score of the same class goes.
        nms_inclusive: suppress at IoU equal to `nms` too.
        min_size: a box with a side shorter than this, pixels, or of 0 is no detection.
        detections: rows of the result, best first.
        candidates: best (box, class) pairs that enter NMS; what lies beyond is never detected.
        one_class_per_box: keep only the best foreground class of a proposal.
        iou_score: what the IoU branch is for (EXPERIMENTS 5.4). "none": nothing. "product": every
            probability is multiplied by sigmoid(IoU logit), first of all. "order": boxes are
            ranked by sigmoid(IoU logit), in NMS and in the result, which is then best first by it;
            threshold, class and reported score go by the probability.

    No valid proposal gives no valid detection.
    """
    scores, rank = _scores(outputs, iou_score)
    classes = scores.shape[1]
    usable = proposals.valid[:, None] & (scores > score_threshold)
    if one_class_per_box:
        usable &= jax.nn.one_hot(jnp.argmax(scores, axis=-1), classes, dtype=bool)
    ranked = jnp.where(usable, rank, -1.0).reshape(-1)
    best, order = jax.lax.top_k(ranked, min(candidates, ranked.shape[0]))
    row, label = order // classes, (order % classes).astype(jnp.int32)
    column = jnp.zeros_like(label) if outputs.deltas.shape[1] == 1 else label
    boxes = box_ops.decode(proposals.boxes[row], outputs.deltas[row, column], weights=weights)
    boxes = box_ops.clip(boxes, size)
    alive = (best >= 0.0) & box_ops.nonempty(boxes, min_size)
    rows = min(detections, best.shape[0])
    kept, valid = nms_ops.nms(
        boxes, best, alive, threshold=nms, max_output=rows, classes=label, inclusive=nms_inclusive
    )
    blank = lambda leaf: jnp.where(valid[:, None] if leaf.ndim == 2 else valid, leaf[kept], 0)
    score = scores.reshape(-1)[order]
    return Detections(blank(boxes), blank(score), blank(label), valid, None)


def _scores(outputs: BoxOutputs, iou_score: IouScore) -> tuple[Array, Array]:
    """Of every foreground class of every box: its score, and what it is ranked by, [n, k]."""
    scores = jax.nn.softmax(outputs.logits, axis=-1)[:, :-1]
    if iou_score == "none":
        return scores, scores
    assert outputs.iou is not None  # as `check` sees to
    iou = jax.nn.sigmoid(outputs.iou)[:, None]
    if iou_score == "order":
        return scores, jnp.broadcast_to(iou, scores.shape)
    return scores * iou, scores * iou
