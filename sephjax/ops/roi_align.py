"""Pooling of ROIs from a feature pyramid: ROIAlign, and the published series' pooler.

Gradients flow to the features only; boxes get a gradient of zero. Features may be of any float
type: interpolation and the sums of the gradient are in float32, and results come back in the
features' type. The way of reading is chosen by platform where the program is lowered (`roi_scan`
on a CPU, `roi_gather` elsewhere); both give the same numbers.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from sephjax.ops import roi_gather, roi_scan
from sephjax.ops.roi_taps import Axis, Taps, bilinear, level_sizes

# Cells beyond the map up to which `crop_and_max_pool` reads the border: the last point of a box
# that ends at the canvas' edge lies on it but for rounding, which differs by compiler.
_ROUNDING = 1e-3


def roi_align(  # noqa: PLR0913
    pyramid: Sequence[Float[Array, "b _ _ c"]],
    boxes: Float[Array, "b n 4"],
    levels: Int[Array, "b n"],
    valid: Bool[Array, "b n"],
    *,
    strides: tuple[float, ...],
    output_size: tuple[int, int],
    sampling_ratio: int = 2,
    aligned: bool = True,
    extent: Num[Array, "b 2"] | None = None,
) -> Float[Array, "b n {output_size[0]} {output_size[1]} c"]:
    """ROIAlign of each ROI from its own level, as `torchvision.ops.roi_align` computes it.

    A box is cut into `output_size` bins; a bin is the mean of `sampling_ratio` squared bilinear
    samples. Samples up to one cell outside the map take the border's value, those further out
    are 0. Any box is allowed. Invalid ROIs give zeros and pass no gradient.

    Args:
        pyramid: features of the levels, each `[b, h_l, w_l, c]`.
        boxes: corners `(x1, y1, x2, y2)` in pixels of the network input.
        levels: index into `pyramid` for each box; clipped to its length.
        valid: which ROIs exist.
        strides: pixels a cell, for each level.
        output_size: height and width of the output.
        sampling_ratio: samples along each side of a bin, at least 1 (there is no adaptive choice).
        aligned: pixel centres lie at .5 (detectron2's ROIAlignV2). False is the older form of
            torchvision's own models: no half pixel, and box sides of at least one cell.
        extent: height and width of each picture, pixels: the maps end with its last cell, so that a
            box reads the same whatever the padding. None: they end with the canvas.

    Source: Mask R-CNN (He et al. 2017), section 3; the border rules are torchvision's.
    """
    boxes, level = _sanitised(boxes, levels, valid, len(pyramid))
    height, width = level_sizes(pyramid, level, strides, extent)
    scale = jnp.asarray([1.0 / stride for stride in strides], jnp.float32)[level]
    grid = functools.partial(_align_axis, scale=scale, samples=sampling_ratio, aligned=aligned)
    rows = grid(boxes[..., 1], boxes[..., 3], size=height, cells=output_size[0])
    columns = grid(boxes[..., 0], boxes[..., 2], size=width, cells=output_size[1])
    return _pool(_specs(pyramid), tuple(pyramid), Taps(level, valid, rows, columns))


def crop_and_max_pool(
    pyramid: Sequence[Float[Array, "b _ _ c"]],
    boxes: Float[Array, "b n 4"],
    levels: Int[Array, "b n"],
    valid: Bool[Array, "b n"],
    *,
    strides: tuple[float, ...],
    extent: Num[Array, "b 2"],
    output_size: tuple[int, int],
    bins: tuple[int, int] = (2, 2),
) -> Float[Array, "b n {output_size[0]} {output_size[1]} c"]:
    """The published series' pooler: TensorFlow's `crop_and_resize`, then a max pool.

    A box is sampled at `output_size * bins` points whose first and last lie on its edges, at
    `relative coordinate * (cells - 1)`; a point outside the map reads 0, but for a
    thousandth of a cell. Each group of `bins` points gives its maximum, and the first maximum its
    gradient; with `bins` (1, 1) nothing is pooled. A single point along an axis lies at the middle
    of the box. Invalid ROIs give zeros and pass no gradient.

    Args:
        pyramid: features of the levels, each `[b, h_l, w_l, c]`.
        boxes: corners `(x1, y1, x2, y2)` in pixels of the network input.
        levels: index into `pyramid` for each box; clipped to its length.
        valid: which ROIs exist.
        strides: pixels a cell, for each level.
        extent: height and width in pixels to which boxes are relative, of each picture; the maps
            end with its last cell. The canvas' size: padding is part of the picture (the original,
            which met padding in training only).
        output_size: height and width of the output.
        bins: rows and columns of points under each output cell.
    """
    boxes, level = _sanitised(boxes, levels, valid, len(pyramid))
    height, width = level_sizes(pyramid, level, strides, extent)
    grid = output_size[0] * bins[0], output_size[1] * bins[1]
    tall, wide = (extent[:, i, None].astype(jnp.float32) for i in range(2))
    rows = _crop_axis(boxes[..., 1] / tall, boxes[..., 3] / tall, height, grid[0])
    columns = _crop_axis(boxes[..., 0] / wide, boxes[..., 2] / wide, width, grid[1])
    crops: jax.Array = _pool(_specs(pyramid), tuple(pyramid), Taps(level, valid, rows, columns))
    grouped = crops.reshape(
        *levels.shape, output_size[0], bins[0], output_size[1], bins[1], crops.shape[-1]
    )
    points = [grouped[:, :, :, i, :, j] for i in range(bins[0]) for j in range(bins[1])]
    # Not `jnp.max`: its gradient asks which points equal the maximum, and a compiler that computes
    # the points twice with other rounding finds none.
    return functools.reduce(lambda a, b: jnp.where(a >= b, a, b), points)


def assign_levels(
    boxes: Float[Array, "n 4"],
    *,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    min_level: int = 2,
    max_level: int = 5,
    eps: float = 1e-8,
    eps_inside_log: bool = True,
) -> Int[Array, "n"]:
    """The level a ROI is pooled from, as an index that is 0 at `min_level`.

    `floor(canonical_level + log2(sqrt(area) / canonical_size + eps))`, clipped to the levels; with
    `eps_inside_log` False the eps is added outside the logarithm. The defaults are detectron2's;
    torchvision has 1e-6 outside; the published series has 1e-6 inside, canonical level 1 and levels
    from 0. Computed without a logarithm, by comparing with powers of two, so that a box exactly at
    a boundary falls on the same level on every platform. A box without area gets 0.

    Source: Feature Pyramid Networks (Lin et al. 2017), equation 1.
    """
    sides = jnp.maximum(boxes[:, 2:] - boxes[:, :2], 0.0)
    ratio = jnp.sqrt(sides[:, 0] * sides[:, 1]) / canonical_size
    shift, power = (eps, 0.0) if eps_inside_log else (0.0, eps)
    steps = range(min_level + 1, max_level + 1)
    bounds = jnp.asarray([2.0 ** (k - canonical_level - power) for k in steps], jnp.float32)
    return jnp.sum((ratio + shift)[:, None] >= bounds[None], axis=1, dtype=jnp.int32)


def _sanitised(boxes, levels, valid, count):
    """Boxes without gradient, 0 where invalid, and levels in range."""
    boxes = jnp.where(valid[..., None], lax.stop_gradient(boxes).astype(jnp.float32), 0.0)
    return boxes, jnp.clip(levels.astype(jnp.int32), 0, count - 1)


def _align_axis(low, high, *, scale, size, cells, samples, aligned) -> Axis:
    """ROIAlign's samples along one axis, in torchvision's order of operations."""
    half = 0.5 if aligned else 0.0
    start = low * scale - half
    extent = high * scale - half - start
    if not aligned:
        extent = jnp.maximum(extent, 1.0)
    step = (extent / cells)[..., None, None]
    cell = jnp.arange(cells, dtype=jnp.float32)[None, None, :, None]
    sample = jnp.arange(samples, dtype=jnp.float32)[None, None, None, :] + 0.5
    position = start[..., None, None] + cell * step + sample * step / samples
    inside = (position >= -1.0) & (position <= size[..., None, None])
    return bilinear(position, inside, size)


def _crop_axis(low, high, size, points) -> Axis:
    """The points of `crop_and_resize` along one axis, from edge to edge of the box."""
    last = size - 1.0
    if points == 1:
        position = (0.5 * (low + high) * last)[..., None]
    else:
        step = (high - low) * last / (points - 1)
        number = jnp.arange(points, dtype=jnp.float32)[None, None]
        position = (low * last)[..., None] + number * step[..., None]
    inside = (position >= -_ROUNDING) & (position <= last[..., None] + _ROUNDING)
    return bilinear(position[..., None], inside[..., None], size)


def _specs(pyramid) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pyramid)


def _read(pyramid, taps):
    return lax.platform_dependent(pyramid, taps, cpu=roi_scan.pool, default=roi_gather.pool)


def _write(shapes, taps, cotangent):
    ways = {"cpu": roi_scan.spread, "default": roi_gather.spread}
    ways = {name: functools.partial(way, shapes) for name, way in ways.items()}
    return lax.platform_dependent(taps, cotangent, **ways)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(specs, pyramid, taps) -> jax.Array:
    """Features at the taps, [b, n, oh, ow, c], in the type of the features."""
    return _read(pyramid, taps).astype(specs[0].dtype)


def _pool_forward(specs, pyramid, taps):
    return _pool(specs, pyramid, taps), taps


def _pool_backward(specs, taps, cotangent):
    gradients = _write([spec.shape for spec in specs], taps, cotangent)
    typed = [g.astype(spec.dtype) for g, spec in zip(gradients, specs, strict=True)]
    return tuple(typed), None


_pool.defvjp(_pool_forward, _pool_backward)
