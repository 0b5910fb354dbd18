"""Classes of a file and of a model: which rows of the predictors a model takes over.

COCO numbers its 80 categories from 1 to 90 with gaps. torchvision's published detectors have a
class for each number, detectron2's one for each category.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sephjax.input.example import Categories

COCO = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train",
    8: "truck", 9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign",
    14: "parking meter", 15: "bench", 16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep",
    21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe", 27: "backpack",
    28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove",
    41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass",
    47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple",
    54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza",
    60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote",
    76: "keyboard", 77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink",
    82: "refrigerator", 84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear",
    89: "hair drier", 90: "toothbrush",
}  # fmt: skip
NUMBERS = {80: tuple(COCO), 90: tuple(range(1, 91))}  # by the number of classes in a file
# Last axes of the predictors for k classes; background is the last logit.
WIDTHS = {
    "box_head/logits": lambda k: k + 1,
    "box_head/deltas": lambda k: 4 * k,
    "mask_head/predictor": lambda k: k,
}


def named(count: int) -> Categories:
    """The categories of a file that has `count` classes and says nothing else about them.

    80 classes are COCO's, 90 are its category numbers (those without a category are called N/A),
    any other count is numbered from 1.
    """
    ids = NUMBERS.get(count, tuple(range(1, count + 1)))
    names = tuple(COCO.get(i, "N/A") if count in NUMBERS else str(i) for i in ids)
    return Categories(ids, names)


def rows_of(count: int, wanted: Categories) -> list[int] | None:
    """Which of a COCO file's `count` classes each wanted category is.

    Returns:
        A place for each category, or None unless the file has COCO's 80 categories or 90 numbers
        and every wanted one has the number and the name of one of COCO's.
    """
    pairs = zip(wanted.ids, wanted.names, strict=True)
    if count not in NUMBERS or any(COCO.get(number) != name for number, name in pairs):
        return None
    return [NUMBERS[count].index(number) for number in wanted.ids]


def count_of(tensors: Mapping[str, Any]) -> int | None:
    """How many classes a detector's tensors are for; None without a box head."""
    found = (value for path, value in tensors.items() if _layer(path) == "box_head/logits")
    logits = next(found, None)
    return None if logits is None else logits.shape[-1] - 1


def _layer(path: str) -> str:
    """The layer of a tensor, whatever the stage of a cascade."""
    return re.sub(r"^box_head/stage\d+/", "box_head/", path.rpartition("/")[0])


def depends(path: str, shape: Sequence[int], count: int) -> bool:
    """Does the last axis of this tensor of a model with `count` classes depend on their number?"""
    layer = _layer(path)
    return layer in WIDTHS and shape[-1] == WIDTHS[layer](count)


def width(path: str, count: int) -> int:
    """The last axis that this tensor of a predictor has for `count` classes."""
    return WIDTHS[_layer(path)](count)


def choose(path: str, array: np.ndarray, rows: Sequence[int], count: int) -> np.ndarray:
    """The entries of some of `count` classes (and background) on the last axis of a predictor."""
    if _layer(path) == "box_head/logits":
        return array[..., [*rows, count]]
    by_class = array.reshape(*array.shape[:-1], count, -1)
    return by_class[..., list(rows), :].reshape(*array.shape[:-1], -1)
