import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sephjax.ops import boxes as box_ops
from tests.ops.reference import iou

N = 6


@st.composite
def box_arrays(draw, smallest=0.0):
    """[N, 4] boxes on a 100-pixel image with sides from `smallest` on."""
    numbers = draw(hnp.arrays(np.float32, (N, 4), elements=st.floats(0, 50, width=32)))
    corner, side = numbers[:, :2], numbers[:, 2:] + np.float32(smallest)
    return np.concatenate([corner, corner + side], axis=1)


def random_boxes(seed, count, scale=100.0):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, scale, (count, 2)), rng.uniform(0.05, 0.6, (count, 2)) * scale
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


def test_area_of_a_unit_and_of_an_inverted_box():
    boxes = jnp.array([[0.0, 0, 1, 1], [2.0, 3, 5, 10], [4.0, 4, 3, 3]])
    np.testing.assert_allclose(box_ops.area(boxes), [1.0, 21.0, 0.0])


def test_pairwise_iou_agrees_with_a_loop():
    a, b = random_boxes(0, 7), random_boxes(1, 5)
    expected = [[iou(x, y) for y in b.astype(np.float64)] for x in a.astype(np.float64)]
    np.testing.assert_allclose(
        box_ops.pairwise_iou(jnp.asarray(a), jnp.asarray(b)), expected, atol=1e-6
    )


