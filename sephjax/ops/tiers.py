"""Run a head on the smallest of a few capacities that holds what is valid.

Static shapes waste work: 128 mask ROIs an image cost as much as the backbone, and most are padding.
Valid entries come first, so a head compiled for a few capacities and chosen by the largest valid
count of the batch gives the same results for less work. A tier is a share of all rows, so that the
same tiers fit any number of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def capacities(tiers: Sequence[float], full: int) -> tuple[int, ...]:
    """Rows of each tier, a share of `full` rounded up, then `full`."""
    sizes = {math.ceil(tier * full) for tier in tiers}
    return (*sorted(size for size in sizes if size < full), full)


def pack(tree: Any, valid: Bool[Array, "b n"]) -> Any:
    """The rows of a batch as one list [1, bn, ...], valid ones first in their order.

    A tier of a packed list follows the valid rows of the batch; without packing it follows its
    fullest image.
    """
    order = jnp.argsort(~valid.reshape(-1), stable=True)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[order][None], tree)


def _index(count: Int[Array, ""], sizes: Sequence[int]) -> Int[Array, ""]:
    return jnp.searchsorted(jnp.asarray(sizes, jnp.int32), count.astype(jnp.int32))


def _cut(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:, :size], tree)


def _fill(tree: Any, full: int) -> Any:
    grow = lambda leaf: jnp.pad(
        leaf, [(0, 0), (0, full - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2)
    )
    return jax.tree.map(grow, tree)


def by_tier(
    run: Callable[[Any], Any], rows: Any, count: Int[Array, ""], tiers: Sequence[float]
) -> Any:
    """`run(rows)` on the smallest tier that holds `count`; the result's other rows are 0.

    Args:
        run: maps a pytree of arrays [b, t, ...] to a pytree of arrays [b, t, ...], row by row.
        rows: pytree of arrays [b, n, ...], what is valid first.
        count: the most valid rows of any image of the batch.
        tiers: shares of `n` to compile beside the whole.
    """
    full = jax.tree.leaves(rows)[0].shape[1]
    sizes = capacities(tiers, full)
    if len(sizes) == 1:
        return run(rows)
    branch = lambda size: lambda every: _fill(run(_cut(every, size)), full)
    return jax.lax.switch(_index(count, sizes), [branch(size) for size in sizes], rows)


def tiered_sum(
    loss: Callable[..., tuple[Float[Array, ""], Any]],
    params: Any,
    inputs: Any,
    rest: Any,
    count: Int[Array, ""],
    tiers: Sequence[float],
    fixed: tuple[Any, ...] = (),
) -> tuple[Float[Array, ""], Any]:
    """`loss` on the smallest tier that holds `count`, and its gradient.

    Differentiating a `lax.switch` keeps every branch's activations; here the forward pass of a
    branch computes its gradient at once (the loss is a scalar, so the cotangent only scales it).

    Args:
        loss: of (params, inputs, rest, *fixed): a sum over rows to which rows past the valid ones
            add nothing, and arrays that go with it, of the same shapes whatever the number of rows;
            they have no gradient. It must not close over what is traced: the gradient may be taken
            when that trace is over.
        params: differentiated.
        inputs: arrays [b, n, ...], differentiated.
        rest: arrays [b, n, ...], not differentiated.
        count: the most valid rows of any image of the batch.
        tiers: shares of `n` to compile beside the whole.
        fixed: arrays, used whole, not differentiated.
    """
    full = jax.tree.leaves(inputs)[0].shape[1]
    sizes = capacities(tiers, full)

    def value_branch(size):
        return lambda params, inputs, rest, fixed: loss(
            params, _cut(inputs, size), _cut(rest, size), *fixed
        )

    def grad_branch(size):
        def run(params, inputs, rest, fixed):
            found, (by_params, by_inputs) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
                params, _cut(inputs, size), _cut(rest, size), *fixed
            )
            return found, by_params, _fill(by_inputs, full)

        return run

    @jax.custom_vjp
    def total(index, *values):
        return jax.lax.switch(index, [value_branch(size) for size in sizes], *values)

    def forward(index, *values):
        found, *grads = jax.lax.switch(index, [grad_branch(size) for size in sizes], *values)
        return found, grads

    def backward(grads, cotangents):
        scale = lambda g: g * cotangents[0].astype(g.dtype)
        return (None, *jax.tree.map(scale, tuple(grads)), None, None)

    total.defvjp(forward, backward)
    return total(_index(count, sizes), params, inputs, rest, fixed)
