"""Random choice of anchors and ROIs for the losses, with static shapes.

A choice is a sort by random numbers: those that may be taken come first, in random order, and the
first few are taken. One image at a time; keys are arguments.

ROIs are chosen (`sample_rois`) by this rule. With P = `int(count * positive_fraction)` and p
positives, q negatives there:

* `fill` "none" (detectron2, torchvision): min(p, P) positives, then negatives up to `count`;
  where they run out the rest is invalid.
* `fill` "repeat" (the published series) gives exactly `count`, unless nothing is there:
  p >= P and q >= count - P: P positives and count - P negatives;
  0 < p < P and q >= count - P: all p positives and count - p negatives, repeated if short;
  no positive, or q < count - P: uniformly from all, repeated if short (so there may be more
  than P positives);
  nothing there: all invalid, index 0.

A choice is uniform without replacement unless balanced. Balanced negatives: `bins` bins of the
IoU from `low` to `high` (IoUs beyond go to the outermost bins) give up to wanted // bins each,
the rest comes from what they left. Balanced positives: the same with the positives of each
ground truth as a bin, and as many bins as ground truths have positives; or with `positive_bins`
bins of the IoU from 0.5 to 1 (EXPERIMENTS 4.2: the series' first sampler). A plain choice that
runs short repeats its random order mirrored (a b c c b a a b); a balanced one takes the rest
from all, in a new random order repeated whole.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Fill = Literal["none", "repeat"]
Groups = Literal["truth", "iou"]

_LAST = 2**31 - 1  # the group of what may not be taken: sorts behind all others


def subsample(
    key: jax.Array,
    positive: Bool[Array, " n"],
    negative: Bool[Array, " n"],
    *,
    count: int,
    positive_fraction: float,
) -> tuple[Bool[Array, " n"], Bool[Array, " n"]]:
    """Up to `int(count * positive_fraction)` positives and negatives up to `count` in all.

    Uniform without replacement; fewer where there are not enough. For the sampling of a whole batch
    together (the published series) pass the labels of all images in one row.
    Source: detectron2 `subsample_labels`.

    Args:
      key: PRNG key.
      positive: What may be taken as positive.
      negative: What may be taken as negative; disjoint from `positive`.
      count: Wanted number in all.
      positive_fraction: Largest share of positives.

    Returns:
      The positives and the negatives taken.
    """
    draw = jax.random.uniform(key, positive.shape)
    quota = int(count * positive_fraction)
    wanted = jnp.minimum(jnp.sum(positive), quota)
    return _take(draw, positive, wanted, most=quota), _take(
        draw, negative, count - wanted, most=count
    )


def _take(
    draw: Float[Array, " n"], member: Bool[Array, " n"], wanted: Int[Array, ""], *, most: int
) -> Bool[Array, " n"]:
    """The `wanted` members of highest draw, or all members; `wanted` is at most `most`."""
    most = min(most, member.shape[0])
    # top_k of a few instead of a sort of all: there may be 270,000 anchors.
    score, index = jax.lax.top_k(jnp.where(member, draw, -1.0), most)
    taken = (score >= 0.0) & (jnp.arange(most) < wanted)
    return jnp.zeros(member.shape, bool).at[index].set(taken)


def sample_rois(  # noqa: PLR0913, the four columns of a match and the choices of a sampler
    key: jax.Array,
    *,
    positive: Bool[Array, " n"],
    negative: Bool[Array, " n"],
    iou: Float[Array, " n"],
    matched: Int[Array, " n"],
    count: int,
    positive_fraction: float,
    balance_positives: bool,
    balance_negatives: bool,
    fill: Fill,
    low: float = -0.2,
    high: float = 0.5,
    bins: int = 8,
    positive_groups: Groups = "truth",
    positive_bins: int = 5,
) -> tuple[Int[Array, " r"], Bool[Array, " r"]]:
    """The ROIs that the heads of one image train on, positives first: indices, and which are valid.

    The rule: this module's docstring. Sources: detectron2 `ROIHeads`, Libra R-CNN (Pang 2019).

    Args:
      key: PRNG key.
      positive: Positive proposals.
      negative: Negative proposals; what is neither is never taken.
      iou: IoU of each proposal with its best ground truth.
      matched: Index of each proposal's ground truth.
      count: Number of ROIs.
      positive_fraction: Share of positives.
      balance_positives: Whether positives are balanced over their groups.
      balance_negatives: Whether negatives are balanced over IoU.
      fill: What happens when there are too few.
      low: Lower end of the negatives' IoU histogram.
      high: Upper end of the negatives' IoU histogram.
      bins: Number of its bins: 8, in the series' first sampler 7.
      positive_groups: What positives are balanced over: their ground truths or their IoU.
      positive_bins: Number of the positives' IoU bins.
    """
    keys = jax.random.split(key, 3)
    quota = int(count * positive_fraction)
    there_positive, there_negative = jnp.sum(positive), jnp.sum(negative)
    want_positive = jnp.minimum(there_positive, quota)
    room = count - want_positive
    want_negative = room if fill == "repeat" else jnp.minimum(room, there_negative)
    by_iou = positive_groups == "iou"
    group = _bin(iou, 0.5, 1.0, positive_bins) if by_iou else matched
    groups = (group, positive_bins if by_iou else None) if balance_positives else None
    picked_positive = _pick(keys[0], positive, groups, want_positive, count)
    groups = (_bin(iou, low, high, bins), bins) if balance_negatives else None
    picked_negative = _pick(keys[1], negative, groups, want_negative, count)
    slot = jnp.arange(count)
    picked_negative = picked_negative[jnp.clip(slot - want_positive, 0, count - 1)]
    indices = jnp.where(slot < want_positive, picked_positive, picked_negative)
    valid = slot < want_positive + want_negative
    if fill == "repeat":
        uniform = (there_positive == 0) | (there_negative < count - quota)
        indices = jnp.where(uniform, _plain(keys[2], positive | negative, count), indices)
        valid = jnp.broadcast_to(there_positive + there_negative > 0, (count,))
    return _positives_first(indices, valid, positive)


def _positives_first(
    indices: Int[Array, " r"], valid: Bool[Array, " r"], positive: Bool[Array, " n"]
) -> tuple[Int[Array, " r"], Bool[Array, " r"]]:
    """The chosen with the positives in front, order kept: a uniform choice mixes both kinds."""
    front = jnp.argsort(jnp.where(valid, jnp.where(positive[indices], 0, 1), 2), stable=True)
    valid = valid[front]
    return jnp.where(valid, indices[front], 0).astype(jnp.int32), valid


def _pick(
    key: jax.Array,
    member: Bool[Array, " n"],
    groups: tuple[Int[Array, " n"], int | None] | None,
    wanted: Int[Array, ""],
    count: int,
) -> Int[Array, " c"]:
    """Members in random order, balanced over `groups` (group and divisor of `_balanced`) if any."""
    if groups is None:
        return _plain(key, member, count)
    return _balanced(key, member, groups[0], wanted, groups[1], count)


def repeat_truth(
    key: jax.Array, valid: Bool[Array, " m"], *, count: int = 16
) -> tuple[Int[Array, " c"], Bool[Array, " c"]]:
    """The ground truths that the published series appends to the proposals: always `count` of them.

    A random permutation of the valid ones, cut to `count` or repeated mirrored up to it. Without a
    valid one all are invalid, with index 0.
    """
    there = jnp.broadcast_to(jnp.any(valid), (count,))
    return jnp.where(there, _plain(key, valid, count), 0).astype(jnp.int32), there


def _bin(iou: Float[Array, " n"], low: float, high: float, bins: int) -> Int[Array, " n"]:
    """The bin of each IoU; those beyond an end are in the outermost one."""
    # Truncation and the clamp are the series' own; IoUs reported as 0 fall into bin 2 of 8.
    index = jnp.trunc((iou - low) / ((high - low) / bins)).astype(jnp.int32)
    return jnp.clip(index, 0, bins - 1)


def _shuffled(key: jax.Array, rank: Int[Array, " n"]) -> Int[Array, " n"]:
    """Indices in order of rank, in random order within a rank."""
    return jnp.lexsort((jax.random.uniform(key, rank.shape), rank))


def _plain(key: jax.Array, member: Bool[Array, " n"], count: int) -> Int[Array, " c"]:
    """Members in random order, repeated mirrored up to `count`; nonsense without any."""
    order = _shuffled(key, jnp.where(member, 0, 1))
    size = jnp.maximum(jnp.sum(member), 1)
    turn = jnp.arange(count) % (2 * size)
    return order[jnp.minimum(turn, 2 * size - 1 - turn)]


def _balanced(
    key: jax.Array,
    member: Bool[Array, " n"],
    group: Int[Array, " n"],
    wanted: Int[Array, ""],
    groups: int | None,
    count: int,
) -> Int[Array, " c"]:
    """`wanted` (at most `count`) members, an equal share from each group as far as it goes.

    `groups` is the divisor of `wanted`, or None for the number of groups that have a member.
    """
    inside, outside, again = jax.random.split(key, 3)
    members = member.shape[0]
    group = jnp.where(member, group, _LAST)
    order = _shuffled(inside, group)
    group, position = group[order], jnp.arange(members)
    # Sorted by group, a member's rank in its group is its distance from where the group begins.
    begins = jnp.concatenate([jnp.ones(1, bool), group[1:] != group[:-1]])
    rank = position - jax.lax.cummax(jnp.where(begins, position, 0))
    if groups is None:
        share = wanted // jnp.maximum(jnp.sum(begins & (group != _LAST)), 1)
    else:
        share = wanted // groups
    within = (rank < share) & (group != _LAST)
    taken = jnp.sum(within)
    stage = jnp.where(within, 0, jnp.where(group == _LAST, 2, 1))
    chosen = order[_shuffled(outside, stage)]  # the shares, then what they left, then non-members

    slot, size = jnp.arange(count), jnp.sum(member)
    anew = _shuffled(again, jnp.where(member, 0, 1))[(slot - taken) % jnp.maximum(size, 1)]
    once = (slot < taken) | (wanted <= size)
    return jnp.where(once, chosen[jnp.minimum(slot, members - 1)], anew)
