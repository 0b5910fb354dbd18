"""The metric of the published results log, odd as it is, beside COCO's: EXPERIMENTS 5.6.

It makes every column of the log comparable; it is no better a metric. docs/CONVENTIONS.md has the
differences.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as _coco_mask

from sephjax.evaluation import coco

coco_mask: Any = _coco_mask  # its stubs know one of its call forms only

Row = dict[str, Any]
Size = tuple[int, int]  # height, width
InputSize = Callable[[int, int], Size]  # of a file -> of the picture in the network input

FRAMES = ("512", "input")
SIDE = 512  # what the log's evaluator assumed of a picture whose size it was not given
CELLS = 28  # a side of a ground-truth shape where no detection tells


def score(
    truth: Mapping[str, Any],
    rows: Sequence[Row],
    input_size: InputSize,
    *,
    shapes: Sequence[Row] | None = None,
    image_ids: Collection[int] | None = None,
    backend: str = "pycocotools",
) -> dict[str, Any]:
    """Scores detections as the results log did.

    Small, medium and large go by box area in a frame: `512`, every picture stretched to 512x512
    (rows logged from 2020-10-10 on), or `input`, the picture as the network sees it (rows before).
    Crowds are ordinary ground truths. Boxes without area or reaching beyond the picture were not
    in the log's data and are left out, and so are pictures without ground truth, with what was
    detected in them. For `segm` a ground truth is its mask cut to its own box, a detection its mask
    in the frame of its box; they are compared without position, and a detection's area is its own,
    at most 784, a ground truth's that of its box. No unmatched detection is medium or large then,
    and in these ranges AP is AR, but for AP's 101 steps of recall.

    Args:
      truth: a COCO instances dict; with `shapes` all of its annotations need a segmentation.
      rows: rows of the COCO results format, in pixels of the files.
      input_size: how large the network sees a file.
      shapes: the RLE of each row's mask in the frame of its box (`paste.shapes_to_rle`), all of one
        size; None: boxes only.
      image_ids: the images that count; None: all of `truth`.
      backend: as for `coco.score`.

    Returns:
      `images` and `objects`, how many counted, and for each of `FRAMES` a dict of `bbox` and, with
      `shapes`, `segm`: the 12 numbers of `coco.METRICS`, -1 where there is no ground truth.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    wanted = sizes.keys() if image_ids is None else set(image_ids)
    objects = [a for a in truth["annotations"] if a["image_id"] in wanted]
    objects = [a for a in objects if _in_the_records(a["bbox"], sizes[a["image_id"]])]
    images = sorted({a["image_id"] for a in objects})
    found: dict[str, Any] = {"images": len(images), "objects": len(objects)}
    masked = None
    if shapes is not None:
        cells = shapes[0]["size"][0] if shapes else CELLS
        crop = lambda a, size: truth_shape(a["segmentation"], a["bbox"], size, input_size, cells)
        masked = [crop(a, sizes[a["image_id"]]) for a in objects]
    for frame in FRAMES:
        to_frame = input_size if frame == "input" else lambda *_: (SIDE, SIDE)
        there, here = (_framed(some, sizes, to_frame) for some in (objects, rows))
        found[frame] = {"bbox": _numbers(truth, there, here, "bbox", images, backend)}
        if shapes is not None and masked is not None:
            there, here = _shaped(there, masked), _shaped(here, shapes)
            found[frame]["segm"] = _numbers(truth, there, here, "segm", images, backend)
    return found


def log_rows(name: str, found: Mapping[str, Any]) -> list[str]:
    """Rows in the column order of the log from what `score` returned, one a frame and kind."""
    return [
        coco.log_row(f"{name} reference {frame} {kind}", found[frame], kind)
        for frame in FRAMES
        for kind in found[frame]
    ]


def truth_shape(
    segmentation: Any, box: Sequence[float], size: Size, input_size: InputSize, cells: int
) -> Row:
    """The RLE of a ground truth in the frame of its own box.

    The mask is sampled as the log's data pipeline did: resized to the network input (bilinear,
    cell i reads i * in / out), then cells x cells points from edge to edge of the box (TensorFlow's
    `crop_and_resize`); a value of 0.9 or more is 1, the log's cast of value + 0.1 to an integer. So
    shapes shrink a little.

    Args:
      segmentation: COCO polygons or RLE.
      box: x, y, width, height in pixels of the file.
      size: height and width of the file.
      input_size: how large the network sees it.
      cells: a side of the result.
    """
    mask = _decoded(segmentation, size).astype(np.float32)
    large = input_size(*size)
    x, y, width, height = box
    rows = _weights(y / size[0], (y + height) / size[0], size[0], large[0], cells)
    columns = _weights(x / size[1], (x + width) / size[1], size[1], large[1], cells)
    values = rows @ mask @ columns.T
    bits = np.asfortranarray(values + np.float32(0.1), np.uint8)
    rle = coco_mask.encode(bits)
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _weights(low: float, high: float, pixels: int, large: int, cells: int) -> np.ndarray:
    """float32 [cells, pixels]: how much of each pixel a point from `low` to `high` reads.

    Both resampling steps are linear and work an axis at a time, so they are one matrix.
    """
    at = (low + (high - low) * np.arange(cells) / (cells - 1)) * (large - 1)
    weights = np.zeros((cells, pixels), np.float32)
    for cell, share in _two(at, large):
        for pixel, part in _two(cell * (pixels / large), pixels):
            np.add.at(weights, (np.arange(cells), pixel), share * part)
    return weights


def _two(at: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two neighbours of each position and their shares; the last cell goes on beyond it."""
    low = np.clip(np.floor(at), 0, count - 1).astype(np.int64)
    part = np.clip(at - low, 0.0, 1.0)
    return [(low, 1.0 - part), (np.minimum(low + 1, count - 1), part)]


def _decoded(segmentation: Any, size: Size) -> np.ndarray:
    if isinstance(segmentation, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *size)))
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(segmentation)


def _in_the_records(box: Sequence[float], size: Size) -> bool:
    x, y, width, height = box
    return width > 0 and height > 0 and x + width <= size[1] and y + height <= size[0]


def _framed(rows: Sequence[Row], sizes: Mapping[int, Size], to_frame: InputSize) -> list[Row]:
    """Rows with boxes in the frame and box areas; no crowd."""
    moved = []
    for row in rows:
        size = sizes[row["image_id"]]
        high, wide = (to / of for to, of in zip(to_frame(*size), size, strict=True))
        x, y, width, height = row["bbox"]
        box = [x * wide, y * high, width * wide, height * high]
        moved.append({**row, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    return moved


def _shaped(rows: Sequence[Row], shapes: Sequence[Row]) -> list[Row]:
    return [{**row, "segmentation": one} for row, one in zip(rows, shapes, strict=True)]


def _numbers(
    truth: Mapping[str, Any],
    objects: list[Row],
    rows: list[Row],
    kind: coco.Kind,
    images: Sequence[int],
    backend: str,
) -> dict[str, float]:
    if not images:
        return dict.fromkeys(coco.METRICS, -1.0)
    whole = {**truth, "annotations": objects}
    found = coco.score(whole, rows, kind, backend=backend, image_ids=images)
    return {key: found[key] for key in coco.METRICS}
