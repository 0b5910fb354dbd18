"""Mask targets beside torchvision's: `python -m benchmarks.mask_targets ANNOTATIONS.json`.

For every instance three targets of 28x28, binarised at one half and compared by IoU:

- ours: the 112x112 crop in the frame of the object's box, resampled into the ROI;
- theirs: torchvision's `project_masks_on_boxes` of the mask at network size, resized by its own
  `GeneralizedRCNNTransform`;
- polygon: `project_masks_on_boxes` of the polygons rasterised in the frame of the ROI, 8x8 pixels
  a bin: what the other two approximate.

The ROIs are the ground truth's boxes ("truth"), and the same with every edge moved by up to 15 % of
its side ("jittered").
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from pycocotools import mask as coco_mask

from sephjax.input import transforms
from sephjax.ops import masks as mask_ops

SIDE, FINE = 28, 8  # bins a target, pixels of a fine mask a bin
LONG = 1.5  # longest side, in short sides
BOUNDS = (0, 8, 16, 32, 64, np.inf)  # of the smaller side of a box at network size, pixels


class Targets(NamedTuple):
    """Targets [n, 28, 28] in [0, 1] of n instances, and what they are of."""

    ids: np.ndarray  # [n] of the annotations
    smaller: np.ndarray  # [n] smaller side of the box at network size, pixels
    ours: np.ndarray
    theirs: np.ndarray
    polygon: np.ndarray


def targets(coco: Mapping[str, Any], *, short: int = 320, jitter: float = 0.0) -> Targets:
    """The targets of all polygon instances of a COCO instances dict, at a short side of `short`."""
    rng = np.random.default_rng(0)
    parts = [
        _of_image(image, annotations, short, jitter, rng) for image, annotations in _by_image(coco)
    ]
    crops, boxes, rois, ids, smaller, theirs, polygon = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    arrays = (crops, boxes.astype(np.float32), rois.astype(np.float32), np.arange(len(crops)))
    ours = np.asarray(mask_ops.crop_masks(*map(jnp.asarray, arrays), output_size=SIDE))
    return Targets(ids, smaller, ours, theirs, polygon)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU [n] of targets binarised at one half; 1 where both are empty."""
    a, b = a >= 0.5, b >= 0.5
    union = (a | b).sum((1, 2))
    return np.where(union > 0, (a & b).sum((1, 2)) / np.maximum(union, 1), 1.0)


def _by_image(coco: Mapping[str, Any]) -> list[tuple[Any, list[Any]]]:
    found = {image["id"]: (image, []) for image in coco["images"]}
    for annotation in coco["annotations"]:
        polygons = isinstance(annotation["segmentation"], list)
        if polygons and min(annotation["bbox"][2:]) > 0.01:
            found[annotation["image_id"]][1].append(annotation)
    return [(image, annotations) for image, annotations in found.values() if annotations]


def _of_image(image: Any, annotations: list[Any], short: int, jitter: float, rng: Any) -> tuple:
    """Crops, boxes, ROIs (pixels of the file), ids, smaller sides, their and the fine targets."""
    height, width = image["height"], image["width"]
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    limit = np.array([width, height] * 2)
    boxes = np.clip(boxes, 0, limit)
    moved = boxes + rng.uniform(-jitter, jitter, boxes.shape) * np.tile(
        boxes[:, 2:] - boxes[:, :2], 2
    )
    rois = np.clip(moved, 0, limit)
    rings = [[np.asarray(r, np.float64) for r in a["segmentation"]] for a in annotations]
    crops = transforms.crop_masks_to_boxes(rings, boxes, height, width)
    theirs, ratio = _theirs(rings, rois, (height, width), short)
    smaller = ((boxes[:, 2:] - boxes[:, :2]) * ratio).min(axis=1)
    polygon = np.stack([_fine(ring, roi) for ring, roi in zip(rings, rois, strict=True)])
    ids = np.array([annotation["id"] for annotation in annotations])
    return crops, boxes, rois, ids, smaller, theirs, polygon


def _theirs(
    rings: list[Any], rois: np.ndarray, size: tuple[int, int], short: int
) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's targets, and how much its network input is larger than the file (x, y)."""
    import torch
    from torchvision.models.detection.roi_heads import project_masks_on_boxes
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    resize = GeneralizedRCNNTransform(short, int(LONG * short), [0.0] * 3, [1.0] * 3).eval().resize
    full = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(r, *size))) for r in rings]
    truth = {"boxes": torch.tensor(rois), "masks": torch.tensor(np.stack(full))}
    image, truth = resize(torch.zeros(3, *size), truth)
    number = torch.arange(len(rings))
    found = project_masks_on_boxes(truth["masks"], truth["boxes"].float(), number, SIDE)
    return found.numpy(), np.array(image.shape[:0:-1]) / np.array(size[::-1])


def _fine(rings: Sequence[np.ndarray], roi: np.ndarray) -> np.ndarray:
    import torch
    from torchvision.models.detection.roi_heads import project_masks_on_boxes

    side = SIDE * FINE
    scale = side / (roi[2:] - roi[:2])
    moved = [((r.reshape(-1, 2) - roi[:2]) * scale).ravel() for r in rings if len(r) >= 6]
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, side, side)))
    # Half a pixel earlier: torchvision's targets count pixel centres from 0.
    whole = torch.tensor([[-0.5, -0.5, side - 0.5, side - 0.5]])
    return project_masks_on_boxes(torch.tensor(mask[None]), whole, torch.tensor([0]), SIDE)[
        0
    ].numpy()


def table(found: Targets) -> list[str]:
    """Rows of a Markdown table: IoU of the three pairs by the smaller side of the box."""
    pairs = {
        "ours, theirs": iou(found.ours, found.theirs),
        "ours, polygon": iou(found.ours, found.polygon),
        "theirs, polygon": iou(found.theirs, found.polygon),
    }
    rows = []
    for name, values in pairs.items():
        for low, high in [*itertools.pairwise(BOUNDS), (0, np.inf)]:
            part = values[(found.smaller >= low) & (found.smaller < high)]
            numbers = (part.mean(), np.percentile(part, 1), part.min(), np.mean(part >= 0.95))
            cells = [f"{low:g} to {high:g}", str(len(part)), *(f"{x:.3f}" for x in numbers)]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="mask targets beside torchvision's")
    parser.add_argument("annotations", type=pathlib.Path)
    parser.add_argument("--short", type=int, default=320, help="short side of the network input")
    options = parser.parse_args(arguments)
    coco = json.loads(options.annotations.read_text())
    for name, jitter in (("truth", 0.0), ("jittered", 0.15)):
        print(f"\nROIs: {name}; short side {options.short}\n")
        print("| IoU of | smaller side, px | n | mean | 1st percentile | minimum | >= 0.95 |")
        print("|---|---|---:|---:|---:|---:|---:|")
        print("\n".join(table(targets(coco, short=options.short, jitter=jitter))))


if __name__ == "__main__":
    main()
