"""nets/layers.py against PyTorch, TensorFlow's published padding rule and counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sephjax.nets import layers


def rngs():
    return nnx.Rngs(0)


def test_the_valid_extent_of_a_map_is_the_rounded_up_quotient():
    # 9 pixels at stride 4 touch 3 cells, 8 touch 2; the map has 4 columns.
    mask = layers.valid_mask(jnp.asarray([[9, 8], [1, 16]], jnp.int32), (4, 4), 4)
    np.testing.assert_array_equal(mask[0].sum(axis=0), [3, 3, 0, 0])
    np.testing.assert_array_equal(mask[0].sum(axis=1), [2, 2, 2, 0])
    np.testing.assert_array_equal(mask[1].sum(axis=1), [4, 0, 0, 0])


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [(8, 3, 1, (1, 1)), (8, 3, 2, (0, 1)), (7, 3, 2, (1, 1)), (224, 7, 2, (2, 3))],
)
def test_same_padding_puts_the_odd_pixel_after(size, kernel, stride, expected):
    assert layers.same_tf(size, kernel, stride) == expected


def test_padding_is_not_read_by_a_wide_kernel():
    conv = layers.Conv(2, 3, 3, rngs=rngs())
    x = jax.random.normal(jax.random.key(1), (1, 6, 6, 2))
    valid = layers.valid_mask(jnp.asarray([[4, 5]], jnp.int32), (6, 6), 1)
    alone = conv(x[:, :4, :5])
    np.testing.assert_allclose(conv(x, valid)[:, :4, :5], alone, atol=1e-6)
    assert not np.allclose(conv(x)[:, :4, :5], alone, atol=1e-3)
    grad = jax.grad(lambda x: jnp.sum(conv(x, valid)))(x)
    assert np.all(np.asarray(grad)[~np.asarray(valid)] == 0)


def test_parameters_stay_float32_and_bfloat16_goes_through():
    x = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    conv = layers.Conv(2, 3, 3, rngs=rngs())
    assert conv(x).dtype == jnp.bfloat16
    assert conv.kernel[...].dtype == jnp.float32
    assert layers.ConvTranspose2x2(2, 3, rngs=rngs())(x).dtype == jnp.bfloat16
    assert layers.Linear(2, 3, rngs=rngs())(x[0, 0]).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("init", "std", "bound"),
    [
        # kernel 3x3x64x128: fan in 576, fan out 1152
        ("xavier_uniform", np.sqrt(2 / (576 + 1152)), np.sqrt(6 / (576 + 1152))),
        ("kaiming_fan_out", np.sqrt(2 / 1152), None),
        ("msra", np.sqrt(2 / 1152), None),
        ("kaiming_uniform_a1", np.sqrt(1 / 576), np.sqrt(3 / 576)),
        (("normal", 0.01), 0.01, None),
    ],
)
def test_initialisers_have_the_spread_of_their_definition(init, std, bound):
    kernel = np.asarray(layers.initializer(init)(jax.random.key(0), (3, 3, 64, 128), jnp.float32))
    assert kernel.std() == pytest.approx(std, rel=0.02)
    assert bound is None or np.abs(kernel).max() == pytest.approx(bound, rel=0.01)


def test_an_unknown_initialiser_is_named():
    with pytest.raises(ValueError, match="'lecun'"):
        layers.initializer("lecun")


def test_max_pool_reads_the_valid_cells_only_and_is_zero_where_there_are_none():
    x = jnp.arange(-32.0, 0.0).reshape(1, 4, 8, 1)
    valid = layers.valid_mask(jnp.asarray([[4, 3]], jnp.int32), (4, 8), 1)
    pooled = layers.max_pool_3x3(x, valid, "torch")
    alone = layers.max_pool_3x3(x[:, :, :3], None, "torch")
    np.testing.assert_array_equal(pooled[:, :, :2], alone)
    np.testing.assert_array_equal(pooled[:, :, 2:], 0.0)
    grad = jax.grad(lambda x: jnp.sum(layers.max_pool_3x3(x, valid, "torch")))(x)
    assert np.isfinite(grad).all()
    assert np.all(np.asarray(grad)[:, :, 3:] == 0)


@pytest.mark.torch
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_agrees_with_torch(kernel, stride):
    torch = pytest.importorskip("torch")
    conv = layers.Conv(3, 4, kernel, stride=stride, rngs=rngs())
    conv.bias[...] = jnp.arange(4.0)
    x = np.random.default_rng(0).normal(size=(2, 9, 10, 3)).astype(np.float32)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(np.array(conv.kernel[...])).permute(3, 2, 0, 1),
        torch.arange(4.0),
        stride=stride,
        padding=kernel // 2,
    )
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.torch
def test_transposed_convolution_agrees_with_torch():
    torch = pytest.importorskip("torch")
    conv = layers.ConvTranspose2x2(3, 4, rngs=rngs())
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    expected = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(np.array(conv.kernel[...])).permute(2, 3, 0, 1),
        stride=2,
    )
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected.permute(0, 2, 3, 1), atol=1e-5)
