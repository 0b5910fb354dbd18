"""One step's batch: pictures of one bucket, resized, on their canvas, with padded truth."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sephjax import types
from sephjax.errors import RunError
from sephjax.input import transforms, views
from sephjax.input.buckets import Canvas
from sephjax.input.example import Example, Source, UnreadableImage
from sephjax.input.paste import choose, paste
from sephjax.input.schedule import Item, Schedule, augmentation, pasting, stitching
from sephjax.input.stitch import stitch
from sephjax.input.views import Frame, Layer

OVER_CAP = "objects_over_cap"  # beyond data.max_objects
CUT_AWAY = "objects_cut_away"  # outside the crop of data.jitter
COVERED = "objects_covered"  # under what data.copy_paste has pasted


class Prepared(NamedTuple):
    """A batch on its way from a worker: a plain dict of arrays, and what could not be used."""

    arrays: dict[str, np.ndarray]
    unreadable: list[tuple[int, str]]  # position and reason
    lost: dict[str, int]  # objects left out, by reason


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
    arrays: dict[str, np.ndarray], row: int, layers: Sequence[Layer], frame: Frame
) -> int:
    """Puts the objects of the layers of a picture into its row.

    Returns:
        How many objects were over the cap; the smallest by area are left out.
    """
    area = np.concatenate([layer.area for layer in layers])
    kept = transforms.largest(area, frame.max_objects)
    before, m = 0, 0
    for layer in layers:
        own = kept[(kept >= before) & (kept < before + len(layer))] - before
        chosen, rows = views.take(layer, own), slice(m, m + len(own))
        arrays["boxes"][row, rows] = chosen.boxes
        arrays["labels"][row, rows] = layer.example.labels[chosen.positions]
        if frame.masks:
            arrays["masks"][row, rows] = views.crops(chosen)
        before += len(layer)
        m += len(own)
    arrays["object_valid"][row, :m] = True
    return len(area) - m


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Step number to the slice of that step's batch that belongs to this process."""

    source: Source
    schedule: Schedule
    buckets: tuple[Canvas, ...]
    frame: Frame
    first: int  # slot of the global batch where this process begins
    local: int  # slots of this process
    group: int = 1  # images among which a pair to stitch is drawn; it divides the batch

    def __call__(self, step: int) -> Prepared:
        """Prepares the batch of a step."""
        bucket, count = self.schedule.bucket(step)
        arrays = self._blank(bucket, self.local)
        unreadable: list[tuple[int, str]] = []
        lost = collections.Counter()
        start = count * self.schedule.batch
        for row in range(self.local):
            lost += self._place(arrays, row, bucket, start + self.first + row, unreadable)
        if self.frame.stitch:
            lost[OVER_CAP] += self._stitch(arrays, step, bucket, start)
        return Prepared(arrays, unreadable, dict(lost))

    def _blank(self, bucket: int, rows: int) -> dict[str, np.ndarray]:
        frame = self.frame
        return blank(rows, self.buckets[bucket], frame.max_objects, masks=frame.masks)

    def _place(
        self,
        arrays: dict[str, np.ndarray],
        row: int,
        bucket: int,
        place: int,
        unreadable: list[tuple[int, str]],
    ) -> collections.Counter[str]:
        """Fills a row with the picture at a place; returns what it has lost."""
        item, example = self._readable(bucket, place, unreadable)
        random, canvas = augmentation(self.schedule.seed, item), self.buckets[bucket]
        view = views.draw(random, (example.height, example.width), canvas, self.frame)
        views.show(arrays["image"][row], example.image, view)
        layer, cut = views.seen(example, view)
        lost = collections.Counter({CUT_AWAY: cut})
        layers, size = (layer,), view.size
        if self.frame.copy_paste:
            layers, size, covered = self._paste(arrays["image"][row], item, layer, unreadable)
            lost[COVERED] += covered
        arrays["size"][row] = size
        arrays["original"][row] = example.height, example.width
        arrays["valid"][row] = True
        arrays["index"][row] = item.picture
        lost[OVER_CAP] += place_objects(arrays, row, layers, self.frame)
        return lost

    def _paste(
        self, image: np.ndarray, item: Item, layer: Layer, unreadable: list[tuple[int, str]]
    ) -> tuple[tuple[Layer, ...], tuple[int, int], int]:
        """Lays objects of another picture, in a view of its own, over one that is on its canvas.

        Any other picture of the source may be it, of whatever bucket. One that cannot be read, or
        of which nothing is seen, leaves the picture as it is.
        """
        random, plain = pasting(self.schedule.seed, item), ((layer,), layer.view.size, 0)
        if random.random() >= self.frame.copy_paste:
            return plain
        step = int(random.integers(1, len(self.source)))
        other = (item.picture + step) % len(self.source)
        try:
            example = self.source.example(other)
        except UnreadableImage as error:
            unreadable.append((other, str(error)))
            return plain
        view = views.draw(random, (example.height, example.width), image.shape[:2], self.frame)
        above, _ = views.seen(example, view)
        above = views.take(above, choose(random, len(above)))
        if not len(above):
            return plain
        picture = np.zeros_like(image)
        views.show(picture, example.image, view)
        done = paste(image, layer.view.size, layer, picture, above)
        return (done.below, done.above), done.size, done.covered

    def _stitch(self, arrays: dict[str, np.ndarray], step: int, bucket: int, start: int) -> int:
        """With a probability a group, one of its pictures becomes a composite of it and another.

        The pair is drawn from the whole group, so that the batch does not depend on how processes
        share it: a picture that another process has is prepared here once more.
        """
        over_cap = 0
        for number in range(self.schedule.batch // self.group):
            random = stitching(self.schedule.seed, step, number)
            if random.random() >= self.frame.stitch:
                continue
            pair = number * self.group + random.permutation(self.group)[:2] - self.first
            a, b = pair.tolist()
            if not 0 <= a < self.local:
                continue
            other = arrays
            if not 0 <= b < self.local:
                other = self._blank(bucket, 1)
                self._place(other, 0, bucket, start + self.first + b, [])
                b = 0
            over_cap += stitch(arrays, a, other, b)
        return over_cap

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
        return Prepared(arrays, unreadable, {})


def frame_of(data: Any, split: Any, *, train: bool, masks: bool) -> Frame:
    """The frame of `config.data` and one of its splits."""
    plain = Frame(
        short_sides=tuple(split.short_sides),
        long_side=int(split.long_side),
        resize=data.resize,
        flip=0.0,
        max_objects=int(data.max_objects),
        masks=masks,
    )
    if not train:
        return plain
    return dataclasses.replace(
        plain,
        flip=float(data.flip),
        jitter=(float(data.jitter.low), float(data.jitter.high)),
        crop=int(data.jitter.crop),
        copy_paste=float(data.copy_paste),
        stitch=float(data.stitch),
    )
