"""Annotations of images as their files have them, and what of them is usable."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

# A polygon list (one flat x, y, x, y ... array a ring, pixels), a COCO RLE, or nothing.
Segmentation = list[np.ndarray] | dict[str, Any] | None

MIN_SIDE = 0.01  # pixels; a shorter side counts as zero


@dataclasses.dataclass(frozen=True)
class Objects:
    """The annotations of one image, untouched."""

    ids: np.ndarray  # int64 [m]
    bbox: np.ndarray  # float64 [m, 4], (x, y, width, height) pixels
    labels: np.ndarray  # int32 [m], 0..k-1
    crowd: np.ndarray  # bool [m]
    area: np.ndarray  # float64 [m], square pixels
    segmentations: list[Segmentation]  # [m]


class BoxKinds(NamedTuple):
    """What became of each box: bool [m] each; `clipped` ones are usable."""

    usable: np.ndarray
    zero_area: np.ndarray
    outside: np.ndarray
    clipped: np.ndarray


def usable_boxes(bbox: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, BoxKinds]:
    """Clips boxes to their images and says which can be used.

    Args:
        bbox: float64 [m, 4], (x, y, width, height) pixels.
        size: int [m or 1, 2], height and width of the image of each box.

    Returns:
        float64 [m, 4] (x1, y1, x2, y2) inside the image, and the kinds.
    """
    corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)
    limit = np.tile(size[:, ::-1], 2).astype(np.float64)
    boxes = np.clip(corners, 0.0, limit)
    zero_area = np.any(bbox[:, 2:] < MIN_SIDE, axis=1)
    outside = ~zero_area & np.any(boxes[:, 2:] - boxes[:, :2] < MIN_SIDE, axis=1)
    usable = ~zero_area & ~outside
    clipped = usable & np.any(np.abs(boxes - corners) >= MIN_SIDE, axis=1)
    return boxes, BoxKinds(usable, zero_area, outside, clipped)


class Counts(NamedTuple):
    """Objects by image: int [n] each."""

    plain: np.ndarray  # usable and not crowd
    crowd: np.ndarray  # usable crowds
    zero_area: np.ndarray
    outside: np.ndarray
    clipped: np.ndarray
    unmasked: np.ndarray  # plain ones without a segmentation


def count_objects(
    image: np.ndarray, kinds: BoxKinds, crowd: np.ndarray, masked: np.ndarray, n: int
) -> Counts:
    """Counts objects by image.

    Args:
        image: int [m], the image of each object, 0..n-1.
        kinds: what became of each box.
        crowd: bool [m].
        masked: bool [m], has a segmentation.
        n: number of images.
    """

    def count(which: np.ndarray) -> np.ndarray:
        return np.bincount(image[which], minlength=n)

    plain = kinds.usable & ~crowd
    return Counts(
        plain=count(plain),
        crowd=count(kinds.usable & crowd),
        zero_area=count(kinds.zero_area),
        outside=count(kinds.outside),
        clipped=count(kinds.clipped),
        unmasked=count(plain & ~masked),
    )


def choose_images(
    counts: Counts, *, train: bool, skip_empty: bool, limit: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Which images a view holds, and what was left out or changed.

    Args:
        counts: objects by image, images ascending by id.
        train: a training view.
        skip_empty: leave images without a usable non-crowd object out of a training view.
        limit: keep the first so many; 0: all.

    Returns:
        int64 [chosen] positions, ascending, and the notes (kinds that occur only).
    """
    notes = {
        "zero_area_boxes_dropped": counts.zero_area.sum(),
        "boxes_outside_image_dropped": counts.outside.sum(),
        "boxes_clipped_to_image": counts.clipped.sum(),
        "objects_without_mask": counts.unmasked.sum(),
    }
    chosen = np.arange(len(counts.plain))
    if train and skip_empty:
        empty = counts.plain == 0
        notes["images_without_objects_skipped"] = (empty & (counts.crowd == 0)).sum()
        notes["crowd_only_images_skipped"] = (empty & (counts.crowd > 0)).sum()
        chosen = chosen[~empty]
    if limit > 0:
        chosen = chosen[:limit]
    return chosen, {name: int(count) for name, count in notes.items() if count}


def coco_annotations(
    image_id: int, objects: Objects, category_ids: tuple[int, ...]
) -> Iterable[dict[str, Any]]:
    """The annotations of one image in COCO JSON form, none left out."""
    for row, segmentation in enumerate(objects.segmentations):
        annotation = {
            "id": int(objects.ids[row]),
            "image_id": image_id,
            "category_id": category_ids[objects.labels[row]],
            "iscrowd": int(objects.crowd[row]),
            "area": float(objects.area[row]),
            "bbox": objects.bbox[row].tolist(),
        }
        if isinstance(segmentation, list):
            annotation["segmentation"] = [ring.tolist() for ring in segmentation]
        elif segmentation is not None:
            annotation["segmentation"] = segmentation
        yield annotation
