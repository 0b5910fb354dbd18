"""nets/norms.py against literal values, NumPy, PyTorch and timm's EvoNorm-S0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sephjax.nets import norms
from sephjax.nets.functional import functional
from sephjax.nets.layers import valid_mask

NAMES = ["evonorm_s0", "gn", "frozen_bn", "bn", "none"]


def make(name, channels, **options):
    return norms.make_norm(name, channels, rngs=nnx.Rngs(0), **options)


def randomise(norm, seed=0):
    rng = np.random.default_rng(seed)
    for name in ("gamma", "beta", "v", "mean", "variance"):
        if hasattr(norm, name):
            variable = getattr(norm, name)
            variable[...] = jnp.asarray(rng.uniform(0.5, 1.5, variable[...].shape), jnp.float32)
    return norm


def test_evonorm_of_a_vector_has_the_values_worked_by_hand():
    norm = norms.EvoNormS0(4, groups=2)
    norm.v[...] = jnp.asarray([1.0, 1.0, 0.5, 2.0])
    norm.gamma[...] = jnp.asarray([1.0, 2.0, 1.0, 1.0])
    norm.beta[...] = jnp.asarray([0.0, 0.1, 0.0, 0.0])
    y = norm(jnp.asarray([[1.0, -1.0, 2.0, 0.5]]))
    np.testing.assert_allclose(y, [[0.731055, -0.437880, 1.949472, 0.487368]], atol=2e-6)


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (1024, 32), (64, 32), (96, 32), (32, 16), (8, 4), (5, 1)]
)
def test_there_are_32_groups_where_the_width_allows(channels, groups):
    assert norms.groups_of(channels) == groups


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_and_parameters_are_float32(name):
    norm = make(name, 64)
    x = jnp.ones((2, 3, 3, 64), jnp.bfloat16)
    assert norm(x, train=True).dtype == jnp.bfloat16
    assert norm(x[:, 0, 0]).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(norm))


@pytest.mark.parametrize("name", ["evonorm_s0", "gn", "bn"])
def test_statistics_ignore_the_padding_and_so_does_the_gradient(name):
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 64)) * 3 + 1
    valid = valid_mask(jnp.asarray([[4, 5], [4, 5]], jnp.int32), (6, 7), 1)
    norm = randomise(make(name, 64))
    padded = norm(x, valid, train=True)[:, :4, :5]
    alone = randomise(make(name, 64))(x[:, :4, :5], train=True)
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    assert not np.allclose(norm(x, train=True)[:, :4, :5], alone, atol=1e-3)
    inside = lambda x: jnp.sum(jnp.sin(norm(x, valid)[:, :4, :5]))
    grad = np.asarray(jax.grad(inside)(x))
    assert np.isfinite(grad).all()
    assert np.all(grad[~np.asarray(valid)] == 0)


@pytest.mark.parametrize("name", NAMES)
def test_constant_and_wholly_padded_maps_have_finite_values_and_gradients(name):
    norm = functional(lambda rngs: norms.make_norm(name, 64, rngs=rngs))
    params, frozen = norm.init(jax.random.key(0))
    nothing = jnp.zeros((2, 3, 3), bool)

    def total(x):
        return jnp.sum(norm.apply(params, frozen, x, nothing, train=True))

    value, grad = jax.value_and_grad(total)(jnp.zeros((2, 3, 3, 64)))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_which_of_frozen_batch_norm_is_trained_is_an_option():
    names = lambda option: tuple(
        sorted(part)
        for part in functional(
            lambda rngs: norms.make_norm("frozen_bn", 2, rngs=rngs, trainable_affine=option)
        ).abstract
    )
    assert names(False) == ([], ["beta", "gamma", "mean", "variance"])
    assert names(True) == (["beta", "gamma"], ["mean", "variance"])


def test_frozen_batch_norm_never_looks_at_the_batch():
    norm = randomise(make("frozen_bn", 3, eps=1e-3))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    mean, variance, gamma, beta = (
        np.asarray(v[...]) for v in (norm.mean, norm.variance, norm.gamma, norm.beta)
    )
    expected = (np.asarray(x) - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(norm(x, train=True), expected, atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], mean)


def test_only_evonorm_is_its_own_activation():
    assert [make(name, 64).activates for name in NAMES] == [True, False, False, False, False]


def test_an_unknown_norm_is_named():
    with pytest.raises(ValueError, match="'layer'"):
        make("layer", 4)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evonorm_and_its_gradient_agree_with_timm(dtype):
    torch = pytest.importorskip("torch")
    evo_norm = pytest.importorskip("timm.layers.evo_norm")
    norm = randomise(make("evonorm_s0", 64))
    peer = evo_norm.EvoNorm2dS0(64)
    for theirs, ours in ((peer.weight, norm.gamma), (peer.bias, norm.beta), (peer.v, norm.v)):
        theirs.data = torch.from_numpy(np.array(ours[...]))
    x = np.random.default_rng(0).normal(1.0, 2.0, (2, 5, 6, 64)).astype(np.float32)
    tx = torch.from_numpy(x).permute(0, 3, 1, 2).to(getattr(torch, dtype)).requires_grad_()
    ty = peer(tx)
    y = norm(jnp.asarray(x, dtype))
    # bfloat16 has 8 bits; timm rounds after every operation, we once
    atol = 2e-6 if dtype == "float32" else 0.06
    np.testing.assert_allclose(
        np.asarray(y, np.float32), ty.detach().float().permute(0, 2, 3, 1), atol=atol
    )
    torch.sin(ty.float()).sum().backward()
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(norm(x).astype(jnp.float32))))(jnp.asarray(x, dtype))
    np.testing.assert_allclose(
        np.asarray(grad, np.float32), tx.grad.float().permute(0, 2, 3, 1), atol=2 * atol
    )
    grads = nnx.grad(lambda norm: jnp.sum(jnp.sin(norm(jnp.asarray(x, dtype)).astype(jnp.float32))))
    ours = grads(norm)
    part = 1e-6 if dtype == "float32" else 0.015  # timm's bfloat16 rounds each of the 60 addends
    for theirs, name in ((peer.weight, "gamma"), (peer.bias, "beta"), (peer.v, "v")):
        found, want = getattr(ours, name)[...], theirs.grad.numpy()
        np.testing.assert_allclose(found, want, atol=part * np.abs(want).max())


@pytest.mark.torch
def test_group_norm_agrees_with_torch():
    torch = pytest.importorskip("torch")
    norm = randomise(make("gn", 64))
    gamma, beta = (torch.from_numpy(np.array(v[...])) for v in (norm.gamma, norm.beta))
    x = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 4, 64)).astype(np.float32)
    for ours, theirs in ((x, torch.from_numpy(x).permute(0, 3, 1, 2)), (x[0, 0],) * 2):
        expected = torch.nn.functional.group_norm(torch.as_tensor(theirs), 32, gamma, beta, 1e-5)
        expected = expected.permute(0, 2, 3, 1) if expected.ndim == 4 else expected
        np.testing.assert_allclose(norm(jnp.asarray(ours)), expected, atol=1e-5)


@pytest.mark.torch
def test_batch_norm_trains_and_tests_as_torch():
    torch = pytest.importorskip("torch")
    norm = randomise(make("bn", 5))
    peer = torch.nn.BatchNorm2d(5)
    for theirs, ours in (
        (peer.weight.data, norm.gamma),
        (peer.bias.data, norm.beta),
        (peer.running_mean, norm.mean),
        (peer.running_var, norm.variance),
    ):
        theirs.copy_(torch.from_numpy(np.array(ours[...])))
    x = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 4, 5)).astype(np.float32)
    tx = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = peer.train()(tx).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(norm(jnp.asarray(x), train=True), expected, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], peer.running_mean, atol=1e-6)
    np.testing.assert_allclose(norm.variance[...], peer.running_var, rtol=1e-5)
    expected = peer.eval()(tx).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-5)
