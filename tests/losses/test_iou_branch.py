"""Losses that ask how well a box fits: IoU branch, weighted GIoU, the threshold of labels."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.losses import roi
from sephjax.types import BoxOutputs, Rois

CLASSES = 2
SIZE = jnp.float32([[100, 100]])
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
IOU = np.float32([0.9, 0.4, 0.2, 0.0, 0.7])
# Positive, positive of low IoU, background, background, not there.
POSITIVE = np.array([True, True, False, False, False])
VALID = np.array([True, True, True, True, False])
LOGITS = np.float32([1.5, -0.7, 0.3, -2.0, 9.0])
# EXPERIMENTS 9: GIoU -0.079365 (in tenths of a picture there, pixels here).
BOX, GOAL, GIOU = [0, 0, 40, 40], [20, 20, 60, 60], -0.079365


def rois(positive=POSITIVE, valid=VALID):
    """Five ROIs that are `BOX`; the first object is the ROI itself, the others' is `GOAL`."""
    row = lambda values: jnp.asarray(values)[None]
    goals = np.float32([BOX, GOAL, GOAL, GOAL, GOAL])
    return Rois(
        boxes=row(np.float32([BOX] * 5)),
        labels=row(np.where(positive, 0, CLASSES).astype(np.int32)),
        matched=row(np.zeros(5, np.int32)),
        targets=row(goals),
        iou=row(IOU),
        positive=row(positive),
        valid=row(valid),
    )


def outputs(logits=LOGITS):
    """Deltas of zero, so that the predicted box is the ROI."""
    classes = jnp.zeros((1, 5, CLASSES + 1)).at[:, :, 0].set(1.0)
    return BoxOutputs(classes, jnp.zeros((1, 5, 1, 4)), jnp.asarray(logits)[None])


def losses(outputs, rois, box_loss="giou", **options):
    return roi.box_losses(
        outputs,
        rois,
        box_loss={"name": box_loss},
        weights=WEIGHTS,
        class_weighting="none",
        size=SIZE,
        **options,
    )


def focal(logit, target):
    """EXPERIMENTS 4.5 in double precision, one number at a time."""
    p = 1 / (1 + math.exp(-logit))
    p_t = target * p + (1 - target) * (1 - p)
    entropy = -(target * math.log(p) + (1 - target) * math.log(1 - p))
    return (1 - p_t) ** 2 * (0.25 * target + 0.75 * (1 - target)) * entropy


V1 = functools.partial(roi.iou_loss_v1, negative_weight=0.3)


def test_version_0_learns_the_rois_own_iou_over_all_that_are_there():
    found = losses(outputs(), rois(), iou_loss=roi.iou_loss_v0)["roi_iou"]
    rows = [focal(float(x), float(t)) for x, t in zip(LOGITS[:4], IOU[:4], strict=True)]
    np.testing.assert_allclose(found, np.mean(rows), rtol=1e-5)


@pytest.mark.torch
def test_version_0_is_torchvisions_focal_loss():
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    found = losses(outputs(), rois(), iou_loss=roi.iou_loss_v0)["roi_iou"]
    expected = ops.sigmoid_focal_loss(
        torch.tensor(LOGITS[:4]), torch.tensor(IOU[:4]), alpha=0.25, gamma=2.0, reduction="mean"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5])
def test_version_1_learns_the_giou_of_predicted_boxes_and_weighs_backgrounds(weight):
    branch = functools.partial(roi.iou_loss_v1, negative_weight=weight)
    found = losses(outputs(), rois(), iou_loss=branch)["roi_iou"]
    # The second target is below 0: it is not clamped.
    positives = (focal(1.5, 1.0) + focal(float(LOGITS[1]), GIOU)) / 2
    negatives = (focal(float(LOGITS[2]), 0) + focal(-2.0, 0)) / 2
    np.testing.assert_allclose(found, positives + weight * negatives, rtol=1e-5)
    clamped = (focal(1.5, 1.0) + focal(float(LOGITS[1]), 0)) / 2
    assert abs(positives - clamped) > 1e-3


def test_version_1_follows_the_predicted_box_without_a_gradient_through_it():
    def loss(deltas):
        moved = dataclasses.replace(outputs(), deltas=deltas)
        return losses(moved, rois(), iou_loss=V1)["roi_iou"]

    still = outputs().deltas
    # (10, 10, 5, 5): half a box to the right and down puts the second ROI on its object.
    moved = still.at[0, 1, 0].set(jnp.float32([5, 5, 0, 0]))
    change = (focal(float(LOGITS[1]), 1.0) - focal(float(LOGITS[1]), GIOU)) / 2
    np.testing.assert_allclose(loss(moved) - loss(still), change, atol=1e-5)
    assert not np.any(jax.grad(loss)(still))


