"""`--mode=convert`: weights of a file into a workdir, or a workdir's weights into a file."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import mask_rcnn
from configs._chain import flat
from sephjax import build, check, initial, restore
from sephjax.checkpoint import Checkpoints
from sephjax.command import nearest
from sephjax.errors import UserError
from sephjax.export import torch as twins
from sephjax.input import coco_json, sources
from sephjax.input.example import Categories
from sephjax.nets.backbone import resnet
from sephjax.train import workdir as claims
from sephjax.types import Params
from sephjax.weights import classes, files, table, torchvision
from sephjax.weights.contents import Contents
from sephjax.weights.formats import FORMATS

# What torchvision's Mask and Faster R-CNN compute with, beside the tensors: other values here would
# give the same state dict and other detections. Their values are those of `mask_rcnn:torchvision`.
TORCHVISION_KEYS = (
    "mask_padding", "backbone.layout", "fpn.inputs", "fpn.extra", "anchors.ratio_is",
    "anchors.sizes", "anchors.ratios", "anchors.rounded", "anchors.offset", "anchors.stride",
    "rpn.weights", "rpn.proposals.name", "roi.weights", "roi.levels", "roi.canonical.size",
    "roi.canonical.level", "roi.canonical.eps", "roi.canonical.eps_inside_log", "roi.pooler.name",
    "roi.pooler.aligned", "roi.pooler.sampling_ratio", "roi.head.name", "roi.class_agnostic",
    "heads_bn.eps", "mask.pool", "test.nms_inclusive", "test.one_class_per_box",
)  # fmt: skip


def convert(
    config: ConfigDict, workdir: str, at: int | None, source: str | None, target: str | None
) -> int:
    """Writes step 0 of a workdir from `source`, or `target` from a step of it.

    Args:
        config: Of the model.
        workdir: Where its checkpoints are, or will be.
        at: The step to write out; None: the newest.
        source: `<format>:<file>` of `SOURCES`, or None.
        target: `<format>:<file>` of `TARGETS`, or None.

    Returns:
        The exit code, 0.

    Raises:
        UserError: not exactly one of the two is given, or something does not fit.
    """
    check.check(config)
    folder = pathlib.Path(workdir)
    if source and not target:
        _take_in(config, folder, *_named("source", source, SOURCES))
    elif target and not source:
        _give_out(config, folder, at, *_named("target", target, TARGETS))
    else:
        raise UserError(
            "--mode=convert takes --source=<format>:<file> or --target=<format>:<file>: give one "
            "of them."
        )
    return 0


def _named(flag: str, value: str, table: dict[str, Any]) -> tuple[str, str]:
    name, _, path = value.partition(":")
    known = ", ".join(table)
    if not path:
        raise UserError(f"--{flag}={value} names no file: write <format>:<file>, as in {name}:x.")
    if name not in table:
        raise UserError(
            f"--{flag}={value} has an unknown format; did you mean {nearest(name, table)}? The "
            f"formats are {known}."
        )
    return name, path


def _take_in(config: ConfigDict, folder: pathlib.Path, name: str, path: str) -> None:
    checkpoints = Checkpoints(folder / "checkpoints")
    if steps := checkpoints.steps():
        raise UserError(f"{folder} holds checkpoints (steps {steps}); name another workdir.")
    found = initial.read(config, name, path, SOURCES)
    if name == "twin":
        twins.check_meaning(path, config)
    categories = _categories(config, name, path, found)
    model = build.model(config, len(categories))
    claims.claim(folder, config)
    weights_key, _ = jax.random.split(jax.random.key(config.seed))  # as training draws them
    params, frozen = initial.fill(config, model, weights_key, folder, categories, found)
    claims.save_categories(folder, categories)
    try:
        checkpoints.save_weights(0, params, frozen)
    finally:
        checkpoints.close()
    print(f"written to {folder}: step 0, {len(categories)} classes")
    if name == "torchvision" and found.whole and (other := _not_torchvisions(config)):
        print(
            f"note: torchvision's model has {_listed(other)}; "
            "--config=configs/mask_rcnn.py:torchvision agrees with it number for number."
        )


def _categories(config: ConfigDict, name: str, path: str, found: Contents) -> Categories:
    """Of the config's data, if it names some; else of the file."""
    view = config.data.eval
    if config.data.source == "coco":
        if view.annotations:
            content = coco_json.read_json(view.annotations, "data.eval.annotations")
            return coco_json.categories_of(content["categories"], view.annotations)
    elif config.data.source != "tfds" or config.data.data_dir:
        return sources.open_source(config.data, train=False).categories
    if name == "sephjax":
        place = pathlib.Path(path)
        return claims.load_categories(
            place.parent.parent
            if place.parent.name == "checkpoints" and place.name.isdigit()
            else place
        )
    if found.classes is None:
        raise UserError(
            f"{path} holds a backbone and no classes: name data with them, "
            "--config.data.eval.annotations=<COCO JSON>."
        )
    return classes.named(found.classes)


def _give_out(
    config: ConfigDict, folder: pathlib.Path, at: int | None, name: str, path: str
) -> None:
    step = restore.step_of(folder, at)
    categories = claims.load_categories(folder)
    model = build.model(config, len(categories))
    params, frozen = restore.weights(config, model, folder, step)
    print(TARGETS[name](config, params, frozen, path))


def _to_torchvision(config: ConfigDict, params: Params, frozen: Params, path: str) -> str:
    if other := _not_torchvisions(config):
        raise UserError(
            f"torchvision has no model of this config, for its own has {_listed(other)}; "
            "it has --config=configs/mask_rcnn.py:torchvision."
        )
    if config.backbone.norm not in ("frozen_bn", "bn"):
        raise UserError(
            f"torchvision has no model of this config, for backbone.norm is "
            f"{config.backbone.norm!r} and not batch norm."
        )
    eps = config.backbone.norm_eps or resnet.LAYOUTS["torchvision"].eps
    state = torchvision.dump_detector(params, frozen, eps=eps)
    files.write_torch(path, state)
    kind = "mask" if config.mask.enabled else "faster"
    version = "_v2" if config.roi.head.conv_dims else ""
    rows = len(state["roi_heads.box_predictor.cls_score.bias"])
    return (
        f"written to {path}: {len(state)} tensors, for {kind}rcnn_resnet50_fpn{version} with "
        f"num_classes={rows}"
    )


def _not_torchvisions(config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The keys in which torchvision's model differs: its value and ours."""
    theirs, ours = dict(flat(mask_rcnn.get_config("torchvision"))), dict(flat(config))
    pairs = {key: (theirs.get(key), ours.get(key)) for key in TORCHVISION_KEYS}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _listed(pairs: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}={a!r} ({b!r} here)" for key, (a, b) in pairs.items())


def _to_twin(config: ConfigDict, params: Params, frozen: Params, path: str) -> str:
    number = classes.count_of(table.flatten(params))
    assert number is not None  # the model has a box head
    count = twins.save_twin(config, number, params, frozen, path)
    return f"written to {path}: {count} tensors, for sephjax.export.torch.twin_from_file"


SOURCES = FORMATS | {"twin": twins.read}
# Each writes a file from `(config, params, frozen, path)` and returns what to print.
TARGETS: dict[str, Callable[[ConfigDict, Params, Params, str], str]] = {
    "torchvision": _to_torchvision,  # what its maskrcnn_resnet50_fpn loads strictly
    "twin": _to_twin,  # a PyTorch module of any config, with its weights
}
