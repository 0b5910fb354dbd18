"""RPN losses: normalisers by hand and against torchvision, nothing to learn, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.losses import rpn
from sephjax.types import RpnOutputs, RpnTargets

IMAGES, ANCHORS = 4, 100
DRAWN = np.random.default_rng(1).uniform((0, 0, 8, 8), (80, 80, 30, 30), (ANCHORS, 4))
BOXES = jnp.float32(DRAWN + DRAWN[:, (0, 1, 0, 1)] * (0, 0, 1, 1))
OPTIONS = {
    "box_loss": {"name": "smooth_l1", "beta": 1 / 9},
    "weights": (1.0, 1.0, 1.0, 1.0),
    "samples": 256,
    "normalizer": "images_times_samples",
    "size": jnp.full((IMAGES, 2), 200.0),
}


def batch(positives=3, sampled=64, seed=2):
    """Drawn outputs; the first anchors of each image are positive, the next negative."""
    rng = np.random.default_rng(seed)
    at = np.broadcast_to(np.arange(ANCHORS), (IMAGES, ANCHORS))
    shift = rng.uniform(-3, 3, (IMAGES, ANCHORS, 4))
    targets = RpnTargets(
        boxes=jnp.float32(np.asarray(BOXES)[None] + shift),
        positive=jnp.asarray(at < positives),
        negative=jnp.asarray((at >= positives) & (at < sampled)),
    )
    logits, deltas = rng.normal(size=(IMAGES, ANCHORS)), 0.2 * rng.normal(size=shift.shape)
    return RpnOutputs(jnp.float32(logits), jnp.float32(deltas)), targets


def losses(outputs, targets, **options):
    return rpn.rpn_losses(outputs, targets, BOXES, **(OPTIONS | options))


def test_256_equal_losses_in_a_batch_of_four_give_a_quarter_of_one():
    # EXPERIMENTS 9: 64 anchors an image are 256 in the batch; the divisor is 4 * 256.
    outputs, targets = batch(positives=32)
    outputs = RpnOutputs(jnp.zeros_like(outputs.logits), outputs.deltas)
    np.testing.assert_allclose(losses(outputs, targets)["rpn_cls"], math.log(2) / 4, rtol=1e-6)
    alone = losses(outputs, targets, normalizer="sampled")["rpn_cls"]
    np.testing.assert_allclose(alone, math.log(2), rtol=1e-6)


@pytest.mark.torch
def test_the_sampled_normaliser_is_that_of_torchvision():
    torch = pytest.importorskip("torch")
    detection = pytest.importorskip("torchvision.models.detection")
    outputs, targets = batch()
    coder = detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    goal = coder.encode_single(
        torch.tensor(np.asarray(targets.boxes)).reshape(-1, 4),
        torch.tensor(np.asarray(BOXES)).repeat(IMAGES, 1),
    )
    positive, negative = (
        torch.tensor(np.asarray(part)).reshape(-1) for part in (targets.positive, targets.negative)
    )
    # As RegionProposalNetwork.compute_loss has it, after its sampler.
    sampled = positive | negative
    box = torch.nn.functional.smooth_l1_loss(
        torch.tensor(np.asarray(outputs.deltas)).reshape(-1, 4)[positive],
        goal[positive],
        beta=1 / 9,
        reduction="sum",
    ) / int(sampled.sum())
    logits = torch.tensor(np.asarray(outputs.logits)).reshape(-1)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[sampled], positive[sampled].float()
    )
    ours = losses(outputs, targets, normalizer="sampled")
    np.testing.assert_allclose(ours["rpn_box"], float(box), rtol=1e-5)
    np.testing.assert_allclose(ours["rpn_cls"], float(entropy), rtol=1e-5)


def test_the_giou_loss_of_zero_deltas_is_that_of_the_anchors():
    outputs, targets = batch(positives=1)
    outputs = RpnOutputs(outputs.logits, jnp.zeros_like(outputs.deltas))
    # Half of the anchor is the ground truth: IoU 1/2, hull = anchor, loss 1/2.
    half = BOXES.at[:, 2].set(0.5 * (BOXES[:, 0] + BOXES[:, 2]))
    boxes = jnp.broadcast_to(half[None], (IMAGES, ANCHORS, 4))
    targets = RpnTargets(boxes, targets.positive, targets.negative)
    found = losses(outputs, targets, box_loss={"name": "giou"})
    np.testing.assert_allclose(found["rpn_box"], 0.5 * IMAGES / (IMAGES * 256), rtol=1e-5)


def test_the_giou_loss_sees_boxes_clipped_to_the_picture():
    outputs, targets = batch(positives=ANCHORS, sampled=ANCHORS)
    outputs = RpnOutputs(outputs.logits, jnp.zeros_like(outputs.deltas))
    size = jnp.full((IMAGES, 2), 60.0)
    boxes = jnp.broadcast_to(jnp.minimum(BOXES, 60.0)[None], (IMAGES, ANCHORS, 4))
    inside = jnp.all(BOXES[:, :2] < 59.0, axis=1)  # some of it is in the picture
    targets = RpnTargets(boxes, targets.positive & inside[None], targets.negative)
    found = losses(outputs, targets, box_loss={"name": "giou"}, size=size)
    assert bool(jnp.any(jnp.any(BOXES[:, 2:] > 60.0, axis=1) & inside))
    np.testing.assert_allclose(found["rpn_box"], 0.0, atol=1e-6)


FOCAL = {"name": "focal", "alpha": 0.25, "gamma": 2.0}


@pytest.mark.torch
@pytest.mark.parametrize(("positives", "divisor"), [(3, 3 * IMAGES), (0, 1)])
def test_the_focal_loss_over_the_positives_is_torchvisions(positives, divisor):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    outputs, targets = batch(positives)
    positive, negative = np.asarray(targets.positive), np.asarray(targets.negative)
    rows = ops.sigmoid_focal_loss(
        torch.tensor(np.asarray(outputs.logits)), torch.tensor(np.float32(positive)), 0.25, 2.0
    )
    expected = float(rows[torch.tensor(positive | negative)].sum()) / divisor
    found = losses(outputs, targets, class_loss=FOCAL, normalizer="positives")
    np.testing.assert_allclose(found["rpn_cls"], expected, rtol=1e-5)
    plain = losses(outputs, targets, normalizer="positives")
    assert abs(plain["rpn_cls"] - found["rpn_cls"]) > 0.1 * found["rpn_cls"]


@pytest.mark.parametrize("name", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("normalizer", ["sampled", "images_times_samples"])
def test_nothing_sampled_is_zero_with_a_zero_gradient(name, normalizer):
    outputs, targets = batch(positives=0, sampled=0)
    targets = RpnTargets(jnp.zeros_like(targets.boxes), targets.positive, targets.negative)
    options = {"box_loss": {"name": name, "beta": 1.0}, "normalizer": normalizer}
    total = lambda outputs: sum(losses(outputs, targets, **options).values())
    value, slopes = jax.value_and_grad(total)(outputs)
    assert value == 0.0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("name", ["smooth_l1", "giou", "diou", "ciou"])
def test_only_positives_move_deltas_and_only_the_sampled_move_logits(name):
    outputs, targets = batch(positives=3)
    options = {"box_loss": {"name": name, "beta": 0.0}}
    slopes = jax.grad(lambda outputs: sum(losses(outputs, targets, **options).values()))(outputs)
    moved = np.any(np.asarray(slopes.deltas) != 0, axis=-1)
    np.testing.assert_array_equal(moved, targets.positive)
    sampled = targets.positive | targets.negative
    np.testing.assert_array_equal(np.asarray(slopes.logits) != 0, sampled)
