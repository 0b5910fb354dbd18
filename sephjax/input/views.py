"""How a picture lies on its canvas, and what of its objects is seen there.

A view is: mirror or not, resize, cut to a window. Ordinary training has the window as large as the
resized picture; large-scale jitter (`data.jitter`) draws both from wide ranges, so that objects are
cut. Masks are rasterised in the frame of what is left of a box, straight from the outlines of the
file, and never from a mask that was already cropped or resized.
"""

import dataclasses

import cv2
import numpy as np

from sephjax.input import transforms
from sephjax.input.buckets import Canvas
from sephjax.input.example import Example

Size = tuple[int, int]  # height, width
LEAST = 1.0  # canvas pixels; a cut object with a shorter side is not seen any more


@dataclasses.dataclass(frozen=True)
class Frame:
    """How pictures come onto canvases, and what they go through on the way."""

    short_sides: tuple[int, ...]
    long_side: int
    resize: str  # data.resize
    flip: float  # probability
    max_objects: int
    masks: bool
    jitter: tuple[float, float] = (1.0, 1.0)  # range of the target size, in crops
    crop: int = 0  # side of the square canvas, pixels; 0: no jitter
    copy_paste: float = 0.0  # probability an image
    stitch: float = 0.0  # probability a group of images


@dataclasses.dataclass(frozen=True)
class View:
    """A picture mirrored or not, then resized, then cut to a window at the canvas' top-left."""

    file: Size
    resized: Size
    offset: Size  # of the window in the resized picture
    size: Size  # of the window
    flip: bool

    @property
    def whole(self) -> bool:
        """Is all of the picture seen?"""
        return self.size == self.resized

    def to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [m, 4] of the file on the canvas; they may reach over the window."""
        boxes = transforms.scale_boxes(boxes, self.file, self.resized)
        boxes = transforms.flip_boxes(boxes, self.resized[1]) if self.flip else boxes
        return boxes - self._corner()

    def to_file(self, boxes: np.ndarray) -> np.ndarray:
        """The reverse of `to_canvas`."""
        boxes = boxes + self._corner()
        boxes = transforms.flip_boxes(boxes, self.resized[1]) if self.flip else boxes
        return transforms.scale_boxes(boxes, self.resized, self.file)

    def _corner(self) -> np.ndarray:
        return np.asarray([self.offset[1], self.offset[0]] * 2, np.float64)


def draw(random: np.random.Generator, file: Size, canvas: Canvas, frame: Frame) -> View:
    """Draws a view.

    With `frame.crop` it is large-scale jitter (Ghiasi et al. 2021, section 3; detectron2's
    ResizeScale and FixedSizeCrop): a factor is drawn evenly from `frame.jitter`, the picture is
    resized, keeping its aspect, to the largest size within factor * crop a side, and where it is
    longer than the canvas a window is cut evenly among the possible ones, each axis by itself
    (detectron2 has one draw for both). Otherwise one of `short_sides` is drawn.

    Args:
        random: the picture's stream.
        file: height and width of the file.
        canvas: the window is at most as large.
        frame: the ranges.
    """
    if frame.crop:
        target = random.uniform(*frame.jitter) * frame.crop
        scale = target / max(file)
        resized = (max(int(file[0] * scale + 0.5), 1), max(int(file[1] * scale + 0.5), 1))
    else:
        short = frame.short_sides[int(random.integers(len(frame.short_sides)))]
        resized = transforms.resized_shape(*file, short, frame.long_side, frame.resize)
    flip = bool(random.random() < frame.flip)
    spare = [max(side - most, 0) for side, most in zip(resized, canvas, strict=True)]
    offset = (int(random.integers(spare[0] + 1)), int(random.integers(spare[1] + 1)))
    size = (min(resized[0], canvas[0]), min(resized[1], canvas[1]))
    return View(file, resized, offset, size, flip)


def show(canvas: np.ndarray, image: np.ndarray, view: View) -> None:
    """Draws what a view shows of a picture at the top-left of a canvas.

    Args:
        canvas: uint8 [H, W, 3], changed in place; outside the window it stays as it is.
        image: uint8 [h, w, 3].
        view: how.
    """
    image = transforms.flip(image) if view.flip else image
    if view.whole:
        transforms.resize_onto(canvas, image, *view.resized)
        return
    (y, x), (height, width) = view.offset, view.size
    resized = cv2.resize(image, view.resized[::-1], interpolation=cv2.INTER_LINEAR)
    canvas[:height, :width] = resized[y : y + height, x : x + width]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The objects of one picture that are seen on a canvas, [m] each."""

    example: Example
    view: View
    positions: np.ndarray  # int64, in the example
    boxes: np.ndarray  # float64 [m, 4], canvas pixels
    area: np.ndarray  # float64, square pixels of the canvas
    hidden: np.ndarray | None = None  # bool [H, W], canvas pixels that lie under another layer

    def __len__(self) -> int:
        return len(self.positions)


