"""Opens the source that a config names."""

from typing import Any

from sephjax.errors import UserError
from sephjax.input.coco import open_coco
from sephjax.input.example import Source
from sephjax.input.shapes import open_shapes
from sephjax.input.tfds_source import open_tfds


def open_source(data: Any, *, train: bool, seed: int = 0) -> Source:
    """Opens the training or evaluation view that `config.data` names.

    Args:
        data: `config.data`.
        train: the training view.
        seed: of what the drawn set shows; the other sources do not use it.

    Raises:
        UserError: a path, a name or the content does not do.
    """
    kinds = {"coco": _coco, "tfds": _tfds, "shapes": _shapes}
    if data.source not in kinds:
        raise UserError(f"data.source is {data.source!r}: choose one of {', '.join(kinds)}.")
    return kinds[data.source](data, data.train if train else data.eval, train, seed)


def require_masks(source: Source) -> None:
    """Fails unless every object that will be used has a mask.

    Raises:
        UserError: it does not.
    """
    if not source.has_masks:
        raise UserError(
            "The data has objects without a segmentation, which a mask head cannot learn from: use "
            "data with masks (tfds' coco/2017 has boxes only; --mode=prepare makes coco_instances, "
            "which has both), or set --config.mask.enabled=False."
        )


def _coco(data: Any, split: Any, train: bool, seed: int) -> Source:  # noqa: ARG001, FBT001
    return open_coco(
        split.annotations,
        split.images,
        train=train,
        limit=split.limit,
        skip_empty=data.skip_empty,
    )


def _tfds(data: Any, split: Any, train: bool, seed: int) -> Source:  # noqa: ARG001, FBT001
    return open_tfds(
        data.name,
        data.data_dir,
        split.split,
        train=train,
        limit=split.limit,
        skip_empty=data.skip_empty,
    )


def _shapes(data: Any, split: Any, train: bool, seed: int) -> Source:  # noqa: FBT001
    count = data.shapes.train_images if train else data.shapes.eval_images
    return open_shapes(
        min(count, split.limit) if split.limit > 0 else count,
        data.shapes.height,
        data.shapes.width,
        data.shapes.max_objects,
        kind=data.shapes.set,
        seed=seed,
        train=train,
    )