def test_pairwise_iou_of_detectron2s_literal_boxes():
    # detectron2 tests/structures/test_boxes.py: one unit box against six.
    one = jnp.array([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    other = jnp.array(
        [
            [0, 0, 1, 1],
            [0, 0, 0.5, 1],
            [0, 0, 1, 0.5],
            [0, 0, 0.5, 0.5],
            [0.5, 0.5, 1, 1],
            [0.5, 0.5, 1.5, 1.5],
        ],
        jnp.float32,
    )
    expected = [1.0, 0.5, 0.5, 0.25, 0.25, 0.25 / (2 - 0.25)]
    np.testing.assert_allclose(box_ops.pairwise_iou(one, other), [expected] * 2, rtol=1e-6)


@given(box_arrays(), box_arrays())
def test_iou_is_symmetric_and_within_0_and_1(a, b):
    a, b = jnp.asarray(a), jnp.asarray(b)
    forth, back = box_ops.pairwise_iou(a, b), box_ops.pairwise_iou(b, a)
    np.testing.assert_allclose(forth, back.T, atol=1e-6)
    assert float(forth.min()) >= 0.0
    assert float(forth.max()) <= 1.0 + 1e-5
    np.testing.assert_allclose(box_ops.iou(a, b), jnp.diagonal(forth), atol=1e-6)


def test_iou_of_a_degenerate_box_is_zero():
    point, box = jnp.array([[3.0, 3.0, 3.0, 3.0]]), jnp.array([[0.0, 0.0, 5.0, 5.0]])
    assert float(box_ops.iou(point, point)[0]) == 0.0
    assert float(box_ops.iou(point, box)[0]) == 0.0
    assert float(box_ops.giou(point, point)[0]) == 0.0


def test_giou_of_two_worked_pairs():
    # Intersection .04, union .28, hull .36: 1/7 - 2/9. Disjoint: union .05, hull .36.
    a = jnp.array([[0, 0, 0.4, 0.4], [0, 0, 0.2, 0.2]], jnp.float32)
    b = jnp.array([[0.2, 0.2, 0.6, 0.6], [0.5, 0.5, 0.6, 0.6]], jnp.float32)
    np.testing.assert_allclose(box_ops.giou(a, b), [-0.079365, -0.861111], atol=1e-6)


@pytest.mark.parametrize("function", [box_ops.iou, box_ops.giou, box_ops.diou, box_ops.ciou])
@pytest.mark.parametrize(
    "pair",
    [
        ([3, 3, 3, 3], [3, 3, 3, 3]),
        ([3, 3, 3, 3], [0, 0, 9, 9]),
        ([0, 0, 9, 9], [3, 3, 3, 3]),
        ([0, 0, 1e-20, 1e-20], [0, 0, 1e-20, 1e-20]),
        ([0, 0, 4, 4], [0, 0, 4, 4]),
        ([0, 0, 4, 4], [50, 50, 60, 60]),
        ([5, 5, 1, 1], [0, 0, 9, 9]),
        ([2, 2, 2, 8], [0, 0, 8, 0]),
    ],
)
def test_overlap_has_a_finite_gradient_at_ugly_points(function, pair):
    a, b = (jnp.asarray([box], jnp.float32) for box in pair)
    value, gradients = jax.value_and_grad(lambda a, b: function(a, b).sum(), argnums=(0, 1))(a, b)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_diou_and_ciou_of_worked_pairs():
    # Unit boxes, centres 2 apart: IoU 0, diagonal^2 9 + 1, so -.4; equal shapes, so CIoU too.
    apart = jnp.array([[0.0, 0, 1, 1]]), jnp.array([[2.0, 0, 3, 1]])
    np.testing.assert_allclose(box_ops.diou(*apart), [-0.4], atol=1e-6)
    np.testing.assert_allclose(box_ops.ciou(*apart), [-0.4], atol=1e-6)
    # A column 2 by 4 in a square of 4, centres equal: DIoU = IoU = 1/2. atan 1/2 against atan 1:
    # v = 4 / pi^2 * .3217506^2 = .0419568, and v^2 / (1/2 + v) = .0032483.
    nested = jnp.array([[1.0, 0, 3, 4]]), jnp.array([[0.0, 0, 4, 4]])
    np.testing.assert_allclose(box_ops.diou(*nested), [0.5], atol=1e-6)
    np.testing.assert_allclose(box_ops.ciou(*nested), [0.4967517], atol=1e-6)


def test_giou_pulls_a_distant_box_nearer():
    box, target = jnp.array([[0.0, 0.0, 4.0, 4.0]]), jnp.array([[50.0, 50.0, 60.0, 60.0]])
    gradient = jax.grad(lambda box: box_ops.giou(box, target).sum())(box)
    # GIoU = union / hull - 1, union 116, hull 3600. A pixel of the near corner adds 4 to the union;
    # one of the far corner takes 4 from it and 60 from the hull.
    near, far = 4 / 3600, (60 * 116 / 3600 - 4) / 3600
    np.testing.assert_allclose(gradient, [[far, far, near, near]], rtol=1e-5)
    assert jnp.sum(gradient) > 0  # the whole box moves nearer


def test_encode_of_a_worked_box():
    # w .2, h .4 of the box (x .1–.3, y .1–.5); the ground truth is x .08–.52, y .12–.36 transposed:
    # dx = 10·0/.4, dy = 10·.04/.2, dw = 5 ln(.44/.4), dh = 5 ln(.24/.2).
    box, truth = jnp.array([[0.1, 0.1, 0.5, 0.3]]), jnp.array([[0.08, 0.12, 0.52, 0.36]])
    deltas = box_ops.encode(box, truth, weights=(10.0, 10.0, 5.0, 5.0))
    np.testing.assert_allclose(deltas, [[0.0, 2.0, 0.476551, 0.911608]], atol=2e-6)


@given(box_arrays(smallest=1.0), box_arrays(smallest=1.0))
def test_decode_undoes_encode(references, targets):
    references, targets = jnp.asarray(references), jnp.asarray(targets)
    for weights in ((1, 1, 1, 1), (10.0, 10.0, 5.0, 5.0)):
        deltas = box_ops.encode(references, targets, weights=weights)
        decoded = box_ops.decode(references, deltas, weights=weights)
        np.testing.assert_allclose(decoded, targets, atol=2e-3)


def test_the_round_trip_of_detectron2_and_axlearn():
    # detectron2 tests/modeling/test_box2box_transform.py: weights (5, 5, 10, 10), torch.allclose.
    weights = (5, 5, 10, 10)
    source, target = (jnp.asarray(random_boxes(seed, 10)) for seed in (20, 21))
    deltas = box_ops.encode(source, target, weights=weights)
    back = box_ops.decode(source, deltas, weights=weights)
    np.testing.assert_allclose(back, target, rtol=1e-5, atol=1e-5)
    # axlearn vision/box_coder_test.py, in (y1, x1, y2, x2); its first box is flat. There
    # it comes back flat; here, where a logarithm of 0 is taken for 0, with the anchor's width.
    anchors = jnp.array([[23.0, 12.0, 27.0, 22.0], [38.0, 22.0, 47.0, 33.0]])
    boxes = jnp.array([[25.0, 10.0, 25.0, 20.0], [40.0, 20.0, 50.0, 30.0]])
    deltas = box_ops.encode(anchors, boxes, weights=(10.0, 10.0, 5.0, 5.0))
    back = box_ops.decode(anchors, deltas, weights=(10.0, 10.0, 5.0, 5.0))
    np.testing.assert_allclose(back[1], boxes[1], rtol=1e-6)
    np.testing.assert_allclose(back[0], [23.0, 10.0, 27.0, 20.0], rtol=1e-6)


def test_encode_is_zero_from_a_degenerate_reference_and_finite_to_a_degenerate_target():
    point, box = jnp.array([[3.0, 3.0, 3.0, 8.0]]), jnp.array([[0.0, 0.0, 4.0, 4.0]])
    np.testing.assert_array_equal(
        box_ops.encode(point, box, weights=(1, 1, 1, 1)), np.zeros((1, 4))
    )
    deltas = box_ops.encode(box, point, weights=(1, 1, 1, 1))
    np.testing.assert_allclose(deltas, [[0.25, 0.875, 0.0, np.log(1.25)]], rtol=1e-6)
    for pair in ((point, box), (box, point), (point, point)):
        gradients = jax.grad(lambda a, b: box_ops.encode(a, b, weights=(1, 1, 1, 1)).sum(), (0, 1))(
            *pair
        )
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_decode_clamps_the_growth_of_a_box():
    box, deltas = jnp.array([[0.0, 0.0, 16.0, 16.0]]), jnp.array([[0.0, 0.0, 50.0, 50.0]])
    decoded = box_ops.decode(box, deltas, weights=(1, 1, 5, 5))
    np.testing.assert_allclose(decoded, [[-492.0, -492.0, 508.0, 508.0]], rtol=1e-5)
    free = box_ops.decode(box, deltas, weights=(1, 1, 5, 5), clamp=None)
    np.testing.assert_allclose(free[0, 2] - free[0, 0], 16 * np.exp(10.0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_clip_cuts_at_height_and_width(dtype):
    boxes = jnp.array([[-5.0, -6.0, 30.0, 40.0], [25.0, 1.0, 28.0, 2.0]])
    clipped = box_ops.clip(boxes, jnp.array([10, 20], dtype))
    np.testing.assert_array_equal(clipped, [[0, 0, 20, 10], [20, 1, 20, 2]])
    np.testing.assert_array_equal(box_ops.nonempty(clipped), [True, False])


@pytest.mark.torch
@pytest.mark.parametrize("bound", [1e-3, 1e-2, 3.0])
def test_small_boxes_are_those_of_torchvision(bound):
    torch = pytest.importorskip("torch")
    from torchvision.ops import remove_small_boxes

    side = np.float32(bound) * np.array([0, 1, 1.001, 0.999, 2, -2], np.float32)
    boxes = np.stack([np.zeros_like(side), 0 * side, side, side[::-1] + 1e-6], axis=1)
    boxes = np.concatenate([boxes, boxes[:, [1, 0, 3, 2]], [[5, 5, 9, 5], [0, 0, bound, bound]]])
    boxes = boxes.astype(np.float32)
    theirs = remove_small_boxes(torch.from_numpy(boxes), bound).tolist()
    assert np.flatnonzero(box_ops.nonempty(jnp.asarray(boxes), bound)).tolist() == theirs
    assert 0 < len(theirs) < len(boxes)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("iou", "box_iou"),
        ("giou", "generalized_box_iou"),
        ("diou", "distance_box_iou"),
        ("ciou", "complete_box_iou"),
    ],
)
def test_overlaps_agree_with_torchvision(name, theirs):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    a, b = random_boxes(2, 40), random_boxes(3, 40)
    b[:5] = a[:5]  # equal boxes
    every = getattr(ops, theirs)(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    ours = getattr(box_ops, name)(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(ours, np.diagonal(every), atol=1e-6)
    if name == "iou":
        np.testing.assert_allclose(
            box_ops.pairwise_iou(jnp.asarray(a), jnp.asarray(b)), every, atol=1e-6
        )


@pytest.mark.torch
def test_box_coding_agrees_with_torchvision():
    torch = pytest.importorskip("torch")
    coder = pytest.importorskip("torchvision.models.detection._utils").BoxCoder(
        (10.0, 10.0, 5.0, 5.0)
    )
    a, b = random_boxes(4, 40), random_boxes(5, 40)
    theirs = coder.encode_single(torch.from_numpy(b), torch.from_numpy(a)).numpy()
    ours = box_ops.encode(jnp.asarray(a), jnp.asarray(b), weights=(10.0, 10.0, 5.0, 5.0))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    deltas = np.random.default_rng(6).normal(0, 12, (40, 4)).astype(np.float32)
    theirs = coder.decode_single(torch.from_numpy(deltas), torch.from_numpy(a)).numpy()
    ours = box_ops.decode(jnp.asarray(a), jnp.asarray(deltas), weights=(10.0, 10.0, 5.0, 5.0))
    # Sides grow up to 62 times, to thousands of pixels, and a corner may lie near 0 nevertheless.
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
