"""The train step and the predict step: pure functions, jitted by their callers."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from sephjax.nets.functional import Functional
from sephjax.train import averages, optimizer, sharding
from sephjax.types import (
    Batch,
    Detections,
    Params,
    Proposals,
    RpnTargets,
    TrainOutputs,
    TrainState,
    Weights,
)

Losses = Callable[[TrainOutputs, Any], dict[str, jax.Array]]
Classify = Callable[[Any, Proposals, Any], Detections]


def make_train_step(
    model: Functional,
    tx: optax.GradientTransformation,
    losses: Losses,
    fixed_mask: Any,
    *,
    mesh: Mesh | None = None,
    group: int = 1,
    ema: float = 0.0,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One SGD step on one batch.

    Args:
        model: the detector.
        tx: optimizer of the trained parameters.
        losses: (outputs, size) -> `loss` and its terms.
        fixed_mask: tree of bools like the parameters; where True they stay as they are and their
            gradient is never computed.
        mesh: the devices that the batch is cut over; None: it is on one. Each runs the detector on
            its own images; they exchange normalisers, losses and the gradient. Batch norm that
            learns sees one device's images, as the series'.
        group: images that share a sample of anchors (`rpn.sample_group`); where they lie on several
            devices, these exchange the anchors' labels too.
        ema: decay of the averages of the weights; a state without averages ignores it.
        accumulate: micro-batches that each device's images are cut into, one after the other; see
            `micro_batches`. Batch norm that learns sees one of them at a time.

    An image's sampling key is folded from (run key, step, index of the image in its source), so the
    result does not depend on how the batch lies on devices.
    """

    forward = _forward(model, mesh, group, accumulate)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.index)
        trained, fixed = optimizer.split_by_mask(state.params, fixed_mask)

        def objective(trained: Params) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
            params = optimizer.join(trained, fixed)
            outputs, frozen = forward(params, state.frozen, batch, keys)
            terms = losses(outputs, batch.size.astype(jnp.float32))
            terms["positive_rois"] = jnp.sum(outputs.rois.positive, dtype=jnp.float32)
            return terms["loss"], (terms, frozen)

        grads, (terms, frozen) = jax.grad(objective, has_aux=True)(trained)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        params = optimizer.join(cast("Params", optax.apply_updates(trained, updates)), fixed)
        scalars = terms | {"grad_norm": optax.tree.norm(grads)}
        smooth = state.averages
        if smooth is not None:
            smooth = averages.update(smooth, Weights(params, frozen), state.step, ema)
        return TrainState(state.step + 1, params, frozen, opt_state, state.key, smooth), scalars

    return train_step


def _forward(
    model: Functional, mesh: Mesh | None, group: int, accumulate: int
) -> Callable[..., tuple[TrainOutputs, Params]]:
    """(params, frozen, batch, keys) -> outputs of the batch and the frozen values it leaves."""
    own = functools.partial(model.apply_and_update, method="training")
    if accumulate > 1:
        own = micro_batches(model, group, accumulate)
    if mesh is None or mesh.size == 1:
        return own

    def one(
        params: Params, frozen: Params, batch: Batch, keys: jax.Array, targets: RpnTargets | None
    ) -> tuple[TrainOutputs, Params]:
        outputs, after = own(params, frozen, batch, keys, targets)
        if outputs.mask_sum is not None:
            outputs = dataclasses.replace(outputs, mask_sum=outputs.mask_sum[None])
        # What did not move is the same everywhere; moving statistics become their mean.
        mean = lambda old, new: new if new is old else jax.lax.pmean(new, sharding.AXIS)
        return outputs, jax.tree.map(mean, frozen, after)

    cut: Any = PartitionSpec(sharding.AXIS)
    copy: Any = PartitionSpec()
    outputs = TrainOutputs(
        anchors=copy, rpn=cut, rpn_targets=cut, rois=cut, boxes=cut, mask_sum=cut, later=cut
    )
    run = sharding.by_device(mesh, one, (0, 1), (outputs, copy))

    def forward(
        params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[TrainOutputs, Params]:
        targets = None
        if (len(batch.size) // mesh.size) % group:
            targets = model.apply(params, frozen, batch, keys, method="rpn_targets")
        outputs, after = run(params, frozen, batch, keys, targets)
        if outputs.mask_sum is not None:
            outputs = dataclasses.replace(outputs, mask_sum=jnp.sum(outputs.mask_sum))
        return outputs, after

    return forward


def micro_batches(
    model: Functional, group: int, count: int
) -> Callable[..., tuple[TrainOutputs, Params]]:
    """`training` on one device's images, cut into `count` micro-batches in their order.

    The outputs, all that the losses read, are those of the whole batch, and so are losses,
    normalisers and gradient; a mean of the micro-batches' losses would weigh an image by how few
    positives its micro-batch has. The activations of one micro-batch are in memory at a time: each
    is run again in the backward pass, which costs one more forward pass. Statistics of batch norm
    move micro-batch by micro-batch. Where a group of images that share a sample of anchors lies in
    several micro-batches, the RPN's targets are made before for all of them.
    """

    def run(
        params: Params,
        frozen: Params,
        batch: Batch,
        keys: jax.Array,
        targets: RpnTargets | None = None,
    ) -> tuple[TrainOutputs, Params]:
        if targets is None and (len(batch.size) // count) % group:
            targets = model.apply(params, frozen, batch, keys, method="rpn_targets")
        still: list[
            Any
        ] = []  # which frozen values no micro-batch moves; known once `one` is traced

        def one(before: Params, rows: Any) -> tuple[Params, TrainOutputs]:
            outputs, after = model.apply_and_update(params, before, *rows, method="training")
            still.append(jax.tree.map(operator.is_, before, after))
            # What a custom gradient moved would count as a function of the parameters.
            return jax.lax.stop_gradient(after), outputs

        cut = lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:])
        rows = jax.tree.map(cut, (batch, keys, targets))
        # A scan needs no guard against merging the two forward passes: they are in two loops.
        moved, parts = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), frozen, rows)
        same = lambda still, old, new: old if still else new
        by_image = dataclasses.replace(parts, anchors=None, mask_sum=None)
        outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), by_image)
        total = None if parts.mask_sum is None else jnp.sum(parts.mask_sum)
        outputs = dataclasses.replace(outputs, anchors=parts.anchors[0], mask_sum=total)
        return outputs, jax.tree.map(same, still[0], frozen, moved)

    return run


def make_predict_step(
    model: Functional, classify: Classify, *, masks: bool
) -> Callable[[Params, Params, Batch], Detections]:
    """Detections of a batch: `predict_step(params, frozen, batch)`; truth is not read.

    Args:
        model: the detector.
        classify: `predict.detections` of one image with its options bound.
        masks: run the mask head on the detections.
    """

    def predict_step(params: Params, frozen: Params, batch: Batch) -> Detections:
        pyramid, proposals, outputs = model.apply(params, frozen, batch, method="candidates")
        found = jax.vmap(classify)(outputs, proposals, batch.size.astype(jnp.float32))
        if not masks:
            return found
        rows = (found.boxes, found.labels, found.valid)
        probabilities = model.apply(params, frozen, batch, pyramid, *rows, method="masks")
        return Detections(found.boxes, found.scores, found.labels, found.valid, probabilities)

    return predict_step
