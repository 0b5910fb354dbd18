"""Real pictures, weights that behave like trained ones, and every stage of both sides."""

import json
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from sephjax import build, recipe
from sephjax.export import torch as export
from sephjax.train import step
from sephjax.types import Batch, Truth
from tests import narrow
from tests.ops.reference import iou

CLASSES = 5


def pictures(folder, canvas=(192, 256), sizes=((192, 256), (150, 211))) -> Batch:
    """The first val pictures, one of each size, top-left on a canvas."""
    listed = json.loads((folder / "annotations" / "instances_val.json").read_text())["images"]
    image = np.zeros((len(sizes), *canvas, 3), np.uint8)
    for i, (height, width) in enumerate(sizes):
        pixels = cv2.imread(str(folder / "val" / listed[i]["file_name"]))[..., ::-1]
        image[i, :height, :width] = cv2.resize(pixels, (width, height))
    size, count = np.asarray(sizes, np.int32), len(sizes)
    none = np.zeros((count, 0))
    truth = Truth(none[..., None].repeat(4, -1), none, none.astype(bool), None)
    index = np.arange(count, dtype=np.int32)
    return Batch(image, size, size, index, np.ones(count, bool), truth)


def draw(model, seed=0):
    """`(params, frozen)`: kernels of unit gain, norms and biases that all do something."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        name = path[-1].key
        if name == "kernel":
            values = rng.normal(size=like.shape) * np.sqrt(2 / np.prod(like.shape[:-1]))
        elif name in ("gamma", "v", "variance"):
            values = rng.uniform(0.5, 1.5, like.shape)
        else:  # bias, beta, mean
            values = 0.2 * rng.normal(size=like.shape)
        return values.astype(np.float32)

    return jax.tree.map_with_path(leaf, model.abstract)


def drawn(config, seed=0):
    """A twin, the model, and the weights of both."""
    model = build.model(config, CLASSES)
    params, frozen = draw(model, seed)
    twin = export.build_twin(config, CLASSES)
    export.load_twin(twin, params, frozen)
    return twin, model, params, frozen


def settled(config, batch, seed=0):
    """A twin and its weights, whose predictors have the spread of a trained model's on `batch`."""
    import torch

    twin, _, params, frozen = drawn(config, seed)
    size, canvas = torch.from_numpy(batch.size), batch.image.shape[1:3]

    def spread(part, **outputs):
        for layer, (values, wanted) in outputs.items():
            part[layer]["kernel"] *= np.float32(wanted / float(values.std()))
        export.load_twin(twin, params, frozen)

    with torch.no_grad():
        pyramid = twin.pyramid(torch.from_numpy(batch.image), size)
        logits, deltas = twin.score(pyramid, size)
        spread(params["rpn"], logits=(logits, 3.0), deltas=(deltas, 0.3))
        proposals = twin.propose(pyramid, *twin.score(pyramid, size), size, canvas)
        extents = twin.extents(size, canvas)
        for stage in range(len(twin.weights)):
            head = params["box_head"]
            boxes = [rows["boxes"] for rows in proposals]
            logits, deltas, iou = twin.classify(pyramid, boxes, extents, stage)
            wanted = {"logits": (torch.cat(logits), 2.0), "deltas": (torch.cat(deltas), 0.5)}
            if config.roi.iou_branch.name != "none":
                wanted["iou"] = torch.cat(iou), 2.0
            spread(head.get(f"stage{stage}", head), **wanted)
            moves = twin.classify(pyramid, boxes, extents, stage)[1]
            proposals = twin.moved(proposals, moves, size, stage)
        if config.mask.enabled:
            found = [{"boxes": rows, "labels": torch.arange(len(rows)) % CLASSES} for rows in boxes]
            masks = torch.logit(torch.cat(twin.masks(pyramid, found, extents)))
            spread(params["mask_head"], predictor=(masks[masks.isfinite()], 3.0))
    return twin, params, frozen


class Stages(NamedTuple):
    """What sephjax computes of a batch, as NumPy arrays."""

    pyramid: dict[str, Any]
    rpn: Any
    proposals: Any
    boxes: Any
    found: Any


def ours(config, params, frozen, batch) -> Stages:
    """Every stage of sephjax, in one program."""
    model = build.model(config, CLASSES)
    predict = step.make_predict_step(model, build.classify(config), masks=config.mask.enabled)

    def run(params, frozen, batch):
        size = batch.size if config.mask_padding else None
        pyramid, proposals, boxes = model.apply(params, frozen, batch, method="candidates")
        anchored = {name: pyramid[name] for name in recipe.rpn_levels_of(config)}
        rpn = model.apply(params, frozen, anchored, size, method="rpn.__call__")
        return Stages(pyramid, rpn, proposals, boxes, predict(params, frozen, batch))

    batch = jax.tree.map(jnp.asarray, batch)
    return jax.device_get(narrow.jit(run)(params, frozen, batch))


def error(found, expected):
    """Largest difference, relative to the largest of the expected values."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def paired(boxes, theirs, labels=None, their_labels=None, *, sliver=0.0):
    """For each of `boxes` its own one of `theirs`; both lists must be the same boxes.

    The IoU of a pair is at least 0.999, or all its corners are less than `sliver` pixels apart.
    """
    assert len(boxes) == len(theirs) > 0
    overlap = iou(np.float64(boxes)[:, None], np.float64(theirs)[None])
    if labels is not None:
        overlap = np.where(labels[:, None] == their_labels[None], overlap, 0)
    mate = overlap.argmax(axis=1)
    assert sorted(mate) == list(range(len(theirs)))
    near = np.abs(boxes - theirs[mate]).max(axis=1) < sliver
    assert (near | (overlap[np.arange(len(mate)), mate] >= 0.999)).all()
    return mate
