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
    shapes: bool = False,
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
      shapes: with masks, add `shape`: the RLE of the mask in the frame of its box.

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
        found = [
            _row(int(image_id), int(category_ids[int(label)]), box, float(score))
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]
        if detections.masks is not None:
            masks = np.asarray(detections.masks[at])[kept]
            size = (int(originals[at][0]), int(originals[at][1]))
            _add(found, "segmentation", paste.paste_to_rle(masks, boxes, size))
            if shapes:
                _add(found, "shape", paste.shapes_to_rle(masks))
        rows += found
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


def _add(rows: list[Row], key: str, runs: Sequence[Row]) -> None:
    for row, rle in zip(rows, runs, strict=True):
        row[key] = {"size": rle["size"], "counts": _text(rle["counts"])}


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
