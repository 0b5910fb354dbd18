"""TensorFlow Datasets stored as ArrayRecord, read without TensorFlow.

Any builder with COCO-like `objects` will do: `coco_instances`, which `builder.prepare` writes, and
the stock `coco/2017`, whose boxes are relative (ymin, xmin, ymax, xmax) and which has no masks.
"""

import dataclasses
import functools
import io
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from sephjax.errors import RunError, UserError
from sephjax.input.example import (
    Categories,
    Example,
    Picture,
    UnreadableImage,
    image_size,
    make_example,
)
from sephjax.input.objects import (
    Counts,
    Objects,
    Segmentation,
    choose_images,
    count_objects,
    usable_boxes,
)
from sephjax.input.truth import coco_ground_truth

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Index:
    """What opening must know of every record of a split, in the order of the records."""

    ids: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int32 [n, 2]
    names: np.ndarray  # str [n]
    counts: np.ndarray  # int64 [6, n], the fields of `Counts`

    def save(self, path: epath.Path) -> None:
        """Writes the index as npz."""
        buffer = io.BytesIO()
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        np.savez_compressed(buffer, **fields)
        path.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: epath.Path) -> "Index":
        """Reads what `save` wrote."""
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            return cls(*(arrays[field.name] for field in dataclasses.fields(cls)))

    def take(self, order: np.ndarray) -> "Index":
        """The index of some records."""
        return Index(self.ids[order], self.sizes[order], self.names[order], self.counts[:, order])


