"""Copy-paste: objects of one picture laid over another (Ghiasi et al. 2021, Simple Copy-Paste)."""

import dataclasses
from typing import NamedTuple

import numpy as np

from sephjax.input import views
from sephjax.input.views import Layer, Size


class Pasted(NamedTuple):
    """What became of a picture that objects were pasted onto."""

    below: Layer  # its own objects that are still seen
    above: Layer  # the pasted ones
    size: Size  # valid height and width of the canvas now
    covered: int  # own objects of which nothing is seen any more


def choose(random: np.random.Generator, count: int) -> np.ndarray:
    """A random subset of `count` objects, ascending: every number from one to all as likely."""
    if not count:
        return np.zeros(0, np.int64)
    return np.sort(random.permutation(count)[: int(random.integers(1, count + 1))])


def paste(
    canvas: np.ndarray, size: Size, below: Layer, picture: np.ndarray, above: Layer
) -> Pasted:
    """Lays the objects of `above` over a picture: its pixels, its boxes and its masks.

    Edges are hard (blending is without effect in the paper). An object whose mask loses pixels gets
    the box of those that are left; one that loses all of them goes. The pasted ones stay where they
    are in their own picture, which may be beside this one: the valid part of the canvas grows to
    the smallest rectangle that holds both, and what is neither is black. (The paper pads every
    picture to the crop, all of it valid.)

    Args:
        canvas: uint8 [H, W, 3] with the picture; changed in place.
        size: its valid height and width.
        below: its objects.
        picture: uint8 [H, W, 3], the other picture on a canvas of its own.
        above: the objects of that one to paste; those without a pixel are left out.
    """
    hidden = np.zeros(canvas.shape[:2], bool)
    drawn = np.zeros(len(above), bool)
    for row in range(len(above)):
        window = views.outer(above.boxes[row], above.view.size)
        mask = views.pixels(above, row, window).astype(bool)
        hidden[_part(window)] |= mask
        drawn[row] = mask.any()
        if drawn[row]:
            size = (max(size[0], int(window[3])), max(size[1], int(window[2])))
    canvas[hidden] = picture[hidden]
    left, covered = _uncovered(below, hidden)
    return Pasted(left, views.take(above, drawn), size, covered)


def _uncovered(layer: Layer, hidden: np.ndarray) -> tuple[Layer, int]:
    """The objects that are still seen, with their new boxes, and how many are not."""
    boxes, area = layer.boxes.copy(), layer.area.copy()
    kept = np.ones(len(layer), bool)
    for row in range(len(layer)):
        window = views.outer(layer.boxes[row], layer.view.size)
        over = hidden[_part(window)]
        if not over.any():
            continue
        mask = views.pixels(layer, row, window).astype(bool)
        mask = mask if mask.any() else np.ones_like(mask)  # smaller than a pixel
        rest = mask & ~over
        if rest.sum() == mask.sum():
            continue
        tight = views.bounds(rest, window)
        kept[row] = tight is not None
        boxes[row] = boxes[row] if tight is None else tight
        area[row] *= rest.sum() / mask.sum()
    layer = dataclasses.replace(layer, boxes=boxes, area=area, hidden=hidden)
    return views.take(layer, kept), int((~kept).sum())


def _part(window: np.ndarray) -> tuple[slice, slice]:
    return slice(window[1], window[3]), slice(window[0], window[2])
