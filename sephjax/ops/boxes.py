"""Arithmetic of boxes: area, overlap, box coding, clipping.

Boxes are float32 `(x1, y1, x2, y2)` with continuous edges (no +1). Every function works on plain
arrays without a batch axis of its own; invalid rows go through as finite numbers.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

# An int is no float to the run-time type check, so both are named.
Weights = tuple[float | int, float | int, float | int, float | int]

DELTA_CLAMP = math.log(1000.0 / 16.0)  # of dw and dh, detectron2 and torchvision

_TINY_AREA = 1e-12  # below it an area counts as zero: its inverse would overflow in a gradient
_TINY_SIDE = 1e-8  # below it a side counts as zero in the box coding


def _columns(boxes: Array) -> tuple[Array, Array, Array, Array]:
    """The four columns of `boxes`; elementwise arithmetic on them fuses, a small axis does not."""
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]


def _ratio(part: Array, whole: Array) -> Array:
    """`part / whole`, 0 with zero gradient where the whole is empty."""
    # The inner where keeps 0/0 out of the gradient, the outer one out of the value.
    there = whole > _TINY_AREA
    return jnp.where(there, part / jnp.where(there, whole, 1.0), 0.0)


def area(boxes: Float[Array, "*s 4"]) -> Float[Array, "*s"]:
    """Area in square pixels; 0 for a box whose corners are swapped.

    Args:
      boxes: Any number of boxes.
    """
    x1, y1, x2, y2 = _columns(boxes)
    return jnp.maximum(x2 - x1, 0.0) * jnp.maximum(y2 - y1, 0.0)


def _overlap(a: Array, b: Array) -> Array:
    """Area of the intersection of boxes whose leading axes broadcast."""
    ax1, ay1, ax2, ay2 = _columns(a)
    bx1, by1, bx2, by2 = _columns(b)
    width = jnp.maximum(jnp.minimum(ax2, bx2) - jnp.maximum(ax1, bx1), 0.0)
    height = jnp.maximum(jnp.minimum(ay2, by2) - jnp.maximum(ay1, by1), 0.0)
    return width * height


def pairwise_iou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over union of every box of `a` with every box of `b`, in [0, 1].

    A box of no area has IoU 0 with everything, and zero gradient.
    """
    return _iou(a[:, None, :], b[None, :, :])


def iou(a: Float[Array, "*s 4"], b: Float[Array, "*s 4"]) -> Float[Array, "*s"]:
    """Intersection over union of the boxes of `a` with those of `b`, one by one, in [0, 1].

    Two boxes of no area have IoU 0, and zero gradient.
    """
    return _iou(a, b)


def _iou(a: Array, b: Array) -> Array:
    """IoU of boxes whose leading axes broadcast."""
    overlap = _overlap(a, b)
    return _ratio(overlap, area(a) + area(b) - overlap)


def giou(a: Float[Array, "*s 4"], b: Float[Array, "*s 4"]) -> Float[Array, "*s"]:
    """Generalised IoU, one by one, in (-1, 1].

    `IoU - (hull - union) / hull`, where the hull is the smallest box around both. Where the union
    or the hull has no area the term with it is 0; the gradient is finite everywhere.
    Source: Rezatofighi et al., Generalized Intersection over Union, 2019.
    """
    ax1, ay1, ax2, ay2 = _columns(a)
    bx1, by1, bx2, by2 = _columns(b)
    overlap = _overlap(a, b)
    union = area(a) + area(b) - overlap
    hull_width = jnp.maximum(jnp.maximum(ax2, bx2) - jnp.minimum(ax1, bx1), 0.0)
    hull_height = jnp.maximum(jnp.maximum(ay2, by2) - jnp.minimum(ay1, by1), 0.0)
    hull = hull_width * hull_height
    return _ratio(overlap, union) - _ratio(hull - union, hull)


def diou(a: Float[Array, "*s 4"], b: Float[Array, "*s 4"]) -> Float[Array, "*s"]:
    """Distance IoU, one by one, in (-1, 1].

    `IoU - d^2 / c^2`, with `d` the distance of the centres and `c` the diagonal of the smallest box
    around both. Where the union or the diagonal is zero the term with it is 0; the gradient is
    finite everywhere.
    Source: Zheng et al., Distance-IoU Loss, 2020.
    """
    return _iou(a, b) - _distance(a, b)


def ciou(a: Float[Array, "*s 4"], b: Float[Array, "*s 4"]) -> Float[Array, "*s"]:
    """Complete IoU, one by one: `diou` less a term for unequal aspect ratios.

    The term is `v^2 / (1 - IoU + v)` with `v = 4 / pi^2 (atan(w_a / h_a) - atan(w_b / h_b))^2`. The
    gradient takes `v / (1 - IoU + v)` for a constant, as the paper, detectron2 and torchvision do.
    A box whose sides are both below 1e-8 has the angle 0; the gradient is finite everywhere.
    Source: Zheng et al., Distance-IoU Loss, 2020.
    """
    overlap = _iou(a, b)
    v = (4.0 / math.pi**2) * jnp.square(_aspect_angle(a) - _aspect_angle(b))
    share = jax.lax.stop_gradient(_ratio(v, 1.0 - overlap + v))
    return overlap - _distance(a, b) - share * v


