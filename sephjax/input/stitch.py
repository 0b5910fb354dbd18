"""Stitch: two pictures of a batch on one canvas (EXPERIMENTS 1.3 of the published series)."""

from collections.abc import Mapping

import numpy as np

from sephjax.input import transforms
from sephjax.input.buckets import Canvas
from sephjax.input.views import Size

Arrays = Mapping[str, np.ndarray]
Place = tuple[int, int, int, int]  # y, x, height, width


def layout(canvas: Canvas, sizes: tuple[Size, Size]) -> tuple[Place, Place]:
    """Where two pictures go: stacked halves or halves side by side, whichever leaves less unused.

    Each picture is scaled, keeping its aspect, to the largest that fits its half (up or down), at
    the top-left of the half. Stacked where both leave as much.
    """
    height, width = canvas
    halves = (
        ((0, 0), (height // 2, 0), (height // 2, width)),
        ((0, 0), (0, width // 2), (height, width // 2)),
    )
    found = []
    for first, second, half in halves:
        a, b = (_fit(size, half) for size in sizes)
        found.append(((*first, *a), (*second, *b)))
    return max(found, key=lambda places: sum(h * w for _, _, h, w in places))


def _fit(size: Size, half: Size) -> Size:
    scale = min(half[0] / size[0], half[1] / size[1])
    height, width = (
        min(max(int(side * scale + 0.5), 1), most) for side, most in zip(size, half, strict=True)
    )
    return height, width


def stitch(arrays: Arrays, a: int, other: Arrays, b: int) -> int:
    """Makes row `a` of a batch a composite of itself and of row `b` of `other`, on its own canvas.

    Boxes, labels and masks (which lie in the frames of their boxes and so just follow) of both come
    together, those of `a` first; beyond the cap the smallest by area of mask (else of box) are left
    out. The valid size becomes the smallest top-left rectangle that holds both pictures: from the
    canvas' corner to the lower end of the lower picture and the right end of the wider or right
    one. What in it belongs to neither is black and counts as picture, since a size is one rectangle
    (in the original all of the canvas counts). `original` and `index` stay those of `a`.

    Args:
        arrays: of a prepared batch; row `a` is changed in place.
        a: which row.
        other: of a batch on a canvas of the same size, or the same one.
        b: which row of it; it stays as it is.

    Returns:
        How many objects were over the cap.
    """
    rows = ((arrays, a), (other, b))
    sizes = [(int(s["size"][i, 0]), int(s["size"][i, 1])) for s, i in rows]
    height, width = arrays["image"].shape[1:3]
    places = layout((height, width), (sizes[0], sizes[1]))
    canvas = np.zeros_like(arrays["image"][a])
    parts: dict[str, list[np.ndarray]] = {"boxes": [], "labels": [], "masks": []}
    for (source, row), (h, w), (y, x, new_h, new_w) in zip(rows, sizes, places, strict=True):
        transforms.resize_onto(canvas[y:, x:], source["image"][row, :h, :w], new_h, new_w)
        valid = source["object_valid"][row]
        boxes = transforms.scale_boxes(source["boxes"][row][valid], (h, w), (new_h, new_w))
        parts["boxes"].append(boxes + np.asarray([x, y, x, y]))
        for name in ("labels", "masks"):
            if name in source:
                parts[name].append(source[name][row][valid])
    arrays["image"][a] = canvas
    arrays["size"][a] = [max(p[i] + p[i + 2] for p in places) for i in range(2)]
    return _write(arrays, a, {name: np.concatenate(part) for name, part in parts.items() if part})


def _write(arrays: Arrays, row: int, objects: dict[str, np.ndarray]) -> int:
    """The objects into a row; those over the cap are left out and counted."""
    area = np.prod(objects["boxes"][:, 2:] - objects["boxes"][:, :2], axis=1)
    if "masks" in objects:
        area *= objects["masks"].mean(axis=(1, 2))
    kept = transforms.largest(area, arrays["boxes"].shape[1])
    for name, values in objects.items():
        arrays[name][row] = 0
        arrays[name][row, : len(kept)] = values[kept]
    arrays["object_valid"][row] = np.arange(arrays["boxes"].shape[1]) < len(kept)
    return len(area) - len(kept)
