"""Both sides of a comparison: torchvision's model, and ours with its weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mask_rcnn
from sephjax import build
from sephjax.nets.functional import Functional
from sephjax.types import Batch, Params
from sephjax.weights import table, torchvision
from tests.parity import pictures

PEERS = {  # functions of benchmarks/peer.py
    "torchvision": "mask_rcnn",
    "box_only_torchvision": "faster_rcnn",
    "torchvision_v2": "mask_rcnn_v2",
}


def theirs(row: str, batch: Batch, *, proposals: int, seed: int = 0) -> Any:
    """torchvision's model of a row, in evaluation, with predictors that suit the pictures."""
    pytest.importorskip("torchvision")
    from benchmarks import peer

    model = getattr(peer, PEERS[row])(pictures.SHORT, pictures.LONG, seed=seed)
    model.rpn._post_nms_top_n = {"training": proposals, "testing": proposals}
    if row == "torchvision_v2":
        _follow(model, pictures.tensors(batch))
    # The towers of version 2 have no shortcuts and lose a digit more than version 1: rounding is
    # 2e-5 to 5e-5 of the logits, by CPU, which a smaller spread keeps from being 1e-4 of a score.
    contrast = 0.5 if row == "torchvision_v2" else 2.0
    picture = pictures.unpadded(batch)[0]
    peer.settle(model, picture, detections=40, contrast=contrast)
    return model


def _follow(model: Any, images: list[Any]) -> None:
    """Gives the backbone's batch norm the statistics of the pictures.

    In training the RPN then sees what its predictors were settled on. Else its logits run to 40 and
    more, where torchvision, which ranks by float32 probabilities, has ties that ours, which ranks
    by logits, has not.
    """
    from torch import nn, no_grad

    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    momentum = norms[0].momentum
    for norm in norms:
        norm.momentum = 1.0
    with no_grad():
        tensors = model.eval().transform(images)[0].tensors
        model.backbone.train()(tensors)
    for norm in norms:
        norm.momentum = momentum


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our model with torchvision's weights."""

    config: Any
    model: Functional
    params: Params
    frozen: Params

    def training(self, batch, keys):
        """Losses, outputs, the gradient of every parameter, frozen values after the step."""
        losses = build.losses(self.config)

        def objective(params, frozen, batch, keys):
            outputs, frozen = self.model.apply_and_update(
                params, frozen, batch, keys, method="training"
            )
            terms = losses(outputs, batch.size.astype(jnp.float32))
            return terms["loss"], (terms, outputs, frozen)

        run = jax.jit(jax.grad(objective, has_aux=True))
        grads, (terms, outputs, frozen) = jax.device_get(run(self.params, self.frozen, batch, keys))
        return terms, outputs, table.flatten(grads), table.flatten(frozen)


def ours(row: str, theirs: Any, **changes: Any) -> Ours:
    """The row `row` of mask_rcnn with the weights of a model of torchvision."""
    config = mask_rcnn.get_config(row)
    with config.unlocked():
        config.roi.tiers, config.mask.tiers = (), ()  # one program each: they compile faster
        config.update_from_flattened_dict(changes)
    model = build.model(config, pictures.CLASSES)
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    params, frozen, _ = torchvision.load_detector(state, *model.abstract)
    wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # or float64
    params, frozen = wide(params), wide(frozen)
    return Ours(config, model, params, frozen)


def gradients_and_statistics(theirs: Any, ours: Ours) -> tuple[table.Arrays, table.Arrays]:
    """Of torchvision's model: the gradient of every parameter of ours, and our frozen values."""
    params, frozen = table.flatten(ours.params), table.flatten(ours.frozen)
    v2 = any(path.startswith("box_head/tower/") for path in params)
    rules = torchvision.rules(v2=v2)
    grads = {name: value.grad.numpy() for name, value in theirs.named_parameters()}
    state = {name: value.numpy() for name, value in theirs.named_buffers()}
    load = lambda paths, arrays: table.load(
        rules, paths, arrays, source="torchvision", ignore=(r"\.num_batches_tracked$",)
    )
    return load(params, grads)[0], load(frozen, state)[0]


def relative_error(ours, theirs):
    """Largest difference over the largest number."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