def index_path(directory: epath.Path, split: str) -> epath.Path:
    """Where `prepare` puts the index of a split."""
    return directory / f"sephjax_index_{split}.npz"


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Images of a tfds split; see `example.Source`."""

    directory: str  # of one version of the dataset
    split: str
    rows: np.ndarray  # int64 [n], records
    ids: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    categories: Categories
    has_masks: bool
    notes: dict[str, int]
    train: bool

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay behind: a worker opens its own.
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    @functools.cached_property
    def _records(self) -> Sequence[Record]:
        return open_records(tfds.builder_from_directory(self.directory), self.split)

    def file_name(self, i: int) -> str:
        """Name of image `i` when it was a file."""
        return str(self.names[i])

    def _read(self, i: int) -> tuple[Picture, Objects]:
        record = self._records[int(self.rows[i])]
        if int(record.get("image/id", self.ids[i])) != self.ids[i]:
            raise RunError(
                f"Record {self.rows[i]} of {self.directory} is image {record['image/id']} and not "
                f"{self.ids[i]}: the index does not belong to these records, prepare them anew."
            )
        height, width = self.sizes[i].tolist()
        picture = Picture(int(self.ids[i]), self.file_name(i), height, width, record["image"])
        return picture, objects_of(record, height, width)

    def example(self, i: int) -> Example:
        """Reads and decodes image `i`; raises `UnreadableImage`."""
        return make_example(*self._read(i), train=self.train)

    def ground_truth(self) -> dict[str, Any]:
        """Everything annotated on these images, as a COCO JSON object; reads all records."""
        return coco_ground_truth(self, lambda i: self._read(i)[1])


def open_tfds(
    name: str,
    data_dir: str,
    split: str,
    *,
    train: bool,
    limit: int = 0,
    skip_empty: bool = True,
) -> TfdsSource:
    """Opens a split of a prepared dataset.

    Args:
        name: of the dataset, `coco_instances` or `coco/2017`; a version may follow after a colon.
        data_dir: folder that holds the dataset's folder.
        split: of the dataset; slices such as `train[:10%]` too.
        train: a training view (crowds left out of the examples) instead of an evaluation view.
        limit: keep the first so many images by id; 0: all.
        skip_empty: leave images without a usable non-crowd object out of a training view.

    Raises:
        UserError: there is no such dataset or split, its form is not COCO-like, or nothing is left.
    """
    directory = find_directory(name, data_dir)
    builder = tfds.builder_from_directory(directory)
    if re.split(r"\W", split)[0] not in builder.info.splits:
        raise UserError(
            f"{directory} has no split {split!r}: choose one of {', '.join(builder.info.splits)}."
        )
    categories = _categories(builder, name)
    path = index_path(epath.Path(directory), split)
    index = Index.load(path) if path.exists() else scan(open_records(builder, split), name)
    order = np.argsort(index.ids, kind="stable")
    index = index.take(order)
    if (index.ids[1:] == index.ids[:-1]).any():
        raise UserError(f"{directory} has two images of the same id in {split}: rebuild it.")
    chosen, notes = choose_images(
        Counts(*index.counts), train=train, skip_empty=skip_empty, limit=limit
    )
    if not len(chosen):
        raise UserError(
            f"Split {split!r} of {directory} leaves no image to use (it has {len(order)}): choose "
            f"another split or rebuild the dataset."
        )
    return TfdsSource(
        directory=directory,
        split=split,
        rows=order[chosen],
        ids=index.ids[chosen],
        sizes=index.sizes[chosen],
        names=index.names[chosen],
        categories=categories,
        has_masks=not index.counts[5, chosen].any(),
        notes=notes,
        train=train,
    )


def find_directory(name: str, data_dir: str) -> str:
    """The folder of the newest (or the named) version of a dataset.

    Raises:
        UserError: there is none.
    """
    if not data_dir:
        raise UserError(
            "data.data_dir is empty: set it to the folder in which --mode=prepare (or tfds build) "
            "put the dataset."
        )
    name, _, version = name.partition(":")
    root = epath.Path(data_dir).expanduser() / name
    versions = {}
    for path in root.iterdir() if root.exists() else ():
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").exists():
            versions[tuple(map(int, path.name.split(".")))] = path
    if version:
        versions = {key: path for key, path in versions.items() if path.name == version}
    if not versions:
        raise UserError(
            f"{root} holds no prepared dataset{' of version ' + version if version else ''}: make "
            f"it with --mode=prepare, or check data.data_dir and data.name."
        )
    return str(versions[max(versions)])


def open_records(builder: Any, split: str) -> Sequence[Record]:
    """Random access to the records of a split; pictures stay encoded.

    Raises:
        UserError: the records are not ArrayRecord.
    """
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        return builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{builder.data_dir} is not stored as ArrayRecord, which random access needs: rebuild "
            f"it with file_format=array_record."
        ) from error


def _categories(builder: Any, name: str) -> Categories:
    features = builder.info.features
    try:
        label = features["objects"]["label"]
        _ = features["image"], features["objects"]["bbox"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{name} is not COCO-like: its features lack `image`, `objects/bbox` or "
            f"`objects/label`."
        ) from error
    label = getattr(label, "feature", label)
    names = getattr(label, "names", None)
    if not names:
        raise UserError(f"{name} does not name its classes: `objects/label` must be a ClassLabel.")
    metadata = builder.info.metadata or {}
    return Categories(tuple(metadata.get("category_ids", range(len(names)))), tuple(names))


def objects_of(record: Record, height: int, width: int) -> Objects:
    """The annotations of a record: exact as `prepare` stores them, or relative as in the stock."""
    objects = record["objects"]
    labels = np.asarray(objects["label"], np.int32).reshape(-1)
    m = len(labels)
    bbox = np.asarray(objects["bbox"], np.float64).reshape(m, 4)
    if "segmentation" not in objects:
        bbox = bbox[:, [1, 0, 3, 2]] * np.asarray([width, height, width, height])
        bbox[:, 2:] -= bbox[:, :2]
    area = np.asarray(objects.get("area", bbox[:, 2] * bbox[:, 3]), np.float64)
    return Objects(
        ids=np.asarray(objects.get("id", np.zeros(m)), np.int64).reshape(m),
        bbox=bbox,
        labels=labels,
        crowd=np.asarray(objects.get("is_crowd", np.zeros(m)), bool).reshape(m),
        area=area.reshape(m),
        segmentations=[_segmentation(text) for text in objects.get("segmentation", [b""] * m)],
    )


def _segmentation(text: bytes) -> Segmentation:
    value = json.loads(text) if text else None
    if isinstance(value, list):
        return [np.asarray(ring, np.float64) for ring in value] or None
    return value


def scan(records: Sequence[Record], name: str) -> Index:
    """Makes an index by reading every record once."""
    begun = time.monotonic()
    ids, sizes, names = [], [], []
    counts = np.zeros((len(Counts._fields), len(records)), np.int64)
    for row, record in enumerate(records):
        ids.append(int(record.get("image/id", row)))
        names.append(bytes(record.get("image/filename", b"%d" % row)).decode())
        try:
            sizes.append(image_size(record["image"], names[-1]))
        except UnreadableImage:
            sizes.append((1, 1))  # reading it will fail, be counted and logged
        counts[:, row] = count_record(objects_of(record, *sizes[-1]), sizes[-1])
    logging.info(
        "Read all %d records of %s for their sizes and object counts: %.1f s; a dataset made by "
        "--mode=prepare keeps an index of them.",
        len(ids),
        name,
        time.monotonic() - begun,
    )
    return Index(
        np.asarray(ids, np.int64),
        np.asarray(sizes, np.int32).reshape(-1, 2),
        np.asarray(names, np.str_),
        counts,
    )


def count_record(objects: Objects, size: tuple[int, int]) -> list[int]:
    """The fields of `Counts` for one image."""
    _, kinds = usable_boxes(objects.bbox, np.asarray([size]))
    masked = np.asarray([bool(value) for value in objects.segmentations], bool)
    owner = np.zeros(len(objects.ids), np.int64)
    counts = count_objects(owner, kinds, objects.crowd, masked, 1)
    return [int(field[0]) for field in counts]
