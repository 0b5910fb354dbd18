"""Which pictures a training step sees: closed forms in (seed, step), nothing remembered.

The bucket of a step. With n_k images in bucket k, buckets are used in proportion to n_k and as
evenly as integers allow. Bucket 0 has had `floor((t * n_0 + r_0) / N)` of the first t steps, with
an offset `0 <= r_0 < N` drawn from the seed; of the steps left to the others, bucket 1 has had
`floor((t' * n_1 + r_1) / (N - n_0))`, and so on. Each count grows by 0 or 1 a step and together
they grow by exactly 1, so the bucket of step t is the one whose count grows there.

The pictures of a step. Every bucket is an endless stream of its pictures: item j belongs to epoch
`j // n_k` and stands at `j % n_k` of a permutation drawn from (seed, bucket, epoch). A bucket's
c-th step takes items `c * batch` to `(c + 1) * batch - 1`, so every picture occurs once in each
epoch of its bucket. An epoch may end within a step.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

_OFFSETS, _ORDER, _AUGMENT = 0, 1, 2  # purposes of random streams; 3 is that of drawn shapes
_PASTE, _STITCH = 4, 5


class Item(NamedTuple):
    """One place of a bucket's stream."""

    picture: int  # its position in the source
    epoch: int  # of the bucket


def stream(seed: int, *path: int) -> np.random.Generator:
    """The random stream of a purpose: a pure function of its numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**32, *path])))


def augmentation(seed: int, item: Item) -> np.random.Generator:
    """The random stream that augments a picture in an epoch."""
    return stream(seed, _AUGMENT, item.epoch, item.picture)


def pasting(seed: int, item: Item) -> np.random.Generator:
    """The random stream of what is pasted onto a picture in an epoch."""
    return stream(seed, _PASTE, item.epoch, item.picture)


def stitching(seed: int, step: int, group: int) -> np.random.Generator:
    """The random stream of what is stitched in a group of a step's batch."""
    return stream(seed, _STITCH, step, group)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order of training; see the head of the file."""

    seed: int
    batch: int  # global, images a step
    members: tuple[np.ndarray, ...]  # positions of the pictures of each bucket
    _cache: dict[tuple[int, int], np.ndarray] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def counts(self, step: int) -> list[int]:
        """How many of the first `step` steps each bucket has had."""
        left, images = step, sum(map(len, self.members))
        offsets = stream(self.seed, _OFFSETS)
        counts = []
        for members in self.members:
            offset = int(offsets.integers(images))
            counts.append((left * len(members) + offset) // images)
            left -= counts[-1]
            images -= len(members)
        return counts

    def bucket(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many earlier steps it has had."""
        before, after = self.counts(step), self.counts(step + 1)
        (grown,) = [k for k, (a, b) in enumerate(zip(before, after, strict=True)) if b > a]
        return grown, before[grown]

    def item(self, bucket: int, place: int) -> Item:
        """The picture at a place of a bucket's stream."""
        members = self.members[bucket]
        epoch, position = divmod(place, len(members))
        return Item(int(members[self._order(bucket, epoch)[position]]), epoch)

    def _order(self, bucket: int, epoch: int) -> np.ndarray:
        order = self._cache.get((bucket, epoch))
        if order is None:
            order = stream(self.seed, _ORDER, bucket, epoch).permutation(len(self.members[bucket]))
            if len(self._cache) > 4 * len(self.members):
                self._cache.clear()
            self._cache[bucket, epoch] = order
        return order
