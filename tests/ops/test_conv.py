"""conv2d and conv_transpose2d against lax, torch, and literal values."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sephjax.ops import conv as conv_ops

# (h, w), input and output channels, kernel, stride, padding; on both sides of the thin-input rule.
CASES = [
    ((6, 7), 35, 40, (1, 1), 1, 0),
    ((7, 6), 40, 8, (1, 1), 2, 0),
    ((8, 5), 3, 6, (1, 1), 3, 0),
    ((5, 6), 4, 3, (1, 1), 2, 1),
    ((6, 7), 5, 4, (3, 3), 1, 1),
    ((7, 9), 33, 4, (3, 3), 1, 1),
    ((7, 8), 33, 5, (3, 3), 2, 1),
    ((8, 7), 32, 5, (3, 3), 2, ((0, 1), (0, 1))),
    ((9, 8), 34, 2, (3, 3), 1, 0),
    ((9, 11), 3, 8, (7, 7), 2, 3),
    ((10, 9), 3, 8, (7, 7), 2, ((2, 3), (1, 4))),
    ((9, 10), 35, 3, (2, 3), 3, ((1, 0), (2, 1))),
    ((11, 7), 36, 3, (5, 3), 2, ((2, 2), (0, 3))),
    ((8, 8), 6, 3, (2, 2), 4, 0),
    ((48, 40), 33, 3, (1, 1), 1, 0),  # from here on, products in chunks
    ((48, 60), 32, 40, (1, 1), 1, 0),
    ((31, 67), 36, 6, (1, 1), 1, 0),  # rows that cannot be cut
]


def pads_of(padding):
    return ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding


def reference(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads_of(padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def draw(case, dtype=np.float32):
    (h, w), ci, co, taps, stride, padding = case
    rng = np.random.default_rng(sum(taps) + h * w + ci)
    (top, bottom), (left, right) = pads_of(padding)
    oh, ow = (h + top + bottom - taps[0]) // stride + 1, (w + left + right - taps[1]) // stride + 1
    x, dy = rng.standard_normal((2, h, w, ci)), rng.standard_normal((2, oh, ow, co))
    kernel = rng.standard_normal((*taps, ci, co)) / np.sqrt(ci * taps[0] * taps[1])
    return [jnp.asarray(a, dtype) for a in (x, kernel, dy)]


def assert_close(got, want):
    """Within the rounding of a float32 sum, measured by the largest element."""
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def value_and_gradients(fn, x, kernel, dy):
    y, vjp = jax.vjp(fn, x, kernel)
    return (y, *vjp(dy))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_those_of_lax(case):
    stride, padding = case[4:]
    x, kernel, dy = draw(case)

    @jax.jit
    def both(x, kernel, dy):
        ours = lambda x, k: conv_ops.conv2d(x, k, stride=stride, padding=padding)
        theirs = lambda x, k: reference(x, k, stride, padding)
        return [value_and_gradients(f, x, kernel, dy) for f in (ours, theirs)]

    got, want = both(x, kernel, dy)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.torch
@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c[5], int)], ids=str)
def test_value_and_gradients_are_those_of_torch(case):
    torch = pytest.importorskip("torch")
    stride, padding = case[4:]
    x, kernel, dy = draw(case)
    ours = lambda x, k: conv_ops.conv2d(x, k, stride=stride, padding=padding)
    y, dx, dk = jax.jit(lambda *a: value_and_gradients(ours, *a))(x, kernel, dy)
    tx = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    tk = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1).requires_grad_()
    ty = torch.nn.functional.conv2d(tx, tk, stride=stride, padding=padding)
    ty.backward(torch.tensor(np.asarray(dy)).permute(0, 3, 1, 2))
    assert_close(y, ty.detach().permute(0, 2, 3, 1).numpy())
    assert_close(dx, tx.grad.permute(0, 2, 3, 1).numpy())
    assert_close(dk, tk.grad.permute(2, 3, 1, 0).numpy())


@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[9]], ids=str)
def test_bfloat16_stays_bfloat16_and_near_float32(case):
    stride, padding = case[4:]
    x, kernel, dy = draw(case, jnp.bfloat16)
    ours = lambda x, k: conv_ops.conv2d(x, k, stride=stride, padding=padding)
    got = jax.jit(lambda *a: value_and_gradients(ours, *a))(x, kernel, dy)
    exact = lambda x, k: reference(x, k, stride, padding)
    want = value_and_gradients(exact, *(a.astype(jnp.float32) for a in (x, kernel, dy)))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=scale / 100)


def test_a_box_kernel_sums_its_window():
    x = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1)
    kernel = jnp.ones((3, 3, 1, 1))
    y = conv_ops.conv2d(x, kernel, stride=2, padding=1)
    np.testing.assert_array_equal(y[0, :, :, 0], [[10, 24], [51, 90]])


def test_it_works_under_vmap_and_remat():
    x, kernel, _ = draw(CASES[6])

    def loss(conv, x, k):
        return jnp.sum(jax.checkpoint(conv)(x, k) ** 2)

    ours = lambda x, k: conv_ops.conv2d(x, k, stride=2, padding=1)
    theirs = lambda x, k: reference(x, k, 2, 1)
    xs, ks = jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel[::-1]])
    got, want = (
        jax.jit(jax.vmap(jax.grad(lambda x, k, f=f: loss(f, x, k), (0, 1))))(xs, ks)
        for f in (ours, theirs)
    )
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_other_platforms_get_plain_convolutions_only(case, platform):
    stride, padding = case[4:]
    ours = lambda x, k: conv_ops.conv2d(x, k, stride=stride, padding=padding)
    step = jax.jit(lambda *a: value_and_gradients(ours, *a))
    text = jax.export.export(step, platforms=[platform])(*draw(case)).mlir_module()
    assert text.count("stablehlo.convolution(") == 3
    for word in ("dot_general", "while", "optimization_barrier", "dynamic_slice"):
        assert word not in text


@pytest.mark.torch
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_transposed_convolution_is_that_of_torch(k):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(k)
    x = rng.standard_normal((2, 3, 5, 4), dtype=np.float32)
    kernel = rng.standard_normal((k, k, 4, 6), dtype=np.float32)
    dy = rng.standard_normal((2, 3 * k, 5 * k, 6), dtype=np.float32)
    y, dx, dk = jax.jit(lambda *a: value_and_gradients(conv_ops.conv_transpose2d, *a))(
        *map(jnp.asarray, (x, kernel, dy))
    )
    tx = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    tk = torch.tensor(kernel).permute(2, 3, 0, 1).requires_grad_()
    ty = torch.nn.functional.conv_transpose2d(tx, tk, stride=k)
    ty.backward(torch.tensor(dy).permute(0, 3, 1, 2))
    assert_close(y, ty.detach().permute(0, 2, 3, 1).numpy())
    assert_close(dx, tx.grad.permute(0, 2, 3, 1).numpy())
    assert_close(dk, tk.grad.permute(2, 3, 0, 1).numpy())
