"""targets/cascade.py: labels at a stage's IoU by hand, appended ground truths, what is invalid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.ops import matchers
from sephjax.targets import cascade
from sephjax.types import Truth
from tests.targets.test_roi import CLASSES, FAR, keys, strip, truths

SHIFTS = np.array([0, 1, 2, 3, 5], np.float32)  # of a 10 x 10 box: IoU (10 - d) / (10 + d)
IOUS = [1, 9 / 11, 8 / 12, 7 / 13, 5 / 15]


@functools.partial(jax.jit, static_argnames=("iou", "append"))
def stage(keys, boxes, valid, truth, iou=0.6, append=0):
    matcher = functools.partial(matchers.max_iou, low=iou, high=iou, low_quality="none")
    return cascade.next_rois(
        keys, boxes, valid, truth, matcher=matcher, append=append, classes=CLASSES
    )


def shifted(images=1):
    """Five boxes ever farther from the second object, then one far from all."""
    boxes = strip(2, 0.0)[1] + SHIFTS[:, None] * np.float32([1, 0, 1, 0])
    boxes = np.concatenate([boxes, strip(1, FAR)])
    return jnp.asarray(np.broadcast_to(boxes, (images, *boxes.shape))), jnp.ones((images, 6), bool)


@pytest.mark.parametrize(("iou", "positives"), [(0.5, 4), (0.6, 3), (0.7, 2)])
def test_a_box_is_foreground_from_the_iou_of_the_stage_on(iou, positives):
    boxes, valid = shifted()
    found = stage(keys(1), boxes, valid, truths(2), iou)
    np.testing.assert_array_equal(found.positive[0], np.arange(6) < positives)
    np.testing.assert_array_equal(found.labels[0], np.where(np.arange(6) < positives, 1, CLASSES))
    np.testing.assert_allclose(found.iou[0], [*IOUS, 0], rtol=1e-5)
    np.testing.assert_array_equal(found.boxes, boxes)  # all of them, in their order
    assert np.all(found.valid)
    own = np.asarray(found.targets[0])[np.asarray(found.positive[0])]
    np.testing.assert_array_equal(own, np.tile(strip(2, 0.0)[1:], (positives, 1)))


def test_eight_ground_truths_join_at_the_end_repeated_mirrored():
    boxes, valid = shifted()
    found = stage(keys(1), boxes, valid, truths(3), append=8)
    assert found.boxes.shape == (1, 14, 4)
    objects = np.asarray(found.boxes[0, 6:, 0]) / 20
    assert sorted(objects[:3]) == [0, 1, 2]
    np.testing.assert_array_equal(objects, objects[:3][[0, 1, 2, 2, 1, 0, 0, 1]])
    np.testing.assert_array_equal(found.labels[0, 6:], objects)
    np.testing.assert_array_equal(found.iou[0, 6:], np.ones(8))
    assert np.all(found.positive[0, 6:])
    drawn = stage(keys(1, seed=3), boxes, valid, truths(20), append=8)
    assert len(np.unique(drawn.boxes[0, 6:, 0])) == 8
    other = stage(keys(1, seed=4), boxes, valid, truths(20), append=8)
    assert np.any(drawn.boxes[0, 6:] != other.boxes[0, 6:])


def test_an_image_without_objects_has_background_and_nothing_appended():
    found = stage(keys(1), *shifted(), truths(0), append=8)
    np.testing.assert_array_equal(found.valid[0], np.arange(14) < 6)
    assert not np.any(found.positive)
    np.testing.assert_array_equal(found.labels, np.full((1, 14), CLASSES))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_padding_and_boxes_without_area_stay_out():
    boxes, valid = shifted()
    boxes = boxes.at[0, 1, 2].set(boxes[0, 1, 0])
    found = stage(keys(1), boxes, valid.at[0, 0].set(False), truths(2))
    np.testing.assert_array_equal(found.valid[0], [False, False, True, True, True, True])
    np.testing.assert_array_equal(found.positive[0], np.arange(6) == 2)
    np.testing.assert_array_equal(found.boxes[0, :2], np.zeros((2, 4)))
    empty = stage(keys(1), boxes * 0, valid & False, truths(0), append=8)
    assert not np.any(empty.valid)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(empty))


def test_an_image_does_not_depend_on_its_place_in_the_batch():
    (boxes, valid), order = shifted(3), np.array([2, 0, 1])
    truth = truths(8, 3, 0)
    turn = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)
    turned: Truth = turn(truth)
    before = stage(keys(3), boxes, valid, truth, append=8)
    after = stage(keys(3)[order], boxes, valid, turned, append=8)
    jax.tree.map(np.testing.assert_array_equal, turn(before), after)
