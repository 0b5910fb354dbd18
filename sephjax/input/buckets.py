"""Canvas sizes: a few fixed shapes, so that each is compiled once."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sephjax.errors import UserError
from sephjax.input.transforms import resized_shape

Canvas = tuple[int, int]  # height, width


def canvases(
    short_sides: Sequence[int], long_side: int, aspects: Sequence[float], multiple: int
) -> list[Canvas]:
    """The canvases of a split: landscape and portrait, by aspect and for the longest picture.

    Args:
        short_sides: short sides that a picture may get, pixels; the greatest counts.
        long_side: greatest long side, pixels.
        aspects: long/short ratios that get a canvas of their own.
        multiple: heights and widths are rounded up to it.

    Returns:
        (height, width), smallest area first, landscape before portrait.
    """
    if not short_sides or long_side < max(short_sides):
        raise UserError(
            f"long_side={long_side} is below short_sides={tuple(short_sides)}: raise it to the "
            f"greatest short side or more."
        )
    short = max(short_sides)
    longs = {min(math.ceil(short * aspect), long_side) for aspect in aspects} | {long_side}

    def up(pixels: int) -> int:
        return -(-pixels // multiple) * multiple

    pairs = sorted({(up(short), max(up(long), up(short))) for long in longs})
    both = [canvas for low, high in pairs for canvas in ((low, high), (high, low))]
    return list(dict.fromkeys(both))


def training(data: Any) -> list[Canvas]:
    """The canvases of the training split of `config.data`: with large-scale jitter one square.

    Raises:
        UserError: the sides do not do.
    """
    split, crop, multiple = data.train, int(data.jitter.crop), int(data.size_multiple)
    if not crop:
        return canvases(split.short_sides, split.long_side, split.aspects, multiple)
    if crop < 0 or crop % multiple:
        raise UserError(
            f"data.jitter.crop={crop} is no multiple of data.size_multiple={multiple}: change one "
            f"of them."
        )
    return [(crop, crop)]


def evaluation(data: Any) -> list[Canvas]:
    """The canvases of the evaluation split of `config.data`."""
    view = data.eval
    return canvases(view.short_sides, view.long_side, view.aspects, data.size_multiple)


def largest(choices: Sequence[Canvas]) -> Canvas:
    """The canvas of the most pixels; of two the landscape."""
    return max(choices, key=lambda canvas: (canvas[0] * canvas[1], canvas[1]))


def assign(
    sizes: np.ndarray,
    choices: Sequence[Canvas],
    short_sides: Sequence[int],
    long_side: int,
    mode: str,
) -> np.ndarray:
    """The canvas of each picture: the first of `choices` that holds it at every short side.

    A pure function of the picture's size; a square one counts as landscape.

    Args:
        sizes: int [n, 2], height and width of the files.
        choices: from `canvases`.
        short_sides: short sides that a picture may get.
        long_side: greatest long side.
        mode: `data.resize`.

    Returns:
        int64 [n], positions in `choices`.
    """
    h, w = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    shapes = [resized_shape(h, w, short, long_side, mode) for short in short_sides]
    greatest_h = np.max([shape[0] for shape in shapes], axis=0)
    greatest_w = np.max([shape[1] for shape in shapes], axis=0)
    held = np.stack([(greatest_h <= ch) & (greatest_w <= cw) for ch, cw in choices], axis=1)
    if not held.any(axis=1).all():
        raise ValueError(f"a picture fits none of the canvases {list(choices)}")
    return held.argmax(axis=1)


def group(assigned: np.ndarray, choices: Sequence[Canvas]) -> tuple[list[Canvas], list[np.ndarray]]:
    """The canvases that hold pictures, and the positions of the pictures of each, ascending."""
    used = np.unique(assigned)
    return [choices[k] for k in used], [np.flatnonzero(assigned == k) for k in used]
