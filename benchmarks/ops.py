"""NMS and ROIAlign against torchvision: `python -m benchmarks.ops [--repeats K]`.

Each piece of work is a `Work`; either side of it can be built alone, which the measurement of peak
memory uses: `python -m benchmarks.ops --peak ours NAME` runs one side three times in a process that
holds nothing else and prints its peak in GB.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from sephjax.ops import nms as nms_ops
from sephjax.ops import roi_align as roi_ops

STRIDES = (4.0, 8.0, 16.0, 32.0)
CANVAS = (800, 1088)
IMAGES, ROIS, CHANNELS = 2, 512, 256
THRESHOLD, KEPT = 0.7, 1000


@dataclasses.dataclass(frozen=True)
class Work:
    """A named comparison; each side makes its own inputs from the same seed."""

    name: str
    ours: Callable[[], timing.Side]
    theirs: Callable[[], timing.Side]


def works() -> list[Work]:
    """All comparisons of this module."""
    found = []
    for size in (7, 14):
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            sides = [
                functools.partial(f, size, backward=backward) for f in (_our_align, _their_align)
            ]
            found.append(Work(f"ROIAlign {size}x{size} {what}", *sides))
    for kind in ("spread", "clustered"):
        for n in (1000, 4000, 6000):
            sides = [functools.partial(f, kind, n) for f in (_our_nms, _their_nms)]
            found.append(Work(f"NMS {kind} {n}", *sides))
    return found


def rows(repeats: int = 5, only: str = "", *, memory: bool = True) -> list[timing.Row]:
    """Measures the comparisons whose name contains `only`."""
    found = []
    for work in works():
        if only not in work.name:
            continue
        peaks = (float("nan"), float("nan"))
        if memory:
            one = functools.partial(timing.peak_of, "benchmarks.ops", "--peak")
            peaks = one("ours", work.name), one("theirs", work.name)
        # NMS takes milliseconds: more repeats cost nothing.
        count = repeats * 10 if work.name.startswith("NMS") else repeats
        row = timing.compare(work.name, work.ours(), work.theirs(), repeats=count, peaks=peaks)
        found.append(row)
    return found


def roi_inputs(size: int):
    """Features of all levels, boxes, their levels and a cotangent `[b, n, size, size, c]`.

    Box sides are log-uniform from 16 to 512 pixels, aspect ratios from 1:2 to 2:1, centres uniform;
    boxes are clipped to the image.
    """
    rng = np.random.default_rng(0)
    features = []
    for stride in STRIDES:
        height, width = (int(np.ceil(side / stride)) for side in CANVAS)
        shape = (IMAGES, height, width, CHANNELS)
        features.append(rng.standard_normal(shape, dtype=np.float32))
    side = np.exp(rng.uniform(np.log(16), np.log(512), (IMAGES, ROIS, 1)))
    aspect = np.sqrt(np.exp(rng.uniform(-np.log(2), np.log(2), (IMAGES, ROIS, 1))))
    extent = np.concatenate([side * aspect, side / aspect], -1)
    limit = np.array(CANVAS[::-1])
    centre = rng.uniform(size=(IMAGES, ROIS, 2)) * limit
    corners = [np.clip(centre + sign * extent / 2, 0, limit) for sign in (-1, 1)]
    boxes = np.concatenate(corners, -1).astype(np.float32)
    levels = np.asarray(roi_ops.assign_levels(jnp.asarray(boxes.reshape(-1, 4))))
    cotangent = rng.standard_normal((IMAGES, ROIS, size, size, CHANNELS), dtype=np.float32)
    return features, boxes, levels.reshape(IMAGES, ROIS), cotangent


def nms_inputs(kind: str, n: int):
    """Boxes and scores: spread ones, or jittered copies of 60 objects as an RPN gives them."""
    rng = np.random.default_rng(0)
    limit = np.array(CANVAS[::-1])
    if kind == "spread":
        centre = rng.uniform(size=(n, 2)) * limit
        extent = np.exp(rng.uniform(np.log(16), np.log(128), (n, 2)))
    else:
        middle = rng.uniform(size=(60, 2)) * limit
        side = np.exp(rng.uniform(np.log(32), np.log(400), (60, 2)))
        which = rng.integers(0, 60, n)
        centre = middle[which] + rng.normal(0, 0.15, (n, 2)) * side[which]
        extent = side[which] * np.exp(rng.normal(0, 0.2, (n, 2)))
    corners = [np.clip(centre + sign * extent / 2, 0, limit) for sign in (-1, 1)]
    scores = rng.normal(size=n).astype(np.float32)
    return np.concatenate(corners, -1).astype(np.float32), scores, n if kind == "spread" else KEPT


def _compiled(function, *arguments) -> timing.Side:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return timing.Side(lambda: jax.block_until_ready(compiled(*arguments)), seconds)


def _our_align(size: int, *, backward: bool) -> timing.Side:
    features, boxes, levels, cotangent = roi_inputs(size)
    arrays = [jnp.asarray(f) for f in features], jnp.asarray(boxes), jnp.asarray(levels)
    del features
    valid = jnp.ones(levels.shape, bool)
    align = functools.partial(roi_ops.roi_align, strides=STRIDES, output_size=(size, size))

    def both(pyramid, boxes, levels, valid, cotangent):
        out, pull = jax.vjp(lambda pyramid: align(pyramid, boxes, levels, valid), pyramid)
        return out, pull(cotangent)[0]

    if backward:
        return _compiled(both, *arrays, valid, jnp.asarray(cotangent))
    return _compiled(align, *arrays, valid)


def _their_align(size: int, *, backward: bool) -> timing.Side:
    import torch
    from torchvision.ops import roi_align

    features, boxes, levels, cotangent = roi_inputs(size)
    to_torch = lambda array: torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    pyramid = [to_torch(f).requires_grad_(backward) for f in features]
    cotangent = to_torch(cotangent.reshape(-1, *cotangent.shape[2:]))
    del features
    image = torch.arange(IMAGES).repeat_interleave(ROIS).float()[:, None]
    rois = torch.cat([image, torch.from_numpy(boxes).reshape(-1, 4)], 1)
    level = torch.from_numpy(levels.astype(np.int64)).reshape(-1)

    def forward():
        out = torch.zeros(IMAGES * ROIS, CHANNELS, size, size)
        for i, (features, stride) in enumerate(zip(pyramid, STRIDES, strict=True)):
            here = torch.where(level == i)[0]
            pooled = roi_align(features, rois[here], (size, size), 1 / stride, 2, True)
            out[here] = pooled
        return out

    def both():
        out = forward()
        return out, torch.autograd.grad(out, pyramid, cotangent)

    return timing.Side(both if backward else forward)


def _our_nms(kind: str, n: int) -> timing.Side:
    boxes, scores, kept = nms_inputs(kind, n)
    run = functools.partial(nms_ops.nms, threshold=THRESHOLD, max_output=kept)
    return _compiled(run, jnp.asarray(boxes), jnp.asarray(scores), jnp.ones(n, bool))


def _their_nms(kind: str, n: int) -> timing.Side:
    import torch
    from torchvision.ops import nms

    boxes, scores, kept = nms_inputs(kind, n)
    boxes, scores = torch.from_numpy(boxes), torch.from_numpy(scores)
    return timing.Side(lambda: nms(boxes, scores, THRESHOLD)[:kept])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="NMS and ROIAlign against torchvision")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the names to measure")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "NAME"), help="peak of one side")
    options = parser.parse_args(arguments)
    if options.peak:
        which, name = options.peak
        work = next(work for work in works() if work.name == name)
        side = work.ours() if which == "ours" else work.theirs()
        for _ in range(3):
            side.run()
        print(json.dumps(timing.peak_gb()))
        return
    print(timing.table(rows(options.repeats, options.only, memory=not options.no_memory)))


if __name__ == "__main__":
    main()
