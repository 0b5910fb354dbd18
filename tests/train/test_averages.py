"""Averaged weights: values by hand, what is averaged, and exact resumption with batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import build
from sephjax.train import averages, optimizer, step
from sephjax.types import TrainState, Weights
from tests import narrow


def test_the_decay_warms_up():
    """(1 + t) / (10 + t): 1/10, 2/11, 10/19; the cap 0.9 binds from t = 80 on (81/90)."""
    found = [float(averages.decay_at(jnp.int32(t), 0.9)) for t in (0, 1, 9, 79, 80, 1000)]
    np.testing.assert_allclose(found, [0.1, 2 / 11, 10 / 19, 80 / 89, 0.9, 0.9], rtol=1e-6)


def test_three_updates_by_hand():
    """From 1: 0.1*1 + 0.9*2 = 1.9; 2/11*1.9 + 9/11*5 = 48.8/11; 1/4 of it + 3/4*(-1)."""
    smooth = Weights({"w": jnp.float32([1.0])}, {"mean": jnp.float32([0.0])})
    expected = [1.9, 48.8 / 11, 0.25 * 48.8 / 11 - 0.75]
    for t, (w, mean) in enumerate([(2.0, 10.0), (5.0, 10.0), (-1.0, 10.0)]):
        now = Weights({"w": jnp.float32([w])}, {"mean": jnp.float32([mean])})
        smooth = averages.update(smooth, now, jnp.int32(t), 0.999)
        np.testing.assert_allclose(smooth.params["w"], expected[t : t + 1], rtol=1e-6)
    left = 1 / 10 * 2 / 11 * 3 / 12  # of the distance from 0 to 10
    np.testing.assert_allclose(smooth.frozen["mean"], [10 * (1 - left)], rtol=1e-6)


def test_what_does_not_change_stays_bit_for_bit():
    values = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    same = Weights({"w": values}, {})
    for t in range(5):
        same = averages.update(same, Weights({"w": values}, {}), jnp.int32(t), 0.9998)
    np.testing.assert_array_equal(same.params["w"], values)


@pytest.fixture(scope="module")
def trained():
    """Three steps of a narrow detector with batch norm, with averages and without."""
    config = narrow.config("bn", **{"optimizer.lr": 0.005})
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    mask = optimizer.frozen_mask(params, (r"^backbone/stem/",))
    trained, fixed = optimizer.split_by_mask(params, mask)
    tx = optimizer.make_optimizer(config, trained, optimizer.parameter_names(fixed))
    state = TrainState(jnp.int32(0), params, frozen, tx.init(trained), jax.random.key(3))
    train_step = narrow.jit(step.make_train_step(model, tx, build.losses(config), mask, ema=0.15))
    batch = jax.tree.map(jnp.asarray, narrow.batch([(64, 96), (50, 70)], [2, 3]))
    states = {}
    for smooth in (Weights(params, frozen), None):
        kept = [TrainState(state.step, params, frozen, state.opt_state, state.key, smooth)]
        for _ in range(3):
            kept.append(train_step(kept[-1], batch)[0])
        states[smooth is not None] = kept
    return states


def test_averages_do_not_change_the_training(trained):
    for with_them, without in zip(trained[True], trained[False], strict=True):
        assert without.averages is None
        for part in ("params", "frozen", "opt_state"):
            pairs = (jax.tree.leaves(getattr(s, part)) for s in (with_them, without))
            for a, b in zip(*pairs, strict=True):
                # another program may fuse otherwise
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_step_averages_parameters_and_running_statistics(trained):
    """NumPy, from the weights after each step: decays 0.1, then the cap 0.15 twice."""
    kept = trained[True]
    smooth = [np.asarray(x, np.float64) for x in jax.tree.leaves(kept[0].averages)]
    for decay, state in zip((0.1, 0.15, 0.15), kept[1:], strict=True):
        now = jax.tree.leaves((state.params, state.frozen))
        smooth = [decay * a + (1 - decay) * np.asarray(w) for a, w in zip(smooth, now, strict=True)]
        found = jax.tree.leaves(state.averages)
        for a, b in zip(found, smooth, strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    last = kept[-1]
    assert last.best is last.averages
    moved = [
        not np.array_equal(a, w)
        for a, w in zip(
            jax.tree.leaves((last.averages.params, last.averages.frozen)),
            jax.tree.leaves((last.params, last.frozen)),
            strict=True,
        )
    ]
    names = optimizer.parameter_names((last.params, last.frozen))
    still = {name for name, yes in zip(names, moved, strict=True) if not yes}
    assert still == {name for name in names if name.startswith("0/backbone/stem/")}
    assert any("/mean" in name for name in names)


def test_a_state_without_averages_evaluates_its_own_weights(trained):
    state = trained[False][-1]
    assert state.best.params is state.params
    assert state.best.frozen is state.frozen
    # No leaf more than before there were averages.
    parts = (state.step, state.params, state.frozen, state.opt_state, state.key)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(parts))
