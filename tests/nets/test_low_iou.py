"""Row 15's parts in a narrow detector: they are active, learn, and leave the rest as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs._chain import apply
from sephjax import build, recipe
from sephjax.errors import UserError
from sephjax.types import Proposals
from tests import narrow

SIZES = [(50, 70), (64, 96)]
SAMPLER = {
    "balance_positives": True,
    "balance_negatives": True,
    "fill": "repeat",
    "positive_groups": "iou",
    "positive_bins": 5,
    "bins": 7,
}
CHANGES = {
    "anchors.sizes": (16, 24, 32, 48),
    "rpn.levels": ("p3", "p4", "p5", "p6"),
    # So many and so near their anchors that some overlap every object.
    "rpn.proposals": narrow.PROPOSALS | {"nms": 0.95, "train_pre": 300, "train_post": 300},
    "roi.levels": ("p2",),
    "roi.pooler": {"name": "crop_max", "bins": (1, 1)},
    "roi.matcher.low": 0.2,
    "roi.matcher.high": 0.2,
    "roi.positive_iou": 0.5,
    "roi.samples": 48,
    "roi.sampler": SAMPLER,
    "roi.head": {
        "name": "separate_v2",
        "fc_dims": (32,),
        "conv_dims": (8, 8),
        "norm": "evonorm_s0",
    },
    "roi.class_agnostic": True,
    "roi.class_weight": "linear",
    "roi.box_loss": {"name": "weighted_giou"},
    "roi.iou_branch": {"name": "v1", "negative_weight": 0.5},
    "mask.enabled": False,
    "test.iou_score": "product",
}


def made():
    config = low()
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    for part in ("rpn", "box_head"):  # boxes move by little
        params[part]["deltas"]["kernel"] *= 0.01
    return config, model, params, frozen


def low(**changes):
    """The narrow config with all of them, but for `changes`."""
    return apply(apply(narrow.config("frozen_bn"), CHANGES, "all"), changes, "a test")


@pytest.fixture(scope="module")
def learned():
    config, model, params, frozen = made()
    batch = narrow.batch(SIZES, [0, 3])
    return config, *narrow.learn(build.losses(config), model, params, frozen, batch)


def test_the_loss_is_finite_without_objects_and_every_tensor_gets_a_gradient(learned):
    _, terms, outputs, slopes = learned
    assert set(terms) == {"loss", *(f"loss/{x}" for x in ("rpn_cls", "rpn_box", "roi_cls"))} | {
        "loss/roi_box",
        "loss/roi_iou",
    }
    assert all(np.isfinite(value) for value in terms.values()), terms
    assert [name for name, slope in slopes.items() if not np.all(np.isfinite(slope))] == []
    assert [name for name, slope in slopes.items() if not np.any(slope)] == []
    assert {"box_head/iou/kernel", "box_head/overlap/conv0/kernel"} <= slopes.keys()
    assert outputs.boxes.iou.shape == (2, 48)


def test_the_rpn_reads_its_levels_and_the_rois_the_finest(learned):
    _, _, outputs, slopes = learned
    cells = [8 * 12, 4 * 6, 2 * 3, 1 * 2]  # of p3 to p6
    assert outputs.rpn.logits.shape == (2, 3 * sum(cells))
    assert outputs.anchors.shape == (3 * sum(cells), 4)
    assert np.any(slopes["fpn/output2/kernel"])  # which only ROIs read


def test_low_positives_are_sampled_and_teach_the_box(learned):
    _, _, outputs, _ = learned
    rois = jax.device_get(outputs.rois)
    low = rois.positive & (rois.iou <= 0.5)
    assert not np.any(rois.positive[0])
    assert np.sum(low[1]) >= 3
    assert np.sum(rois.positive[1] & ~low[1]) >= 3


@pytest.mark.parametrize(
    ("term", "change"),
    [
        ("roi_cls", {"roi.positive_iou": 0.0}),
        ("roi_cls", {"roi.class_weight": "none"}),
        ("roi_box", {"roi.box_loss": {"name": "giou"}}),
        ("roi_iou", {"roi.iou_branch": {"name": "v0"}}),
        ("roi_iou", {"roi.iou_branch": {"name": "v1", "negative_weight": 0.3}}),
    ],
)
def test_each_choice_of_a_loss_changes_its_term_and_no_other(learned, term, change):
    _, was, outputs, _ = learned
    now = build.losses(low(**change))(outputs, jnp.float32(SIZES))
    changed = {name for name, value in was.items() if abs(now[name] - value) > 1e-3 * abs(value)}
    assert changed == {"loss", f"loss/{term}"}


def test_without_a_branch_the_loss_is_the_rest(learned):
    _, was, outputs, _ = learned
    off = low(**{"roi.iou_branch": {"name": "none"}, "test.iou_score": "none"})
    now = build.losses(off)(outputs, jnp.float32(SIZES))
    assert "loss/roi_iou" not in now
    np.testing.assert_allclose(now["loss"], was["loss"] - was["loss/roi_iou"], rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"roi.sampler": SAMPLER | {"positive_groups": "truth"}},
        {"roi.sampler": SAMPLER | {"bins": 1}},
        {"roi.sampler": SAMPLER | {"positive_bins": 1}},
        {"roi.positive_iou": 0.0},
    ],
)
def test_each_choice_of_the_sampler_samples_others(change):
    rng = np.random.default_rng(0)
    truth = np.float32([[10, 10, 40, 40], [50, 20, 90, 60]])
    shifts = np.tile(rng.uniform(-25, 25, (400, 2)), 2) + rng.uniform(-5, 5, (400, 4))
    boxes = truth[rng.integers(0, 2, 400)] + shifts.astype(np.float32)
    batch = narrow.batch([(64, 96)], [2], most=2)
    truths = dataclasses.replace(
        jax.tree.map(jnp.asarray, batch.truth), boxes=jnp.asarray(truth[None]), masks=None
    )
    proposals = Proposals(boxes[None], jnp.zeros((1, 400)), jnp.ones((1, 400), bool))
    keys = jax.random.split(jax.random.key(0), 1)
    sample = lambda c: recipe.recipe(c, narrow.CLASSES).roi_targets(keys, proposals, truths)
    assert np.any(sample(low(**change)).boxes != sample(low()).boxes)


def test_a_predicted_iou_changes_what_is_found():
    _, model, params, frozen = made()
    batch = jax.tree.map(jnp.asarray, narrow.batch(SIZES, [0, 3]))
    run = lambda p, f, b: model.apply(p, f, b, method="candidates")[1:]
    proposals, outputs = narrow.jit(run)(params, frozen, batch)
    found = {}
    for use in ("none", "product", "order"):
        changes = {"test.score_threshold": 0.01}
        changes |= {} if use == "product" else {"test.iou_score": use}
        classify = build.classify(low(**changes))
        found[use] = jax.vmap(classify)(outputs, proposals, jnp.float32(SIZES))
    assert int(np.sum(found["none"].valid)) >= 10
    order = found["order"]
    for use in ("product", "order"):
        assert np.any(found[use].boxes != found["none"].boxes)
        assert np.all(np.isfinite(found[use].scores))
    assert np.max(found["product"].scores) < np.max(found["none"].scores)
    assert np.any(np.diff(order.scores[0][order.valid[0]]) > 0)


def test_levels_of_the_rpn_are_named_as_the_pyramids_and_in_its_order():
    for levels in (("p4", "p3"), ("p3", "p7")):
        with pytest.raises(UserError, match=r"rpn.levels is .*; name levels of p2, p3, p4, p5, p6"):
            build.model(low(**{"rpn.levels": levels}), narrow.CLASSES)
    with pytest.raises(UserError, match=r"anchors.sizes has 4 sizes for the 2 levels"):
        build.model(low(**{"rpn.levels": ("p3", "p4")}), narrow.CLASSES)


def test_an_unknown_branch_is_refused():
    with pytest.raises(UserError, match=r"roi.iou_branch.name is 'v2'"):
        build.losses(low(**{"roi.iou_branch": {"name": "v2"}}))


def test_masks_are_learned_from_low_positives_too():
    # They stand behind the quarter of ROIs that are sampled as positives.
    count = lambda c: recipe.recipe(c, narrow.CLASSES).mask_rois
    plain = {"roi.samples": 48}
    assert count(narrow.config(**plain)) == 12
    assert count(narrow.config(**plain, **{"roi.positive_iou": 0.5})) == 48
