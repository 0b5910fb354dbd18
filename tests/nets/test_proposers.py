"""Norms of the RPN's levels and RetinaNet as proposal generator, in a narrow detector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import build
from sephjax.nets.functional import flat_paths
from tests import narrow
from tests.ops.reference import iou

LEVELS = ("p2", "p3", "p4", "p5", "p6")
RULE = {"nms": 0.7, "pre": 60, "post": 30, "shrink": 2}
TEST = {"test_pre": 50, "test_score": 0.5, "test_nms": 0.5, "test_post": 12}
KINDS = {
    "norms": {"rpn.norm": "evonorm_s0"},
    "retinanet": {
        "rpn.name": "retinanet",
        "rpn.norm": "evonorm_s0",
        "rpn.samples": 0,
        "rpn.normalizer": "positives",
        "rpn.class_loss": {"name": "focal", "alpha": 0.25, "gamma": 2.0},
        "rpn.box_loss": {"name": "giou"},
        "rpn.proposals": {"name": "retinanet", **RULE, **TEST},
    },
}
# So low that every level has positives, for only these teach the norms of the box tower.
MATCHER = {"name": "max_iou", "low": 0.02, "high": 0.02, "low_quality": "none", "min_iou": 0.0}
SIZES = [(50, 70), (64, 96)]


def made(kind):
    config = narrow.config(**KINDS[kind], **{"rpn.matcher": MATCHER})
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    for part in ("rpn", "box_head"):  # boxes move by little
        params[part]["deltas"]["kernel"] *= 0.1
    return config, model, params, frozen


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_finite_without_objects_and_every_tensor_gets_a_gradient(kind):
    config, model, params, frozen = made(kind)
    batch = narrow.batch(SIZES, [0, 3])
    terms, outputs, slopes = narrow.learn(build.losses(config), model, params, frozen, batch)
    assert all(np.isfinite(value) and value > 0 for value in terms.values()), terms
    assert [name for name, slope in slopes.items() if not np.all(np.isfinite(slope))] == []
    assert [name for name, slope in slopes.items() if not np.any(slope)] == []
    towers = ("rpn",) if kind == "norms" else ("rpn/classify", "rpn/refine")
    for tower in towers:
        assert {f"{tower}/norm0_{level}/gamma" for level in LEVELS} <= slopes.keys()
    if kind == "retinanet":  # the same outputs by the parent's loss
        negative = outputs.rpn_targets.negative
        assert jnp.sum(negative[0]) > 300  # all of them, not a sample
        size = jnp.float32(SIZES)
        was = build.losses(narrow.config())(outputs, size)["loss/rpn_cls"]
        assert abs(was - terms["loss/rpn_cls"]) > 0.1 * was


def test_without_a_norm_the_rpn_has_none_and_its_names_are_the_old_ones():
    params, _ = build.model(narrow.config("frozen_bn"), narrow.CLASSES).abstract
    expected = {f"{n}/{k}" for n in ("conv0", "logits", "deltas") for k in ("kernel", "bias")}
    assert {path for path, _ in flat_paths(params["rpn"])} == expected


def test_retinanets_test_proposals_are_its_own_best_detections():
    _, model, params, frozen = made("retinanet")
    batch = jax.tree.map(jnp.asarray, narrow.batch(SIZES, [0, 3]))
    run = lambda p, f, b: model.apply(p, f, b, method="candidates")[1]
    found = jax.device_get(narrow.jit(run)(params, frozen, batch))
    assert found.boxes.shape == (2, 12, 4)
    for boxes, scores, valid, (height, width) in zip(
        found.boxes, found.scores, found.valid, SIZES, strict=True
    ):
        assert np.sum(valid) >= 5
        boxes, scores = boxes[valid], scores[valid]
        assert np.all(scores > 0)  # a probability over a half
        assert np.all(np.diff(scores) <= 0)  # ranked over the levels
        overlap = iou(boxes[:, None], boxes[None])
        assert np.max(overlap[~np.eye(len(boxes), dtype=bool)]) < 0.5
        assert np.all(boxes >= 0)
        assert np.all(boxes <= [width, height, width, height])