def take(layer: Layer, rows: np.ndarray) -> Layer:
    """Some objects of a layer."""
    chosen = {name: getattr(layer, name)[rows] for name in ("positions", "boxes", "area")}
    return dataclasses.replace(layer, **chosen)


def seen(example: Example, view: View) -> tuple[Layer, int]:
    """The objects that a view shows.

    What the window cuts gets the smallest box around what is left of its mask, as detectron2's
    `recompute_boxes` has it, to a pixel; without a mask the box is cut. A cut object with less than
    a pixel of either side left, or nothing of its mask, is not seen.

    Returns:
        The layer, and how many objects the cut has taken away.
    """
    boxes = view.to_canvas(example.boxes)
    share = view.resized[0] * view.resized[1] / (view.file[0] * view.file[1])
    layer = Layer(example, view, np.arange(len(boxes)), boxes, example.area * share)
    if view.whole:
        return layer, 0
    left = np.clip(boxes, 0.0, np.asarray(view.size[::-1] * 2, np.float64))
    area = layer.area.copy()
    kept = np.ones(len(boxes), bool)
    for i in np.flatnonzero((left != boxes).any(axis=1)):
        left[i], part = _left_of(layer, int(i), left[i])
        kept[i] = part > 0
        area[i] *= part
    return take(dataclasses.replace(layer, boxes=left, area=area), kept), int((~kept).sum())


def _left_of(layer: Layer, i: int, box: np.ndarray) -> tuple[np.ndarray, float]:
    """The box of what is left of object `i` in the cut `box`, and its share of the whole box."""
    if (box[2:] - box[:2] < LEAST).any():
        return box, 0.0
    share = float(np.prod(box[2:] - box[:2]) / np.prod(layer.boxes[i, 2:] - layer.boxes[i, :2]))
    if not layer.example.segmentations[i]:
        return box, share
    window = outer(box, layer.view.size)
    tight = bounds(pixels(layer, i, window), window)
    if tight is None:
        return box, 0.0
    tight = np.concatenate([np.maximum(tight[:2], box[:2]), np.minimum(tight[2:], box[2:])])
    return tight, 0.0 if (tight[2:] - tight[:2] < LEAST).any() else share


def outer(box: np.ndarray, size: Size) -> np.ndarray:
    """The whole pixels that a box touches in a window of `size`: int64 [4] xyxy, not empty."""
    limit = np.asarray(size[::-1])
    low = np.clip(np.floor(box[:2]).astype(np.int64), 0, limit - 1)
    high = np.clip(np.ceil(box[2:]).astype(np.int64), low + 1, limit)
    return np.concatenate([low, high])


def pixels(layer: Layer, row: int, window: np.ndarray) -> np.ndarray:
    """The mask of an object in a window of the canvas.

    Args:
        layer: of the object.
        row: which.
        window: int [4] xyxy in pixels of the canvas.

    Returns:
        uint8 [rows, columns], 0 or 1, whatever lies over it.
    """
    segmentation = layer.example.segmentations[int(layer.positions[row])]
    shape = (int(window[3] - window[1]), int(window[2] - window[0]))
    box = layer.view.to_file(window[None].astype(np.float64))[0]
    mask = transforms.rasterize(segmentation, box, shape, layer.view.file)
    return mask[:, ::-1] if layer.view.flip else mask


def bounds(mask: np.ndarray, window: np.ndarray) -> np.ndarray | None:
    """The smallest box around a mask in a window: float64 [4] xyxy of the canvas; None: empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    low = [window[0] + columns[0], window[1] + rows[0]]
    high = [window[0] + columns[-1] + 1, window[1] + rows[-1] + 1]
    return np.asarray([*low, *high], np.float64)


def crops(layer: Layer) -> np.ndarray:
    """The mask of each object in the frame of its own box: uint8 [m, 112, 112], 0 or 1."""
    example, view = layer.example, layer.view
    whole = view.whole and layer.hidden is None
    boxes = example.boxes[layer.positions] if whole else view.to_file(layer.boxes)
    outlines = [example.segmentations[i] for i in layer.positions]
    found = transforms.crop_masks_to_boxes(outlines, boxes, *view.file)
    found = found[:, :, ::-1] if view.flip else found
    if layer.hidden is None:
        return found
    over = [transforms.sample_in_box(layer.hidden, box, found.shape[1:]) for box in layer.boxes]
    return found & (1 - np.asarray(over, np.uint8).reshape(found.shape))
