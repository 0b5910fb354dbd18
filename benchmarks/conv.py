"""Times conv2d beside lax and torch (oneDNN): `python benchmarks/conv.py [b,h,w,c,o,k,stride ...]`.

One line a shape and direction: milliseconds (GFLOP/s), the fastest of the repeats, one after the
other in one process, each after one call of its own that is not counted. Needs torch.
"""

import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from sephjax.ops import conv as conv_ops

REPEATS = 9
SHAPES = [
    (1, 512, 512, 3, 64, 7, 2),
    (1, 128, 128, 64, 256, 1, 1),
    (1, 64, 64, 512, 128, 1, 1),
    (1, 64, 64, 512, 1024, 1, 2),
    (1, 16, 16, 2048, 512, 1, 1),
    (1, 128, 128, 64, 64, 3, 1),
    (1, 64, 64, 128, 128, 3, 1),
    (1, 128, 128, 128, 128, 3, 2),
    (1, 32, 32, 256, 256, 3, 1),
    (1, 16, 16, 512, 512, 3, 1),
    (1, 128, 128, 256, 256, 3, 1),
    (1, 64, 64, 256, 256, 3, 1),
    (32, 14, 14, 256, 256, 3, 1),
    (128, 14, 14, 256, 256, 3, 1),
    (512, 7, 7, 256, 256, 3, 1),
]


def jax_calls(conv, x, kernel, dy):
    vjp = lambda x, kernel, dy: jax.vjp(conv, x, kernel)[1](dy)
    steps = {
        "forward": jax.jit(lambda x, kernel, _: conv(x, kernel)),
        "dx": jax.jit(lambda *a: vjp(*a)[0]),
        "dw": jax.jit(lambda *a: vjp(*a)[1]),
    }
    return {n: lambda f=f: jax.block_until_ready(f(x, kernel, dy)) for n, f in steps.items()}


def torch_calls(layout, stride, pad, x, kernel, dy):
    x, dy = (torch.tensor(np.asarray(a)).permute(0, 3, 1, 2) for a in (x, dy))
    kernel = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1)
    x, kernel, dy = (a.contiguous(memory_format=layout) for a in (x, kernel, dy))
    sizes = ([stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1)
    back = lambda mask: torch.ops.aten.convolution_backward(dy, x, kernel, None, *sizes, mask)
    return {
        "forward": lambda: torch.nn.functional.conv2d(x, kernel, stride=stride, padding=pad),
        "dx": lambda: back([True, False, False]),
        "dw": lambda: back([False, True, False]),
    }


def fastest(calls):
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(REPEATS):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def compare(b, h, w, c, o, k, stride):
    pad = k // 2
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((b, h, w, c), dtype=np.float32))
    kernel = jnp.asarray(rng.standard_normal((k, k, c, o), dtype=np.float32)) / (k * k * c) ** 0.5
    plain = lambda x, kernel: lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    ours = lambda x, kernel: conv_ops.conv2d(x, kernel, stride=stride, padding=pad)
    dy = plain(x, kernel)
    flop = 2 * dy.size * k * k * c / 1e9
    rows = {
        "lax": jax_calls(plain, x, kernel, dy),
        "sephjax": jax_calls(ours, x, kernel, dy),
        "torch NHWC": torch_calls(torch.channels_last, stride, pad, x, kernel, dy),
        "torch NCHW": torch_calls(torch.contiguous_format, stride, pad, x, kernel, dy),
    }
    for what in ("forward", "dx", "dw"):
        best = fastest({name: calls[what] for name, calls in rows.items()})
        cells = [f"{n} {s * 1e3:.2f} ({flop / s:.0f})" for n, s in best.items()]
        print(f"{b}x{h}x{w}x{c} -> {o} k{k} s{stride} {what}: " + ", ".join(cells), flush=True)


def main():
    shapes = [tuple(map(int, a.split(","))) for a in sys.argv[1:]] or SHAPES
    for shape in shapes:
        compare(*shape)


if __name__ == "__main__":
    main()
