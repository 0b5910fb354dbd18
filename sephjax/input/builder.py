"""`--mode=prepare`: COCO JSON and images into the tfds dataset `coco_instances`, as ArrayRecord.

The only file of the input side that uses TensorFlow, and only while it writes.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from sephjax.errors import UserError
from sephjax.input.coco import CocoSource, open_coco
from sephjax.input.example import UnreadableImage
from sephjax.input.tfds_source import Index, count_record, index_path

NAME, VERSION = "coco_instances", "1.0.0"


def prepare(splits: Mapping[str, tuple[str, str]], data_dir: str) -> str:
    """Writes COCO data as a sharded tfds dataset with masks, exactly.

    Image files are stored byte for byte, boxes and areas as float64, segmentations as JSON text.
    All images and annotations are kept, also those that training leaves out; records are in the
    order of image ids. Beside the shards lies an index by split (`sephjax_index_<split>.npz`).

    Args:
        splits: by name of the split: annotation file and image folder.
        data_dir: tfds data_dir to write to; `coco_instances/1.0.0` must not exist in it.

    Returns:
        The folder of the dataset.

    Raises:
        UserError: the input does not do (see `open_coco`), or the dataset exists.
    """
    if not data_dir:
        raise UserError("data.data_dir is empty: set it to the folder to prepare the dataset in.")
    target = epath.Path(data_dir).expanduser() / NAME / VERSION
    if target.exists():
        raise UserError(f"{target} exists: remove it, or choose another data.data_dir.")
    sources = {
        split: open_coco(annotations, images, train=False)
        for split, (annotations, images) in splits.items()
    }
    _check_categories(sources)
    builder = _builder(sources, str(epath.Path(data_dir).expanduser()))
    builder.download_and_prepare(download_config=_offline(), file_format="array_record")
    for split, source in sources.items():
        _index(source).save(index_path(target, split))
    return str(target)


def _check_categories(sources: Mapping[str, CocoSource]) -> None:
    kinds = {source.categories for source in sources.values()}
    if len(kinds) != 1:
        raise UserError(
            f"The splits {', '.join(sources)} must exist and have the same categories: give all of "
            f"them annotation files with one list of categories."
        )
    names = kinds.pop().names
    if len(set(names)) < len(names):
        raise UserError("Two categories have the same name: give each its own.")


def _index(source: CocoSource) -> Index:
    sizes = [(height, width) for height, width in source.sizes.tolist()]
    rows = [count_record(source.objects(i), size) for i, size in enumerate(sizes)]
    return Index(source.ids, source.sizes, np.asarray(source.names), np.asarray(rows).T)


def _records(source: CocoSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every image with all its annotations, by ascending id."""
    for i in range(len(source)):
        try:
            picture = source.picture(i)
        except UnreadableImage as error:
            raise UserError(f"{error}; complete the image folder.") from error
        objects = source.objects(i)
        texts = [
            json.dumps([ring.tolist() for ring in value] if isinstance(value, list) else value)
            if value
            else ""
            for value in objects.segmentations
        ]
        yield (
            i,
            {
                "image": picture.data,
                "image/filename": picture.file_name,
                "image/id": picture.image_id,
                "objects": {
                    "area": objects.area,
                    "bbox": objects.bbox,
                    "id": objects.ids,
                    "is_crowd": objects.crowd,
                    "label": objects.labels.tolist(),
                    "segmentation": texts,
                },
            },
        )


def _features(tfds: Any, names: tuple[str, ...]) -> Any:
    f = tfds.features
    return f.FeaturesDict(
        {
            "image": f.Image(doc="the file as it was"),
            "image/filename": f.Text(),
            "image/id": np.int64,
            "objects": {
                "area": f.Tensor(shape=(None,), dtype=np.float64, encoding="bytes"),
                "bbox": f.Tensor(
                    shape=(None, 4),
                    dtype=np.float64,
                    encoding="bytes",
                    doc="(x, y, width, height) in pixels of the file, as in the COCO JSON",
                ),
                "id": f.Tensor(shape=(None,), dtype=np.int64),
                "is_crowd": f.Tensor(shape=(None,), dtype=np.bool_),
                "label": f.Sequence(f.ClassLabel(names=names)),
                "segmentation": f.Sequence(f.Text(doc="JSON: polygons, an RLE, or empty")),
            },
        }
    )


def _builder(sources: Mapping[str, CocoSource], data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    categories = next(iter(sources.values())).categories

    class CocoInstances(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """COCO instances with masks, exactly as annotated."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="COCO instances with crowds and masks, exactly as annotated.",
                features=_features(tfds, categories.names),
                metadata=tfds.core.MetadataDict(category_ids=list(categories.ids)),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: _records(source) for split, source in sources.items()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            raise NotImplementedError  # every split has its generator above

    return CocoInstances(data_dir=data_dir, file_format="array_record")


def _offline() -> Any:
    import tensorflow_datasets as tfds

    return tfds.download.DownloadConfig(try_download_gcs=False)
