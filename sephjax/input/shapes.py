"""Drawn sets of geometric shapes with masks: real pictures from a seed, no file."""

import dataclasses
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as _coco_mask

from sephjax.errors import UserError
from sephjax.input.example import Categories, Example, Picture, assemble
from sephjax.input.objects import Objects
from sephjax.input.schedule import stream
from sephjax.input.truth import coco_ground_truth

coco_mask: Any = _coco_mask  # its stubs know one of its call forms only

_DRAWING = 3  # purpose of the random stream
_FINE = 16  # subpixel steps of outlines
_QUARTERS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # cosine and sine of the turns of a cross' arms
_TRIES = 12  # places tried for an object before it is left out


class Kind(NamedTuple):
    """What the pictures of a set show."""

    names: tuple[str, ...]  # of the shapes, in label order
    sizes: tuple[float, float]  # least and largest, of the short side; the logarithm is uniform
    visible: float  # least part of every object that stays in sight


KINDS = {
    "plain": Kind(("circle", "square", "triangle"), (18 / 128, 64 / 128), 0.4),
    "hard": Kind(
        ("circle", "square", "triangle", "star", "cross", "ring", "bar", "half"),
        (12 / 128, 96 / 128),
        0.25,
    ),
}


class Drawing(NamedTuple):
    """A drawn picture and its objects."""

    image: np.ndarray  # uint8 [h, w, 3], RGB
    labels: np.ndarray  # int32 [m]
    masks: np.ndarray  # bool [m, h, w], what is in sight


def open_shapes(
    count: int,
    height: int,
    width: int,
    max_objects: int,
    *,
    kind: str = "plain",
    seed: int = 0,
    train: bool,
) -> "ShapesSource":
    """The drawn set.

    Args:
        count: number of pictures.
        height: of a landscape picture, pixels; every third picture is portrait.
        width: of a landscape picture, pixels.
        max_objects: objects a picture at most; at least one.
        kind: of `KINDS`.
        seed: of the content.
        train: the training split; it shares no picture with the evaluation split.
    """
    if count <= 0 or min(height, width) < 48 or max_objects < 1:
        raise UserError(
            f"data.shapes cannot draw {count} pictures of {height}x{width} with up to "
            f"{max_objects} objects: one picture, 48 pixels a side and one object are the least."
        )
    if kind not in KINDS:
        raise UserError(f"data.shapes.set is {kind!r}: choose one of {', '.join(KINDS)}.")
    names = KINDS[kind].names
    portrait = np.arange(count) % 3 == 2
    sizes = np.where(portrait[:, None], (width, height), (height, width)).astype(np.int32)
    return ShapesSource(
        ids=np.arange(1, count + 1, dtype=np.int64),
        sizes=sizes,
        max_objects=max_objects,
        kind=KINDS[kind],
        seed=seed,
        train=train,
        categories=Categories(tuple(range(1, len(names) + 1)), names),
    )


