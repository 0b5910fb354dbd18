"""Detections of a batch as rows of the COCO results format, in pixels of the original files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sephjax.evaluation import paste
from sephjax.types import Detections

Row = dict[str, Any]


def to_results(
    detections: Detections,
    *,
    sizes: np.ndarray,
    originals: np.ndarray,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    present: np.ndarray | None = None,
) -> list[Row]:
    """Turns the detections of a batch into COCO results rows.

    The resize is undone by the ratio that really applied, original over valid size, an axis at a
    time. Boxes are clipped to the picture; those left without area are dropped, as in detectron2.
    Boxes are rounded to 1/1000 pixel and scores to 1e-8, which keeps the files small.

    Args:
      detections: host arrays [b, d, ...]; with `masks` None the rows have no `segmentation`.
      sizes: [b, 2], valid height and width on the canvas.
      originals: [b, 2], height and width of the files.
      image_ids: [b], ids to write.
      category_ids: [k], the category id of each label.
      present: bool [b], rows of the batch that are pictures; None: all.

    Returns:
      Rows in batch order, best first within an image: `image_id`, `category_id`, `bbox` (x, y, w,
      h in pixels of the file), `score`, and `segmentation` (RLE with str counts) where there are
      masks.
    """
    rows = []
    for at, image_id in enumerate(image_ids):
        if present is not None and not present[at]:
            continue
        boxes, kept = original_boxes(detections, at, sizes[at], originals[at])
        labels, scores = (np.asarray(x[at])[kept] for x in (detections.labels, detections.scores))
        masks: list[dict[str, Any] | None] = [None] * len(kept)
        if detections.masks is not None:
            size = (int(originals[at][0]), int(originals[at][1]))
            masks = [*paste.paste_to_rle(np.asarray(detections.masks[at])[kept], boxes, size)]
        for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True):
            rows.append(_row(int(image_id), int(category_ids[int(label)]), box, float(score)))
            if mask is not None:
                rows[-1]["segmentation"] = {"size": mask["size"], "counts": _text(mask["counts"])}
    return rows


def original_boxes(
    detections: Detections, at: int, size: np.ndarray, original: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of one image of a batch in pixels of its file.

    Returns:
      Boxes [n, 4] float32 clipped to the file's frame, and their places [n] in `detections`; what
      is not valid or has no area is left out.
    """
    height, width = (float(side) for side in original)
    ratio = np.array([width / float(size[1]), height / float(size[0])], np.float64)
    boxes = np.asarray(detections.boxes[at], np.float64) * np.tile(ratio, 2)
    boxes = np.clip(boxes, 0.0, [width, height, width, height]).astype(np.float32)
    area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    kept = np.flatnonzero(np.asarray(detections.valid[at]) & area)
    return boxes[kept], kept


def _row(image_id: int, category_id: int, box: np.ndarray, score: float) -> Row:
    x1, y1, x2, y2 = (float(edge) for edge in box)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [round(side, 3) for side in (x1, y1, x2 - x1, y2 - y1)],
        "score": round(score, 8),
    }


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
