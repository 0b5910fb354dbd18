"""Matchers: which ground truth each anchor or proposal of one image belongs to, if any.

A padded ground truth never matches; without any valid one everything is negative. The rules on a
given IoU matrix are functions of their own, so that published values can be held against them.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sephjax.ops import boxes as box_ops
from sephjax.types import Match

LowQuality = Literal["none", "all", "single"]


def max_iou(
    anchors: Float[Array, "n 4"],
    boxes: Float[Array, "m 4"],
    valid: Bool[Array, " m"],
    *,
    low: float,
    high: float,
    low_quality: LowQuality,
    min_iou: float = 0.0,
) -> Match:
    """Gives each anchor its ground truth of highest IoU; see `max_iou_labels`.

    Args:
      anchors: Anchors or proposals.
      boxes: Ground truths.
      valid: Which of them are there.
      low: An anchor whose IoU is below it is negative.
      high: An anchor whose IoU reaches it is positive.
      low_quality: Rule for ground truths that no anchor reaches `high` with.
      min_iou: A pair below it counts as IoU 0; 0.0625 for the published series.
    """
    return max_iou_labels(
        box_ops.pairwise_iou(anchors, boxes),
        valid,
        low=low,
        high=high,
        low_quality=low_quality,
        min_iou=min_iou,
    )


def max_iou_labels(
    iou: Float[Array, "n m"],
    valid: Bool[Array, " m"],
    *,
    low: float,
    high: float,
    low_quality: LowQuality,
    min_iou: float = 0.0,
) -> Match:
    """The rule of `max_iou` on a given IoU matrix.

    Negative below `low`, positive from `high` on, ignored between; the first ground truth wins a
    tie. `low_quality` "all" (detectron2, torchvision) makes every anchor positive whose IoU equals
    the best one of some ground truth, "single" (the published series) only the first such anchor
    of each ground truth; both leave the anchor the ground truth of its own highest IoU. Unlike
    detectron2, a ground truth that overlaps no anchor promotes none.
    Source: detectron2 `Matcher`; Ren et al., Faster R-CNN, 2015.
    """
    # Padded columns are masked before any maximum over anchors, else they would claim one.
    usable = valid[None, :] & (iou >= min_iou)
    iou = jnp.where(usable, iou, jnp.where(valid, 0.0, -1.0)[None, :])
    index = jnp.argmax(iou, axis=1).astype(jnp.int32)
    best = jnp.max(iou, axis=1)  # -1 without any ground truth
    positive = best >= high
    if low_quality != "none":
        positive = positive | _low_quality(iou, every_tie=low_quality == "all")
    return Match(
        index=index,
        iou=jnp.maximum(best, 0.0),
        positive=positive,
        negative=(best < low) & ~positive,
    )


def _low_quality(iou: Float[Array, "n m"], *, every_tie: bool) -> Bool[Array, " n"]:
    """Anchors that some ground truth overlaps most: all of them, or the first of each."""
    best = jnp.max(iou, axis=0)
    if every_tie:
        wanted = jnp.where(best > 0.0, best, 2.0)  # no IoU equals 2
        return jnp.any(iou == wanted[None, :], axis=1)
    count = iou.shape[0]
    first = jnp.where(best > 0.0, jnp.argmax(iou, axis=0), count)
    return jnp.zeros(count, bool).at[first].set(True, mode="drop")


def atss(
    anchors: Float[Array, "n 4"],
    boxes: Float[Array, "m 4"],
    valid: Bool[Array, " m"],
    *,
    high: float,
    low: float,
    ignore_band: bool,
    min_iou: float = 0.1,
) -> Match:
    """Gives each anchor a ground truth by a threshold of the ground truth's own.

    The published series' ATSSMatcher3 (`ignore_band`) and ATSSMatcher4 (without): an anchor belongs
    only to a ground truth that holds its centre (closed box); see `atss_labels`. There is no choice
    of candidates by distance as in the ATSS paper, and a ground truth may end without an anchor.

    Args:
      anchors: Anchors of all levels.
      boxes: Ground truths.
      valid: Which of them are there.
      high: Upper bound of a ground truth's threshold.
      low: `high - low` is the width of the ignore band.
      ignore_band: Whether anchors closely below the threshold are ignored.
      min_iou: Pairs at or below it count neither for a threshold nor as positive.
    """
    x = (anchors[None, :, 0] + anchors[None, :, 2]) * 0.5
    y = (anchors[None, :, 1] + anchors[None, :, 3]) * 0.5
    x1, y1, x2, y2 = (boxes[:, i, None] for i in range(4))
    return atss_labels(
        box_ops.pairwise_iou(boxes, anchors),
        (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2),
        valid,
        high=high,
        low=low,
        ignore_band=ignore_band,
        min_iou=min_iou,
    )


def atss_v1(  # noqa: PLR0913, what it matches, what the pyramid is and the choices of the rule
    anchors: Float[Array, "n 4"],
    boxes: Float[Array, "m 4"],
    valid: Bool[Array, " m"],
    *,
    counts: tuple[int, ...],
    canvas: tuple[int, int],
    top_k: int = 27,
    min_iou: float = 0.1,
    legacy_offsets: bool = False,
    relative_distance: bool = False,
) -> Match:
    """Thresholds from the anchors nearest to each ground truth: the published series' first ATSS.

    The candidates of a ground truth are the `top_k` anchors of each level whose centres are nearest
    to its own (the first ones win a tie); its threshold is the mean + population std of their IoUs.
    Positive is, unlike in the ATSS paper (arXiv 1912.02424), any anchor above the threshold whose
    centre it holds (closed box), of several ground truths the one of highest IoU, and only with an
    IoU above `min_iou`. All others are negative: nothing is ignored, and a ground truth may end
    without an anchor. The match's `iou` is that highest one, 0 for a negative. EXPERIMENTS 3.4.

    Args:
      anchors: Anchors of all levels, fine to coarse.
      boxes: Ground truths.
      valid: Which of them are there.
      counts: Number of anchors of each level.
      canvas: Height and width that `relative_distance` divides by, pixels.
      top_k: Candidates a level: 9 for each of 3 anchors to a cell.
      min_iou: A pair at or below it is no positive.
      legacy_offsets: Count the candidates of level l from the size of level l - 1 instead of from
        the sum of all before it, as the original did: from the third level on the IoUs of other
        anchors enter the threshold.
      relative_distance: Distances in shares of the canvas, as the original, instead of in pixels.

    Raises:
      ValueError: `counts` are not those of `anchors`.
    """
    if sum(counts) != anchors.shape[0]:
        raise ValueError(f"Levels of {counts} anchors do not make {anchors.shape[0]} anchors.")
    x, y = (0.5 * (anchors[None, :, i] + anchors[None, :, i + 2]) for i in (0, 1))
    x1, y1, x2, y2 = (boxes[:, i, None] for i in range(4))
    height, width = canvas if relative_distance else (1.0, 1.0)
    far = jnp.square((x - 0.5 * (x1 + x2)) / width) + jnp.square((y - 0.5 * (y1 + y2)) / height)
    begins = [sum(counts[:i]) for i in range(len(counts))]
    offsets = [0, *counts[:-1]] if legacy_offsets else begins
    nearest = []
    for begin, count, offset in zip(begins, counts, offsets, strict=True):
        _, index = jax.lax.top_k(-far[:, begin : begin + count], min(top_k, count))
        nearest.append(index + offset)
    iou = box_ops.pairwise_iou(boxes, anchors)
    candidates = jnp.take_along_axis(iou, jnp.concatenate(nearest, axis=1), axis=1)
    threshold = jnp.mean(candidates, axis=1) + jnp.std(candidates, axis=1)
    holds = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2) & valid[:, None]
    above = jnp.where(holds & (iou > threshold[:, None]), iou, 0.0)
    best = jnp.max(above, axis=0)
    positive = best > min_iou
    index = jnp.argmax(above, axis=0).astype(jnp.int32)
    return Match(index, jnp.where(positive, best, 0.0), positive, ~positive)


def atss_thresholds(
    iou: Float[Array, "m n"], *, high: float, min_iou: float = 0.1
) -> Float[Array, " m"]:
    """Threshold of each ground truth: mean + population std of its IoUs above `min_iou`.

    At most `high`; `high` itself where no IoU is above `min_iou`.
    """
    counted = iou > min_iou
    count = jnp.sum(counted, axis=1)
    divisor = jnp.maximum(count, 1).astype(iou.dtype)
    mean = jnp.sum(jnp.where(counted, iou, 0.0), axis=1) / divisor
    squares = jnp.where(counted, jnp.square(iou - mean[:, None]), 0.0)
    spread = jnp.sqrt(jnp.sum(squares, axis=1) / divisor)
    return jnp.where(count > 0, jnp.minimum(mean + spread, high), high)


def atss_labels(
    iou: Float[Array, "m n"],
    inside: Bool[Array, "m n"],
    valid: Bool[Array, " m"],
    *,
    high: float,
    low: float,
    ignore_band: bool,
    min_iou: float = 0.1,
) -> Match:
    """The rule of `atss` on given IoUs and on whether a ground truth holds an anchor's centre.

    With `s` the highest IoU among the ground truths that hold the centre (the first one wins a tie)
    and `T` that ground truth's threshold (`atss_thresholds`): positive where `s > min_iou` and
    `s >= T`; with the band of width `d = high - low`, ignored where `T - d < s < T` and
    `s > min_iou + d`; else negative. The match's `iou` is `s`.
    """
    thresholds = atss_thresholds(iou, high=high, min_iou=min_iou)
    held = jnp.where(inside & valid[:, None], iou, 0.0)
    index = jnp.argmax(held, axis=0).astype(jnp.int32)
    best = jnp.max(held, axis=0)
    threshold = thresholds[index]
    positive = (best > min_iou) & (best >= threshold)
    negative = ~positive
    if ignore_band:
        band = high - low
        ignored = (best > threshold - band) & (best < threshold) & (best > min_iou + band)
        negative = negative & ~ignored
    return Match(index=index, iou=best, positive=positive, negative=negative)