@pytest.mark.parametrize("branch", [roi.iou_loss_v0, V1])
def test_the_gradient_is_finite_and_reaches_only_logits_that_are_there(branch):
    loss = lambda x: losses(outputs(x), rois(), iou_loss=branch)["roi_iou"]
    slope = np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(slope != 0, VALID)
    for i in range(4):
        step = 1e-2 * np.eye(5, dtype=np.float32)[i]
        numeric = (loss(LOGITS + step) - loss(LOGITS - step)) / 2e-2
        np.testing.assert_allclose(slope[i], numeric, atol=2e-4)
    extreme = jnp.float32([90, -90, 90, -90, 0])
    assert np.all(np.isfinite(jax.grad(loss)(extreme)))


@pytest.mark.parametrize("branch", [roi.iou_loss_v0, V1])
def test_without_rois_the_branch_has_no_loss_and_no_gradient(branch):
    nothing = rois(np.zeros(5, bool), np.zeros(5, bool))
    loss = lambda x: losses(outputs(x), nothing, iou_loss=branch)["roi_iou"]
    value, slope = jax.value_and_grad(loss)(jnp.asarray(LOGITS))
    assert value == 0.0
    assert not np.any(slope)


def test_without_positives_version_1_has_its_backgrounds():
    found = losses(outputs(), rois(np.zeros(5, bool)), iou_loss=V1)["roi_iou"]
    rows = [focal(float(x), 0) for x in LOGITS[:4]]
    np.testing.assert_allclose(found, 0.3 * np.mean(rows), rtol=1e-5)


def test_without_a_branch_there_is_no_term():
    assert set(losses(outputs(), rois())) == {"roi_cls", "roi_box"}


def test_a_weighted_giou_counts_a_roi_of_low_iou_by_it():
    plain = losses(outputs(), rois())["roi_box"]
    weighted = losses(outputs(), rois(), "weighted_giou")["roi_box"]
    # The first predicted box is its object; the second ROI has IoU 0.4. Four ROIs are there.
    np.testing.assert_allclose(plain, (1 - GIOU) / 4, rtol=1e-5)
    np.testing.assert_allclose(weighted, 0.4 * (1 - GIOU) / 4, rtol=1e-5)


@pytest.mark.parametrize(("iou", "weight"), [(0.3, 0.3), (0.5, 0.5), (0.50001, 1.0), (0.8, 1.0)])
def test_a_weighted_giou_is_a_plain_one_above_a_half(iou, weight):
    rows = dataclasses.replace(rois(), iou=jnp.full((1, 5), iou, jnp.float32))
    value, slopes = jax.value_and_grad(lambda o: losses(o, rows, "weighted_giou")["roi_box"])(
        outputs()
    )
    plain, expected = jax.value_and_grad(lambda o: losses(o, rows)["roi_box"])(outputs())
    np.testing.assert_allclose(value, weight * plain, rtol=1e-5)
    assert np.any(slopes.deltas)
    np.testing.assert_allclose(slopes.deltas, weight * expected.deltas, rtol=1e-4, atol=1e-7)


def test_a_positive_of_low_iou_is_background_to_the_class_loss_alone():
    was, now = losses(outputs(), rois()), losses(outputs(), rois(), positive_iou=0.5)
    sum_ = math.log(math.exp(1.0) + CLASSES)
    # Class 0 has logit 1, all others 0: an entropy of `sum_` - 1 or `sum_`.
    np.testing.assert_allclose(was["roi_cls"], sum_ - 2 / 4, rtol=1e-6)
    np.testing.assert_allclose(now["roi_cls"], sum_ - 1 / 4, rtol=1e-6)
    assert now["roi_box"] == was["roi_box"] > 0


def test_the_threshold_of_labels_is_itself_background():
    rows = dataclasses.replace(rois(), iou=jnp.full((1, 5), 0.5, jnp.float32))
    found = losses(outputs(), rows, positive_iou=0.5)["roi_cls"]
    np.testing.assert_allclose(found, math.log(math.exp(1.0) + CLASSES), rtol=1e-6)
