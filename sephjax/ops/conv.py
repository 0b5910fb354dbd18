"""Convolutions whose gradients are fast on a CPU and which are XLA's own elsewhere.

On a GPU or TPU both functions are `jax.lax` operations with the gradients that JAX derives. On a
CPU, XLA runs a convolution well only when it looks like a forward one; the other cases are written
as matrix products here (the numbers are in `benchmarks/conv.py`):

* a 1x1 convolution is one product, with the strided pixels cut out first;
* the gradient of a kernel is one product for each of its taps, `dy^T @ shifted x`, so that XLA sees
  plain row-major products, the only kind that its fast CPU library takes;
* the gradient of the input of a strided convolution is one dense convolution for each of the
  `stride^2` residues of the pixel position, instead of one over an input stretched with zeros.

All are functions of one image axis order: NHWC pictures and HWIO kernels, as in Flax.
Reverse-mode differentiation only (the CPU rules are a `jax.custom_vjp`).
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pads: TypeAlias = tuple[tuple[int, int], tuple[int, int]]

# With fewer input channels than this, as in a stem, the product of one tap is too thin to pay.
_THIN = 32

# Pixels of one product of a gradient: few enough for the cache, enough to run at full speed.
_CHUNK = 1024


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c o"],
    *,
    stride: int = 1,
    padding: Pads | int = 0,
) -> Float[Array, "b h2 w2 o"]:
    """Convolves pictures with a kernel (cross-correlation, as in every deep-learning library).

    Args:
      x: pictures, float32 or bfloat16.
      kernel: one filter for each output channel, of the dtype of `x`.
      stride: step in both directions, 1 or more.
      padding: zeros before and after the rows and the columns, `((top, bottom), (left, right))`, or
        one number for all four; never negative.

    Returns:
      `[b, (h + top + bottom - kh) // stride + 1, ..., o]` in the dtype of `x`. Equal, up to the
      order of summation, to `torch.nn.functional.conv2d` with NCHW pictures and OIHW kernels.
    """
    pads = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    return _conv(x, kernel, stride, pads)


def conv_transpose2d(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "b h2 w2 o"]:
    """Upsamples pictures by a kernel that is as large as its stride, so that no outputs overlap.

    `y[k * i + u, k * j + v] = x[i, j] @ kernel[u, v]`: one matrix product on every platform.

    Args:
      x: pictures, float32 or bfloat16.
      kernel: `kernel[u, v, c, o]` is torch's `weight[c, o, u, v]`, nothing flipped.

    Returns:
      `[b, h * k, w * k, o]`, equal to `torch.nn.functional.conv_transpose2d(..., stride=k)`.
    """
    b, h, w, c = x.shape
    k, o = kernel.shape[0], kernel.shape[3]
    taps = x.reshape(-1, c) @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)
    return taps.reshape(b, h, w, k, k, o).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * k, w * k, o)


def _convolve(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    def cpu(x: Array, kernel: Array) -> Array:
        if _is_product(kernel.shape, pads):
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        return _lax_conv(x, kernel, stride, pads)

    return lax.platform_dependent(
        x, kernel, cpu=cpu, default=lambda x, kernel: _lax_conv(x, kernel, stride, pads)
    )


_conv = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3))


def _forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, stride, pads), (x, kernel)


def _backward(
    stride: int, pads: Pads, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    def cpu(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        dx = _cpu_input_gradient(x, kernel, dy, stride, pads)
        return dx, _cpu_kernel_gradient(x, kernel, dy, stride, pads)

    def default(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, kernel: _lax_conv(x, kernel, stride, pads), x, kernel)[1](dy)

    return lax.platform_dependent(*saved, dy, cpu=cpu, default=default)


_conv.defvjp(_forward, _backward)


def _lax_conv(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=axes)


def _is_product(kernel_shape: tuple[int, ...], pads: Pads) -> bool:
    return kernel_shape[:2] == (1, 1) and pads == ((0, 0), (0, 0))


def _cpu_kernel_gradient(x: Array, kernel: Array, dy: Array, stride: int, pads: Pads) -> Array:
    """The gradient of the kernel as products over all output pixels.

    The barriers keep XLA's simplifier from merging a transpose into a product: such a product
    leaves the fast library.
    """
    kh, kw, ci, co = kernel.shape
    if ci < _THIN:
        return jax.vjp(lambda kernel: _lax_conv(x, kernel, stride, pads), kernel)[1](dy)[0]
    b, oh, ow = dy.shape[:3]
    rows, cols = (oh - 1) * stride + 1, (ow - 1) * stride + 1
    x, dy = lax.optimization_barrier((x, dy))
    if _is_product(kernel.shape, pads):
        return _product_over_rows(x[:, :rows:stride, :cols:stride], dy).reshape(kernel.shape)
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *pads, (0, 0))))
    dy_t = lax.optimization_barrier(dy.reshape(-1, co).T)

    def one_tap(tap: Array) -> Array:
        zero = jnp.zeros_like(tap)
        shifted = lax.dynamic_slice(x, (zero, tap // kw, tap % kw, zero), (b, rows, cols, ci))
        return dy_t @ lax.optimization_barrier(shifted[:, ::stride, ::stride]).reshape(-1, ci)

    # A loop, because XLA makes all the shifted copies of an unrolled sum before it uses the first.
    taps = lax.map(one_tap, jnp.arange(kh * kw, dtype=jnp.int32))
    return lax.optimization_barrier(taps).swapaxes(1, 2).reshape(kernel.shape)


def _product_over_rows(x: Array, dy: Array) -> Array:
    """`x^T @ dy` over all pixels, a chunk at a time; the narrower of the two is transposed.

    The loop makes XLA keep `x` and `dy` in memory as they are (it would compute the chain of layers
    that led to `x` again inside the transpose), and a chunk stays in the cache.
    """
    chunks = _chunks(x.shape[0] * x.shape[1], x.shape[2])
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    narrow, wide = (x, dy) if x.shape[1] <= dy.shape[1] else (dy, x)
    size = x.shape[0] // chunks

    def add_chunk(total: Array, chunk: Array) -> tuple[Array, None]:
        left, right = (lax.dynamic_slice_in_dim(a, chunk * size, size) for a in (narrow, wide))
        left = lax.optimization_barrier(left.T)
        return total + jnp.matmul(left, right, preferred_element_type=jnp.float32), None

    total = jnp.zeros((narrow.shape[1], wide.shape[1]), jnp.float32)
    total, _ = lax.scan(add_chunk, total, jnp.arange(chunks, dtype=jnp.int32))
    return (total if narrow is x else total.T).astype(x.dtype)


def _chunks(rows: int, width: int) -> int:
    """Into how many chunks of whole rows, about `_CHUNK` pixels each, the rows can be cut."""
    wanted = max(1, rows * width // _CHUNK)
    count = next(n for n in range(wanted, rows + 1) if rows % n == 0) if wanted <= rows else 1
    return count if rows // count * width >= _CHUNK // 2 else 1


def _cpu_input_gradient(x: Array, kernel: Array, dy: Array, stride: int, pads: Pads) -> Array:
    if _is_product(kernel.shape, pads):
        pixels = dy @ kernel[0, 0].T
        (h, w), (oh, ow) = x.shape[1:3], dy.shape[1:3]
        low_high_inner = [(0, n - (m - 1) * stride - 1, stride - 1) for n, m in ((h, oh), (w, ow))]
        zero = jnp.zeros((), dy.dtype)
        return lax.pad(pixels, zero, ((0, 0, 0), *low_high_inner, (0, 0, 0)))
    if stride == 1:
        # The barrier: without it, inside a branch, XLA folds the transpose into the convolution's
        # axis order, which leaves the fast library (mask branch: 2.03 instead of 0.56 CPU s).
        flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
        (top, bottom), (left, right) = pads
        rows, columns = kernel.shape[0] - 1, kernel.shape[1] - 1
        back = ((rows - top, rows - bottom), (columns - left, columns - right))
        return _lax_conv(dy, flipped, 1, back)
    return _strided_input_gradient(x, kernel, dy, stride, pads)


def _strided_input_gradient(x: Array, kernel: Array, dy: Array, stride: int, pads: Pads) -> Array:
    """One convolution of `dy` for each residue of the row and column of an input pixel.

    An input pixel `u = stride * q + residue` meets tap `i` of output `o` where
    `u + pad = stride * o + i`: only every `stride`-th tap, at consecutive outputs.
    """
    b, h, w, ci = x.shape
    transposed = kernel.swapaxes(2, 3)
    sizes = (-(-h // stride), -(-w // stride))
    planes = []
    for row in range(stride):
        for col in range(stride):
            axes = [
                _residue(r, low, stride, taps, count, outputs)
                for r, (low, _), taps, count, outputs in zip(
                    (row, col), pads, kernel.shape[:2], sizes, dy.shape[1:3], strict=True
                )
            ]
            (first_i, pad_i), (first_j, pad_j) = axes
            part = transposed[first_i::stride, first_j::stride]
            if part.size == 0:
                planes.append(jnp.zeros((b, *sizes, ci), dy.dtype))
            else:
                planes.append(_lax_conv(dy, jnp.flip(part, (0, 1)), 1, (pad_i, pad_j)))
    grid = jnp.stack(planes, 3).reshape(b, *sizes, stride, stride, ci).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(b, sizes[0] * stride, sizes[1] * stride, ci)[:, :h, :w]


def _residue(
    residue: int, pad: int, stride: int, taps: int, count: int, outputs: int
) -> tuple[int, tuple[int, int]]:
    """The first tap that a residue meets, and the padding of its convolution of `count` outputs."""
    shift, first = divmod(residue + pad, stride)
    used = len(range(first, taps, stride))
    low = used - 1 - shift
    return first, (low, count + used - 1 - low - outputs)
