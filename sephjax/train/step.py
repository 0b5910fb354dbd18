"""The train step and the predict step: pure functions, jitted by their callers."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from sephjax.nets.functional import Functional
from sephjax.train import averages, optimizer
from sephjax.types import (
    Batch,
    Detections,
    Params,
    Proposals,
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
    ema: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One SGD step on one batch.

    Args:
        model: the detector.
        tx: optimizer of the trained parameters.
        losses: (outputs, size) -> `loss` and its terms.
        fixed_mask: tree of bools like the parameters; where True they stay as they are and their
            gradient is never computed.
        ema: decay of the averages of the weights; a state without averages ignores it.

    An image's sampling key is folded from (run key, step, index of the image in its source), so the
    result does not depend on how the batch lies on devices.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.index)
        trained, fixed = optimizer.split_by_mask(state.params, fixed_mask)

        def objective(trained: Params) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
            params = optimizer.join(trained, fixed)
            outputs, frozen = model.apply_and_update(
                params, state.frozen, batch, keys, method="training"
            )
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
