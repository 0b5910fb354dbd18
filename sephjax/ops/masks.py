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
) -> Float[Array, "r s s"]:
    """The mask of each ROI's ground truth, resampled into the frame of the ROI.

    Each bin of the output is the part of its area that the stored mask covers, its cells taken as
    small rectangles; in [0, 1], for the caller to threshold at 0.5. Outside the ground-truth box it
    is 0; a ground-truth box or a ROI of no area gives zeros everywhere.
    Source: Mask R-CNN (He et al. 2017), section 3.1; detectron2 and torchvision average samples of
    a mask of the whole image instead, which its pixels limit.

    Args:
      masks: 0 or 1, each mask filling the frame of its own box.
      gt_boxes: The boxes of the masks.
      rois: Where the targets are wanted.
      matched: Index of the ground truth of each ROI; finite nonsense where there is none.
      output_size: Side s of the output.
    """
    stored = masks.shape[-1]
    boxes = gt_boxes[matched]
    rows, columns = (
        _shares(boxes[:, axis::2], rois[:, axis::2], stored, output_size) for axis in (1, 0)
    )
    # A TPU would multiply float32 in bfloat16, and a GPU in TF32, unless told otherwise.
    precise = jax.lax.Precision.HIGHEST
    picked = masks[matched].astype(jnp.float32)
    half = jnp.einsum("rsy,ryx->rsx", rows, picked, precision=precise)
    return jnp.einsum("rsx,rtx->rst", half, columns, precision=precise)


def _shares(
    box: Float[Array, "r 2"], roi: Float[Array, "r 2"], stored: int, output_size: int
) -> Float[Array, "r s c"]:
    """Along one axis, the share of every bin of the output that lies in each stored cell.

    `box` and `roi` are intervals (start, end) in pixels.
    """
    length = box[:, 1:] - box[:, :1]
    there = length > 0.0
    edges = jnp.arange(output_size + 1, dtype=jnp.float32)[None, :] / output_size
    edges = roi[:, :1] + edges * (roi[:, 1:] - roi[:, :1]) - box[:, :1]
    edges = edges / jnp.where(there, length, 1.0) * stored  # in cells
    begin, end = edges[:, :-1, None], edges[:, 1:, None]
    cell = jnp.arange(stored, dtype=jnp.float32)[None, None, :]
    overlap = jnp.minimum(end, cell + 1.0) - jnp.maximum(begin, cell)
    there = there[:, :, None] & (end > begin)
    return jnp.where(there, jnp.maximum(overlap, 0.0) / jnp.where(there, end - begin, 1.0), 0.0)
