import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sephjax.ops import boxes as box_ops
from sephjax.ops import matchers

ATSS_IOU = jnp.array([[0.05, 0.12, 0.22, 0.31, 0.42, 0.6], [0.3, 0.15, 0.11, 0.0, 0.0, 0.0]])
ATSS_INSIDE = jnp.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]], bool)


def labels(match):
    """1, 0 and -1 as the peers write them."""
    assert not bool(jnp.any(match.positive & match.negative))
    return np.where(match.positive, 1, np.where(match.negative, 0, -1))


def random_boxes(seed, count, least=5.0):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 60, (count, 2)), rng.uniform(least, 50, (count, 2))
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


def test_labels_agree_with_detectron2s_published_matrix():
    # detectron2 tests/modeling/test_matcher.py, ground truths by anchors.
    iou = jnp.array([[0.15, 0.45, 0.2, 0.6], [0.3, 0.65, 0.05, 0.1], [0.05, 0.4, 0.25, 0.4]]).T
    match = matchers.max_iou_labels(iou, jnp.ones(3, bool), low=0.3, high=0.7, low_quality="all")
    np.testing.assert_array_equal(match.index, [1, 1, 2, 0])
    np.testing.assert_array_equal(labels(match), [-1, 1, 0, 1])
    np.testing.assert_allclose(match.iou, [0.3, 0.65, 0.25, 0.6])


def test_a_promoted_anchor_keeps_its_own_best_ground_truth():
    # Anchor 0 is the best of ground truth 1, but itself overlaps ground truth 0 more.
    iou = jnp.array([[0.5, 0.4], [0.9, 0.1]])
    match = matchers.max_iou_labels(iou, jnp.ones(2, bool), low=0.3, high=0.7, low_quality="all")
    np.testing.assert_array_equal(labels(match), [1, 1])
    np.testing.assert_array_equal(match.index, [0, 0])


@pytest.mark.parametrize(
    ("low_quality", "expected"), [("none", [-1, -1, 0]), ("all", [1, 1, 0]), ("single", [1, -1, 0])]
)
def test_ties_are_promoted_all_or_one_or_not_at_all(low_quality, expected):
    iou = jnp.array([[0.45], [0.45], [0.2]])
    match = matchers.max_iou_labels(
        iou, jnp.ones(1, bool), low=0.4, high=0.5, low_quality=low_quality
    )
    np.testing.assert_array_equal(labels(match), expected)


def test_a_pair_below_the_least_iou_promotes_nothing():
    iou = jnp.array([[0.05, 0.0], [0.06, 0.07]])
    match = matchers.max_iou_labels(
        iou, jnp.ones(2, bool), low=0.4, high=0.5, low_quality="single", min_iou=0.0625
    )
    np.testing.assert_array_equal(labels(match), [0, 1])
    np.testing.assert_allclose(match.iou, [0.0, 0.07])
    assert int(match.index[1]) == 1


def test_a_ground_truth_beside_all_anchors_promotes_none():
    iou = jnp.array([[0.0, 0.8], [0.0, 0.1]])
    for low_quality in ("all", "single"):
        match = matchers.max_iou_labels(
            iou, jnp.ones(2, bool), low=0.3, high=0.7, low_quality=low_quality
        )
        np.testing.assert_array_equal(labels(match), [1, 0])


def test_the_first_ground_truth_wins_a_tie_and_the_threshold_belongs_to_the_positives():
    iou = jnp.array([[0.5, 0.5]])
    match = matchers.max_iou_labels(iou, jnp.ones(2, bool), low=0.5, high=0.5, low_quality="none")
    np.testing.assert_array_equal(labels(match), [1])
    np.testing.assert_array_equal(match.index, [0])


@pytest.mark.parametrize("low_quality", ["none", "all", "single"])
def test_without_a_ground_truth_everything_is_negative(low_quality):
    boxes = jnp.asarray(random_boxes(0, 5))
    none = jnp.zeros(5, bool)
    match = matchers.max_iou(boxes, boxes, none, low=0.3, high=0.7, low_quality=low_quality)
    np.testing.assert_array_equal(labels(match), np.zeros(5))
    np.testing.assert_array_equal(match.iou, np.zeros(5))
    match = matchers.atss(boxes, boxes, none, high=0.5, low=0.4, ignore_band=True)
    np.testing.assert_array_equal(labels(match), np.zeros(5))
    np.testing.assert_array_equal(match.iou, np.zeros(5))


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(0, 100, width=32)))
def test_padded_ground_truths_change_nothing(padding):
    anchors, boxes = jnp.asarray(random_boxes(1, 30)), random_boxes(2, 4)
    padded = jnp.asarray(np.concatenate([boxes, padding]))
    valid = jnp.arange(7) < 4
    options = {"low": 0.4, "high": 0.5}
    for low_quality in ("all", "single"):
        match = matchers.max_iou(
            anchors, jnp.asarray(boxes), valid[:4], low_quality=low_quality, **options
        )
        other = matchers.max_iou(anchors, padded, valid, low_quality=low_quality, **options)
        jax.tree.map(np.testing.assert_array_equal, match, other)
    match = matchers.atss(anchors, jnp.asarray(boxes), valid[:4], ignore_band=True, **options)
    other = matchers.atss(anchors, padded, valid, ignore_band=True, **options)
    jax.tree.map(np.testing.assert_array_equal, match, other)


