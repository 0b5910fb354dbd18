"""How far the values of a stage lie apart; inside a program, which only a few numbers leave."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sephjax.errors import UserError
from sephjax.parity.stages import Stage
from sephjax.types import Array, pytree

PARTS = {"": "boxes", "scores": "scores"}  # of what is compared by pairs
SAME_BOX = 1.0  # pixels within which two boxes can be a pair


@pytree
class Difference:
    """Of one value, or of a part of it; float32 and int32 scalars.

    Rows without a pair are counted and not measured.
    """

    max: Array  # of |ours - theirs|
    sum: Array  # of the same
    scale: Array  # largest |theirs|
    count: Array  # numbers compared
    unmatched: Array  # boxes of either side without a pair on the other


@pytree
class Pairs:
    """Which row of ours belongs to each of theirs."""

    index: Array  # int32 [n]
    valid: Array  # bool [n]
    unmatched: Array  # int32 []


def every(
    stages: Sequence[Stage], start: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Difference]]]:
    """Compares all stages.

    Args:
        stages: of our model.
        start: `image` and `size`.
        theirs: the peer's value of every stage.

    Returns:
        By stage and part (the empty string, or `scores` of detections) the differences `same`, of
        our stage fed with the peer's inputs, and `own`, fed with our own results. Rows that belong
        to boxes are compared where the boxes of both sides are pairs.
    """
    known: dict[str, Any] = {**start, **theirs}
    own, pairs, found = dict(start), {}, {}
    for stage in stages:
        wanted = theirs[stage.name]
        values = {
            "same": stage.compute(*(known[name] for name in stage.inputs)),
            "own": stage.compute(*(own[name] for name in stage.inputs)),
        }
        own[stage.name] = values["own"]
        if isinstance(wanted, Mapping):
            matched = {side: match(value, wanted) for side, value in values.items()}
            pairs[stage.name] = matched["own"]
            found[stage.name] = {
                part: {s: rows(v[key], wanted[key], matched[s]) for s, v in values.items()}
                for part, key in PARTS.items()
                if key in wanted
            }
            continue
        _check_shape(stage, values["same"], wanted)
        if stage.rows:
            every_row = jnp.arange(wanted.shape[0])
            matched = {
                "same": Pairs(every_row, theirs[stage.rows]["valid"], jnp.int32(0)),
                "own": pairs[stage.rows],
            }
            found[stage.name] = {"": {s: rows(v, wanted, matched[s]) for s, v in values.items()}}
        else:
            found[stage.name] = {"": {s: difference(v, wanted) for s, v in values.items()}}
    return found


def _check_shape(stage: Stage, ours: Array, theirs: Array) -> None:
    if ours.shape != theirs.shape:
        raise UserError(
            f"{stage.name} has the shape {ours.shape} here and {theirs.shape} at the peer: the "
            "config is of another model than the weights."
        )


def difference(ours: Array, theirs: Array, mask: Array | None = None) -> Difference:
    """Of two arrays of one shape, where `mask`, of their first axis, is True."""
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    apart, size = jnp.abs(ours - theirs), jnp.abs(theirs)
    count = jnp.int32(apart.size)
    if mask is not None:
        wide = mask.reshape(-1, *(1,) * (apart.ndim - 1))
        apart, size = jnp.where(wide, apart, 0.0), jnp.where(wide, size, 0.0)
        count = jnp.sum(mask, dtype=jnp.int32) * (apart.size // max(apart.shape[0], 1))
    return Difference(
        jnp.max(apart, initial=0.0), jnp.sum(apart), jnp.max(size, initial=0.0), count, jnp.int32(0)
    )


def rows(ours: Array, theirs: Array, pairs: Pairs) -> Difference:
    """Of rows that belong to paired boxes."""
    found = difference(ours[pairs.index], theirs, pairs.valid)
    return Difference(found.max, found.sum, found.scale, found.count, pairs.unmatched)


def match(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> Pairs:
    """Pairs boxes (of one label, if they have labels) one to one.

    Two boxes are a pair if each is the other's nearest and they lie within `SAME_BOX` pixels. Equal
    boxes, which clipping to the picture makes, go by rank.
    """
    apart = jnp.max(jnp.abs(theirs["boxes"][:, None] - ours["boxes"][None]), axis=-1)
    if "labels" in theirs:
        apart = jnp.where(theirs["labels"][:, None] == ours["labels"][None], apart, jnp.inf)
    apart = jnp.where(theirs["valid"][:, None] & ours["valid"][None], apart, jnp.inf)
    here, there = jnp.arange(apart.shape[0]), jnp.arange(apart.shape[1])
    rank = jnp.abs(here[:, None] - there[None]).astype(jnp.float32)
    cost = apart + 1e-3 * SAME_BOX * rank
    nearest, back = jnp.argmin(cost, axis=1), jnp.argmin(cost, axis=0)
    near = apart[here, nearest] < SAME_BOX
    valid = theirs["valid"] & near & (back[nearest] == here)
    both = jnp.sum(theirs["valid"], dtype=jnp.int32) + jnp.sum(ours["valid"], dtype=jnp.int32)
    return Pairs(nearest, valid, both - 2 * jnp.sum(valid, dtype=jnp.int32))


def end_to_end(ours: Any, theirs: Mapping[str, Any], logits: Array | None) -> dict[str, Difference]:
    """Detections of our whole program against the peer's, by part.

    Args:
        ours: `Detections` of one image.
        theirs: the peer's stage `detections`.
        logits: the peer's mask logits, or None without a mask head.
    """
    mine = {name: getattr(ours, name)[0] for name in ("boxes", "scores", "labels", "valid")}
    pairs = match(mine, theirs)
    found = {name: rows(mine[name], theirs[name], pairs) for name in ("boxes", "scores")}
    if logits is not None:
        found["masks"] = rows(ours.masks[0], jax.nn.sigmoid(logits), pairs)
    return found
