"""Learning rates against published formulas, updates against torch.optim.SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from sephjax.errors import UserError
from sephjax.train import optimizer


@pytest.fixture
def config():
    config = base.get_config()
    config.optimizer.no_decay = ()
    config.optimizer.freeze = ()
    return config


def params():
    draw = np.random.default_rng(0).normal
    return {
        "backbone": {"stem": {"kernel": draw(size=(3, 2))}, "norm1": {"scale": draw(size=2)}},
        "head": {"kernel": draw(size=(2, 4)), "bias": draw(size=4)},
    }


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_the_cosine_schedule_has_the_published_values(config):
    config.train.steps = 120_000
    config.schedule.update({"name": "cosine", "warmup_from": 0.0, "floor": 1e-6})
    rate = optimizer.make_schedule(config)
    steps = [1, 500, 1000, 30_000, 60_500, 90_000, 119_000, 120_000, 130_000]
    values = [2e-5, 0.01, 0.02, 0.01720982, 0.0100005, 0.00297661, 4.48e-6, 1e-6, 1e-6]
    got = [float(rate(jnp.int32(step))) for step in steps]
    np.testing.assert_allclose(got, values, rtol=1e-3)  # 4.48e-6 has three digits
    np.testing.assert_allclose(got[3:6], values[3:6], rtol=2e-6)


def test_the_step_schedule_falls_at_the_milestones_and_not_before(config):
    rate = optimizer.make_schedule(config)
    steps = [1_000, 59_999, 60_000, 79_999, 80_000, 90_000]
    got = [float(rate(step)) for step in steps]
    np.testing.assert_allclose(got, [0.02, 0.02, 0.002, 0.002, 2e-4, 2e-4], rtol=1e-6)


def test_warm_up_is_detectron2s(config):
    # factor = warmup_factor * (1 - alpha) + alpha, alpha = iter / warmup_iters
    rate = optimizer.make_schedule(config)
    expected = [0.02 * 0.001, 0.02 * (0.001 * 0.75 + 0.25), 0.02 * (0.001 * 0.5 + 0.5)]
    np.testing.assert_allclose([float(rate(t)) for t in (0, 250, 500)], expected, rtol=1e-6)


def test_no_warm_up_starts_at_the_full_rate(config):
    config.schedule.warmup_steps = 0
    assert float(optimizer.make_schedule(config)(0)) == pytest.approx(0.02)


def test_an_unknown_schedule_is_refused(config):
    config.schedule.name = "linear"
    with pytest.raises(UserError, match="'linear'"):
        optimizer.make_schedule(config)


@pytest.mark.torch
def test_updates_are_those_of_torch_sgd(config):
    torch = pytest.importorskip("torch")
    config.optimizer.no_decay = (r"norm\d?/",)
    config.schedule.update({"warmup_steps": 0, "milestones": ()})
    config.optimizer.weight_decay = 0.05
    ours = as_float32(params())
    names = optimizer.parameter_names(ours)
    theirs = {
        name: torch.tensor(np.asarray(leaf), requires_grad=True)
        for name, leaf in zip(names, jax.tree.leaves(ours), strict=True)
    }
    groups = [
        {"params": [p for n, p in theirs.items() if "norm" not in n], "weight_decay": 0.05},
        {"params": [p for n, p in theirs.items() if "norm" in n], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    tx = optimizer.make_optimizer(config, ours)
    state = tx.init(ours)
    rng = np.random.default_rng(1)
    for _ in range(5):
        grads = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), ours)
        for name, grad in zip(names, jax.tree.leaves(grads), strict=True):
            theirs[name].grad = torch.tensor(np.asarray(grad))
        sgd.step()
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, leaf in zip(names, jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(leaf, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_clip_counts_the_decay_as_part_of_the_gradient(config):
    # g = 3, decay 1 * w = 4 in another parameter: norm 5, clipped to 1 -> (0.6, 0.8)
    config.optimizer.update({"lr": 1.0, "momentum": 0.0, "weight_decay": 1.0, "clip": 1.0})
    config.optimizer.decay = ("^b$",)
    config.schedule.update({"warmup_steps": 0, "milestones": ()})
    weights = as_float32({"a": 0.0, "b": 4.0})
    tx = optimizer.make_optimizer(config, weights)
    updates, _ = tx.update(as_float32({"a": 3.0, "b": 0.0}), tx.init(weights), weights)
    np.testing.assert_allclose([updates["a"], updates["b"]], [-0.6, -0.8], rtol=1e-6)


def test_a_rule_that_matches_nothing_names_the_nearest_parameters(config):
    config.optimizer.decay = ("bakbone/stem/kernel",)
    with pytest.raises(UserError, match=r"optimizer.decay.*backbone/stem/kernel"):
        optimizer.make_optimizer(config, params())
    with pytest.raises(UserError, match=r"optimizer.freeze.*head/bias"):
        optimizer.frozen_mask(params(), ("head/biass",))
    with pytest.raises(UserError, match="no regular expression"):
        optimizer.frozen_mask(params(), ("(",))


def test_a_rule_may_match_a_weight_that_nobody_trains(config):
    config.optimizer.no_decay = (r"^frozen_only/",)
    optimizer.make_optimizer(config, params(), known=["frozen_only/mean"])


def test_split_and_join_are_inverse_and_frozen_parameters_have_no_momentum(config):
    tree = as_float32(params())
    mask = optimizer.frozen_mask(tree, ("^backbone/", "bias$"))
    trainable, fixed = optimizer.split_by_mask(tree, mask)
    assert optimizer.parameter_names(trainable) == ["head/kernel"]
    assert optimizer.parameter_names(fixed) == [
        "backbone/norm1/scale",
        "backbone/stem/kernel",
        "head/bias",
    ]
    back = optimizer.join(trainable, fixed)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    state = optimizer.make_optimizer(config, trainable).init(trainable)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape]
    assert shapes == [(2, 4)]


def test_a_name_on_both_sides_of_a_join_is_an_error():
    with pytest.raises(ValueError, match="both"):
        optimizer.join({"a": 1}, {"a": 2})