@dataclasses.dataclass(frozen=True)
class ShapesSource:
    """Drawn pictures; see `example.Source`."""

    ids: np.ndarray
    sizes: np.ndarray
    max_objects: int
    kind: Kind
    seed: int
    train: bool
    categories: Categories
    has_masks: bool = True
    notes: dict[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def file_name(self, i: int) -> str:
        """A name for picture `i`."""
        return f"shapes_{'train' if self.train else 'eval'}_{i:06d}.png"

    def drawing(self, i: int) -> Drawing:
        """Draws picture `i`: a pure function of (seed, split, i) and the size."""
        height, width = self.sizes[i].tolist()
        random = stream(self.seed, _DRAWING, int(self.train), i)
        count = int(random.integers(1, self.max_objects + 1))
        return draw(random, height, width, count, self.kind)

    def example(self, i: int) -> Example:
        """Draws picture `i` with its objects."""
        drawing = self.drawing(i)
        height, width = self.sizes[i].tolist()
        picture = Picture(int(self.ids[i]), self.file_name(i), height, width, b"")
        return assemble(picture, drawing.image, self._objects(i, drawing), train=self.train)

    def ground_truth(self) -> dict[str, Any]:
        """Everything on these pictures, as a COCO JSON object."""
        return coco_ground_truth(self, lambda i: self._objects(i, self.drawing(i)))

    def _objects(self, i: int, drawing: Drawing) -> Objects:
        rles = coco_mask.encode(np.asfortranarray(drawing.masks.transpose(1, 2, 0), np.uint8))
        first = i * self.max_objects + 1
        return Objects(
            ids=np.arange(first, first + len(rles), dtype=np.int64),
            bbox=coco_mask.toBbox(rles).reshape(-1, 4),
            labels=drawing.labels,
            crowd=np.zeros(len(rles), bool),
            area=coco_mask.area(rles).astype(np.float64),
            segmentations=[{**rle, "counts": rle["counts"].decode()} for rle in rles],
        )


def draw(random: np.random.Generator, height: int, width: int, objects: int, kind: Kind) -> Drawing:
    """Draws objects one over the other, a part of every one in sight.

    Args:
        random: where everything comes from.
        height: pixels.
        width: pixels.
        objects: wanted; one that finds no place is left out, the first always finds one.
        kind: the shapes, their sizes and how much of each stays in sight.
    """
    image = _background(random, height, width)
    labels: list[int] = []
    masks = np.zeros((0, height, width), bool)
    wholes: list[int] = []  # pixels of each object before others covered it
    for _ in range(objects):
        for _ in range(_TRIES):
            label = int(random.integers(len(kind.names)))
            alpha = _coverage(random, kind.names[label], kind.sizes, height, width)
            mask = alpha >= 0.5
            seen = masks & ~mask
            if (seen.sum(axis=(1, 2)) >= kind.visible * np.asarray(wholes)).all():
                image = _paint(random, image, alpha)
                masks = np.concatenate([seen, mask[None]])
                labels.append(label)
                wholes.append(int(mask.sum()))
                break
    picture = np.clip(image + random.normal(0.0, 3.0, image.shape), 0, 255).astype(np.uint8)
    return Drawing(picture, np.asarray(labels, np.int32), masks)


def _background(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A soft gradient with cloudy texture, float32 [h, w, 3]."""
    corners = _colour(random, saturation=(20, 90), value=(60, 220))[None, None]
    corners = corners + random.normal(0.0, 28.0, (2, 2, 3))
    size = (width, height)
    image = cv2.resize(corners.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    for cells, strength in ((5, 14.0), (14, 7.0)):
        clouds = random.normal(0.0, strength, (cells, cells, 1)).astype(np.float32)
        image += cv2.resize(clouds, size, interpolation=cv2.INTER_CUBIC)[..., None]
    return image


def _colour(
    random: np.random.Generator, saturation: tuple[int, int], value: tuple[int, int]
) -> np.ndarray:
    hsv = [[[random.integers(180), random.integers(*saturation), random.integers(*value)]]]
    return cv2.cvtColor(np.asarray(hsv, np.uint8), cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _coverage(
    random: np.random.Generator, name: str, sizes: tuple[float, float], height: int, width: int
) -> np.ndarray:
    """Coverage of one shape, float32 [h, w], 0 to 1, antialiased."""
    short = min(height, width)
    radius = short * float(np.exp(random.uniform(*np.log(sizes)))) / 2
    margin = 0.8 * radius  # up to a tenth may reach over the edge
    centre = np.asarray([random.uniform(margin, side - margin) for side in (width, height)])
    turn = random.uniform(0, 2 * np.pi)
    canvas = np.zeros((height, width), np.uint8)
    # OpenCV counts from the centres of pixels; ours are continuous edges.
    fixed = [
        np.rint((centre + radius * points - 0.5) * _FINE).astype(np.int32)
        for points in _outlines(name, turn)
    ]
    cv2.fillPoly(canvas, fixed, 255, lineType=cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) / 255


def _outlines(name: str, turn: float) -> list[np.ndarray]:
    """Corners of a shape of radius 1, [n, 2] each; the second one is a hole."""
    polygon = lambda corners, reach: (
        reach * _circle(turn + np.arange(corners) * 2 * np.pi / corners)
    )
    if name in ("circle", "square", "triangle"):  # reaches give like areas
        return [polygon(*{"circle": (64, 1.0), "square": (4, 1.15), "triangle": (3, 1.25)}[name])]
    if name == "star":
        points = polygon(10, 1.25)
        points[1::2] *= 0.45
        return [points]
    if name == "ring":
        return [polygon(64, 1.0), polygon(64, 0.55)]
    if name == "half":
        return [1.2 * _circle(turn + np.linspace(0, np.pi, 33))]
    if name == "bar":
        corners = [(1.3, 0.4), (-1.3, 0.4), (-1.3, -0.4), (1.3, -0.4)]
    else:  # cross
        a, b = 1.15, 0.35
        arm = [(a, -b), (a, b), (b, b)]
        turned = lambda k: [
            (x * c - y * s, x * s + y * c) for x, y in arm for c, s in [_QUARTERS[k]]
        ]
        corners = [corner for k in range(4) for corner in turned(k)]
    return [np.asarray(corners) @ np.array([_circle(turn), _circle(turn + np.pi / 2)])]


def _circle(angles: Any) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _paint(random: np.random.Generator, image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lays a shape of one colour, lit from one side, over the picture."""
    height, width = alpha.shape
    colour = _colour(random, saturation=(140, 256), value=(110, 256))
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width]
    slope = np.cos(angle) * x / width + np.sin(angle) * y / height
    light = (1.0 + 0.5 * (slope - slope.mean()))[..., None]
    return (image + alpha[..., None] * (colour * light - image)).astype(np.float32)
