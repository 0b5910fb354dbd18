"""nets/functional.py: plain dicts in and out, names and shapes checked."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sephjax.errors import UserError
from sephjax.nets import layers, norms
from sephjax.nets.functional import Frozen, attach, detach, functional


class Tower(nnx.Module):
    """Eleven blocks, so that the sorted order of names is not the order of the numbers."""

    def __init__(self, rngs):
        for i in range(11):
            setattr(self, f"block{i}", layers.Linear(3, 3, rngs=rngs))
        self.norm = norms.make_norm("bn", 3, rngs=rngs)

    def __call__(self, x, train=False):
        for i in range(11):
            x = getattr(self, f"block{i}")(x)
        return self.norm(x, train=train)

    def last(self, x):
        return self.block10(x)


@pytest.fixture
def tower():
    return functional(Tower)


def test_names_are_plain_strings_and_known_without_making_an_array(tower):
    params, frozen = tower.abstract
    assert sorted(params) == sorted([*(f"block{i}" for i in range(11)), "norm"])
    assert sorted(params["norm"]) == ["beta", "gamma"]
    assert sorted(frozen["norm"]) == ["mean", "variance"]
    assert type(params) is dict
    assert type(params["block0"]["kernel"]) is jax.ShapeDtypeStruct
    drawn = tower.init(jax.random.key(0))
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), drawn, (params, frozen)
    )
    assert all(jax.tree.leaves(same))


def test_apply_is_a_pure_function_of_the_dicts(tower):
    params, frozen = tower.init(jax.random.key(0))
    x = jnp.arange(6.0).reshape(2, 3)
    expected = np.asarray(x, np.float64)
    for i in range(11):
        expected = expected @ np.asarray(params[f"block{i}"]["kernel"], np.float64)
    np.testing.assert_allclose(
        jax.jit(tower.apply)(params, frozen, x), expected / np.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        tower.apply(params, frozen, x, method="last"), x @ params["block10"]["kernel"], rtol=1e-6
    )
    np.testing.assert_allclose(
        tower.apply(params, frozen, x, method="block3.__call__"),
        x @ params["block3"]["kernel"],
        rtol=1e-6,
    )


def test_training_statistics_come_back_and_the_input_is_not_touched(tower):
    params, frozen = tower.init(jax.random.key(0))
    x = jnp.arange(12.0).reshape(4, 3)
    before = jax.tree.map(np.array, frozen)
    y, after = jax.jit(lambda p, f, x: tower.apply_and_update(p, f, x, train=True))(
        params, frozen, x
    )
    np.testing.assert_allclose(jnp.mean(y, axis=0), 0.0, atol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(frozen)
    assert not np.allclose(after["norm"]["mean"], before["norm"]["mean"])
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_only_params_have_a_gradient(tower):
    params, frozen = tower.init(jax.random.key(0))
    grads = jax.grad(lambda p: jnp.sum(tower.apply(p, frozen, jnp.ones((2, 3)))))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_every_wrong_name_and_shape_is_reported_at_once(tower):
    params, frozen = tower.init(jax.random.key(0))
    params["block2"] = {"kernel": jnp.zeros((3, 4)), "bias": params["block2"]["bias"]}
    params["block11"] = params.pop("block10")
    with pytest.raises(UserError) as caught:
        tower.apply(params, frozen, jnp.ones((2, 3)))
    message = str(caught.value)
    assert "block10/kernel is missing" in message
    assert "block11/kernel is not part of the model" in message
    assert "block2/kernel has shape (3, 4) where the model has (3, 3)" in message


def test_a_part_of_a_running_model_can_be_detached():
    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = Tower(rngs)

        def __call__(self, x):
            call, params, frozen = detach(self.inner)
            doubled = jax.tree.map(lambda p: 2 * p, params)
            return call(doubled, frozen, x)[0], call(params, frozen, x)[0]

    outer = functional(Outer)
    doubled, plain = jax.jit(outer.apply)(*outer.init(jax.random.key(0)), jnp.ones((2, 3)))
    # eleven kernels and gamma are doubled
    np.testing.assert_allclose(doubled, plain * 2.0**12, rtol=1e-5)


def test_what_a_detached_part_leaves_behind_can_be_brought_back():
    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = norms.make_norm("bn", 3, rngs=rngs)

        def __call__(self, x, through):
            if not through:
                return self.inner(x, train=True)
            call, params, frozen = detach(self.inner)
            y, moved = call(params, frozen, x, train=True)
            attach(self.inner, moved)
            return y

    outer = functional(Outer)
    params, frozen = outer.init(jax.random.key(0))
    x = jnp.arange(12.0).reshape(4, 3)
    plain, through = (outer.apply_and_update(params, frozen, x, way) for way in (False, True))
    jax.tree.map(np.testing.assert_array_equal, through, plain)
    np.testing.assert_allclose(through[1]["inner"]["mean"], 0.1 * np.mean(x, axis=0), rtol=1e-6)


def test_a_model_without_frozen_values_has_an_empty_dict():
    model = functional(lambda rngs: layers.Linear(2, 3, rngs=rngs))
    params, frozen = model.init(jax.random.key(0))
    assert frozen == {}
    assert model.apply(params, frozen, jnp.ones((1, 2))).shape == (1, 3)


def test_frozen_is_no_parameter():
    assert issubclass(Frozen, nnx.Variable)
    assert not issubclass(Frozen, nnx.Param)


def test_tree_mode_of_nnx_gives_the_same_names_and_values():
    program = """
import jax, jax.numpy as jnp
from sephjax.nets.backbone.resnet import ResNet
from sephjax.nets.functional import flat_paths, functional
net = functional(lambda rngs: ResNet(depth=18, layout="torchvision", norm="bn", width=2, rngs=rngs))
params, frozen = net.init(jax.random.key(0))
y, frozen = net.apply_and_update(params, frozen, jnp.ones((1, 8, 8, 3)), train=True)
print(sum(hash(p) % 9973 for p, _ in flat_paths(params)), float(jnp.sum(y["c3"])),
      float(jnp.sum(frozen["stem"]["norm"]["mean"])))
"""
    outputs = []
    for mode in ("true", "false"):
        env = os.environ | {"NNX_GRAPH_MODE": mode, "PYTHONHASHSEED": "0"}
        env["JAX_PLATFORMS"] = "cpu"
        run = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        )
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].strip()
