"""Operators against literal values in the tests of detectron2, axlearn and TF Model Garden.

The values alone are taken, with the file that publishes them. axlearn and Model Garden order
corners (y1, x1, y2, x2); here they are turned.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.losses import elementwise
from sephjax.ops import anchors as anchor_ops
from sephjax.ops import boxes as box_ops
from sephjax.ops import matchers
from sephjax.ops import nms as nms_ops
from sephjax.ops import roi_align as roi_ops


def turned(boxes):
    return jnp.asarray(boxes, jnp.float32)[..., jnp.array([1, 0, 3, 2])]


def labels(match):
    return np.where(match.positive, 1, np.where(match.negative, 0, -1)).tolist()


# axlearn vision/spatial_transform_ops_test.py, RoIAlignTest: no half pixel; map, boxes, size, bins.
AXLEARN_ALIGN = [
    (np.arange(25).reshape(5, 5), [0, 0, 4, 4], 1, [[6, 8], [16, 18]]),
    (np.arange(1, 17).reshape(4, 4), [1, 1, 2, 2], 2, [[8.5]]),
    (np.arange(1, 5).reshape(2, 2), [0, 0, 1, 1], 1, [[2.5]]),
    (
        np.arange(1, 5).reshape(2, 2),
        [0, 0, 1, 1],
        1,
        np.array([[9, 11, 13], [13, 15, 17], [17, 19, 21]]) / 6,
    ),
    (np.arange(1, 10).reshape(3, 3), [0, 0, 2, 2], 1, [[3, 4], [6, 7]]),
    (np.arange(1, 10).reshape(3, 3), [0, 0, 1, 1], 1, [[2, 2.5], [3.5, 4]]),
    (np.arange(16).reshape(4, 4), [0, 0, 2, 2], 1, [[2.5, 3.5], [6.5, 7.5]]),
    (np.arange(16).reshape(4, 4), [0, 0, 2, 3], 1, [[2.75, 4.25], [6.75, 8.25]]),
]


@pytest.mark.parametrize(("image", "box", "ratio", "expected"), AXLEARN_ALIGN)
def test_roi_align_gives_axlearns_values(image, box, ratio, expected):
    found = roi_ops.roi_align(
        [jnp.asarray(image, jnp.float32)[None, :, :, None]],
        turned([[box]]),
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones((1, 1), bool),
        strides=(1.0,),
        output_size=np.shape(expected),
        sampling_ratio=ratio,
        aligned=False,
    )
    np.testing.assert_allclose(found[0, 0, :, :, 0], expected, rtol=1e-6)


def test_levels_are_axlearns():
    # spatial_transform_ops_test.py, BoxLevelsTest: canonical level 2 of 0..3.
    boxes = [[0, 0, side, side] for side in (111, 113, 223, 225, 449)]
    boxes += [[50, 60, 40, 80], [50, 60, 40, 30]]
    found = roi_ops.assign_levels(turned(boxes), canonical_level=2, min_level=0, max_level=3)
    assert found.tolist() == [0, 1, 1, 2, 3, 0, 0]


def test_low_quality_matches_are_axlearns():
    # axlearn vision/matchers_test.py, test_allow_low_quality_matches: thresholds .3 and .6. Their
    # 1, 0, -1 are positive, ignored, negative.
    anchors = [
        [0, 0.5, 0.5, 0.85],
        [0, 0, 0.4, 0.5],
        [0.5, 0.5, 0.55, 1],
        [0, 0.5, 0.1, 1],
        [0.5, 0, 0.75, 0.5],
        [0, 0.5, 0.2, 1],
        [0, 0.5, 0.1, 1],
        [0, 0, 0.05, 0.5],
    ]
    boxes = [[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1]]
    match = matchers.max_iou(
        turned(anchors), turned(boxes), jnp.ones(4, bool), low=0.3, high=0.6, low_quality="all"
    )
    assert match.index.tolist() == [1, 0, 3, 1, 2, 1, 1, 0]
    assert labels(match) == [1, 1, 1, 0, 1, -1, 0, 0]


def test_high_quality_matches_are_axlearns():
    # test_only_high_quality_matches, its two images; padded boxes are not there.
    anchors = turned([[0, 0, 1, 0.3], [0, 0.5, 1, 1]])
    images = [
        ([[0, 0.26, 1, 1], [0, 0, 0, 0], [0, 0.5, 1, 1], [0, 0, 0, 0]], [0, 2], [0, 1]),
        ([[0, 0, 0, 0], [0, 0, 0.02, 0.02], [0, 0, 0, 0], [0, 0.3, 1, 0.8]], [1, 3], [0, -1]),
    ]
    for boxes, index, expected in images:
        there = jnp.asarray([any(box) for box in boxes])
        match = matchers.max_iou(
            anchors, turned(boxes), there, low=0.2, high=0.5, low_quality="none"
        )
        assert match.index.tolist() == index
        # Their threshold .01, below which an anchor is neither, has no counterpart: it is negative.
        assert labels(match) == expected


def test_a_matrix_is_matched_as_in_model_garden():
    # official/vision/ops/box_matcher_test.py: positive from .5, negative below .2.
    iou = jnp.array([[0.04, 0, 0, 0], [0, 0, 1.0, 0]])
    match = matchers.max_iou_labels(iou, jnp.ones(4, bool), low=0.2, high=0.5, low_quality="none")
    assert labels(match) == [0, 1]
    assert match.index.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("size", "ratios", "stride", "shape", "expected"),
    [
        (
            64,
            (1.0,),
            32,
            (2, 2),
            [[-16, -16, 48, 48], [-16, 16, 48, 80], [16, -16, 80, 48], [16, 16, 80, 80]],
        ),
        (
            128,
            (1.0, 4.0, 0.25),
            64,
            (1, 1),
            [[-32, -32, 96, 96], [0, -96, 64, 160], [-96, 0, 160, 64]],
        ),
    ],
)
def test_anchors_are_those_of_model_garden(size, ratios, stride, shape, expected):
    # official/vision/ops/anchor_generator_test.py, levels 5 and 6 of a 64 x 64 image; its ratio is
    # width over height, and its anchors stand at the centres of cells.
    cells = anchor_ops.cell_anchors(
        size=size, ratios=ratios, ratio_is="width_over_height", rounded=False
    )
    found = anchor_ops.grid_anchors(cells, shape=shape, stride=(stride, stride), offset=0.5)
    np.testing.assert_allclose(found, turned(expected), atol=1e-4)
    clipped = box_ops.clip(found, jnp.array([64, 64]))
    np.testing.assert_allclose(clipped, np.clip(turned(expected), 0, 64), atol=1e-4)


def test_nms_keeps_what_axlearn_keeps():
    # axlearn vision/nms_test.py.
    boxes = turned([[1, 10, 2, 20], [1.1, 10.1, 2.1, 20.1], [30, 50, 40, 60]])
    index, valid = nms_ops.nms(
        boxes, jnp.array([0.9, 0.8, 0.7]), jnp.ones(3, bool), threshold=0.5, max_output=3
    )
    assert index.tolist()[:2] == [0, 2]
    assert valid.tolist() == [True, True, False]


def test_the_huber_loss_of_an_rpn_box_is_that_of_model_garden():
    # official/vision/losses/maskrcnn_losses_test.py: targets (0, 0, 1, 1), outputs (.2, .2, 1.4,
    # 1.4), delta 1/9: .027093, to 1e-4 there. Keras' Huber loss is delta times smooth L1.
    error = jnp.array([0.2, 0.2, 1.4, 1.4]) - jnp.array([0.0, 0, 1, 1])
    found = jnp.mean(elementwise.smooth_l1(error, beta=1 / 9)) / 9
    np.testing.assert_allclose(found, 0.027093, atol=1e-4)


def test_the_class_loss_of_model_garden():
    # The same file, testFastrcnnClassLossTopK: mean over four boxes; smaller than all but the last.
    logits = jnp.array([[100.0, 0, 0]] * 3 + [[0.0, 1, 0]])
    found = elementwise.softmax_cross_entropy(logits, jnp.array([0, 0, 0, 2]))
    np.testing.assert_allclose(jnp.mean(found), 0.387861, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(found) / 2, 0.775718, atol=1e-5)


def test_average_precision_with_a_crowd_is_that_of_model_garden():
    # official/vision/evaluation/instance_metrics_test.py, test_instance_metrics_with_crowd: the
    # first detection lies in a crowd and does not count; the second has an IoU of .5 or more. AP 1.
    pytest.importorskip("pycocotools")
    from sephjax.evaluation import coco

    xywh = lambda y1, x1, y2, x2: [x1, y1, x2 - x1, y2 - y1]
    truth = {
        "images": [{"id": 1, "height": 20, "width": 20}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": xywh(0, 1, 4, 10), "iscrowd": 1},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": xywh(0, 5, 4, 11), "iscrowd": 0},
        ],
    }
    rows = [
        {"image_id": 1, "category_id": 1, "bbox": xywh(0, 0, 4, 4), "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": xywh(1, 5, 5, 11), "score": 0.8},
    ]
    for backend in ("pycocotools", "faster"):
        assert coco.score(truth, rows, "bbox", backend=backend)["AP50"] == pytest.approx(1.0)
