"""Heads on a few capacities give what they give on all rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.ops import tiers

ROWS, TIERS = 10, (0.3, 0.6)  # of 3 and 6 rows
COUNTS = (0, 1, 3, 4, 6, 7, 10)  # none, below, at and above each tier, all
RNG = np.random.default_rng(0)
INPUTS = jnp.float32(RNG.normal(size=(2, ROWS, 4)))
GOALS = jnp.float32(RNG.normal(size=(2, ROWS)))
PARAMS = {"kernel": jnp.float32(RNG.normal(size=4)), "bias": jnp.float32(0.3)}


def test_capacities_are_shares_rounded_up_and_the_whole():
    assert tiers.capacities((0.5, 0.25, 0.25), 32) == (8, 16, 32)
    assert tiers.capacities((0.25, 0.5), 6) == (2, 3, 6)
    assert tiers.capacities((1.0,), 32) == (32,)
    assert tiers.capacities((), 32) == (32,)


def test_packed_rows_are_the_valid_ones_of_every_image_in_order_then_the_rest():
    valid = jnp.asarray([[True, False, True], [False, False, False], [True, True, False]])
    rows = {"x": jnp.arange(9).reshape(3, 3), "wide": jnp.arange(18).reshape(3, 3, 2)}
    packed = tiers.pack(rows, valid)
    order = [0, 2, 6, 7, 1, 3, 4, 5, 8]
    np.testing.assert_array_equal(packed["x"], [order])
    np.testing.assert_array_equal(packed["wide"][0, :, 0], 2 * np.asarray(order))


@pytest.mark.parametrize("count", COUNTS)
def test_the_valid_rows_of_a_tier_are_those_of_the_plain_run(count):
    run = lambda tree: {"double": 2.0 * tree["x"], "sum": tree["x"].sum(-1) + 1.0}
    rows = {"x": INPUTS, "unused": GOALS}
    tiered = jax.jit(lambda rows, count: tiers.by_tier(run, rows, count, TIERS))
    found, plain = tiered(rows, jnp.int32(count)), run(rows)
    capacity = next(size for size in (3, 6, ROWS) if size >= count)
    for name, leaf in plain.items():
        np.testing.assert_array_equal(found[name][:, :capacity], leaf[:, :capacity])
        assert not np.any(found[name][:, capacity:])


def test_without_tiers_the_run_is_the_plain_one():
    run = lambda x: x + 1.0
    np.testing.assert_array_equal(tiers.by_tier(run, INPUTS, jnp.int32(2), ()), INPUTS + 1.0)


def loss(params, inputs, rest):
    goals, valid = rest
    guess = jnp.tanh(jnp.einsum("brc,c->br", inputs, params["kernel"]) + params["bias"])
    squares = jnp.where(valid, jnp.square(guess - goals), 0.0)
    return jnp.sum(squares), {"largest": jnp.max(squares)}


@functools.partial(jax.jit, static_argnames="sizes")
def both(params, inputs, count, sizes):
    """Value and gradients of three times the loss: with tiers and without."""
    # The second image has one valid row less than the first.
    valid = jnp.arange(ROWS)[None, :] < count - jnp.arange(2)[:, None]
    rest = (GOALS, valid)
    triple = lambda found: (3.0 * found[0], found[1])
    tiered = lambda p, x: triple(tiers.tiered_sum(loss, p, x, rest, count, sizes))
    plain = lambda p, x: triple(loss(p, x, rest))
    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    return [gradient(each)(params, inputs) for each in (tiered, plain)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("sizes", [(), TIERS])
def test_value_and_gradients_are_those_of_the_plain_loss(count, sizes):
    found, plain = both(PARAMS, INPUTS, jnp.int32(count), sizes)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, plain)


def test_the_value_alone_is_that_of_the_plain_loss():
    valid = jnp.broadcast_to(jnp.arange(ROWS)[None, :] < 4, (2, ROWS))
    rest = (GOALS, valid)
    found = jax.jit(lambda: tiers.tiered_sum(loss, PARAMS, INPUTS, rest, jnp.int32(4), TIERS))()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, found, loss(PARAMS, INPUTS, rest))


def test_inputs_of_another_type_get_gradients_of_their_type():
    inputs = INPUTS.astype(jnp.bfloat16)
    wide = lambda p, x, rest: loss(p, x.astype(jnp.float32), rest)
    valid = jnp.broadcast_to(jnp.arange(ROWS)[None, :] < 2, (2, ROWS))
    run = lambda x: tiers.tiered_sum(wide, PARAMS, x, (GOALS, valid), jnp.int32(2), TIERS)[0]
    slope = jax.jit(jax.grad(run))(inputs)
    assert slope.dtype == jnp.bfloat16
    assert np.any(slope[:, :2] != 0)
    assert not np.any(slope[:, 2:])
