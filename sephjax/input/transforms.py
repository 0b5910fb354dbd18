"""What a picture and its objects go through on the host: pure functions on one example."""

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as _coco_mask

from sephjax.input.objects import Segmentation

coco_mask: Any = _coco_mask  # its stubs know one of its call forms only

MASK_SIZE = 112  # cells a side of a mask crop
_FAR = 1e4  # cells; what of a polygon lies further out is cut off, so that slivers stay cheap


def resized_shape(h: Any, w: Any, short: Any, long: int, mode: str) -> tuple[Any, Any]:
    """Height and width after a resize.

    `keep_aspect` scales by `min(short / min(h, w), long / max(h, w))` and rounds half up. `series`
    (EXPERIMENTS 1.2 of the published series) then sets the height to `short` if it came out
    smaller, or else the width: where `long` binds this stretches the short side back.

    Args:
        h: height of the file, an integer or an integer array.
        w: width, likewise.
        short: wanted short side.
        long: greatest long side, for the scale.
        mode: `keep_aspect` or `series`.

    Returns:
        New height and width, at least 1: ints, or int64 arrays for arrays.
    """
    scale = np.minimum(short / np.minimum(h, w), long / np.maximum(h, w))
    new_h = np.maximum(np.floor(h * scale + 0.5), 1).astype(np.int64)
    new_w = np.maximum(np.floor(w * scale + 0.5), 1).astype(np.int64)
    if mode == "series":
        low_h, low_w = new_h < short, (new_h >= short) & (new_w < short)
        new_h, new_w = np.where(low_h, short, new_h), np.where(low_w, short, new_w)
    elif mode != "keep_aspect":
        raise ValueError(f"data.resize is {mode!r}: choose keep_aspect or series")
    if np.ndim(new_h) == 0:
        return int(new_h), int(new_w)
    return new_h, new_w


def resize_onto(canvas: np.ndarray, image: np.ndarray, height: int, width: int) -> None:
    """Resizes a picture straight onto the top-left of a canvas: bilinear, half-pixel centres.

    There is no antialiasing. The rest of the canvas stays as it is.

    Args:
        canvas: uint8 [H, W, 3], changed in place.
        image: uint8 [h, w, 3].
        height: new height, at most H.
        width: new width, at most W.
    """
    target = canvas[:height, :width]
    if image.shape[:2] == (height, width):
        target[...] = image
        return
    written = cv2.resize(image, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    if not np.may_share_memory(written, target):  # OpenCV may prefer memory of its own
        target[...] = written


def flip(image: np.ndarray) -> np.ndarray:
    """A picture mirrored left to right."""
    return cv2.flip(image, 1)


def scale_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Boxes [m, 4] xyxy of an image of (h, w) `old` resized to `new`, by the ratio of each axis."""
    ratio = np.asarray([new[1] / old[1], new[0] / old[0]] * 2)
    return boxes * ratio


def flip_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes [m, 4] xyxy mirrored left to right in an image of `width`."""
    mirrored = boxes.copy()
    mirrored[:, [0, 2]] = width - boxes[:, [2, 0]]
    return mirrored


def largest(area: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest, in their old order; equals lose from the back."""
    if len(area) <= count:
        return np.arange(len(area))
    return np.sort(np.argsort(-area, kind="stable")[:count])


def crop_masks_to_boxes(
    segmentations: list[Segmentation], boxes: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Each object's mask in the frame of its own box.

    Polygons are rasterised by pycocotools straight in the frame; an RLE is decoded at full size and
    sampled bilinearly at the centres of the cells. What lies outside the box is cut off. An object
    without a segmentation gets an empty mask.

    Args:
        segmentations: [m], in pixels of the file.
        boxes: float [m, 4] xyxy, in pixels of the file, no side 0.
        height: of the file.
        width: of the file.

    Returns:
        uint8 [m, 112, 112], 0 or 1.
    """
    crops = np.zeros((len(boxes), MASK_SIZE, MASK_SIZE), np.uint8)
    frame = (MASK_SIZE, MASK_SIZE)
    rows, outlines = [], []
    for row, (segmentation, box) in enumerate(zip(segmentations, boxes, strict=True)):
        if isinstance(segmentation, dict):
            crops[row] = _crop_rle(segmentation, box, frame, (height, width))
        elif segmentation:
            rings = _rings_in_box(segmentation, box, frame)
            if rings:
                rows.append(row)
                outlines.append(coco_mask.merge(coco_mask.frPyObjects(rings, *frame)))
    if rows:
        crops[rows] = coco_mask.decode(outlines).transpose(2, 0, 1)
    return crops


def rasterize(
    segmentation: Segmentation, box: np.ndarray, shape: tuple[int, int], file: tuple[int, int]
) -> np.ndarray:
    """The part of a mask inside a box, at any resolution; else as `crop_masks_to_boxes`.

    Args:
        segmentation: in pixels of the file.
        box: float [4] xyxy, in pixels of the file, no side 0.
        shape: rows and columns that the box is cut into.
        file: height and width of the file.

    Returns:
        uint8 [*shape], 0 or 1.
    """
    if isinstance(segmentation, dict):
        return _crop_rle(segmentation, box, shape, file)
    rings = _rings_in_box(segmentation or [], box, shape)
    if not rings:
        return np.zeros(shape, np.uint8)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(rings, *shape)))