def brute_series(iou, low, high, least):
    """The series' matcher as a loop over boxes, then over ground truths; iou [n, m]."""
    label, index = [], []
    for row in iou:
        best, which = 0.0, -1
        for g, value in enumerate(row):
            if value >= least and value > best:
                best, which = value, g
        label.append(1 if best >= high else 0 if best < low else -1)
        index.append(which)
    for column in iou.T:
        best = int(np.argmax(column))
        if column[best] >= least:
            label[best] = 1
    return np.array(label), np.array(index)


@pytest.mark.parametrize("seed", range(5))
def test_the_series_rule_agrees_with_a_loop(seed):
    anchors, boxes = random_boxes(seed, 80), random_boxes(100 + seed, 6)
    iou = np.asarray(box_ops.pairwise_iou(jnp.asarray(anchors), jnp.asarray(boxes)))
    expected, index = brute_series(iou, 0.4, 0.5, 0.0625)
    match = matchers.max_iou(
        jnp.asarray(anchors),
        jnp.asarray(boxes),
        jnp.ones(6, bool),
        low=0.4,
        high=0.5,
        low_quality="single",
        min_iou=0.0625,
    )
    np.testing.assert_array_equal(labels(match), expected)
    np.testing.assert_array_equal(np.asarray(match.index)[expected == 1], index[expected == 1])


@pytest.mark.parametrize(
    ("ignore_band", "expected"), [(True, [1, 0, 0, 0, -1, 1]), (False, [1, 0, 0, 0, 0, 1])]
)
def test_atss_agrees_with_the_series_check_values(ignore_band, expected):
    match = matchers.atss_labels(
        ATSS_IOU, ATSS_INSIDE, jnp.ones(2, bool), high=0.5, low=0.4, ignore_band=ignore_band
    )
    np.testing.assert_array_equal(labels(match), expected)
    np.testing.assert_array_equal(np.asarray(match.index)[[0, 5]], [1, 0])
    thresholds = matchers.atss_thresholds(ATSS_IOU, high=0.5)
    np.testing.assert_allclose(thresholds, [0.4998, 0.2685], atol=5e-5)


def brute_atss(anchors, boxes, iou, low, high):
    """ATSSMatcher3 as loops; iou [m, n]."""
    thresholds = []
    for row in iou:
        over = row[row > 0.1]
        thresholds.append(min(over.mean() + over.std() if over.size else 1.0, high))
    out = []
    for a, anchor in enumerate(anchors):
        x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
        best, which = 0.0, 0
        for g, box in enumerate(boxes):
            if box[0] <= x <= box[2] and box[1] <= y <= box[3] and iou[g, a] > best:
                best, which = iou[g, a], g
        threshold = thresholds[which]
        if best > 0.1 and best >= threshold:
            out.append(1)
        elif threshold - (high - low) < best < threshold and best > 0.1 + high - low:
            out.append(-1)
        else:
            out.append(0)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_atss_agrees_with_a_loop(seed):
    anchors, boxes = random_boxes(seed, 80), random_boxes(200 + seed, 6)
    iou = np.asarray(box_ops.pairwise_iou(jnp.asarray(boxes), jnp.asarray(anchors)))
    match = matchers.atss(
        jnp.asarray(anchors),
        jnp.asarray(boxes),
        jnp.ones(6, bool),
        high=0.5,
        low=0.4,
        ignore_band=True,
    )
    np.testing.assert_array_equal(labels(match), brute_atss(anchors, boxes, iou, 0.4, 0.5))


def test_a_matcher_can_be_mapped_over_images():
    anchors = jnp.asarray(random_boxes(0, 20))
    boxes = jnp.stack([jnp.asarray(random_boxes(seed, 3)) for seed in (1, 2)])
    valid = jnp.array([[True, True, False], [True, True, True]])

    def match(boxes, valid):
        return matchers.max_iou(anchors, boxes, valid, low=0.3, high=0.7, low_quality="all")

    together = jax.jit(jax.vmap(match))(boxes, valid)
    alone = match(boxes[0], valid[0])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), together, alone)


@pytest.mark.torch
@pytest.mark.parametrize("low_quality", [True, False])
def test_labels_agree_with_torchvision(low_quality):
    torch = pytest.importorskip("torch")
    matcher = pytest.importorskip("torchvision.models.detection._utils").Matcher(
        0.7, 0.3, low_quality
    )
    anchors, boxes = random_boxes(7, 300), random_boxes(8, 10)
    # Whole numbers and copies: anchors that tie for a ground truth, ground truths that tie.
    anchors, boxes = np.round(anchors / 5) * 5, np.round(boxes / 5) * 5
    anchors[100:150], boxes[7] = anchors[:50], boxes[2]
    iou = box_ops.pairwise_iou(jnp.asarray(anchors), jnp.asarray(boxes))
    theirs = matcher(torch.from_numpy(np.asarray(iou).T.copy())).numpy()
    match = matchers.max_iou_labels(
        iou, jnp.ones(10, bool), low=0.3, high=0.7, low_quality="all" if low_quality else "none"
    )
    np.testing.assert_array_equal(
        labels(match), np.where(theirs >= 0, 1, np.where(theirs == -1, 0, -1))
    )
    np.testing.assert_array_equal(np.asarray(match.index)[theirs >= 0], theirs[theirs >= 0])
