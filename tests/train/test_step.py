"""The train step on four fixed pictures: what learns, what stays, and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import build
from sephjax.train import optimizer, step
from sephjax.types import TrainState
from tests import narrow

FREEZE = (r"^backbone/(stem|stage1)/",)
STEPS = 30


def make(**changes):
    """A jitted train step and the state before the first one."""
    config = narrow.config(**({"optimizer.lr": 0.005, "optimizer.clip": 10.0} | changes))
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    params["box_head"]["logits"]["kernel"] *= 0.05  # all classes start nearly alike
    mask = optimizer.frozen_mask(params, FREEZE)
    trained, fixed = optimizer.split_by_mask(params, mask)
    tx = optimizer.make_optimizer(config, trained, optimizer.parameter_names(fixed))
    state = TrainState(jnp.int32(0), params, frozen, tx.init(trained), jax.random.key(3))
    return narrow.jit(step.make_train_step(model, tx, build.losses(config), mask)), state


@pytest.fixture(scope="module")
def batch():
    sizes = [(64, 96), (50, 70), (64, 80), (60, 96)]
    return jax.tree.map(jnp.asarray, narrow.batch(sizes, [2, 3, 0, 1]))


@pytest.fixture(scope="module")
def run(batch):
    """The state before, the state after, and the scalars of every step."""
    train_step, before = make()
    state, rows = before, []
    for _ in range(STEPS):
        state, scalars = train_step(state, batch)
        rows.append(jax.tree.map(float, scalars))
    return before, state, rows


def test_thirty_steps_on_the_same_pictures_lower_the_loss(run):
    _, after, rows = run
    assert after.step == STEPS
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first


def test_the_terms_sum_to_the_loss_at_every_step(run):
    for row in run[2]:
        terms = [value for name, value in row.items() if name.startswith("loss/")]
        assert len(terms) == 5
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_what_is_frozen_stays_bit_for_bit_and_all_else_moves(run):
    before, after, _ = run
    names = optimizer.parameter_names(before.params)
    pairs = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)
    same = {name for name, (a, b) in zip(names, pairs, strict=True) if np.array_equal(a, b)}
    fixed = {name for name in names if name.startswith(("backbone/stem/", "backbone/stage1/"))}
    assert same == fixed
    assert len(fixed) > 5


def test_bfloat16_keeps_float32_parameters_and_nearly_the_loss(run, batch):
    train_step, state = make(compute_dtype="bfloat16")
    after, scalars = train_step(state, batch)
    kept = {leaf.dtype for leaf in jax.tree.leaves((after.params, after.opt_state))}
    assert kept <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    # bfloat16 rounds what enters a product by 2^-9 = 0.2%, and rounding errors of many products
    # average out; the same anchors are sampled, so the RPN's terms differ by that. A proposal near
    # a threshold may change places, which exchanges a few of the sixteen ROIs an image: the box
    # head's terms, and so the total, are less close.
    wide = run[2][0]
    for name, rel in (("rpn_cls", 0.01), ("rpn_box", 0.01), ("mask", 0.02), ("roi_box", 0.3)):
        assert float(scalars[f"loss/{name}"]) == pytest.approx(wide[f"loss/{name}"], rel=rel)
    assert float(scalars["loss"]) == pytest.approx(wide["loss"], rel=0.1)
