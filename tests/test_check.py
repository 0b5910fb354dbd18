"""check.py: what does not fit together in a config is one sentence."""

import pytest

from configs import cascade, fpn3, sephnv15, sephv3, sephv9, sephv21
from configs._chain import apply
from sephjax import check
from sephjax.errors import UserError


@pytest.mark.parametrize("module", [cascade, sephv3, sephv9, sephv21])
def test_the_rows_pass(module):
    check.check(module.get_config())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"roi.iou_branch": {"name": "none"}}, "test.iou_score is 'product', but .*'v0' or 'v1'"),
        ({"test.iou_score": "sum"}, "test.iou_score is 'sum'; use 'none', 'product' or 'order'"),
        ({"roi.positive_iou": -0.5}, "roi.positive_iou is -0.5; it must be 0 or more"),
        ({"roi.sampler.bins": 0}, "roi.sampler.bins is 0"),
        ({"roi.sampler.positive_bins": 0}, "roi.sampler.positive_bins is 0"),
        ({"roi.sampler.positive_groups": "box"}, "is 'box'; use 'truth' or 'iou'"),
        ({"roi.sampler.fill": "zeros"}, "is 'zeros'; use 'none' or 'repeat'"),
    ],
)
def test_values_of_the_iou_branch_and_the_samplers_are_checked(change, told):
    with pytest.raises(UserError, match=told):
        check.check(apply(fpn3.get_config("pred_iou"), change, "a test"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"roi.cascade.ious": (0.5, 0.6)}, "roi.cascade.ious has 2 stages and .* 3; give both"),
        ({"roi.cascade.ious": ()}, "roi.cascade.ious has 0 stages"),
        ({"roi.class_agnostic": False}, "roi.class_agnostic is False, .*; set it to True"),
        ({"roi.weights": (1.0, 1.0, 1.0, 1.0)}, r"roi.weights is \(1.0, .*; make them equal"),
        ({"roi.matcher.high": 0.6}, r"starts with 0.5, but .* low and high \(0.5, 0.6\); use"),
        ({"roi.cascade.append": -1}, "roi.cascade.append is -1; it must be 0 or more"),
    ],
)
def test_a_cascade_that_does_not_fit_together_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        check.check(apply(cascade.get_config(), change, "a test"))


def test_an_unknown_proposal_generator_is_refused():
    with pytest.raises(UserError, match=r"rpn.name is 'retina'; use 'rpn' or 'retinanet'"):
        check.check(apply(sephv9.get_config(), {"rpn.name": "retina"}, "a test"))


@pytest.mark.parametrize("key", ["pre", "post"])
def test_a_level_without_proposals_is_refused(key):
    """Five levels, each with a third of the one before: 81 for one in the last."""
    change = {f"rpn.proposals.{key}": 80}
    with pytest.raises(UserError, match=rf"proposals\.{key} is 80, .* 5 levels gets none; .* 81"):
        check.check(apply(sephnv15.get_config(), change, "a test"))
    check.check(apply(sephnv15.get_config(), {f"rpn.proposals.{key}": 81}, "a test"))
