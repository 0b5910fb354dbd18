"""Mask targets: ground-truth masks, stored in the frames of their own boxes, seen from ROIs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def crop_masks(
    masks: UInt8[Array, "m c c"],
    gt_boxes: Float[Array, "m 4"],
    rois: Float[Array, "r 4"],
    matched: Int[Array, " r"],
    *,
    output_size: int = 28,
    samples: int = 2,
) -> Float[Array, "r s s"]:
    """The mask of each ROI's ground truth, resampled into the frame of the ROI.

    Each bin of the output is the mean of the bilinear values of the stored mask at a grid of points
    within it, as in ROIAlign; in [0, 1], for the caller to threshold at 0.5.
    Outside the ground-truth box it is 0; a ground-truth box of no area gives zeros everywhere.

    Args:
      masks: 0 or 1, each mask filling the frame of its own box.
      gt_boxes: The boxes of the masks.
      rois: Where the targets are wanted.
      matched: Index of the ground truth of each ROI; finite nonsense where there is none.
      output_size: Side s of the output.
      samples: Points a bin, along each side; 1 looks only at the centre (the published series).
    """
    stored = masks.shape[-1]
    boxes = gt_boxes[matched]
    rows, columns = (
        _interpolation(boxes[:, axis::2], rois[:, axis::2], stored, output_size, samples)
        for axis in (1, 0)
    )
    # A TPU would multiply float32 in bfloat16, and a GPU in TF32, unless told otherwise.
    precise = jax.lax.Precision.HIGHEST
    picked = masks[matched].astype(jnp.float32)
    half = jnp.einsum("rsy,ryx->rsx", rows, picked, precision=precise)
    return jnp.einsum("rsx,rtx->rst", half, columns, precision=precise)


def _interpolation(
    box: Float[Array, "r 2"],
    roi: Float[Array, "r 2"],
    stored: int,
    output_size: int,
    samples: int,
) -> Float[Array, "r s c"]:
    """Along one axis, the weight of every stored cell in every bin of the output.

    `box` and `roi` are intervals (start, end) in pixels.
    """
    points = (jnp.arange(output_size * samples, dtype=jnp.float32) + 0.5) / (output_size * samples)
    position = roi[:, :1] + points[None, :] * (roi[:, 1:] - roi[:, :1])
    inside = (position >= box[:, :1]) & (position <= box[:, 1:])
    length = box[:, 1:] - box[:, :1]
    there = length > 0.0
    fraction = (position - box[:, :1]) / jnp.where(there, length, 1.0)
    # Half-pixel frame: the centre of stored cell j lies at j. Within half a cell of the border the
    # outermost cell's value holds, so that a full mask is 1 on exactly the box.
    position = jnp.clip(fraction * stored - 0.5, 0.0, stored - 1.0)
    cell = jnp.arange(stored, dtype=jnp.float32)
    weights = jnp.maximum(1.0 - jnp.abs(position[:, :, None] - cell[None, None, :]), 0.0)
    weights = jnp.where((inside & there)[:, :, None], weights, 0.0)
    return weights.reshape(weights.shape[0], output_size, samples, stored).mean(axis=2)
