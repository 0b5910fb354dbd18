"""SGD with momentum: learning-rate schedules, and rules by regular expressions on names.

A name is a path `a/b/c` in the parameter dict; a rule matches when it is found anywhere in it. The
order of an update is that of the series (EXPERIMENTS 6): weight decay is added to the gradient, the
sum is clipped by its global norm, then momentum `a <- m a + g`, then `w <- w - lr a`. Without
clipping it is `torch.optim.SGD`. (With clipping, PyTorch users clip before the decay; we do not.)
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sephjax.errors import UserError
from sephjax.types import Array, Params

Schedule = Callable[[Any], Array]


def make_schedule(config: ConfigDict) -> Schedule:
    """The learning rate as a function of t, the number of updates done before this one.

    So the first update uses t = 0, and what a run logs at step n is the rate at t = n - 1.
    `lr(t) = warm(t) * base(t)`, with `warm(t) = f (1 - t/w) + t/w` for t < w, else 1 (detectron2's
    linear warm-up; the series' with f = 0).

    `step`: the base is lr times `factor` for each milestone <= t. `cosine`: the base is
    `(lr - m)/2 (1 + cos(pi (t - w) / (T - w))) + m`, with T = train.steps and m = schedule.floor;
    it is lr up to w and m from T on.

    Raises:
        UserError: if schedule.name is unknown.
    """
    optimizer: Any = config.optimizer
    schedule: Any = config.schedule
    train: Any = config.train
    lr = optimizer.lr
    warm_steps, start = schedule.warmup_steps, schedule.warmup_from
    if schedule.name == "step":
        base = _steps(lr, tuple(schedule.milestones), schedule.factor)
    elif schedule.name == "cosine":
        base = _cosine(lr, warm_steps, train.steps, schedule.floor)
    else:
        raise UserError(f"schedule.name is {schedule.name!r}; it must be 'step' or 'cosine'.")

    def rate(step: Any) -> Array:
        alpha = jnp.minimum(jnp.float32(step) / max(warm_steps, 1), 1.0) if warm_steps else 1.0
        return jnp.float32(base(step) * (start * (1.0 - alpha) + alpha))

    return rate


def _steps(lr: float, milestones: Sequence[int], factor: float) -> Schedule:
    def rate(step: Any) -> Array:
        rates = jnp.float32([lr * factor**passed for passed in range(len(milestones) + 1)])
        passed = sum((jnp.asarray(step) >= m).astype(jnp.int32) for m in milestones)
        return rates[passed]

    return rate


def _cosine(lr: float, warm: int, total: int, floor: float) -> Schedule:
    def rate(step: Any) -> Array:
        # (1 + cos(pi p)) / 2 = sin(pi (1 - p) / 2)^2, which keeps its digits near the end.
        left = jnp.clip((total - jnp.float32(step)) / max(total - warm, 1), 0.0, 1.0)
        return (lr - floor) * jnp.sin(left * (jnp.pi / 2)) ** 2 + floor

    return rate


def parameter_names(params: Params) -> list[str]:
    """The name `a/b/c` of every leaf, in the order of `jax.tree.leaves`."""
    paths, _ = jax.tree.flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def match_mask(params: Params, patterns: Sequence[str]) -> Any:
    """A tree like `params` of bools: does any of `patterns` match the name?"""
    compiled = [re.compile(pattern) for pattern in patterns]
    matched = [any(rule.search(name) for rule in compiled) for name in parameter_names(params)]
    return jax.tree.unflatten(jax.tree.structure(params), matched)


def check_patterns(patterns: Sequence[str], names: Iterable[str], key: str) -> None:
    """Raises UserError for a pattern that is no regular expression or that matches none of `names`.

    Args:
        patterns: the rules.
        names: every name that a rule may mean.
        key: the config key they come from, for the message.
    """
    names = list(names)
    for pattern in patterns:
        try:
            rule = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{key}: {pattern!r} is no regular expression ({error}); correct it."
            ) from error
        if not any(rule.search(name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(
                f"{key}: {pattern!r} matches no parameter; the nearest names are {', '.join(near)}."
            )


def frozen_mask(params: Params, patterns: Sequence[str], known: Iterable[str] = ()) -> Any:
    """A tree like `params` of bools: True where a rule of optimizer.freeze holds it fixed.

    Args:
        params: the parameters.
        patterns: regular expressions.
        known: further names that a rule may match without an error (the `frozen` weights).

    Raises:
        UserError: if a rule matches nothing.
    """
    check_patterns(patterns, [*parameter_names(params), *known], "optimizer.freeze")
    return match_mask(params, patterns)


def split_by_mask(params: Params, mask: Any) -> tuple[Params, Params]:
    """Splits nested dicts into (where `mask` is False, where it is True), without empty dicts."""
    trainable, fixed = {}, {}
    for name, value in params.items():
        if isinstance(value, dict):
            parts = split_by_mask(value, mask[name])
        else:
            parts = ({}, value) if mask[name] else (value, {})
        for side, part in zip((trainable, fixed), parts, strict=True):
            if not isinstance(part, dict) or part:
                side[name] = part
    return trainable, fixed


def join(trainable: Params, fixed: Params) -> Params:
    """Puts back together what `split_by_mask` split.

    Raises:
        ValueError: if a name is on both sides.
    """
    joined = dict(trainable)
    for name, value in fixed.items():
        if name not in joined:
            joined[name] = value
        elif isinstance(value, dict) and isinstance(joined[name], dict):
            joined[name] = join(joined[name], value)
        else:
            raise ValueError(f"{name!r} is both trained and fixed")
    return joined


def decay_mask(config: ConfigDict, params: Params) -> Any:
    """A tree like `params` of bools: some rule of `decay` matches and none of `no_decay`."""
    values: Any = config.optimizer
    decays, spared = match_mask(params, values.decay), match_mask(params, values.no_decay)
    return jax.tree.map(lambda yes, no: yes and not no, decays, spared)


def make_optimizer(
    config: ConfigDict, params: Params, known: Iterable[str] = ()
) -> optax.GradientTransformation:
    """SGD with momentum, weight decay by name and clipping (the order: see the module).

    Args:
        config: reads `optimizer`, `schedule` and `train.steps`.
        params: the trained parameters (arrays or shapes), without what optimizer.freeze holds
            fixed: those have neither gradient nor momentum (`frozen_mask`, `split_by_mask`).
        known: names outside `params` that a rule may match without an error: the fixed parameters
            and the frozen weights.

    Raises:
        UserError: if a rule of optimizer.decay or optimizer.no_decay matches nothing.
    """
    values: Any = config.optimizer
    names = [*parameter_names(params), *known]
    check_patterns(values.decay, names, "optimizer.decay")
    check_patterns(values.no_decay, names, "optimizer.no_decay")
    parts = []
    if values.weight_decay:
        parts.append(optax.add_decayed_weights(values.weight_decay, decay_mask(config, params)))
    if values.clip:
        parts.append(optax.clip_by_global_norm(values.clip))
    if values.momentum:
        parts.append(optax.trace(values.momentum))
    return optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(config)))
