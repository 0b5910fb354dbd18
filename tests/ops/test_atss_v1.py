"""The series' first ATSS matcher against loops in NumPy, and in a narrow detector."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import recipe
from sephjax.ops import boxes as box_ops
from sephjax.ops import matchers
from tests import narrow

CANVAS = (60, 120)
LEVELS = ((8, 10.0), (4, 18.0), (2, 30.0), (1, 60.0))  # cells down, side of an anchor; twice across


def pyramid():
    """Two square-ish anchors to a cell, level by level, and the number of each level."""
    rows, counts = [], []
    for cells, side in LEVELS:
        step = CANVAS[0] / cells
        for i in range(cells):
            for j in range(2 * cells):
                x, y = (j + 0.5) * step, (i + 0.5) * step
                for w, h in ((side, 0.8 * side), (0.7 * side, 1.3 * side)):
                    rows.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        counts.append(cells * 2 * cells * 2)
    return np.float32(rows), tuple(counts)


ANCHORS, COUNTS = pyramid()


def truths(seed, count=5):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 50, (count, 2)), rng.uniform(8, 45, (count, 2))
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


def brute(boxes, iou, top_k, *, legacy, relative):
    """Labels and ground truths by loops; iou [m, n]."""
    centre = lambda box: np.float64([box[0] + box[2], box[1] + box[3]]) / 2
    unit = np.float64([CANVAS[1], CANVAS[0]]) if relative else np.ones(2)
    thresholds = []
    for g, box in enumerate(boxes):
        chosen, begin, before = [], 0, 0
        for count in COUNTS:
            far = [
                np.linalg.norm((centre(a) - centre(box)) / unit)
                for a in ANCHORS[begin : begin + count]
            ]
            # A float32 distance and a double one order ties alike after rounding.
            order = np.argsort(np.round(far, 5), kind="stable")[:top_k]
            chosen += [iou[g, i + (before if legacy else begin)] for i in order]
            begin, before = begin + count, count
        thresholds.append(np.mean(chosen) + np.std(chosen))
    label, index = np.zeros(len(ANCHORS), bool), np.zeros(len(ANCHORS), int)
    for a, anchor in enumerate(ANCHORS):
        x, y = centre(anchor)
        best = 0.0
        for g, box in enumerate(boxes):
            inside = box[0] <= x <= box[2] and box[1] <= y <= box[3]
            if inside and iou[g, a] > max(thresholds[g], best):
                best, index[a] = iou[g, a], g
        label[a] = best > 0.1
    return label, index


@functools.partial(jax.jit, static_argnames=("top_k", "legacy", "relative"))
def run(boxes, valid, top_k=9, legacy=False, relative=False):
    return matchers.atss_v1(
        jnp.asarray(ANCHORS),
        boxes,
        valid,
        counts=COUNTS,
        canvas=CANVAS,
        top_k=top_k,
        legacy_offsets=legacy,
        relative_distance=relative,
    )


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_first_atss_agrees_with_a_loop(legacy, relative):
    for seed in range(6):
        boxes = truths(seed)
        iou = np.asarray(box_ops.pairwise_iou(jnp.asarray(boxes), jnp.asarray(ANCHORS)))
        found = run(jnp.asarray(boxes), jnp.ones(5, bool), 9, legacy, relative)
        positive, index = brute(boxes, iou, 9, legacy=legacy, relative=relative)
        np.testing.assert_array_equal(found.positive, positive)
        np.testing.assert_array_equal(found.negative, ~positive)
        np.testing.assert_array_equal(np.asarray(found.index)[positive], index[positive])
        np.testing.assert_allclose(
            np.asarray(found.iou)[positive], iou[index, range(len(ANCHORS))][positive]
        )
        assert positive.sum() >= 5


def test_the_original_offsets_and_distances_change_labels():
    differ = {"legacy": 0, "relative": 0}
    for seed in range(6):
        boxes, there = jnp.asarray(truths(seed)), jnp.ones(5, bool)
        plain = run(boxes, there)
        for name in differ:
            differ[name] += int(
                np.sum(run(boxes, there, **{name: True}).positive != plain.positive)
            )
    assert min(differ.values()) > 0, differ


def test_padding_matches_nothing_and_no_ground_truth_makes_everything_negative():
    boxes = truths(0)
    padded = jnp.asarray(np.concatenate([boxes, truths(9, 2)]))
    alone = run(jnp.asarray(boxes), jnp.ones(5, bool))
    jax.tree.map(np.testing.assert_array_equal, alone, run(padded, jnp.arange(7) < 5))
    none = run(padded, jnp.zeros(7, bool))
    assert np.all(none.negative)
    assert not np.any(none.positive)
    np.testing.assert_array_equal(none.iou, 0.0)


def test_a_level_with_fewer_anchors_than_candidates_gives_them_all():
    boxes = jnp.asarray(truths(1))
    found = run(boxes, jnp.ones(5, bool), 1000)
    iou = np.asarray(box_ops.pairwise_iou(boxes, jnp.asarray(ANCHORS)))
    positive, _ = brute(np.asarray(boxes), iou, 1000, legacy=False, relative=False)
    np.testing.assert_array_equal(found.positive, positive)


def test_levels_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="do not make"):
        matchers.atss_v1(
            jnp.asarray(ANCHORS),
            jnp.asarray(truths(0)),
            jnp.ones(5, bool),
            counts=(3,),
            canvas=CANVAS,
        )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_config_binds_the_sizes_of_the_levels(legacy):
    choice = {"name": "atss_v1", "top_k": 9, "legacy_offsets": legacy}
    targets = recipe.rpn_targets_of(narrow.config(**{"rpn.matcher": choice}))
    begins = np.cumsum((0, *COUNTS))
    levels = tuple(jnp.asarray(ANCHORS[a:b]) for a, b in itertools.pairwise(begins))
    batch = narrow.batch([CANVAS], [3], canvas=CANVAS)
    truth = jax.tree.map(jnp.asarray, batch.truth)
    every = jnp.ones((1, len(ANCHORS)), bool)
    found = targets(jax.random.split(jax.random.key(0), 1), levels, every, truth, CANVAS)
    match = run(truth.boxes[0], truth.valid[0], 9, legacy)
    assert 0 < match.positive.sum() < 128  # fewer than the quota: all are sampled
    np.testing.assert_array_equal(found.positive[0], match.positive)
