"""Exponential moving averages of weights (Polyak averaging): what a run evaluates and exports."""

import jax
import jax.numpy as jnp

from sephjax.types import Array, Weights


def decay_at(step: Array, decay: float) -> Array:
    """The decay of an update: `min(decay, (1 + t) / (10 + t))`, float32 [].

    `t` is the number of updates done before this one. The warm-up is that of TensorFlow's
    ExponentialMovingAverage with `num_updates`: without it a short run would end as a blend with
    its initial weights.
    """
    t = step.astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1.0 + t) / (10.0 + t))


def update(averages: Weights, now: Weights, step: Array, decay: float) -> Weights:
    """`a + (1 - d) (w - a)` of every number, with d from `decay_at`.

    What does not change stays as it is, bit for bit: weights held by `optimizer.freeze` and the
    statistics of frozen batch norm. Running statistics of batch norm are averaged like weights.
    """
    rest = 1.0 - decay_at(step, decay)
    return jax.tree.map(lambda a, w: a + rest * (w - a), averages, now)
