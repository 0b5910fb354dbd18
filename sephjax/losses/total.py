"""All loss terms of a batch and their sum."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sephjax.losses import roi as roi_losses
from sephjax.losses import rpn as rpn_losses
from sephjax.types import TrainOutputs

Weights = tuple[float, float, float, float]
_STAGE = "_stage"


def total_loss(
    outputs: TrainOutputs,
    size: Float[Array, "b 2"],
    *,
    rpn: Mapping[str, Any],
    roi: Mapping[str, Any],
    scales: Mapping[str, float],
    later: Sequence[Weights] = (),
) -> dict[str, Float[Array, ""]]:
    """`loss` and its terms: `loss/rpn_cls`, `rpn_box`, `roi_cls`, `roi_box`, `roi_iou` and `mask`.

    A cascade has the terms of ROIs once a stage: `loss/roi_cls_stage0`, `loss/roi_box_stage0`, ...

    Args:
        outputs: of the detector in training.
        size: valid height and width of every image.
        rpn: arguments of `rpn_losses` beyond the outputs.
        roi: arguments of `box_losses` beyond the outputs.
        scales: factor of each term, the same for every stage; terms are reported scaled, so that
            they sum to `loss`.
        later: weights of the deltas of each stage of a cascade but the first.
    """
    terms = rpn_losses.rpn_losses(
        outputs.rpn, outputs.rpn_targets, outputs.anchors, size=size, **rpn
    )
    terms |= _roi_terms(outputs, size, roi, later)
    if outputs.mask_sum is not None:
        positives = jnp.sum(outputs.rois.positive, dtype=jnp.float32)
        terms["mask"] = outputs.mask_sum / jnp.maximum(positives, 1.0)
    factor = lambda name: scales[name.partition(_STAGE)[0]]
    scaled = {f"loss/{name}": factor(name) * value for name, value in terms.items()}
    return {"loss": jnp.sum(jnp.stack(list(scaled.values()))), **scaled}


def _roi_terms(
    outputs: TrainOutputs, size: Array, roi: Mapping[str, Any], later: Sequence[Weights]
) -> dict[str, Float[Array, ""]]:
    first = roi_losses.box_losses(outputs.boxes, outputs.rois, size=size, **roi)
    if not later:
        return first
    stages = [first]
    for (rois, boxes), weights in zip(outputs.later, later, strict=True):
        options = {**roi, "weights": weights}
        stages.append(roi_losses.box_losses(boxes, rois, size=size, **options))
    return {
        f"{name}{_STAGE}{i}": value
        for i, terms in enumerate(stages)
        for name, value in terms.items()
    }
