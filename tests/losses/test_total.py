"""The terms of the loss and their sum."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.losses import roi as roi_losses
from sephjax.losses import total
from sephjax.types import BoxOutputs, Rois, RpnOutputs, RpnTargets, TrainOutputs

SCALES = {
    "rpn_cls": 1.0,
    "rpn_box": 2.0,
    "roi_cls": 3.0,
    "roi_box": 4.0,
    "roi_iou": 6.0,
    "mask": 5.0,
}
RPN = {
    "box_loss": {"name": "smooth_l1", "beta": 0.0},
    "weights": (1.0, 1.0, 1.0, 1.0),
    "samples": 2,
    "normalizer": "images_times_samples",
}
ROI = {
    "box_loss": {"name": "smooth_l1", "beta": 0.0},
    "weights": (10.0, 10.0, 5.0, 5.0),
    "class_weighting": "none",
}


def outputs(positives: int, mask_sum):
    """One image with two anchors and three ROIs; every logit and delta is 0."""
    box = jnp.float32([0, 0, 10, 10])
    anchors = jnp.tile(box[None], (2, 1))
    rois = jnp.tile(box[None, None], (1, 3, 1))
    positive = jnp.asarray([[i < positives for i in range(3)]])
    return TrainOutputs(
        anchors=anchors,
        rpn=RpnOutputs(jnp.zeros((1, 2)), jnp.zeros((1, 2, 4))),
        # dx = 0.1 for the first anchor.
        rpn_targets=RpnTargets(
            anchors[None] + jnp.float32([1, 0, 1, 0])[None, None],
            jnp.asarray([[True, False]]),
            jnp.asarray([[False, True]]),
        ),
        rois=Rois(
            boxes=rois,
            labels=jnp.where(positive, 0, 1).astype(jnp.int32),
            matched=jnp.zeros((1, 3), jnp.int32),
            targets=rois + jnp.float32([0, 2, 0, 2])[None, None],  # dy = 10 * 0.2
            iou=jnp.ones((1, 3)),
            positive=positive,
            valid=jnp.ones((1, 3), bool),
        ),
        boxes=BoxOutputs(jnp.zeros((1, 3, 2)), jnp.zeros((1, 3, 1, 4))),
        mask_sum=mask_sum,
    )


def terms(positives, mask_sum):
    size = jnp.float32([[100, 100]])
    return total.total_loss(outputs(positives, mask_sum), size, rpn=RPN, roi=ROI, scales=SCALES)


def test_every_term_is_scaled_and_the_loss_is_their_sum():
    found = {name: float(value) for name, value in terms(2, jnp.float32(1.4)).items()}
    expected = {
        "loss/rpn_cls": np.log(2),
        "loss/rpn_box": 2 * 0.1 / 2,
        "loss/roi_cls": 3 * np.log(2),
        "loss/roi_box": 4 * 2 * 2.0 / 3,
        "loss/mask": 5 * 1.4 / 2,  # a mean over the two positives
    }
    expected["loss"] = sum(expected.values())
    assert found == pytest.approx(expected, rel=1e-5)


def test_every_stage_of_a_cascade_has_terms_of_its_own():
    first = outputs(2, jnp.float32(1.4))
    cascaded = dataclasses.replace(first, later=((outputs(1, None).rois, first.boxes),))
    later = ((20.0, 20.0, 10.0, 10.0),)
    size = jnp.float32([[100, 100]])
    found = total.total_loss(cascaded, size, rpn=RPN, roi=ROI, scales=SCALES, later=later)
    expected = {
        "loss/rpn_cls": np.log(2),
        "loss/rpn_box": 2 * 0.1 / 2,
        "loss/roi_cls_stage0": 3 * np.log(2),
        "loss/roi_box_stage0": 4 * 2 * 2.0 / 3,
        "loss/roi_cls_stage1": 3 * np.log(2),
        "loss/roi_box_stage1": 4 * 1 * 4.0 / 3,  # one positive, twice the weight
        "loss/mask": 5 * 1.4 / 2,  # of the first stage's two positives
    }
    expected["loss"] = sum(expected.values())
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)


def test_an_iou_branch_is_part_of_the_sum():
    parts = outputs(2, None)
    parts = dataclasses.replace(
        parts, boxes=dataclasses.replace(parts.boxes, iou=jnp.zeros((1, 3)))
    )
    options = ROI | {"iou_loss": roi_losses.iou_loss_v0}
    found = total.total_loss(parts, jnp.float32([[100, 100]]), rpn=RPN, roi=options, scales=SCALES)
    # IoU 1 and logit 0: a quarter of a half squared of log 2.
    assert found["loss/roi_iou"] == pytest.approx(6 * 0.25 * 0.25 * np.log(2))
    rest = [value for name, value in found.items() if name != "loss"]
    assert found["loss"] == pytest.approx(sum(float(value) for value in rest))


def test_without_a_mask_head_there_is_no_mask_term():
    assert set(terms(2, None)) == {
        "loss",
        "loss/rpn_cls",
        "loss/rpn_box",
        "loss/roi_cls",
        "loss/roi_box",
    }


def test_without_positives_box_and_mask_are_zero():
    found = terms(0, jnp.float32(0))
    assert found["loss/roi_box"] == 0.0
    assert found["loss/mask"] == 0.0
    assert np.isfinite(found["loss"])
