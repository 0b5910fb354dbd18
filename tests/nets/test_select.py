"""Selection of proposals against loops in NumPy and the published quotas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.nets.proposal import select
from sephjax.types import Proposals
from tests.ops.reference import greedy_nms

COUNTS = (40, 24, 8)
PRE, POST, NMS = 16, 20, 0.5
SIZE = (60.0, 80.0)
WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def levels(seed):
    """Raw outputs of three levels: logits, deltas, anchors, which anchors may be used."""
    rng = np.random.default_rng(seed)
    rows = []
    for count in COUNTS:
        corners = rng.uniform(-10, 60, (count, 2))
        anchors = np.concatenate([corners, corners + rng.uniform(5, 40, (count, 2))], axis=1)
        logits, deltas = rng.normal(size=count), 0.3 * rng.normal(size=(count, 4))
        rows.append((logits, deltas, anchors, rng.uniform(size=count) < 0.9))
    as_floats = lambda parts: (jnp.asarray(part, jnp.float32) for part in parts)
    return [(*as_floats(row[:3]), jnp.asarray(row[3])) for row in rows]


def reference_level(logits, deltas, anchors, inside, count, min_size=0.0):
    """The best usable anchors of a level as clipped boxes, best first."""
    logits, deltas, anchors = (np.float64(np.asarray(x)) for x in (logits, deltas, anchors))
    order = [i for i in np.argsort(-logits, kind="stable") if inside[i]][:count]
    wide, high = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    x = (anchors[:, 0] + anchors[:, 2]) / 2 + deltas[:, 0] * wide
    y = (anchors[:, 1] + anchors[:, 3]) / 2 + deltas[:, 1] * high
    w, h = wide * np.exp(deltas[:, 2]), high * np.exp(deltas[:, 3])
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, SIZE[1])
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, SIZE[0])
    shorter = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
    order = [i for i in order if shorter[i] > 0 and shorter[i] >= min_size]
    return boxes[order], logits[order]


@functools.partial(jax.jit, static_argnames=("rule", "counts", "exactly", "floor", "min_size"))
def run(rows, rule="joint", counts=(), exactly=False, floor=None, min_size=0.0):
    options = {"counts": (PRE,) * len(rows), "weights": WEIGHTS, "min_size": min_size}
    ranked = select.rank_levels(*zip(*rows, strict=True), jnp.float32(SIZE), **options)
    if rule == "joint":
        return select.joint(ranked, nms=NMS, count=POST)
    return select.per_level(ranked, nms=NMS, counts=counts, exactly=exactly, logit_floor=floor)


@pytest.mark.parametrize("min_size", [0.0, 9.0])
@pytest.mark.parametrize("seed", range(4))
def test_joint_selection_is_top_k_by_level_then_nms_by_level_then_the_best_of_all(seed, min_size):
    rows = levels(seed)
    boxes, scores = [], []
    for row in rows:
        b, s = reference_level(*row, PRE, min_size)
        kept = greedy_nms(b, s, NMS)
        boxes.append(b[kept])
        scores.append(s[kept])
    boxes, scores = np.concatenate(boxes), np.concatenate(scores)
    best = np.argsort(-scores, kind="stable")[:POST]
    found = run(rows, min_size=min_size)
    count = int(found.valid.sum())
    assert count == len(best)
    assert np.all(found.valid[:count])
    np.testing.assert_allclose(found.scores[:count], scores[best], rtol=1e-6)
    np.testing.assert_allclose(found.boxes[:count], boxes[best], atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_selection_per_level_is_nms_in_each_level_one_after_another(seed):
    rows, counts = levels(seed), (7, 5, 3)
    found = run(rows, "per_level", counts)
    begin = 0
    for row, quota in zip(rows, counts, strict=True):
        b, s = reference_level(*row, PRE)
        kept = greedy_nms(b, s, NMS, inclusive=True)[:quota]
        valid = np.asarray(found.valid[begin : begin + quota])
        np.testing.assert_array_equal(valid, np.arange(quota) < len(kept))
        part = found.boxes[begin : begin + quota][: len(kept)]
        np.testing.assert_allclose(part, b[kept], atol=1e-4)
        begin += quota
    assert begin == found.valid.shape[0]


def test_published_quotas():
    # EXPERIMENTS 9.
    assert select.quotas(6000, 3, 5) == (6000, 2000, 666, 222, 74)
    assert select.quotas(1000, 3, 5) == (1000, 333, 111, 37, 12)
    assert sum(select.quotas(1000, 3, 4)) == 1481


def test_five_levels_of_enough_anchors_give_1493_proposals():
    quotas = select.quotas(1000, 3, 5)
    ranked = []
    for count in quotas:
        corners = jnp.float32(np.random.default_rng(count).uniform(0, 9000, (count + 5, 2)))
        boxes = jnp.concatenate([corners, corners + 1.0], axis=1)
        scores = -jnp.arange(count + 5, dtype=jnp.float32)
        ranked.append((boxes, scores, jnp.ones(count + 5, bool)))
    run = lambda rows: select.per_level(
        rows, nms=0.7, counts=quotas, exactly=False, logit_floor=None
    )
    found = jax.jit(run)(ranked)
    assert found.boxes.shape == (1493, 4)
    assert np.all(found.valid)
    begins = np.cumsum((0, *quotas))[:-1]
    np.testing.assert_array_equal(found.scores[begins], np.zeros(5))  # each level's best is first


def test_in_training_the_quota_is_filled_with_suppressed_boxes():
    # Ten copies of one box: NMS leaves one, exactly k leaves k.
    box = jnp.tile(jnp.float32([[0, 0, 10, 10]]), (10, 1))
    ranked = [(box, -jnp.arange(10, dtype=jnp.float32), jnp.ones(10, bool))]
    pick = functools.partial(select.per_level, ranked, nms=0.7, counts=(4,), logit_floor=None)
    np.testing.assert_array_equal(pick(exactly=False).valid, [True, False, False, False])
    np.testing.assert_array_equal(pick(exactly=True).valid, [True] * 4)
    few = [(box, ranked[0][1], jnp.arange(10) < 3)]
    found = select.per_level(few, nms=0.7, counts=(4,), exactly=True, logit_floor=None)
    np.testing.assert_array_equal(found.valid, [True, True, True, False])


def test_the_logit_floor_keeps_the_best_of_each_level():
    corners = jnp.float32([[0, 0], [20, 0], [40, 0]])
    boxes = jnp.concatenate([corners, corners + 10], axis=1)
    there = jnp.ones(3, bool)
    ranked = [
        (boxes, jnp.float32([2.0, 0.006, 0.005]), there),
        (boxes, jnp.float32([-3.0, -4.0, -5.0]), there),
        (boxes, jnp.float32([1.0, 0.5, 0.2]), ~there),
    ]
    found = select.per_level(ranked, nms=0.7, counts=(3, 3, 3), exactly=False, logit_floor=0.005)
    expected = [True, True, False, True, False, False, False, False, False]
    np.testing.assert_array_equal(found.valid, expected)


@pytest.mark.parametrize("seed", range(3))
def test_retinanets_selection_is_a_threshold_then_nms_over_all_levels(seed):
    rows, score, count = levels(seed), 0.4, 9
    parts = [reference_level(*row, PRE) for row in rows]
    boxes, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    high = 1 / (1 + np.exp(-scores)) > score
    boxes, scores = boxes[high], scores[high]
    kept = greedy_nms(boxes, scores, NMS, inclusive=True)
    assert len(kept) > count  # the cap acts
    ranked = select.rank_levels(
        *zip(*rows, strict=True), jnp.float32(SIZE), counts=(PRE,) * len(rows), weights=WEIGHTS
    )
    for most in (count, 60):
        found = select.above(ranked, score=score, nms=NMS, count=most)
        there = kept[:most]
        np.testing.assert_array_equal(found.valid, np.arange(len(found.valid)) < len(there))
        np.testing.assert_allclose(found.scores[: len(there)], scores[there], rtol=1e-6)
        np.testing.assert_allclose(found.boxes[: len(there)], boxes[there], atol=1e-4)
    nothing = select.above(ranked, score=1.0, nms=NMS, count=count)
    assert not np.any(nothing.valid)
    assert np.all(np.isfinite(nothing.boxes))


def test_no_usable_anchor_gives_no_proposal_and_finite_numbers():
    rows = [(*row[:3], jnp.zeros_like(row[3])) for row in levels(0)]
    for found in (run(rows), run(rows, "per_level", (7, 5, 3), exactly=True)):
        assert not np.any(found.valid)
        assert np.all(np.isfinite(found.boxes))
        assert np.all(np.isfinite(found.scores))


def test_valid_first_keeps_the_order_of_what_is_valid():
    rows = jnp.arange(6, dtype=jnp.float32)
    valid = jnp.asarray([False, True, False, True, True, False])
    found = select.valid_first(Proposals(jnp.tile(rows[:, None], (1, 4)), rows, valid))
    np.testing.assert_array_equal(found.scores, [1, 3, 4, 0, 2, 5])
    np.testing.assert_array_equal(found.boxes[:, 0], [1, 3, 4, 0, 2, 5])
    np.testing.assert_array_equal(found.valid, [True, True, True, False, False, False])
