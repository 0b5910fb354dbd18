"""Reading a COCO annotation file with checks: what is wrong with it becomes one sentence."""

import json
from typing import Any

import numpy as np

from sephjax.errors import UserError
from sephjax.input.example import Categories

Json = dict[str, Any]


def read_json(path: str, where: str) -> Json:
    """Reads a COCO annotation file and checks its outer form.

    Raises:
        UserError: no path, no file, no JSON or no COCO.
    """
    if not path:
        raise UserError(
            f"{where}.annotations is empty: set it to a COCO annotation file, for example "
            f"--config.{where}.annotations=annotations/instances.json, or choose "
            f"--config.data.source=shapes."
        )
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(
            f"{where}.annotations={path} cannot be read ({error.strerror}): set it to a COCO "
            f"annotation file."
        ) from error
    except ValueError as error:  # broken JSON or broken UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): fetch or export it anew.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"{path} is no COCO instances file: it has no list {key!r}; a COCO file holds "
                f"'images', 'annotations' and 'categories'."
            )
    return content


class Described:
    """Turns a missing key or a wrong type inside a COCO file into a sentence."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyError):
            raise UserError(
                f"{self.path} is no COCO instances file: an entry has no {error.args[0]!r}."
            ) from error
        if isinstance(error, TypeError | ValueError | AttributeError | OverflowError):
            raise UserError(
                f"{self.path} is no COCO instances file: an entry has a value of the wrong kind "
                f"({error})."
            ) from error


def whole_numbers(values: list[Any]) -> np.ndarray:
    """Ids, int64 [n]; strings of digits do.

    Raises:
        TypeError, ValueError, OverflowError: one is no whole number, or too large.
    """
    array = np.asarray(values) if values else np.zeros(0, np.int64)
    if array.dtype.kind == "i":
        return array.astype(np.int64)
    numbers = [int(value) for value in values]
    for number, value in zip(numbers, values, strict=True):
        if isinstance(value, float) and value != number:
            raise ValueError(f"{value} is no whole number")
    return np.asarray(numbers, np.int64)


def categories_of(records: list[Json], path: str) -> Categories:
    """The categories of a file, ascending by id."""
    with Described(path):
        numbers = whole_numbers([record["id"] for record in records])
        order = np.argsort(numbers, kind="stable").tolist()
        ids = tuple(numbers[order].tolist())
        names = tuple(str(records[at]["name"]) for at in order)
    if not ids:
        raise UserError(f"{path} has no categories: add the classes of its objects.")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has two categories of the same id: give each its own.")
    return Categories(ids, names)


def check_images(ids: np.ndarray, sizes: np.ndarray, path: str) -> None:
    """Fails on images of the same id (`ids` ascend) or without a size."""
    repeated = np.flatnonzero(ids[1:] == ids[:-1])
    if len(repeated):
        raise UserError(f"{path} has two images of id {ids[repeated[0]]}: give each its own.")
    flat = np.flatnonzero((sizes <= 0).any(axis=1))
    if len(flat):
        raise UserError(
            f"{path} gives image {ids[flat[0]]} the size {sizes[flat[0], 0]}x{sizes[flat[0], 1]}: "
            f"height and width must be positive."
        )


def by_image(
    annotations: list[Json], ids: np.ndarray, path: str
) -> tuple[list[Json], np.ndarray, int]:
    """Annotations in the order of their images, the image of each, and how many are strays."""
    with Described(path):
        image_ids = whole_numbers([row["image_id"] for row in annotations])
    if not len(ids):
        return [], np.zeros(0, np.int64), len(annotations)
    owner = np.minimum(np.searchsorted(ids, image_ids), len(ids) - 1)
    known = np.flatnonzero(ids[owner] == image_ids)
    order = known[np.argsort(owner[known], kind="stable")]
    return [annotations[i] for i in order], owner[order], len(annotations) - len(order)


def boxes_of(rows: list[Json], path: str) -> np.ndarray:
    """The boxes of annotations, float64 [m, 4] xywh."""
    with Described(path):
        lists = [row.get("bbox") for row in rows]
    try:
        bbox = np.asarray(lists, np.float64).reshape(len(rows), 4)
    except (TypeError, ValueError):
        bad = next((i for i, box in enumerate(lists) if not _four_numbers(box)), 0)
    else:
        wrong = np.flatnonzero(~np.isfinite(bbox).all(axis=1))
        if not len(wrong):
            return bbox
        bad = int(wrong[0])
    raise UserError(
        f"{path}: annotation {rows[bad].get('id')} of image {rows[bad]['image_id']} has bbox "
        f"{lists[bad]!r}, which is not four finite numbers x, y, width, height."
    )


def _four_numbers(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)


def labels_of(rows: list[Json], categories: Categories, path: str) -> np.ndarray:
    """The labels of annotations, int32 [m], 0..k-1."""
    with Described(path):
        numbers = whole_numbers([row["category_id"] for row in rows])
    ids = np.asarray(categories.ids, np.int64)
    labels = np.minimum(np.searchsorted(ids, numbers), len(ids) - 1)
    unknown = np.flatnonzero(ids[labels] != numbers)
    if len(unknown):
        row = rows[unknown[0]]
        raise UserError(
            f"{path}: annotation {row.get('id')} of image {row['image_id']} has category_id "
            f"{row['category_id']}, which is not among its {len(ids)} categories: add the category "
            f"or remove the annotation ({len(unknown)} such)."
        )
    return labels.astype(np.int32)