def sample_in_box(full: np.ndarray, box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask of pixels, sampled bilinearly at the centres of the cells of a box.

    Args:
        full: uint8 or bool [h, w], 0 or 1; beyond its edges it goes on as at the edge.
        box: float [4] xyxy in its pixels, no side 0.
        shape: rows and columns of cells.

    Returns:
        uint8 [*shape], 1 where the sample is at least one half.
    """
    step = (box[2:] - box[:2]) / np.asarray(shape[::-1])
    start = box[:2] + 0.5 * step - 0.5  # array position of the centre of cell 0
    back = np.asarray([[step[0], 0.0, start[0]], [0.0, step[1], start[1]]])
    sampled = cv2.warpAffine(
        full * np.uint8(255),
        back,
        shape[::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return (sampled >= 128).astype(np.uint8)


def _rings_in_box(
    rings: list[np.ndarray], box: np.ndarray, shape: tuple[int, int]
) -> list[np.ndarray]:
    # pycocotools takes four numbers for a box, and fewer than three points enclose nothing.
    corner, scale = box[:2], np.asarray(shape[::-1]) / (box[2:] - box[:2])
    inside = [
        _near((ring.reshape(-1, 2) - corner) * scale)
        for ring in rings
        if len(ring) >= 6 and len(ring) % 2 == 0
    ]
    return [points.ravel() for points in inside if len(points) >= 3]


def _near(points: np.ndarray) -> np.ndarray:
    """A polygon [n, 2] cut to +-_FAR on both axes, by half planes (Sutherland and Hodgman 1974)."""
    for axis, sign in ((0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0)):
        if np.abs(points).max(initial=0.0) <= _FAR:
            break
        depth = sign * points[:, axis] + _FAR
        after, ahead = np.roll(depth, -1), np.roll(points, -1, axis=0)
        crosses = (depth >= 0) != (after >= 0)
        share = np.divide(depth, depth - after, out=np.zeros_like(depth), where=crosses)
        both = np.stack([points, points + share[:, None] * (ahead - points)], axis=1)
        keep = np.stack([depth >= 0, crosses], axis=1)
        points = both[keep]
    return points


def _crop_rle(
    rle: dict[str, Any], box: np.ndarray, shape: tuple[int, int], file: tuple[int, int]
) -> np.ndarray:
    if isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, *rle["size"])
    full = coco_mask.decode(rle)
    if full.shape != file:
        raise ValueError(f"a mask of {full.shape} pixels in an image of {file[0]}x{file[1]}")
    return sample_in_box(full, box, shape)
