"""COCO annotation files with their image folders, read as they are."""

import collections
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from sephjax.errors import UserError
from sephjax.input.example import Categories, Example, Picture, UnreadableImage, make_example
from sephjax.input.objects import Objects, choose_images, count_objects, usable_boxes
from sephjax.input.table import Table, flatten_segmentations
from sephjax.input.truth import coco_ground_truth

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CocoSource:
    """Images of a COCO annotation file; see `example.Source`."""

    folder: str
    names: list[str]  # [n], relative to the folder
    ids: np.ndarray
    sizes: np.ndarray
    categories: Categories
    has_masks: bool
    notes: dict[str, int]
    train: bool
    table: Table

    def __len__(self) -> int:
        return len(self.ids)

    def file_name(self, i: int) -> str:
        """Name of image `i` in the annotation file."""
        return self.names[i]

    def picture(self, i: int) -> Picture:
        """The bytes of image `i`; raises `UnreadableImage`."""
        path = os.path.join(self.folder, self.names[i])
        try:
            data = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{path} cannot be read: {error.strerror}") from error
        height, width = self.sizes[i].tolist()
        return Picture(int(self.ids[i]), self.names[i], height, width, data)

    def objects(self, i: int) -> Objects:
        """The annotations of image `i`, untouched."""
        return self.table.objects(i)

    def example(self, i: int) -> Example:
        """Reads and decodes image `i`; raises `UnreadableImage`."""
        return make_example(self.picture(i), self.objects(i), train=self.train)

    def ground_truth(self) -> Json:
        """Everything annotated on these images, as a COCO JSON object."""
        return coco_ground_truth(self, self.objects)


def open_coco(
    annotations: str, images: str, *, train: bool, limit: int = 0, skip_empty: bool = True
) -> CocoSource:
    """Opens a COCO annotation file and its image folder.

    Args:
        annotations: path of the JSON file.
        images: folder of the pictures.
        train: a training view (crowds left out of the examples) instead of an evaluation view.
        limit: keep the first so many images by id; 0: all.
        skip_empty: leave images without a usable non-crowd object out of a training view.

    Raises:
        UserError: a path is missing, the file is not COCO or contradicts itself, or nothing is left.
    """
    where = "data.train" if train else "data.eval"
    content = read_json(annotations, where)
    categories = _categories(content["categories"], annotations)
    with _Described(annotations):
        records = sorted(content["images"], key=lambda record: record["id"])
        ids = np.asarray([record["id"] for record in records], np.int64)
        sizes = np.asarray([(r["height"], r["width"]) for r in records], np.int32).reshape(-1, 2)
        names = [str(record["file_name"]) for record in records]
    _check_images(ids, sizes, annotations)
    rows, owner, orphans = _by_image(content["annotations"], ids, annotations)
    bbox = _boxes(rows, annotations)
    _, kinds = usable_boxes(bbox, sizes[owner])
    crowd = np.asarray([bool(row.get("iscrowd", 0)) for row in rows], bool)
    masked = np.asarray([bool(row.get("segmentation")) for row in rows], bool)
    counts = count_objects(owner, kinds, crowd, masked, len(ids))
    chosen, notes = choose_images(counts, train=train, skip_empty=skip_empty, limit=limit)
    if orphans:
        notes["annotations_of_unknown_images_ignored"] = orphans
    if not len(chosen):
        raise UserError(_nothing_left(annotations, len(ids), notes, where))
    _check_files(images, [names[i] for i in chosen], where)
    table = _table(rows, owner, chosen, _labels(rows, categories, annotations), annotations)
    return CocoSource(
        folder=str(images),
        names=[names[i] for i in chosen],
        ids=ids[chosen],
        sizes=sizes[chosen],
        categories=categories,
        has_masks=not counts.unmasked[chosen].any(),
        notes=notes,
        train=train,
        table=table,
    )


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


class _Described:
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
        if isinstance(error, TypeError | ValueError | AttributeError):
            raise UserError(
                f"{self.path} is no COCO instances file: an entry has a value of the wrong kind "
                f"({error})."
            ) from error


