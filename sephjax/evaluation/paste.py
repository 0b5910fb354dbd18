"""Pastes mask probabilities from the frames of their boxes into images, as COCO run lengths.

On the host, in NumPy: only the region of each box is computed, and no image-sized array is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def paste(
    mask: np.ndarray, box: np.ndarray, size: tuple[int, int], threshold: float = 0.5
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resamples one mask onto the pixels of its box and thresholds it.

    The value of pixel x is the bilinear one at `(x + 0.5 - x1) / (x2 - x1) * s - 0.5` of the mask,
    whose outside is zero; the pixels of the box, rounded outwards and cut at the image, are given
    (no pixel beyond them reaches a threshold above one half).
    Source: detectron2 `paste_masks_in_image`.

    Args:
      mask: float [s, s], probabilities.
      box: float [4], pixels of the image.
      size: Height and width of the image.
      threshold: A pixel whose value reaches it is 1.

    Returns:
      The uint8 region [h, w] and the pixel (x0, y0) where it begins. A box of no area, or outside
      the image, gives a region of no pixels at (0, 0).
    """
    columns, begin = _paste_columns(mask, box, size, threshold)
    return np.ascontiguousarray(columns.T).view(np.uint8), begin


def paste_to_rle(
    masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Pastes masks as `paste` does, into COCO's compressed run lengths.

    Args:
      masks: float [d, s, s], probabilities.
      boxes: float [d, 4], pixels of the image.
      size: Height and width of the image.
      threshold: A pixel whose value reaches it belongs to the object.

    Returns:
      `{"size": [h, w], "counts": bytes}` for each mask, equal to what pycocotools gives for the
      whole image.
    """
    height, width = size
    runs: Any = [
        {
            "size": [height, width],
            "counts": _run_lengths(*_paste_columns(m, b, size, threshold), size),
        }
        for m, b in zip(masks, boxes, strict=True)
    ]
    return coco_mask.frPyObjects(runs, height, width) if runs else []


def shapes_to_rle(masks: np.ndarray, threshold: float = 0.5) -> list[dict[str, Any]]:
    """The run lengths of masks float [d, s, s] as they are, each in the frame of its box."""
    bits = (np.asarray(masks) >= threshold).transpose(1, 2, 0)
    encode: Any = coco_mask.encode  # its stubs know one of its call forms only
    return encode(np.asfortranarray(bits, np.uint8)) if len(masks) else []


def _paste_columns(
    mask: np.ndarray, box: np.ndarray, size: tuple[int, int], threshold: float
) -> tuple[np.ndarray, tuple[int, int]]:
    """The pasted region as bool [w, h], column by column as COCO counts, and where it begins."""
    x1, y1, x2, y2 = (float(edge) for edge in box)
    x0, across = _weights(x1, x2, size[1], mask.shape[1])
    y0, down = _weights(y1, y2, size[0], mask.shape[0])
    if across.size == 0 or down.size == 0:
        return np.zeros((0, 0), bool), (0, 0)
    # The weights are separable, so two small products replace a gather at every pixel.
    return (across @ np.asarray(mask, np.float32).T) @ down.T >= threshold, (x0, y0)


def _weights(low: float, high: float, limit: int, cells: int) -> tuple[int, np.ndarray]:
    """First pixel of an interval, and float32 [pixels, cells]: the weight of each cell in each."""
    begin, end = max(int(np.floor(low)), 0), min(int(np.ceil(high)), limit)
    if not high > low or end <= begin:
        return 0, np.zeros((0, cells), np.float32)
    pixel = np.arange(begin, end, dtype=np.float64) + 0.5
    position = ((pixel - low) / (high - low) * cells - 0.5).astype(np.float32)
    distance = np.abs(position[:, None] - np.arange(cells, dtype=np.float32)[None, :])
    return begin, np.maximum(1.0 - distance, 0.0)


def _run_lengths(
    columns: np.ndarray, begin: tuple[int, int], size: tuple[int, int]
) -> Sequence[int]:
    """COCO's run lengths, zeros first, of an image that is 0 outside the given columns."""
    height, width = size
    across, down = columns.shape
    # A row of zeros before the region and one at the end of each column: every run then has a
    # beginning and an end within its column, in turns.
    padded = np.zeros((across, down + 1), bool)
    padded[:, :down] = columns
    padded = np.concatenate([[False], padded.ravel()])
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    column, row = np.divmod(edges, down + 1)
    edges = (begin[0] + column) * height + begin[1] + row
    starts, ends = edges[0::2], edges[1::2]
    # A run that reaches the bottom goes on at the top of the next column.
    apart = starts[1:] != ends[:-1]
    starts = starts[np.concatenate([[True], apart])] if starts.size else starts
    ends = ends[np.concatenate([apart, [True]])] if ends.size else ends
    edges = np.stack([starts, ends], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    # No trailing empty run, as pycocotools encodes.
    return (counts[:-1] if counts.size > 1 and counts[-1] == 0 else counts).tolist()
