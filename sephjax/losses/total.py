"""All loss terms of a batch and their sum."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sephjax.losses import roi as roi_losses
from sephjax.losses import rpn as rpn_losses
from sephjax.types import TrainOutputs


def total_loss(
    outputs: TrainOutputs,
    size: Float[Array, "b 2"],
    *,
    rpn: Mapping[str, Any],
    roi: Mapping[str, Any],
    scales: Mapping[str, float],
) -> dict[str, Float[Array, ""]]:
    """`loss` and its terms: `loss/rpn_cls`, `rpn_box`, `roi_cls`, `roi_box` and `mask`.

    Args:
        outputs: of the detector in training.
        size: valid height and width of every image.
        rpn: arguments of `rpn_losses` beyond the outputs.
        roi: arguments of `box_losses` beyond the outputs.
        scales: factor of each term; terms are reported scaled, so that they sum to `loss`.
    """
    terms = rpn_losses.rpn_losses(
        outputs.rpn, outputs.rpn_targets, outputs.anchors, size=size, **rpn
    )
    terms |= roi_losses.box_losses(outputs.boxes, outputs.rois, size=size, **roi)
    if outputs.mask_sum is not None:
        positives = jnp.sum(outputs.rois.positive, dtype=jnp.float32)
        terms["mask"] = outputs.mask_sum / jnp.maximum(positives, 1.0)
    scaled = {f"loss/{name}": scales[name] * value for name, value in terms.items()}
    return {"loss": jnp.sum(jnp.stack(list(scaled.values()))), **scaled}
