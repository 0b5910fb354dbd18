"""From a config to its train step and the state it works on, for a mesh of devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sephjax import build
from sephjax.nets.functional import Functional
from sephjax.train import optimizer, step
from sephjax.types import Array, Batch, Params, TrainState, Weights


@dataclasses.dataclass(frozen=True)
class Learner:
    """How a model is trained; nothing is allocated."""

    start: Callable[[Params, Params, Any], TrainState]  # (params, frozen, key) -> state of step 0
    abstract: TrainState  # of jax.ShapeDtypeStruct: what `start` gives
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def learner(config: ConfigDict, model: Functional, mesh: Mesh) -> Learner:
    """The train step of `config`, not jitted.

    Raises:
        UserError: a rule of the optimizer matches no parameter.
    """
    params, frozen = model.abstract
    mask = fixed_mask(config, model)
    trained, fixed = optimizer.split_by_mask(params, mask)
    known = [*optimizer.parameter_names(fixed), *optimizer.parameter_names(frozen)]
    tx = optimizer.make_optimizer(config, trained, known)

    def start(params: Params, frozen: Params, key: Any) -> TrainState:
        trained, _ = optimizer.split_by_mask(params, mask)
        averages = Weights(params, frozen) if config.train.ema else None
        return TrainState(jnp.int32(0), params, frozen, tx.init(trained), key, averages)

    train_step = step.make_train_step(
        model,
        tx,
        build.losses(config),
        mask,
        mesh=mesh,
        group=config.rpn.sample_group,
        ema=config.train.ema,
        accumulate=config.train.accumulate,
    )
    abstract = jax.eval_shape(start, params, frozen, jax.random.key(0))
    return Learner(start, abstract, train_step)


def fixed_mask(config: ConfigDict, model: Functional) -> Any:
    """A tree of bools like the parameters: what optimizer.freeze holds as it was loaded."""
    params, frozen = model.abstract
    constants = optimizer.parameter_names(frozen)
    return optimizer.frozen_mask(params, config.optimizer.freeze, constants)
