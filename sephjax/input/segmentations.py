"""Checks of the segmentations of a COCO file: pycocotools reads past wrong ones, or crashes."""

from typing import Any, NoReturn

import numpy as np

from sephjax.errors import UserError

Json = dict[str, Any]

FAR = 1e7  # pixels; pycocotools' drawing of a polygon crashes somewhere beyond
LETTERS = 12  # of one number of an RLE; more are beyond any picture


def sound_rings(rows: list[Json], path: str) -> tuple[list[Any], int]:
    """The segmentations of annotations without rings that enclose nothing, and how many these are.

    A ring of fewer than three points, or of an odd number of numbers, encloses nothing; a polygon
    without another ring is no segmentation, None. RLEs stay as they are.

    Raises:
        UserError: a segmentation is no list of rings and no RLE.
    """
    found, dropped = [], 0
    for row in rows:
        value = row.get("segmentation")
        if isinstance(value, list):
            if not all(isinstance(ring, list) for ring in value):
                _refuse(row, path, "a polygon that is not a list of rings [x, y, x, y, ...]")
            rings = [ring for ring in value if len(ring) >= 6 and len(ring) % 2 == 0]
            dropped += len(value) - len(rings)
            value = rings
        elif value and not isinstance(value, dict):
            _refuse(row, path, f"the segmentation {value!r}")
        found.append(value or None)
    return found, dropped


def check_points(
    rows: list[Json],
    ring_start: np.ndarray,
    point_start: np.ndarray,
    points: np.ndarray,
    path: str,
) -> None:
    """Fails on a polygon whose points are not all finite and near; arguments as in `Table`."""
    bad = np.flatnonzero(~(np.abs(points) <= FAR))
    if len(bad):
        ring = np.searchsorted(point_start, bad[0], side="right") - 1
        row = rows[int(np.searchsorted(ring_start, ring, side="right")) - 1]
        _refuse(row, path, f"a polygon with the coordinate {points[bad[0]]}")


def check_rles(rows: list[Json], rles: dict[int, Json], sizes: np.ndarray, path: str) -> None:
    """Fails on an RLE that is incomplete, broken, or has another size than its image.

    Args:
        rows: annotations.
        rles: by position in `rows`.
        sizes: int [m, 2], height and width of the image of each annotation.
        path: of the file.
    """
    for at, rle in rles.items():
        height, width = size = sizes[at].tolist()
        counts = rle.get("counts")
        if not isinstance(counts, list | str) or rle.get("size") != size:
            told = f"an RLE without counts or with size {rle.get('size')} in an image of {size}"
            _refuse(rows[at], path, told)
        if not _fill(counts, height * width):
            _refuse(rows[at], path, f"an RLE whose runs are not those of {height}x{width} pixels")


def _fill(counts: list[Any] | str, pixels: int) -> bool:
    try:
        lengths = runs(counts) if isinstance(counts, str) else np.asarray(counts, np.int64)
    except (ValueError, TypeError, OverflowError):
        return False
    return lengths.ndim == 1 and bool((lengths >= 0).all()) and int(lengths.sum()) == pixels


def runs(text: str) -> np.ndarray:
    """Lengths of the runs of a compressed RLE, int64, 0s first.

    A number is letters of six bits: five of its own, low ones first, and whether more follow. From
    the fourth on it is the difference from the one two before.

    Raises:
        ValueError: it is cut short, or holds what no RLE holds.

    Source: `rleFrString` of pycocotools 2.0.11.
    """
    letters = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("no RLE")
    last = np.flatnonzero(letters & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(letters)) - np.repeat(first, last - first + 1)
    if place.max() >= LETTERS:
        raise ValueError("no RLE")
    values = np.add.reduceat((letters & 31) << (5 * place), first)
    values -= np.where(letters[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _refuse(row: Json, path: str, what: str) -> NoReturn:
    raise UserError(
        f"{path}: annotation {row.get('id')} of image {row.get('image_id')} has {what}; correct it "
        "or remove the annotation."
    )
