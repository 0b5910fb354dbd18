"""Sampled ROIs: quotas, appended ground truths, labels, order, keys by image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.ops import matchers, sampling
from sephjax.targets import roi
from sephjax.types import Proposals, Truth

CLASSES, SAMPLES, FAR = 5, 16, 500.0


def strip(count, y):
    """Boxes of 10 x 10 side by side."""
    x = 20.0 * np.arange(count)
    return np.float32(np.stack([x, np.full(count, y), x + 10, np.full(count, y + 10)], axis=-1))


def truths(*counts, most=20):
    """Object i of an image lies at x = 20 i and has label i % CLASSES."""
    valid = np.arange(most)[None] < np.array(counts)[:, None]
    boxes = np.where(valid[..., None], strip(most, 0.0)[None], 0)
    labels = np.where(valid, np.arange(most) % CLASSES, 0)
    return Truth(jnp.float32(boxes), labels.astype(np.int32), jnp.asarray(valid), None)


def proposals(images, near=8, far=40, valid=48):
    """`near` boxes two pixels beside the first objects (IoU 2/3), `far` ones with IoU 0."""
    shifted = strip(near, 0.0) + np.float32([2, 0, 2, 0])
    boxes = np.concatenate([shifted, strip(far, FAR)])
    tile = lambda leaf: jnp.asarray(np.broadcast_to(leaf, (images, *leaf.shape)))
    return Proposals(tile(boxes), tile(np.zeros(48, np.float32)), tile(np.arange(48) < valid))


@functools.partial(jax.jit, static_argnames=("append", "fill", "matched", "positive_iou"))
def sample(keys, proposals, truth, append=0, fill="none", matched=0.5, positive_iou=0.0):
    sampler = functools.partial(
        sampling.sample_rois,
        count=SAMPLES,
        positive_fraction=0.25,
        balance_positives=False,
        balance_negatives=False,
        fill=fill,
    )
    return roi.sample_rois(
        keys,
        proposals,
        truth,
        matcher=functools.partial(matchers.max_iou, low=matched, high=matched, low_quality="none"),
        sampler=sampler,
        append=append,
        classes=CLASSES,
        positive_iou=positive_iou,
    )


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(("append", "fill"), [(0, "none"), (16, "repeat")])
def test_a_quarter_are_positives_and_they_come_first(append, fill):
    found = sample(keys(2), proposals(2), truths(8, 3), append, fill)
    np.testing.assert_array_equal(found.positive, np.broadcast_to(np.arange(16) < 4, (2, 16)))
    assert np.all(found.valid)


def test_labels_are_those_of_the_matched_object_and_k_for_background():
    found = sample(keys(2), proposals(2), truths(8, 3))
    truth = truths(8, 3)
    for image in range(2):
        for row in range(SAMPLES):
            if row >= 4:
                assert found.labels[image, row] == CLASSES
                assert found.iou[image, row] < 0.5
                continue
            object_ = round(float(found.boxes[image, row, 0]) / 20)
            assert found.matched[image, row] == object_
            assert found.labels[image, row] == object_ % CLASSES
            np.testing.assert_array_equal(found.targets[image, row], truth.boxes[image, object_])
            assert np.isclose(found.iou[image, row], 1.0) or np.isclose(
                found.iou[image, row], 2 / 3
            )


def test_every_ground_truth_joins_the_proposals_once():
    # Without a near proposal the positives are the two objects themselves, each once.
    found = sample(keys(1), proposals(1, near=0, far=48), truths(2))
    np.testing.assert_array_equal(found.positive[0], np.arange(16) < 2)
    assert sorted(np.asarray(found.boxes[0, :2, 0]).tolist()) == [0, 20]
    np.testing.assert_array_equal(found.iou[0, :2], [1, 1])


def test_exactly_sixteen_ground_truths_join_with_repetition():
    # Twelve far proposals and sixteen appended boxes: four of the ROIs are copies of one object.
    found = sample(keys(1), proposals(1, near=0, far=48, valid=12), truths(1), 16, "repeat")
    np.testing.assert_array_equal(found.positive[0], np.arange(16) < 4)
    np.testing.assert_array_equal(found.boxes[0, :4], np.tile(strip(1, 0.0), (4, 1)))
    # Of twenty objects only sixteen join: without proposals exactly they can be sampled.
    nothing = proposals(1, valid=0)
    found = sample(keys(1), nothing, truths(20), 16, "repeat")
    assert len(np.unique(np.asarray(found.boxes[0, :, 0]))) == 16
    assert np.all(found.positive)


def low_proposals(images=1):
    """Eight boxes of IoU 2/3 with objects, forty of 10/30: positives at 0.3, not at 0.5."""
    found = proposals(images)
    low = np.tile(strip(8, 0.0) + np.float32([5, 0, 5, 0]), (5, 1))
    return dataclasses.replace(found, boxes=found.boxes.at[:, 8:].set(low))


@pytest.mark.parametrize(("append", "fill"), [(0, "none"), (16, "repeat")])
def test_a_positive_of_low_iou_is_sampled_with_the_negatives_and_stays_positive(append, fill):
    truth = truths(8)
    found = sample(keys(1), low_proposals(), truth, append, fill, 0.3, 0.5)
    iou = np.asarray(found.iou[0])
    # A quarter over the threshold, as if the matcher had it; the rest are the low ones.
    np.testing.assert_array_equal(iou > 0.5, np.arange(16) < 4)
    np.testing.assert_allclose(iou[4:], 1 / 3, rtol=1e-5)
    assert np.all(found.positive)
    assert np.all(found.valid)
    object_ = np.round(np.asarray(found.boxes[0, :, 0]) / 20).astype(int)  # 5 of 20 to the right
    np.testing.assert_array_equal(found.labels[0], object_ % CLASSES)
    np.testing.assert_array_equal(found.targets[0], truth.boxes[0][object_])
    # Off, the matcher alone decides: a quarter of all positives, and no background is there.
    found = sample(keys(1), low_proposals(), truth, append, "none", 0.3)
    np.testing.assert_array_equal(found.valid[0], np.arange(16) < 4)


def test_a_threshold_that_every_positive_passes_changes_nothing():
    one = sample(keys(2), proposals(2), truths(8, 3), 16, "repeat")
    two = sample(keys(2), proposals(2), truths(8, 3), 16, "repeat", 0.5, 0.5)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_an_image_without_objects_gives_background_only():
    for append, fill in ((0, "none"), (16, "repeat")):
        found = sample(keys(1), proposals(1), truths(0), append, fill)
        assert np.all(found.valid)
        assert not np.any(found.positive)
        np.testing.assert_array_equal(found.labels, np.full((1, 16), CLASSES))
        np.testing.assert_array_equal(found.iou, np.zeros((1, 16)))


def test_without_objects_and_proposals_nothing_is_valid_and_all_is_finite():
    for append, fill in ((0, "none"), (16, "repeat")):
        found = sample(keys(1), proposals(1, valid=0), truths(0), append, fill)
        assert not np.any(found.valid)
        assert not np.any(found.positive)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_too_few_negatives_leave_rows_invalid():
    found = sample(keys(1), proposals(1, near=0, far=48, valid=5), truths(2))
    np.testing.assert_array_equal(found.valid[0], np.arange(16) < 7)
    np.testing.assert_array_equal(found.boxes[0, 7:], np.zeros((9, 4)))


@pytest.mark.parametrize(("append", "fill"), [(0, "none"), (16, "repeat")])
def test_the_sample_of_an_image_does_not_depend_on_its_place_in_the_batch(append, fill):
    truth, boxes, order = truths(8, 3, 0), proposals(3), np.array([2, 0, 1])
    turn = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)
    before = sample(keys(3), boxes, truth, append, fill)
    after = sample(keys(3)[order], turn(boxes), turn(truth), append, fill)
    jax.tree.map(np.testing.assert_array_equal, turn(before), after)


def test_another_key_gives_another_sample():
    one, two = (sample(keys(1, seed), proposals(1), truths(8)) for seed in (0, 1))
    assert np.any(one.boxes != two.boxes)
