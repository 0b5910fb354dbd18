"""COCO annotation files with their image folders, read as they are."""

import collections
import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from sephjax.errors import UserError
from sephjax.input.coco_json import (
    Described,
    Json,
    boxes_of,
    by_image,
    categories_of,
    check_images,
    labels_of,
    read_json,
    whole_numbers,
)
from sephjax.input.example import Categories, Example, Picture, UnreadableImage, make_example
from sephjax.input.objects import Objects, choose_images, count_objects, usable_boxes
from sephjax.input.segmentations import check_points, check_rles, sound_rings
from sephjax.input.table import Table, flatten_segmentations
from sephjax.input.truth import coco_ground_truth


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
        UserError: a path is missing, the file is no COCO or contradicts itself, or nothing is left.
    """
    where = "data.train" if train else "data.eval"
    content = read_json(annotations, where)
    categories = categories_of(content["categories"], annotations)
    with Described(annotations):
        ids = whole_numbers([record["id"] for record in content["images"]])
        order = np.argsort(ids, kind="stable")
        ids, records = ids[order], [content["images"][at] for at in order]
        sizes = np.asarray([(r["height"], r["width"]) for r in records], np.int32).reshape(-1, 2)
        names = [str(record["file_name"]) for record in records]
    check_images(ids, sizes, annotations)
    rows, owner, orphans = by_image(content["annotations"], ids, annotations)
    found, flat_rings = _annotated(rows, owner, annotations)
    _, kinds = usable_boxes(found.bbox, sizes[owner])
    masked = np.asarray([value is not None for value in found.segmentations], bool)
    counts = count_objects(owner, kinds, found.crowd, masked, len(ids))
    chosen, notes = choose_images(counts, train=train, skip_empty=skip_empty, limit=limit)
    if orphans:
        notes["annotations_of_unknown_images_ignored"] = orphans
    if flat_rings:
        notes["rings_of_polygons_without_area_dropped"] = flat_rings
    if not len(chosen):
        raise UserError(_nothing_left(annotations, len(ids), notes, where))
    _check_files(images, [names[i] for i in chosen], where)
    labels = labels_of(rows, categories, annotations)
    kept = np.flatnonzero(np.isin(owner, chosen))
    return CocoSource(
        folder=str(images),
        names=[names[i] for i in chosen],
        ids=ids[chosen],
        sizes=sizes[chosen],
        categories=categories,
        # An evaluation scores masks against crowds and boxes without area, too.
        has_masks=not counts.unmasked[chosen].any() if train else bool(masked[kept].all()),
        notes=notes,
        train=train,
        table=_table(found, labels, kept, chosen, sizes, annotations),
    )


class _Annotated(NamedTuple):
    """The annotations of a file, in the order of their images."""

    rows: list[Json]
    owner: np.ndarray  # int64 [m], position of the image
    bbox: np.ndarray  # float64 [m, 4], xywh
    crowd: np.ndarray  # bool [m]
    segmentations: list[Any]


def _annotated(rows: list[Json], owner: np.ndarray, path: str) -> tuple[_Annotated, int]:
    """Checks the annotations; also how many rings of polygons enclose nothing and are left out."""
    bbox = boxes_of(rows, path)
    with Described(path):
        crowd = whole_numbers([row.get("iscrowd") or 0 for row in rows]) != 0
        segmentations, dropped = sound_rings(rows, path)
    return _Annotated(rows, owner, bbox, crowd, segmentations), dropped


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
    found: _Annotated,
    labels: np.ndarray,
    kept: np.ndarray,
    chosen: np.ndarray,
    sizes: np.ndarray,
    path: str,
) -> Table:
    """The flat arrays of the annotations `kept`, those of the `chosen` images."""
    owner, bbox = found.owner[kept], found.bbox[kept]
    counts = np.bincount(np.searchsorted(chosen, owner), minlength=len(chosen))
    rows = [found.rows[i] for i in kept]
    with Described(path):
        packed = flatten_segmentations([found.segmentations[i] for i in kept])
        ids = whole_numbers([row.get("id", 0) for row in rows])
        areas = [row.get("area") for row in rows]
        area = np.asarray([np.nan if value is None else value for value in areas], np.float64)
    ring_start, point_start, points, rles = packed
    check_points(rows, ring_start, point_start, points, path)
    check_rles(rows, rles, sizes[owner], path)
    area = np.where(np.isfinite(area), area, bbox[:, 2] * bbox[:, 3])
    start = np.cumsum([0, *counts], dtype=np.int64)
    return Table(start, ids, bbox, labels[kept], found.crowd[kept], area, *packed)