def _categories(records: list[Json], path: str) -> Categories:
    with _Described(path):
        records = sorted(records, key=lambda record: record["id"])
        ids = tuple(int(record["id"]) for record in records)
        names = tuple(str(record["name"]) for record in records)
    if not ids:
        raise UserError(f"{path} has no categories: add the classes of its objects.")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has two categories of the same id: give each its own.")
    return Categories(ids, names)


def _check_images(ids: np.ndarray, sizes: np.ndarray, path: str) -> None:
    repeated = np.flatnonzero(ids[1:] == ids[:-1])
    if len(repeated):
        raise UserError(f"{path} has two images of id {ids[repeated[0]]}: give each its own.")
    flat = np.flatnonzero((sizes <= 0).any(axis=1))
    if len(flat):
        raise UserError(
            f"{path} gives image {ids[flat[0]]} the size {sizes[flat[0], 0]}x{sizes[flat[0], 1]}: "
            f"height and width must be positive."
        )


def _by_image(
    annotations: list[Json], ids: np.ndarray, path: str
) -> tuple[list[Json], np.ndarray, int]:
    """Annotations in the order of their images, the image of each, and how many are strays."""
    with _Described(path):
        image_ids = np.asarray([row["image_id"] for row in annotations], np.int64)
    if not len(ids):
        return [], np.zeros(0, np.int64), len(annotations)
    owner = np.minimum(np.searchsorted(ids, image_ids), len(ids) - 1)
    known = np.flatnonzero(ids[owner] == image_ids)
    order = known[np.argsort(owner[known], kind="stable")]
    return [annotations[i] for i in order], owner[order], len(annotations) - len(order)


def _boxes(rows: list[Json], path: str) -> np.ndarray:
    with _Described(path):
        lists = [row["bbox"] for row in rows]
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


def _labels(rows: list[Json], categories: Categories, path: str) -> np.ndarray:
    with _Described(path):
        numbers = np.asarray([row["category_id"] for row in rows], np.int64)
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


def _nothing_left(path: str, total: int, notes: dict[str, int], where: str) -> str:
    reasons = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in notes.items())
    return (
        f"{path} leaves no image to use (it lists {total}{'; ' + reasons if reasons else ''}): "
        f"check {where}.annotations."
    )


def _check_files(folder: str, names: list[str], where: str) -> None:
    """One listing of each folder tells which pictures are missing."""
    if not folder or not os.path.isdir(folder):
        raise UserError(
            f"{where}.images={folder or repr('')} is not a folder: set it to the folder of the "
            f"pictures."
        )
    by_folder = collections.defaultdict(list)
    for name in names:
        by_folder[os.path.dirname(name)].append(name)
    missing = []
    for part, members in by_folder.items():
        path = os.path.join(folder, part)
        present = set(os.listdir(path)) if os.path.isdir(path) else set()
        missing += [name for name in members if os.path.basename(name) not in present]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} images are not in {where}.images={folder}, the first "
            f"is {min(missing)}: complete the folder or set {where}.images to another."
        )


def _table(
    rows: list[Json], owner: np.ndarray, chosen: np.ndarray, labels: np.ndarray, path: str
) -> Table:
    """The flat arrays of the annotations of the chosen images."""
    kept = np.flatnonzero(np.isin(owner, chosen))
    counts = np.bincount(np.searchsorted(chosen, owner[kept]), minlength=len(chosen))
    rows = [rows[i] for i in kept]
    bbox = _boxes(rows, path)
    with _Described(path):
        packed = flatten_segmentations([row.get("segmentation") for row in rows])
        ids = np.asarray([row.get("id", 0) for row in rows], np.int64)
        areas = [row.get("area") for row in rows]
        area = np.asarray([np.nan if value is None else value for value in areas], np.float64)
    area = np.where(np.isfinite(area), area, bbox[:, 2] * bbox[:, 3])
    return Table(
        np.cumsum([0, *counts], dtype=np.int64),
        ids,
        bbox,
        labels[kept],
        np.asarray([bool(row.get("iscrowd", 0)) for row in rows], bool),
        area,
        *packed,
    )
