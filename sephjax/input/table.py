"""Annotations of a whole set in a few flat arrays: small, and quick to hand to a worker."""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from sephjax.input.objects import Objects, Segmentation

SHARED = 2**24  # bytes of polygons from which on workers map a file instead of copying


@dataclasses.dataclass(frozen=True)
class Table:
    """Annotations ordered by image; image `i` has rows `start[i]` to `start[i + 1]`."""

    start: np.ndarray  # int64 [n + 1]
    ids: np.ndarray  # int64 [m]
    bbox: np.ndarray  # float64 [m, 4], xywh
    labels: np.ndarray  # int32 [m]
    crowd: np.ndarray  # bool [m]
    area: np.ndarray  # float64 [m]
    ring_start: np.ndarray  # int64 [m + 1]: rings of a row
    point_start: np.ndarray  # int64 [rings + 1]: numbers of a ring
    points: np.ndarray  # float64, x and y by turns
    rles: dict[int, dict[str, Any]]  # by row

    def __getstate__(self) -> dict[str, Any]:
        # Polygons are nearly all of it (0.3 GB for COCO). Workers map one file of them, which lasts
        # as long as this table does: what is pickled is for processes started by this one.
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.points.nbytes >= SHARED:
            state["points"] = self._points_file.name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["points"], str):
            state = {**state, "points": np.load(state["points"], mmap_mode="r")}
        self.__dict__.update(state)

    @functools.cached_property
    def _points_file(self) -> Any:
        file = tempfile.NamedTemporaryFile(prefix="sephjax_", suffix=".npy")  # noqa: SIM115
        np.save(file, self.points)
        file.flush()
        return file

    def objects(self, i: int) -> Objects:
        """The annotations of image `i`."""
        rows = slice(int(self.start[i]), int(self.start[i + 1]))
        return Objects(
            ids=self.ids[rows],
            bbox=self.bbox[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            area=self.area[rows],
            segmentations=[self._segmentation(row) for row in range(rows.start, rows.stop)],
        )

    def _segmentation(self, row: int) -> Segmentation:
        if row in self.rles:
            return self.rles[row]
        first, last = int(self.ring_start[row]), int(self.ring_start[row + 1])
        bounds = self.point_start[first : last + 1].tolist()
        return [self.points[a:b] for a, b in itertools.pairwise(bounds)] or None


def flatten_segmentations(
    segmentations: Sequence[Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, dict[str, Any]]]:
    """Packs segmentations as JSON gives them into `ring_start, point_start, points, rles`.

    An empty polygon list is no segmentation.

    Raises:
        TypeError, ValueError: something is no list of lists of numbers, no dict and not None.
    """
    polygons = [value if isinstance(value, list) else [] for value in segmentations]
    rings = list(itertools.chain.from_iterable(polygons))
    ring_start = np.cumsum([0, *map(len, polygons)], dtype=np.int64)
    point_start = np.cumsum([0, *map(len, rings)], dtype=np.int64)
    points = np.fromiter(
        itertools.chain.from_iterable(rings), np.float64, count=int(point_start[-1])
    )
    rles = {row: value for row, value in enumerate(segmentations) if isinstance(value, dict)}
    return ring_start, point_start, points, rles
