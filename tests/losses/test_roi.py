"""Losses of the box and mask heads: published weights, values by hand, who gets a gradient."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.losses import roi
from sephjax.types import BoxOutputs, Rois

IMAGES, ROIS, CLASSES = 2, 8, 3
SIZE = jnp.float32([[100, 100], [100, 100]])
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CORNERS, SIDES = np.random.default_rng(2).uniform(10, 40, (2, IMAGES, ROIS, 2))
BOXES = np.float32(np.concatenate([CORNERS, CORNERS + SIDES], axis=-1))


def rois(positives=2, valid=6, shift=2.0):
    """The first are positives, the last are not there."""
    at = np.broadcast_to(np.arange(ROIS), (IMAGES, ROIS))
    positive = at < positives
    return Rois(
        boxes=jnp.asarray(BOXES),
        labels=jnp.asarray(np.where(positive, at % CLASSES, CLASSES).astype(np.int32)),
        matched=jnp.zeros((IMAGES, ROIS), jnp.int32),
        targets=jnp.asarray(BOXES + np.float32(shift)),
        iou=jnp.asarray(np.where(positive, 0.8, 0.1).astype(np.float32)),
        positive=jnp.asarray(positive),
        valid=jnp.asarray(at < valid),
    )


def outputs(kinds=CLASSES, seed=3):
    rng = np.random.default_rng(seed)
    logits = jnp.float32(rng.normal(size=(IMAGES, ROIS, CLASSES + 1)))
    return BoxOutputs(logits, jnp.float32(0.1 * rng.normal(size=(IMAGES, ROIS, kinds, 4))))


def losses(outputs, rois, box_loss="smooth_l1", class_weighting="none"):
    return roi.box_losses(
        outputs,
        rois,
        box_loss={"name": box_loss, "beta": 1.0} if box_loss == "smooth_l1" else {"name": box_loss},
        weights=WEIGHTS,
        class_weighting=class_weighting,
        size=SIZE,
    )


def test_class_weights_are_the_published_ones():
    # EXPERIMENTS 9.
    iou = jnp.float32([0, 0.40, 0.42, 0.45, 0.50, 0.55, 0.60, 1])
    weights = roi.class_weight(iou, "quadratic")
    np.testing.assert_allclose(weights, [1, 1, 0.64, 0.25, 0, 0.25, 1, 1], atol=1e-5)
    weights = roi.class_weight(jnp.float32([0, 0.3, 0.5, 0.75, 1]), "linear")
    np.testing.assert_allclose(weights, [2, 0.8, 0, 1, 2], atol=1e-6)
    np.testing.assert_array_equal(roi.class_weight(iou, "none"), np.ones(8))


def test_the_class_loss_is_the_mean_over_the_valid_rois():
    equal = BoxOutputs(jnp.zeros((IMAGES, ROIS, CLASSES + 1)), outputs().deltas)
    for valid in (1, 6, ROIS):
        found = losses(equal, rois(positives=1, valid=valid))["roi_cls"]
        np.testing.assert_allclose(found, math.log(CLASSES + 1), rtol=1e-6)


def test_a_weighted_class_loss_is_divided_by_the_count_and_not_by_the_weights():
    equal = BoxOutputs(jnp.zeros((IMAGES, ROIS, CLASSES + 1)), outputs().deltas)
    found = losses(equal, rois(positives=2, valid=6), class_weighting="linear")["roi_cls"]
    mean = (2 * 4 * 0.3 + 4 * 4 * 0.4) / 6  # two at IoU 0.8, four at 0.1
    np.testing.assert_allclose(found, mean * math.log(4), rtol=1e-5)


def test_the_box_loss_by_hand_is_divided_by_all_valid_rois():
    # Deltas 0 against a shift of (2, 2): dx = 10 * 2 / w, dy likewise, dw = dh = 0.
    zero = BoxOutputs(outputs().logits, jnp.zeros((IMAGES, ROIS, CLASSES, 4)))
    found = losses(zero, rois(positives=2, valid=6))["roi_box"]
    sides = BOXES[:, :2, 2:] - BOXES[:, :2, :2]
    errors = 10 * 2 / sides
    rows = np.where(errors < 1, 0.5 * errors**2, errors - 0.5)
    np.testing.assert_allclose(found, rows.sum() / (IMAGES * 6), rtol=1e-5)


def test_the_giou_loss_compares_the_box_clipped_to_the_image():
    # Deltas that double the box about its centre; the picture ends at the ROI.
    roi_box = jnp.float32([[[0, 0, 20, 20]]])
    one = Rois(
        boxes=roi_box,
        labels=jnp.int32([[0]]),
        matched=jnp.int32([[0]]),
        targets=roi_box,
        iou=jnp.float32([[1]]),
        positive=jnp.asarray([[True]]),
        valid=jnp.asarray([[True]]),
    )
    deltas = jnp.float32([0, 0, 5 * math.log(2), 5 * math.log(2)])
    grown = BoxOutputs(jnp.zeros((1, 1, 2)), deltas[None, None, None])
    found = {
        side: roi.box_losses(
            grown,
            one,
            box_loss={"name": "giou"},
            weights=WEIGHTS,
            class_weighting="none",
            size=jnp.float32([[side, side]]),
        )["roi_box"]
        for side in (20, 100)
    }
    np.testing.assert_allclose(found[20], 0.0, atol=1e-6)
    # Clipped at 0 only: (0, 0, 30, 30) against 20 x 20, IoU = GIoU = 4/9.
    np.testing.assert_allclose(found[100], 5 / 9, rtol=1e-5)


@pytest.mark.parametrize("name", ["smooth_l1", "giou", "diou", "ciou", "weighted_giou"])
@pytest.mark.parametrize("kinds", [1, CLASSES])
def test_only_the_own_class_of_a_positive_gets_a_box_gradient(name, kinds):
    found = outputs(kinds)
    sampled = rois(positives=3)
    slopes = jax.grad(lambda o: losses(o, sampled, name)["roi_box"])(found)
    moved = np.any(np.asarray(slopes.deltas) != 0, axis=-1)  # [b, r, kinds]
    own = np.zeros_like(moved)
    for image in range(IMAGES):
        for row in range(3):
            own[image, row, int(sampled.labels[image, row]) if kinds > 1 else 0] = True
    np.testing.assert_array_equal(moved, own)
    assert not np.any(np.asarray(slopes.logits))


@pytest.mark.parametrize("name", ["smooth_l1", "giou", "diou", "ciou", "weighted_giou"])
@pytest.mark.parametrize("valid", [0, 6])
def test_without_positives_the_box_loss_is_zero_with_a_zero_gradient(name, valid):
    sampled = rois(positives=0, valid=valid)
    nowhere = jnp.zeros_like(sampled.boxes)  # what is not there may have no area at all
    empty = dataclasses.replace(sampled, boxes=nowhere, targets=nowhere)
    for rows in (sampled, empty):
        value, slopes = jax.value_and_grad(lambda o, rows=rows: losses(o, rows, name)["roi_box"])(
            outputs()
        )
        assert value == 0.0
        assert not np.any(np.asarray(slopes.deltas))
        assert np.isfinite(losses(outputs(), rows, name)["roi_cls"])


def test_rois_that_are_not_there_change_nothing():
    found, sampled = outputs(), rois(valid=6)
    noise = jnp.where(sampled.valid[..., None], found.logits, 50.0)
    assert (
        losses(found, sampled)["roi_cls"]
        == losses(BoxOutputs(noise, found.deltas), sampled)["roi_cls"]
    )


def test_the_mask_loss_is_a_mean_over_pixels_summed_over_positives():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(IMAGES, 3, 4, 4))
    targets = np.float64(rng.uniform(size=logits.shape) > 0.5)
    positive = np.array([[True, True, False], [True, False, False]])
    p = 1 / (1 + np.exp(-logits))
    entropy = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    expected = entropy[positive].mean() * positive.sum()
    found = roi.mask_loss(jnp.float32(logits), jnp.float32(targets), jnp.asarray(positive))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_mask_loss_without_positives_is_zero_with_a_zero_gradient():
    logits = jnp.float32(np.random.default_rng(5).normal(size=(1, 2, 4, 4)))
    value, slopes = jax.value_and_grad(roi.mask_loss)(
        logits, jnp.zeros_like(logits), jnp.zeros((1, 2), bool)
    )
    assert value == 0.0
    assert not np.any(np.asarray(slopes))
