"""One step's batch: pictures of one bucket, resized, on their canvas, with padded truth."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from sephjax import types
from sephjax.errors import RunError
from sephjax.input import transforms
from sephjax.input.buckets import Canvas
from sephjax.input.example import Example, Source, UnreadableImage
from sephjax.input.schedule import Item, Schedule, augmentation


class Prepared(NamedTuple):
    """A batch on its way from a worker: a plain dict of arrays, and what could not be used."""

    arrays: dict[str, np.ndarray]
    unreadable: list[tuple[int, str]]  # position and reason
    over_cap: int  # objects beyond max_objects


@dataclasses.dataclass(frozen=True)
class Frame:
    """How pictures come onto canvases."""

    short_sides: tuple[int, ...]
    long_side: int
    resize: str  # data.resize
    flip: float  # probability
    max_objects: int
    masks: bool


def to_batch(arrays: dict[str, np.ndarray]) -> types.Batch:
    """The dataclass of a prepared batch."""
    truth = types.Truth(
        arrays["boxes"], arrays["labels"], arrays["object_valid"], arrays.get("masks")
    )
    names = ("image", "size", "original", "index", "valid")
    return types.Batch(**{name: arrays[name] for name in names}, truth=truth)


def blank(rows: int, canvas: Canvas, objects: int, *, masks: bool) -> dict[str, np.ndarray]:
    """A batch of nothing: zero pictures, all invalid."""
    arrays = {
        "image": np.zeros((rows, *canvas, 3), np.uint8),
        "size": np.zeros((rows, 2), np.int32),
        "original": np.zeros((rows, 2), np.int32),
        "index": np.zeros(rows, np.int32),
        "valid": np.zeros(rows, bool),
        "boxes": np.zeros((rows, objects, 4), np.float32),
        "labels": np.zeros((rows, objects), np.int32),
        "object_valid": np.zeros((rows, objects), bool),
    }
    if masks:
        side = transforms.MASK_SIZE
        arrays["masks"] = np.zeros((rows, objects, side, side), np.uint8)
    return arrays


def place_image(
    arrays: dict[str, np.ndarray], row: int, image: np.ndarray, short: int, frame: Frame
) -> None:
    """Resizes a picture into a row of a blank batch."""
    h, w = image.shape[:2]
    new_h, new_w = transforms.resized_shape(h, w, short, frame.long_side, frame.resize)
    transforms.resize_onto(arrays["image"][row], image, new_h, new_w)
    arrays["size"][row] = new_h, new_w
    arrays["original"][row] = h, w
    arrays["valid"][row] = True


def place_objects(
    arrays: dict[str, np.ndarray], row: int, example: Example, frame: Frame, *, flip: bool
) -> int:
    """Puts the objects of a picture that `place_image` has placed into its row.

    Returns:
        How many objects were over the cap; the smallest by area are left out.
    """
    kept = transforms.largest(example.area, frame.max_objects)
    new = (int(arrays["size"][row, 0]), int(arrays["size"][row, 1]))
    old = (example.height, example.width)
    boxes = transforms.scale_boxes(example.boxes[kept], old, new)
    m = len(kept)
    arrays["boxes"][row, :m] = transforms.flip_boxes(boxes, new[1]) if flip else boxes
    arrays["labels"][row, :m] = example.labels[kept]
    arrays["object_valid"][row, :m] = True
    if frame.masks:
        crops = transforms.crop_masks_to_boxes(
            [example.segmentations[i] for i in kept], example.boxes[kept], *old
        )
        arrays["masks"][row, :m] = crops[:, :, ::-1] if flip else crops
    return len(example.boxes) - m


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Step number to the slice of that step's batch that belongs to this process."""

    source: Source
    schedule: Schedule
    buckets: tuple[Canvas, ...]
    frame: Frame
    first: int  # slot of the global batch where this process begins
    local: int  # slots of this process

    def __call__(self, step: int) -> Prepared:
        """Prepares the batch of a step."""
        bucket, count = self.schedule.bucket(step)
        frame = self.frame
        arrays = blank(self.local, self.buckets[bucket], frame.max_objects, masks=frame.masks)
        unreadable: list[tuple[int, str]] = []
        over_cap = 0
        start = count * self.schedule.batch + self.first
        for row in range(self.local):
            item, example = self._readable(bucket, start + row, unreadable)
            random = augmentation(self.schedule.seed, item)
            short = frame.short_sides[int(random.integers(len(frame.short_sides)))]
            flip = bool(random.random() < frame.flip)
            image = transforms.flip(example.image) if flip else example.image
            place_image(arrays, row, image, short, frame)
            arrays["index"][row] = item.picture
            over_cap += place_objects(arrays, row, example, frame, flip=flip)
        return Prepared(arrays, unreadable, over_cap)

    def _readable(
        self, bucket: int, place: int, unreadable: list[tuple[int, str]]
    ) -> tuple[Item, Example]:
        """The picture at a place, or the next one of the bucket that can be read."""
        size = len(self.schedule.members[bucket])
        for offset in range(size):
            item = self.schedule.item(bucket, place + offset)
            try:
                return item, self.source.example(item.picture)
            except UnreadableImage as error:
                unreadable.append((item.picture, str(error)))
        raise RunError(
            f"None of {size} pictures in a row could be read, the last one because "
            f"{unreadable[-1][1]}: repair the image files."
        )


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Batch number to the slice of that batch that belongs to this process."""

    source: Source
    plan: tuple[tuple[int, np.ndarray], ...]  # bucket and positions of each batch
    buckets: tuple[Canvas, ...]
    frame: Frame
    first: int
    local: int

    def __call__(self, number: int) -> Prepared:
        """Prepares a batch; an unreadable picture becomes a black one."""
        bucket, members = self.plan[number]
        frame = self.frame
        arrays = blank(self.local, self.buckets[bucket], 0, masks=False)
        unreadable: list[tuple[int, str]] = []
        for row, index in enumerate(members[self.first : self.first + self.local].tolist()):
            try:
                image = self.source.example(index).image
            except UnreadableImage as error:
                unreadable.append((index, str(error)))
                image = np.zeros((*self.source.sizes[index].tolist(), 3), np.uint8)
            place_image(arrays, row, image, frame.short_sides[0], frame)
            arrays["index"][row] = index
        return Prepared(arrays, unreadable, 0)


def frame_of(data: Any, split: Any, *, train: bool, masks: bool) -> Frame:
    """The frame of `config.data` and one of its splits."""
    return Frame(
        short_sides=tuple(split.short_sides),
        long_side=int(split.long_side),
        resize=data.resize,
        flip=float(data.flip) if train else 0.0,
        max_objects=int(data.max_objects),
        masks=masks,
    )