def _distance(a: Array, b: Array) -> Array:
    """Squared distance of the centres by the squared diagonal of the hull."""
    ax1, ay1, ax2, ay2 = _columns(a)
    bx1, by1, bx2, by2 = _columns(b)
    across = jnp.maximum(ax2, bx2) - jnp.minimum(ax1, bx1)
    down = jnp.maximum(ay2, by2) - jnp.minimum(ay1, by1)
    apart = jnp.square(ax1 + ax2 - bx1 - bx2) + jnp.square(ay1 + ay2 - by1 - by2)
    return _ratio(0.25 * apart, jnp.square(across) + jnp.square(down))


def _aspect_angle(boxes: Array) -> Array:
    """atan(width / height), 0 with zero gradient for a box without sides."""
    x1, y1, x2, y2 = _columns(boxes)
    width, height = jnp.maximum(x2 - x1, 0.0), jnp.maximum(y2 - y1, 0.0)
    there = jnp.maximum(width, height) > _TINY_SIDE
    return jnp.where(there, jnp.arctan2(width, jnp.where(there, height, 1.0)), 0.0)


def _centres(boxes: Array) -> tuple[Array, Array, Array, Array]:
    """Centre x, centre y, width and height."""
    x1, y1, x2, y2 = _columns(boxes)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def _log_ratio(target: Array, reference: Array) -> Array:
    """log(target / reference), 0 where the target is empty; the reference is positive."""
    there = target > _TINY_SIDE
    return jnp.where(there, jnp.log(jnp.where(there, target, reference) / reference), 0.0)


def encode(
    references: Float[Array, "*s 4"],
    targets: Float[Array, "*s 4"],
    *,
    weights: Weights,
) -> Float[Array, "*s 4"]:
    """The deltas `(dx, dy, dw, dh)` that move each reference onto its target.

    `dx = wx (tx - x) / w`, `dw = ww log(tw / w)`. A reference with a side below 1e-8 gives zeros; a
    target with a side below 1e-8 gives 0 for that side's logarithm.
    Source: Girshick et al., R-CNN, 2014, with detectron2's weights.

    Args:
      references: Anchors or proposals.
      targets: The boxes they should become.
      weights: Factors of dx, dy, dw, dh; (1, 1, 1, 1) or (10, 10, 5, 5) as a rule.
    """
    x, y, width, height = _centres(references)
    target_x, target_y, target_width, target_height = _centres(targets)
    there = (width >= _TINY_SIDE) & (height >= _TINY_SIDE)
    width, height = jnp.where(there, width, 1.0), jnp.where(there, height, 1.0)
    deltas = (
        weights[0] * (target_x - x) / width,
        weights[1] * (target_y - y) / height,
        weights[2] * _log_ratio(target_width, width),
        weights[3] * _log_ratio(target_height, height),
    )
    return jnp.stack([jnp.where(there, delta, 0.0) for delta in deltas], axis=-1)


def decode(
    references: Float[Array, "*s 4"],
    deltas: Float[Array, "*s 4"],
    *,
    weights: Weights,
    clamp: float | int | None = DELTA_CLAMP,
) -> Float[Array, "*s 4"]:
    """Applies deltas to references: the inverse of `encode`.

    Args:
      references: Anchors or proposals.
      deltas: `(dx, dy, dw, dh)` as `encode` gives them.
      weights: The weights of the encoding.
      clamp: Upper bound of dw and dh after division by the weights, so that exp cannot overflow;
        None for no bound (the published series).
    """
    x, y, width, height = _centres(references)
    dx, dy, dw, dh = (delta / w for delta, w in zip(_columns(deltas), weights, strict=True))
    if clamp is not None:
        dw, dh = jnp.minimum(dw, clamp), jnp.minimum(dh, clamp)
    x, y = x + dx * width, y + dy * height
    half_width, half_height = 0.5 * jnp.exp(dw) * width, 0.5 * jnp.exp(dh) * height
    return jnp.stack([x - half_width, y - half_height, x + half_width, y + half_height], axis=-1)


def clip(boxes: Float[Array, "*s 4"], size: Num[Array, "2"]) -> Float[Array, "*s 4"]:
    """Cuts boxes at the borders of an image; a box outside it loses its area.

    Args:
      boxes: Any number of boxes.
      size: Height and width: the valid part of the canvas, lest padding yield boxes.
    """
    height, width = size[0].astype(boxes.dtype), size[1].astype(boxes.dtype)
    x1, y1, x2, y2 = _columns(boxes)
    return jnp.stack(
        [
            jnp.clip(x1, 0.0, width),
            jnp.clip(y1, 0.0, height),
            jnp.clip(x2, 0.0, width),
            jnp.clip(y2, 0.0, height),
        ],
        axis=-1,
    )


def scale(boxes: Float[Array, "*s 4"], factor: float | int) -> Float[Array, "*s 4"]:
    """Boxes whose sides are `factor` times as long, about their centres; they are not cut."""
    x, y, width, height = _centres(boxes)
    width, height = 0.5 * factor * width, 0.5 * factor * height
    return jnp.stack([x - width, y - height, x + width, y + height], axis=-1)


def nonempty(boxes: Float[Array, "*s 4"], min_size: float | int = 0.0) -> Bool[Array, "*s"]:
    """Which boxes have an area and no side shorter than `min_size` pixels.

    detectron2's `nonempty` for 0; torchvision's `remove_small_boxes` for more than 0.
    """
    x1, y1, x2, y2 = _columns(boxes)
    shorter = jnp.minimum(x2 - x1, y2 - y1)
    return (shorter > 0) & (shorter >= min_size)
