"""`train.remat`: a backbone whose inside is computed again gives what the plain one gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs._chain import apply
from sephjax import build, check, describe
from sephjax.errors import UserError
from sephjax.nets.backbone import resnet
from sephjax.nets.functional import flat_paths, functional
from tests import narrow
from tests.nets.reference import draw
from tests.parity import double

SIZE = [(64, 96), (50, 71)]


def network(layout, norm, *, remat):
    return functional(
        lambda rngs: resnet.ResNet(
            depth=18, layout=layout, norm=norm, width=4, remat=remat, rngs=rngs
        )
    )


def objective(model, image, size):
    """(params, frozen) -> a sum that reads every cell of every map, and (maps, frozen after)."""

    def run(params, frozen):
        maps, after = model.apply_and_update(params, frozen, image, size, train=True)
        total = sum(jnp.sum(jnp.square(x)) for x in maps.values())
        return total, (maps, after)

    return run


@pytest.mark.parametrize(
    ("layout", "norm"), [("torchvision", "bn"), ("slim", "bn"), ("slim", "frozen_bn")]
)
def test_maps_gradients_and_statistics_are_those_of_the_plain_network(layout, norm):
    """In float64: what is computed twice is the same, but the compiler may fuse it otherwise."""
    rng = np.random.default_rng(0)
    with double.everywhere(wanted=True):
        image = jnp.asarray(rng.normal(size=(2, 64, 96, 3)))
        found = []
        for remat in (False, True):
            model = network(layout, norm, remat=remat)
            params, frozen = draw(model)
            run = objective(model, image, jnp.asarray(SIZE))
            step = narrow.jit(jax.value_and_grad(run, has_aux=True))
            (_, (maps, after)), slopes = step(params, frozen)
            found.append(jax.device_get((maps, slopes, after, frozen)))
    plain, again = found
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        # Rounding of float64, 2e-16, over some thousand terms of a sum.
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12 * np.abs(one).max())
    moved = [np.any(old != new) for old, new in pairs(again[3], again[2])]
    assert all(moved) if norm == "bn" else not any(moved)


def pairs(before, after):
    after = dict(flat_paths(after))
    return [(value, after[name]) for name, value in flat_paths(before)]


def test_values_that_did_not_move_stay_the_same_arrays():
    """Several devices would take the mean of new ones, which rounds."""
    model = network("torchvision", "frozen_bn", remat=True)
    params, frozen = draw(model)
    same = []

    def run(params, frozen):
        _, after = model.apply_and_update(params, frozen, jnp.ones((1, 32, 32, 3)), train=True)
        same.extend(old is new for old, new in pairs(frozen, after))
        return after

    jax.eval_shape(run, params, frozen)
    assert len(same) == 4 * 20
    assert all(same)


def kept(remat):
    """Bytes that the gradient of a backbone on two pictures keeps from its forward pass.

    A function that `jax.vjp` returns is a tree of them, parameters and input among them.
    """
    model = network("torchvision", "evonorm_s0", remat=remat)
    run = objective(model, jnp.zeros((2, 128, 192, 3)), jnp.asarray([(128, 192)] * 2))
    keep = lambda params: jax.vjp(lambda p: run(p, {})[0], params)[1]
    leaves = jax.tree.leaves(jax.eval_shape(keep, model.abstract[0]))
    given = sum(leaf.size for leaf in jax.tree.leaves(model.abstract[0])) * 4
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) - given


def test_the_gradient_keeps_only_what_passes_between_stages():
    """Of XLA's own figure a CPU shows nothing: there it drops the barriers and moves the second
    forward pass to the first."""
    cells = 2 * 32 * 48  # of stride 4
    between = 4 * cells * (3 * 16 + 4 + 4 + 8 / 4 + 16 / 16 + 32 / 64)  # input, stem, stages
    assert kept(remat=True) < 1.5 * between
    assert kept(remat=False) > 5 * between


def flops(remat, *, train, gradient=True):
    model = network("torchvision", "bn", remat=remat)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    run = lambda p, f, x: sum(map(jnp.sum, model.apply(p, f, x, train=train).values()))
    traced = jax.make_jaxpr(jax.grad(run) if gradient else run)(*model.abstract, image)
    return describe.cost(traced.jaxpr).flops


def test_it_costs_one_more_forward_pass_and_in_training_alone():
    forward = flops(False, train=True, gradient=False)
    assert forward > 5e5
    assert flops(True, train=True) == flops(False, train=True) + forward
    assert flops(True, train=False) == flops(False, train=False)


def test_the_config_chooses_it():
    def inside(remat):
        config = narrow.config(**({"train.remat": remat} if remat != "none" else {}))
        model = build.model(config, narrow.CLASSES)
        return model.inside(*narrow.draw(model), lambda model: model.backbone.remat)

    assert (inside("none"), inside("stage")) == (False, True)
    config = apply(narrow.config(), {"train.remat": "block"}, "a test")
    for refuse in (check.check, lambda config: build.model(config, 3)):
        with pytest.raises(UserError, match=r"train.remat is 'block'; use .*'none'.* 'stage'"):
            refuse(config)
