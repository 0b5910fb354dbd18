"""Element losses against values worked by hand and against PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.losses import elementwise

RNG = np.random.default_rng(0)
LOGITS = np.float32(4 * RNG.normal(size=(6, 5)))
TARGETS = np.float32(RNG.uniform(size=(6, 5)))
LABELS = np.int32(RNG.integers(5, size=6))
ERRORS = np.float32(np.linspace(-2, 2, 81))


def test_sigmoid_cross_entropy_of_logit_zero_is_log_two():
    loss = elementwise.sigmoid_cross_entropy(jnp.zeros(2), jnp.float32([0, 1]))
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)


def test_sigmoid_cross_entropy_neither_overflows_nor_loses_its_gradient():
    logits, targets = jnp.float32([300, 300, -300, -300]), jnp.float32([0, 1, 0, 1])
    loss = elementwise.sigmoid_cross_entropy(logits, targets)
    np.testing.assert_allclose(loss, [300, 0, 0, 300])
    slope = jax.grad(lambda x: elementwise.sigmoid_cross_entropy(x, targets).sum())(logits)
    np.testing.assert_allclose(slope, [1, 0, 0, -1])


def test_softmax_cross_entropy_of_equal_logits_is_log_of_their_number():
    loss = elementwise.softmax_cross_entropy(jnp.full((1, 81), 3.0), jnp.int32([7]))
    np.testing.assert_allclose(loss, math.log(81), rtol=1e-6)


def test_smooth_l1_by_hand():
    errors = jnp.float32([0, 0.5, -0.5, 1, -3])
    np.testing.assert_allclose(elementwise.smooth_l1(errors, beta=1.0), [0, 0.125, 0.125, 0.5, 2.5])
    np.testing.assert_allclose(elementwise.smooth_l1(errors, beta=0.0), [0, 0.5, 0.5, 1, 3])


def test_giou_loss_of_the_published_boxes_does_not_depend_on_scale():
    a = jnp.float32([[0, 0, 0.4, 0.4], [0, 0, 0.2, 0.2]])
    b = jnp.float32([[0.2, 0.2, 0.6, 0.6], [0.5, 0.5, 0.6, 0.6]])
    for scale in (1.0, 100.0):  # -0.079365 and -0.861111: EXPERIMENTS 9
        loss = elementwise.giou_loss(scale * a, scale * b)
        np.testing.assert_allclose(loss, [1.079365, 1.861111], atol=2e-6)


def test_giou_loss_of_a_box_with_itself_is_zero():
    boxes = jnp.float32([[10, 20, 40, 80]])
    np.testing.assert_allclose(elementwise.giou_loss(boxes, boxes), 0.0, atol=1e-7)


@pytest.mark.torch
def test_cross_entropies_agree_with_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    theirs = functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS), torch.tensor(TARGETS), reduction="none"
    )
    ours = elementwise.sigmoid_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    theirs = functional.cross_entropy(
        torch.tensor(LOGITS), torch.tensor(LABELS).long(), reduction="none"
    )
    ours = elementwise.softmax_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("beta", [0.0, 1.0, 1 / 9])
def test_smooth_l1_and_its_gradient_agree_with_torch(beta):
    torch = pytest.importorskip("torch")
    errors = torch.tensor(ERRORS, requires_grad=True)
    theirs = torch.nn.functional.smooth_l1_loss(
        errors, torch.zeros_like(errors), beta=beta, reduction="none"
    )
    theirs.sum().backward()
    ours = elementwise.smooth_l1(jnp.asarray(ERRORS), beta=beta)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
    slope = jax.grad(lambda x: elementwise.smooth_l1(x, beta=beta).sum())(jnp.asarray(ERRORS))
    there = ERRORS != 0  # |x| has no slope at 0
    np.testing.assert_allclose(slope[there], errors.grad.numpy()[there], rtol=1e-5, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("giou", "generalized_box_iou_loss"),
        ("diou", "distance_box_iou_loss"),
        ("ciou", "complete_box_iou_loss"),
    ],
)
def test_the_losses_of_boxes_and_their_gradients_agree_with_torchvision(name, theirs):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    rng = np.random.default_rng(4)
    corner, side = rng.uniform(0, 60, (2, 60, 2)), rng.uniform(1, 50, (2, 60, 2))
    pair = np.concatenate([corner, corner + side], axis=2).astype(np.float32)
    predicted, target = (torch.tensor(boxes, requires_grad=True) for boxes in pair)
    rows = getattr(ops, theirs)(predicted, target, reduction="none")
    rows.sum().backward()
    ours, pull = jax.vjp(elementwise.OVERLAP[name], *map(jnp.asarray, pair))
    np.testing.assert_allclose(ours, rows.detach(), atol=1e-6)
    for slope, peer in zip(pull(jnp.ones_like(ours)), (predicted, target), strict=True):
        np.testing.assert_allclose(slope, peer.grad, atol=1e-6)


@pytest.mark.parametrize("name", ["diou", "ciou"])
def test_a_box_loss_of_a_box_with_itself_is_zero_with_a_finite_gradient(name):
    boxes = jnp.float32([[10, 20, 40, 80]])
    value, slope = jax.value_and_grad(lambda box: elementwise.OVERLAP[name](box, boxes).sum())(
        boxes
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-7)
    assert np.isfinite(slope).all()


@pytest.mark.torch
@pytest.mark.parametrize("targets", [TARGETS, np.float32(TARGETS > 0.5)])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.0)])
def test_focal_loss_and_its_gradient_agree_with_torchvision(alpha, gamma, targets):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torchvision.ops").sigmoid_focal_loss
    ours = lambda x: elementwise.sigmoid_focal(x, jnp.asarray(targets), alpha=alpha, gamma=gamma)
    given, logits = jnp.asarray(LOGITS), torch.tensor(LOGITS, requires_grad=True)
    rows = theirs(logits, torch.tensor(targets), alpha, gamma)
    rows.sum().backward()
    np.testing.assert_allclose(ours(given), rows.detach(), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda x: ours(x).sum())(given)
    np.testing.assert_allclose(slope, logits.grad, rtol=1e-5, atol=1e-6)


def test_focal_loss_is_finite_at_far_logits():
    logits, targets = jnp.float32([300, 300, -300, -300]), jnp.float32([0, 1, 0, 1])
    loss = lambda x: elementwise.sigmoid_focal(x, targets, alpha=0.25, gamma=2.0)
    np.testing.assert_allclose(loss(logits), [225, 0, 0, 75])
    assert np.all(np.isfinite(jax.grad(lambda x: loss(x).sum())(logits)))
