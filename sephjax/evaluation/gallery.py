"""Pictures of an evaluation: what was found beside what is there, a few images a checkpoint."""

import json
import pathlib
from typing import Any

import cv2
import numpy as np

from sephjax import pictures
from sephjax.input.example import Source, UnreadableImage


def write(
    directory: pathlib.Path,
    detections: pathlib.Path,
    source: Source,
    *,
    threshold: float,
    count: int,
) -> list[pathlib.Path]:
    """Writes the first `count` images of a source with detections (left) and truth (right).

    Args:
        directory: where the pictures go; made if missing.
        detections: the `detections.json` of an evaluation of `source`.
        source: the images and their ground truth.
        threshold: detections scored lower are not drawn.
        count: number of pictures.
    """
    directory.mkdir(parents=True, exist_ok=True)
    by_image: dict[int, list[dict[str, Any]]] = {}
    for row in json.loads(detections.read_text()):
        if row["score"] >= threshold:
            by_image.setdefault(row["image_id"], []).append(row)
    names = dict(zip(source.categories.ids, source.categories.names, strict=True))
    written = []
    for position in range(min(count, len(source))):
        try:
            example = source.example(position)
        except UnreadableImage:
            continue  # counted when it was evaluated
        found = _detected(example.image, by_image.get(example.image_id, []), names)
        truth = pictures.annotate(
            example.image,
            example.boxes,
            [source.categories.names[label] for label in example.labels],
            masks=None if any(s is None for s in example.segmentations) else _rles(example),
        )
        path = directory / f"{example.image_id:012d}.jpg"
        gap = np.full((found.shape[0], 8, 3), 255, np.uint8)
        side_by_side = np.concatenate([found, gap, truth], axis=1)[..., ::-1]
        if cv2.imwrite(str(path), side_by_side):  # a JPEG has at most 65,500 pixels a side
            written.append(path)
    return written


def _detected(image: np.ndarray, rows: list[dict[str, Any]], names: dict[int, str]) -> np.ndarray:
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return pictures.annotate(
        image,
        boxes,
        [names[row["category_id"]] for row in rows],
        [row["score"] for row in rows],
        [row["segmentation"] for row in rows] if rows and "segmentation" in rows[0] else None,
    )


def _rles(example: Any) -> list[Any]:
    return [_rle(mask, example.height, example.width) for mask in example.segmentations]


def _rle(segmentation: Any, height: int, width: int) -> Any:
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation
