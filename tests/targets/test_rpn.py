"""Sampled anchors: quotas, images without objects, shared samples, keys by image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sephjax.ops import matchers
from sephjax.targets import rpn
from sephjax.types import Truth

SIDE, CELLS = 10.0, 30
AXIS = np.arange(CELLS) * SIDE
X, Y = np.meshgrid(AXIS, AXIS)
ANCHORS = jnp.float32(np.stack([X, Y, X + SIDE, Y + SIDE], axis=-1).reshape(-1, 4))  # 900
MATCHER = functools.partial(matchers.max_iou, low=0.3, high=0.7, low_quality="none")


def truths(*counts):
    """The first `count` anchors of each image are objects."""
    rows = np.arange(max(counts))[None] < np.array(counts)[:, None]
    boxes = np.broadcast_to(np.asarray(ANCHORS)[: max(counts)], (*rows.shape, 4))
    return Truth(
        jnp.float32(np.where(rows[..., None], boxes, 0)),
        jnp.zeros(rows.shape, jnp.int32),
        jnp.asarray(rows),
        None,
    )


@functools.partial(jax.jit, static_argnames=("group", "samples"))
def sample(keys, truth, inside, group=1, samples=64):
    return rpn.rpn_targets(
        keys,
        ANCHORS,
        inside,
        truth,
        matcher=MATCHER,
        samples=samples,
        positive_fraction=0.5,
        group=group,
    )


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def everywhere(images):
    return jnp.ones((images, CELLS * CELLS), bool)


def test_each_image_has_its_quota_of_positives_and_the_rest_are_negatives():
    found = sample(keys(4), truths(5, 32, 100, 900), everywhere(4))
    np.testing.assert_array_equal(found.positive.sum(axis=1), [5, 32, 32, 32])
    # The last image has no negative anchor.
    np.testing.assert_array_equal(found.negative.sum(axis=1), [59, 32, 32, 0])
    assert not np.any(found.positive & found.negative)


def test_positives_are_objects_and_carry_their_box():
    found = sample(keys(2), truths(20, 3), everywhere(2))
    for image, count in enumerate((20, 3)):
        at = np.flatnonzero(found.positive[image])
        np.testing.assert_array_equal(at, np.arange(count))
        np.testing.assert_array_equal(found.boxes[image][at], ANCHORS[:count])
        assert np.flatnonzero(found.negative[image]).min() >= count


def test_an_image_without_objects_gives_negatives_only():
    found = sample(keys(2), truths(0, 4), everywhere(2))
    np.testing.assert_array_equal(found.positive.sum(axis=1), [0, 4])
    np.testing.assert_array_equal(found.negative.sum(axis=1), [64, 60])
    assert np.all(np.isfinite(found.boxes))


def test_anchors_outside_the_picture_are_never_sampled():
    inside = everywhere(2).at[:, 10:850].set(False)
    found = sample(keys(2), truths(40, 40), inside)
    assert not np.any((found.positive | found.negative) & ~inside)
    np.testing.assert_array_equal(found.positive.sum(axis=1), [10, 10])
    np.testing.assert_array_equal(found.negative.sum(axis=1), [50, 50])  # all there are


def test_four_images_share_a_sample_of_256():
    # EXPERIMENTS 3.5: at most 128 positives and 256 anchors over the four images together.
    found = sample(keys(8), truths(100, 0, 80, 1, 3, 0, 0, 2), everywhere(8), 4, 256)
    positive = np.asarray(found.positive).reshape(2, -1).sum(axis=1)
    negative = np.asarray(found.negative).reshape(2, -1).sum(axis=1)
    np.testing.assert_array_equal(positive, [128, 5])
    np.testing.assert_array_equal(negative, [128, 251])
    assert np.all(np.asarray(found.negative).sum(axis=1) > 0)


def test_a_batch_smaller_than_the_group_shares_one_sample():
    found = sample(keys(2), truths(3, 3), everywhere(2), 4, 256)
    assert (found.positive | found.negative).sum() == 256


def test_the_sample_of_an_image_does_not_depend_on_its_place_in_the_batch():
    truth, order = truths(100, 5, 0), np.array([2, 0, 1])
    turned = jax.tree.map(lambda leaf: leaf[order], truth)
    before = sample(keys(3), truth, everywhere(3))
    after = sample(keys(3)[order], turned, everywhere(3))
    for name in ("positive", "negative"):
        np.testing.assert_array_equal(getattr(before, name)[order], getattr(after, name))


def test_another_key_gives_another_sample():
    one, two = (sample(keys(1, seed), truths(100), everywhere(1)) for seed in (0, 1))
    assert np.any(one.positive != two.positive)
    assert np.any(one.negative != two.negative)


def test_no_quota_takes_every_anchor_that_is_not_ignored():
    inside = everywhere(2).at[:, 850:].set(False)
    found = sample(keys(2), truths(100, 0), inside, samples=0)
    np.testing.assert_array_equal(found.positive.sum(axis=1), [100, 0])
    np.testing.assert_array_equal(found.negative.sum(axis=1), [750, 850])
    np.testing.assert_array_equal(found.boxes[0][:100], ANCHORS[:100])
