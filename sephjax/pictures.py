"""Pictures for people: detections drawn on an image, and curves of numbers over steps."""

import colorsys
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MASK_OPACITY = 0.38
_SHIFT = 4  # OpenCV draws at 1/16 pixel
# Of 10,000 tried: sets 25 common COCO classes, and the drawn shapes, furthest apart in Lab.
_SALT = 8754

Colour = tuple[int, int, int]
Rect = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class _Style:
    """Sizes in pixels, from the size of the picture."""

    line: int
    font: int
    pad: int


def annotate(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    masks: Sequence[Any] | None = None,
) -> np.ndarray:
    """Draws objects on a picture: masks, outlines, and a plate with name and score each.

    A class has the same colour in every picture. Plates stay inside the picture and keep clear of
    each other where there is room; those of earlier objects have the first choice.

    Args:
      image: uint8 [h, w, 3] RGB; not changed.
      boxes: [n, 4], x1, y1, x2, y2 in pixels; none give a copy of the picture.
      labels: [n] names.
      scores: [n], shown with two digits; None: names alone.
      masks: [n] of bool [h, w], or of COCO RLE dicts; None: boxes alone.

    Returns:
      uint8 [h, w, 3] RGB.
    """
    canvas = np.ascontiguousarray(image).copy()
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if not len(boxes):
        return canvas
    style = _style(canvas.shape[0], canvas.shape[1])
    colours = [class_colour(label) for label in labels]
    extent = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-extent, kind="stable")  # small things lie on top of large ones
    if masks is not None:
        for at in order:
            _draw_mask(canvas, _decoded(masks[at]), colours[at], style)
    for at in order:
        _draw_box(canvas, boxes[at], colours[at], style)
    texts = list(labels)
    if scores is not None:
        texts = [f"{label} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    return _draw_plates(canvas, boxes, texts, colours, style)


def class_colour(name: str) -> Colour:
    """An RGB colour that belongs to a class name, on every machine and in every run."""
    code = zlib.crc32(name.encode(), _SALT)
    hue = (code % 360) / 360.0
    saturation = (0.95, 0.75, 0.6)[(code // 360) % 3]
    value = (1.0, 0.85)[(code // 1080) % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def curve(
    path: str | Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """Plots named series of (x, y) points into a PNG file, whose folder is made if needed."""
    # The object interface needs no display, no backend choice and no global figure list.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in series.items():
        marker = "o" if len(points) <= 40 else ""
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, ms=3.5, label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def _style(height: int, width: int) -> _Style:
    side = (height * width) ** 0.5
    font = max(10, round(side * 0.023))
    return _Style(line=max(1, round(side / 300)), font=font, pad=max(2, round(font * 0.22)))


def _decoded(mask: Any) -> np.ndarray:
    if isinstance(mask, Mapping):
        from pycocotools import mask as coco_mask

        return coco_mask.decode(mask).astype(bool)  # pyright: ignore[reportArgumentType]
    return np.asarray(mask, bool)


def _draw_mask(canvas: np.ndarray, mask: np.ndarray, colour: Colour, style: _Style) -> None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside, region = mask[part], canvas[part]
    tint = np.array(colour, np.float32)
    blended = region[inside] * (1.0 - MASK_OPACITY) + tint * MASK_OPACITY
    region[inside] = np.rint(blended).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.polylines(canvas, contours, True, colour, max(1, style.line - 1), cv2.LINE_AA)


def _draw_box(canvas: np.ndarray, box: np.ndarray, colour: Colour, style: _Style) -> None:
    height, width = canvas.shape[:2]
    # Half a line inwards, so that an outline along the picture's edge is seen whole.
    inset = style.line / 2
    low = np.clip(box[:2] + inset, inset, [width - inset, height - inset])
    high = np.clip(box[2:] - inset, inset, [width - inset, height - inset])
    low, high = np.minimum(low, high), np.maximum(low, high)
    corners = np.rint((np.stack([low, high]) - 0.5) * (1 << _SHIFT)).astype(int)
    (left, top), (right, bottom) = corners.tolist()
    # A dark line beneath keeps the outline visible on a ground of its own colour; it would swallow
    # an outline of one pixel.
    lines = [((20, 20, 20), style.line + 2), (colour, style.line)]
    for shade, line in lines if style.line > 1 else lines[1:]:
        cv2.rectangle(canvas, (left, top), (right, bottom), shade, line, cv2.LINE_AA, _SHIFT)


def _draw_plates(
    canvas: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[Colour],
    style: _Style,
) -> np.ndarray:
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=style.font)  # Pillow's own: no font of the system is needed
    ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (11, 3)
    size = (canvas.shape[1], canvas.shape[0])
    taken: list[Rect] = []
    plates: list[Rect] = []
    for box, text in zip(boxes, texts, strict=True):
        wide = round(draw.textlength(text, font=font)) + 2 * style.pad
        plate = _place(box, (wide, ascent + descent + style.pad), size, taken)
        taken.append(plate)
        plates.append(plate)
    for plate, text, colour in reversed([*zip(plates, texts, colours, strict=True)]):
        left, top, right, bottom = plate
        draw.rounded_rectangle(
            (left, top, right - 1, bottom - 1), radius=style.pad, fill=colour, outline=(20, 20, 20)
        )
        draw.text((left + style.pad, top + style.pad // 2), text, _ink(colour), font=font)
    return np.asarray(picture).copy()


def _place(
    box: np.ndarray, plate: tuple[int, int], size: tuple[int, int], taken: list[Rect]
) -> Rect:
    """The first of some places about a box that is free, else the one that covers others least."""
    wide, high = plate
    x1, y1, x2, y2 = (round(float(edge)) for edge in box)
    across = (x1, x2 - wide, (x1 + x2 - wide) // 2)
    spots = [(x, y) for y in (y1 - high, y1, y2, y2 - high) for x in across]
    spots += [(x1, y) for y in range(y1 + high, y2 - 2 * high + 1, high)]
    # In a crowd: beside the box, then a line or two away from it.
    spots += [(x, y) for y in (y1, y2 - high) for x in (x2, x1 - wide)]
    spots += [
        (x, y) for far in (2, 3) for y in (y1 - far * high, y2 + (far - 1) * high) for x in across
    ]
    best, least = (0, 0, wide, high), float("inf")
    for x, y in spots:
        left = max(min(x, size[0] - wide), 0)
        top = max(min(y, size[1] - high), 0)
        spot = (left, top, left + wide, top + high)
        covered = sum(_overlap(spot, other) for other in taken)
        if covered < least:
            best, least = spot, covered
        if not covered:
            break
    return best


def _overlap(one: Rect, other: Rect) -> int:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0) * max(high, 0)


def _ink(colour: Colour) -> Colour:
    """Black or white, whichever is easier to read on a plate."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else (255, 255, 255)
