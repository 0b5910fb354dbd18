"""One drawn picture with its truth: what both sides of a model comparison are given."""

import dataclasses

import numpy as np

from sephjax.types import Batch, Truth

GRID = 112  # cells a side of a mask in the frame of its box


@dataclasses.dataclass(frozen=True)
class Scene:
    """Ellipses on a noisy ground.

    Attributes:
        image: uint8 [h, w, 3], RGB.
        boxes: float32 [m, 4], pixels.
        labels: int32 [m], from 0.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray

    def masks(self) -> np.ndarray:
        """uint8 [m, h, w]: every object on the whole picture."""
        height, width = self.image.shape[:2]
        return np.stack([_ellipse(box, height, width) for box in self.boxes])

    def batch(self, slots: int) -> Batch:
        """The scene as a batch of one image with room for `slots` objects."""
        count = len(self.labels)
        boxes = np.zeros((1, slots, 4), np.float32)
        labels, valid = np.zeros((1, slots), np.int32), np.zeros((1, slots), bool)
        masks = np.zeros((1, slots, GRID, GRID), np.uint8)
        boxes[0, :count], labels[0, :count], valid[0, :count] = self.boxes, self.labels, True
        masks[0, :count] = _ellipse(np.array([0, 0, GRID, GRID]), GRID, GRID)
        size = np.array([self.image.shape[:2]], np.int32)
        truth = Truth(boxes, labels, valid, masks)
        one = np.zeros(1, np.int32)
        return Batch(self.image[None], size, size, one, np.ones(1, bool), truth)


def draw(height: int, width: int, objects: int, classes: int, *, seed: int = 0) -> Scene:
    """A scene whose objects have sides of an eighth to a half of the picture."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (height // 16, width // 16, 3))
    image = np.kron(coarse, np.ones((16, 16, 1))) + rng.normal(0, 12, (height, width, 3))
    limit = np.array([width, height])
    half = 0.5 * rng.uniform(1 / 8, 1 / 2, (objects, 2)) * limit
    centre = half + rng.uniform(size=(objects, 2)) * (limit - 2 * half)
    boxes = np.concatenate([centre - half, centre + half], -1).astype(np.float32)
    for box in boxes:
        image[_ellipse(box, height, width) > 0] = rng.uniform(0, 255, 3)
    labels = rng.integers(0, classes, objects).astype(np.int32)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), boxes, labels)


def _ellipse(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [height, width], 1 inside the ellipse that fills `box`."""
    x1, y1, x2, y2 = (float(edge) for edge in box)
    x = (np.arange(width) + 0.5 - 0.5 * (x1 + x2)) / (0.5 * (x2 - x1))
    y = (np.arange(height) + 0.5 - 0.5 * (y1 + y2)) / (0.5 * (y2 - y1))
    return (x[None] ** 2 + y[:, None] ** 2 <= 1.0).astype(np.uint8)
