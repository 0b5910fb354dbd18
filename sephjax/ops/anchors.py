"""Anchors: the shapes of a cell, laid over the cells of each feature map."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

RatioIs = Literal["height_over_width", "width_over_height"]
Shape = tuple[int, int]
Real = float | int  # an int is no float to the run-time type check


def cell_anchors(
    *, size: Real | tuple[Real, ...], ratios: tuple[Real, ...], ratio_is: RatioIs, rounded: bool
) -> Float32[np.ndarray, "a 4"]:
    """The anchors of one cell, centred on 0, in pixels (host constants, a few rows).

    An anchor of size s has area s² before rounding. detectron2: the ratio is height / width, not
    rounded, for each size all ratios. torchvision: the same ratio, corners rounded half to even,
    for each ratio all sizes. The published series: the ratio is width / height, not rounded, for
    each ratio all sizes. With one size a level the three orders agree.

    Args:
      size: One size, or several.
      ratios: Aspect ratios.
      ratio_is: What a ratio means.
      rounded: Whether the corners are rounded to whole pixels.
    """
    sizes = np.atleast_1d(np.asarray(size, np.float64))
    height_over_width = np.asarray(ratios, np.float64)
    if ratio_is == "width_over_height":
        height_over_width = 1.0 / height_over_width
    root = np.sqrt(height_over_width)
    half_width = 0.5 * sizes[:, None] / root[None, :]
    half_height = 0.5 * sizes[:, None] * root[None, :]
    cells = np.stack([-half_width, -half_height, half_width, half_height], axis=-1)
    sizes_outermost = ratio_is == "height_over_width" and not rounded
    cells = (cells if sizes_outermost else cells.swapaxes(0, 1)).reshape(-1, 4)
    return (np.round(cells) if rounded else cells).astype(np.float32)


def grid_anchors(
    cells: Float[Array | np.ndarray, "a 4"],
    *,
    shape: Shape,
    stride: tuple[Real, Real],
    offset: Real,
) -> Float[Array, "n 4"]:
    """The anchors of one feature map, row-major over its cells, cell anchors innermost.

    The centre of cell (row, column) is `((column + offset) sx, (row + offset) sy)`. Nothing is
    clipped. The grid is computed on the device, so that no large constant enters the program.

    Args:
      cells: Anchors of one cell, from `cell_anchors`.
      shape: Height and width of the feature map.
      stride: Pixels of the canvas between two cells, down and across.
      offset: 0 for detectron2 and torchvision, 0.5 for the published series.
    """
    y = (jnp.arange(shape[0], dtype=jnp.float32) + offset) * stride[0]
    x = (jnp.arange(shape[1], dtype=jnp.float32) + offset) * stride[1]
    y, x = jnp.meshgrid(y, x, indexing="ij")
    centres = jnp.stack([x, y, x, y], axis=-1)
    cells = jnp.asarray(cells, jnp.float32)
    return (centres[:, :, None, :] + cells[None, None, :, :]).reshape(-1, 4)


def pyramid_anchors(
    *,
    canvas: Shape,
    shapes: tuple[Shape, ...],
    cells: tuple[Float[Array | np.ndarray, "_ 4"], ...],
    strides: tuple[Real, ...] | Literal["feature", "feature_floor"],
    offset: Real,
) -> tuple[Float[Array, "_ 4"], ...]:
    """The anchors of every level, fine to coarse.

    Args:
      canvas: Height and width of the padded network input.
      shapes: Height and width of each level's feature map.
      cells: Anchors of one cell of each level.
      strides: Stride of each level in pixels, the same down and across; or "feature" for canvas
        divided by feature map, which differs from the nominal stride where the canvas is no
        multiple of it (the published series); or "feature_floor" for that quotient rounded down, as
        torchvision has it.
      offset: As in `grid_anchors`.

    Raises:
      ValueError: The levels of `shapes`, `cells` and `strides` differ in number.
    """
    if strides == "feature":
        pairs = tuple((canvas[0] / height, canvas[1] / width) for height, width in shapes)
    elif strides == "feature_floor":
        pairs = tuple((canvas[0] // height, canvas[1] // width) for height, width in shapes)
    else:
        pairs = tuple((float(stride), float(stride)) for stride in strides)
    return tuple(
        grid_anchors(cell, shape=shape, stride=pair, offset=offset)
        for cell, shape, pair in zip(cells, shapes, pairs, strict=True)
    )
