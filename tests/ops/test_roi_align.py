"""ROI pooling and level assignment against literals, NumPy loops and torchvision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.ops import roi_align as ops
from sephjax.ops import roi_gather, roi_scan

STRIDES = (4.0, 8.0)
WAYS = {"scan": roi_scan, "gather": roi_gather}


def pyramid_of(seed=0, channels=6):
    rng = np.random.default_rng(seed)
    return [rng.uniform(size=(2, *s, channels)).astype(np.float32) for s in [(20, 28), (10, 14)]]


def boxes_of():
    """Boxes inside, across and outside an 80 x 112 image, without size, and of extreme shape."""
    boxes = np.array(
        [
            [[10, 12, 40, 50], [-21, -9.3, 30, 33], [90, 60, 140, 99], [-60, -60, -30, -30]],
            [[200, 10, 260, 30], [33, 33, 33, 33], [1, 40, 111, 41], [0, 0, 112, 80]],
            [[60, 1, 61, 79], [5.5, 6.25, 7.75, 8.1], [40, 40, 20, 20], [108, 76, 112, 80]],
        ],
        np.float32,
    ).reshape(2, 6, 4)
    levels = np.array([[0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1]], np.int32)
    return boxes, levels, np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]], bool)


def bilinear(features, y, x):
    """Bilinear reading inside the map."""
    height, width, _ = features.shape
    y0, x0 = int(np.floor(y)), int(np.floor(x))
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = features[y0, x0] * (1 - (x - x0)) + features[y0, x1] * (x - x0)
    bottom = features[y1, x0] * (1 - (x - x0)) + features[y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def align_one(features, box, stride, size, ratio, aligned):
    """ROIAlign of one box, sample by sample."""
    height, width, channels = features.shape
    x1, y1, x2, y2 = box.astype(np.float64) / stride - (0.5 if aligned else 0.0)
    roi_h, roi_w = y2 - y1, x2 - x1
    if not aligned:
        roi_h, roi_w = max(roi_h, 1.0), max(roi_w, 1.0)
    out = np.zeros((*size, channels))
    for p, q, i, j in np.ndindex(*size, ratio, ratio):
        y = y1 + (p + (i + 0.5) / ratio) * roi_h / size[0]
        x = x1 + (q + (j + 0.5) / ratio) * roi_w / size[1]
        if -1 <= y <= height and -1 <= x <= width:
            inner = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
            out[p, q] += bilinear(features, *inner) / ratio**2
    return out


def crop_one(features, box, canvas, size, bins):
    """TensorFlow's crop_and_resize of one box, point by point, then the max of each group."""
    height, width, channels = features.shape
    points = size[0] * bins[0], size[1] * bins[1]
    x1, y1, x2, y2 = box.astype(np.float64) / np.array([canvas[1], canvas[0]] * 2)
    crop = np.zeros((*points, channels))
    for i, j in np.ndindex(*points):
        y = y1 * (height - 1) + i * (y2 - y1) * (height - 1) / (points[0] - 1)
        x = x1 * (width - 1) + j * (x2 - x1) * (width - 1) / (points[1] - 1)
        edge = 1e-9  # a point on the border is inside however it was rounded
        if -edge <= y <= height - 1 + edge and -edge <= x <= width - 1 + edge:
            y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
            crop[i, j] = bilinear(features, y, x)
    grouped = crop.reshape(size[0], bins[0], size[1], bins[1], channels)
    return grouped.max(axis=(1, 3))


def align(pyramid, boxes, levels, valid, **options):
    options = {"strides": STRIDES, "output_size": (5, 9)} | options
    return jax.jit(functools.partial(ops.roi_align, **options))(pyramid, boxes, levels, valid)


def crop(pyramid, boxes, levels, valid, **options):
    options = {"strides": STRIDES, "extent": jnp.array([(80, 112)] * len(boxes))} | options
    pool = functools.partial(ops.crop_and_max_pool, **options)
    return jax.jit(pool)(pyramid, boxes, levels, valid)


def levels_of(boxes, **options):
    return jax.jit(functools.partial(ops.assign_levels, **options))(boxes).tolist()


def each(function, pyramid, boxes, levels, valid):
    """Applies a one-box reference to all boxes; zeros where invalid."""
    out = [
        [
            function(pyramid[levels[b, n]][b], boxes[b, n], levels[b, n]) * valid[b, n]
            for n in range(boxes.shape[1])
        ]
        for b in range(boxes.shape[0])
    ]
    return np.array(out)


@pytest.mark.parametrize(("aligned", "first"), [(True, 4.5), (False, 7.5)])
def test_detectron2s_literal_values_are_reproduced(way, aligned, first):
    # detectron2, tests/layers/test_roi_align.py::test_forward_output: a bin is half a cell, so its
    # adaptive sampling takes one sample; values grow by .5 to the right and by 2.5 downwards.
    image = np.arange(25, dtype=np.float32).reshape(1, 5, 5, 1)
    want = {
        4.5: [[4.5, 5, 5.5, 6], [7, 7.5, 8, 8.5], [9.5, 10, 10.5, 11], [12, 12.5, 13, 13.5]],
        7.5: [[7.5, 8, 8.5, 9], [10, 10.5, 11, 11.5], [12.5, 13, 13.5, 14], [15, 15.5, 16, 16.5]],
    }[first]
    got = align(
        [image],
        np.array([[[1, 1, 3, 3]]], np.float32),
        np.zeros((1, 1), np.int32),
        np.ones((1, 1), bool),
        strides=(1.0,),
        output_size=(4, 4),
        sampling_ratio=1,
        aligned=aligned,
    )
    np.testing.assert_allclose(got[0, 0, :, :, 0], want, atol=1e-6)


def test_constant_features_give_the_constant_up_to_the_border(way):
    pyramid = [np.ones_like(f) for f in pyramid_of()]
    boxes = np.array([[[0, 0, 112, 80], [0, 0, 20, 20]], [[100, 70, 112, 80], [0, 60, 112, 80]]])
    levels = np.array([[0, 1], [1, 0]], np.int32)
    got = align(pyramid, boxes.astype(np.float32), levels, np.ones((2, 2), bool))
    np.testing.assert_allclose(got, np.ones_like(got), atol=1e-6)


@pytest.mark.parametrize("aligned", [True, False])
def test_any_box_equals_a_loop_over_samples(way, aligned):
    pyramid, (boxes, levels, valid) = pyramid_of(), boxes_of()
    got = align(pyramid, boxes, levels, valid, aligned=aligned)

    def one(features, box, level):
        return align_one(features, box, STRIDES[level], (5, 9), 2, aligned)

    np.testing.assert_allclose(got, each(one, pyramid, boxes, levels, valid), atol=1e-5)


@pytest.mark.parametrize("pool", [align, crop], ids=["roi_align", "crop_and_max_pool"])
def test_boxes_read_the_same_whatever_lies_beyond_the_picture(way, pool):
    full, (boxes, levels, valid) = pyramid_of(), boxes_of()
    extent = jnp.array([(64, 80), (61, 75)])  # the second ends within a cell
    cells = [(16, 20), (8, 10)]
    cut = [f[:, :h, :w] for f, (h, w) in zip(full, cells, strict=True)]
    boxes = np.concatenate([boxes, boxes[:, :2]], axis=1)
    boxes[:, 6:] = [[40, 30, 80, 64], [-5, 7, 84, 70]]
    levels, valid = np.tile(levels, 2)[:, :8], np.ones((2, 8), bool)
    options = {"output_size": (4, 6), "extent": extent}
    got = pool(full, boxes, levels, valid, **options)
    np.testing.assert_array_equal(got, pool(cut, boxes, levels, valid, **options))
    if pool is align:  # the first picture fills the cut maps
        whole = pool(cut, boxes, levels, valid, output_size=(4, 6))
        np.testing.assert_array_equal(got[0], whole[0])
    assert np.ptp(got[:, 6:]) > 0.1


def test_both_ways_agree_and_the_gradient_is_the_transpose():
    pyramid, (boxes, levels, valid) = pyramid_of(1), boxes_of()
    taps = []
    keep = lambda features, t: (taps.append(t), roi_gather.pool(features, t))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_read", keep)
        arrays = [jnp.asarray(f) for f in pyramid], *map(jnp.asarray, (boxes, levels, valid))
        ops.roi_align(*arrays, strides=STRIDES, output_size=(5, 9))
    shapes = [f.shape for f in pyramid]
    cotangent = np.random.default_rng(2).normal(size=(2, 6, 5, 9, 6)).astype(np.float32)
    read = {k: np.asarray(jax.jit(m.pool)(arrays[0], taps[0])) for k, m in WAYS.items()}
    wrote = {
        k: jax.jit(functools.partial(m.spread, shapes))(taps[0], cotangent) for k, m in WAYS.items()
    }
    np.testing.assert_allclose(read["scan"], read["gather"], atol=1e-6)
    for one, other in zip(wrote["scan"], wrote["gather"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    inner = sum(np.sum(f * np.asarray(g)) for f, g in zip(pyramid, wrote["scan"], strict=True))
    np.testing.assert_allclose(inner, np.sum(read["scan"] * cotangent), rtol=1e-4)


def test_the_gradient_reaches_features_only_and_nothing_from_invalid_rois(way):
    pyramid, (boxes, levels, _) = pyramid_of(), boxes_of()

    def total(pyramid, boxes, valid):
        return jnp.sum(align(pyramid, boxes, levels, valid, output_size=(3, 3)))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    features, of_boxes = gradient(pyramid, boxes, np.zeros(levels.shape, bool))
    assert not any(np.any(g) for g in features)
    features, of_boxes = gradient(pyramid, boxes, np.ones(levels.shape, bool))
    assert all(np.any(g) for g in features)
    assert not np.any(of_boxes)


def test_a_box_that_is_not_finite_leaves_the_other_boxes_alone(way):
    pyramid, (boxes, levels, valid) = pyramid_of(), boxes_of()
    want = align(pyramid, boxes, levels, valid)
    boxes = boxes.copy()
    boxes[0, 0], boxes[1, 5], boxes[1, 3] = np.nan, [-np.inf, 0, np.inf, 1e30], np.nan
    got = np.array(align(pyramid, boxes, levels, valid))
    np.testing.assert_array_equal(got[0, 1:], want[0, 1:])
    np.testing.assert_array_equal(got[1, :5], want[1, :5])


def test_bfloat16_features_are_summed_in_float32(way):
    pyramid, (boxes, levels, valid) = pyramid_of(), boxes_of()
    low = [jnp.asarray(f, jnp.bfloat16) for f in pyramid]
    boxes = np.tile(boxes[:, :1], (1, 600, 1))  # 600 equal boxes: a bfloat16 sum would stand still
    levels, valid = np.zeros((2, 600), np.int32), np.ones((2, 600), bool)

    def run(pyramid):
        return align(pyramid, boxes, levels, valid, output_size=(3, 3))

    @jax.jit
    def both(pyramid):
        out, pull = jax.vjp(run, pyramid)
        return out, pull(jnp.ones_like(out))[0]

    out, gradient = both(low)
    exact, exact_gradient = both([jnp.asarray(f, jnp.float32) for f in low])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.01)
    for g, e in zip(gradient, exact_gradient, strict=True):
        assert g.dtype == jnp.bfloat16
        np.testing.assert_allclose(g.astype(jnp.float32), e, rtol=0.01)


@pytest.mark.parametrize(("size", "bins"), [((4, 3), (2, 2)), ((5, 6), (1, 1))])
def test_crop_and_max_pool_equals_a_loop_over_points(way, size, bins):
    pyramid, (boxes, levels, valid) = pyramid_of(3), boxes_of()
    got = crop(pyramid, boxes, levels, valid, output_size=size, bins=bins)
    one = lambda features, box, _: crop_one(features, box, (80, 112), size, bins)
    np.testing.assert_allclose(got, each(one, pyramid, boxes, levels, valid), atol=1e-5)


def test_boxes_that_end_at_the_edge_of_the_canvas_read_no_zeros(way):
    corners = np.random.default_rng(6).uniform(0, [100, 70], (2, 100, 2))
    ends = np.broadcast_to(np.array([112, 80]), corners.shape)
    boxes = np.concatenate([corners, ends], axis=2).astype(np.float32)
    levels, valid = np.zeros((2, 100), np.int32), np.ones((2, 100), bool)
    got = crop([-np.ones((2, 20, 28, 1), np.float32)], boxes, levels, valid, output_size=(7, 7))
    np.testing.assert_allclose(got, -1, atol=1e-6)


def test_the_corners_of_a_whole_image_crop_are_the_corners_of_the_map(way):
    pyramid = pyramid_of(4)[:1]
    whole = np.array([[[0, 0, 112, 80]]] * 2, np.float32)
    levels, valid = np.zeros((2, 1), np.int32), np.ones((2, 1), bool)
    got = crop(pyramid, whole, levels, valid, output_size=(2, 2), bins=(1, 1))
    np.testing.assert_allclose(got[:, 0], pyramid[0][:, ::19, ::27], atol=1e-5)


def test_crop_and_max_pool_passes_the_gradient_of_each_maximum(way):
    pyramid, (boxes, levels, valid) = pyramid_of(5), boxes_of()

    def run(pyramid):
        return crop(pyramid, boxes, levels, valid, output_size=(3, 3))

    @jax.jit
    def both(pyramid):
        out, pull = jax.vjp(run, pyramid)
        return out, pull(jnp.ones_like(out))[0]

    out, gradient = both(pyramid)
    # The output is piecewise linear in the features: it equals the gradient's inner product.
    inner = sum(np.sum(f * np.asarray(g)) for f, g in zip(pyramid, gradient, strict=True))
    np.testing.assert_allclose(inner, np.sum(out), rtol=1e-4)


def square(*sides):
    return np.array([[3, 5, 3 + side, 5 + side] for side in sides], np.float32)


def test_levels_of_the_published_series():
    series = {"canonical_level": 1, "min_level": 0, "max_level": 3, "eps": 1e-6}
    boxes = square(50, 112, 223, 224, 447, 448, 895, 896, 2000)
    assert levels_of(boxes, **series) == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("eps", "inside"), [(1e-8, True), (1e-6, False)])
def test_levels_change_at_powers_of_two_of_the_canonical_size(eps, inside):
    boxes = square(1, 55.9, 56, 111.9, 112, 223.9, 224, 447.9, 448, 3000)
    got = levels_of(boxes, eps=eps, eps_inside_log=inside)
    assert got == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_a_box_without_area_is_on_the_finest_level():
    boxes = np.array([[0, 0, 0, 0], [5, 5, 5, 900], [9, 9, 2, 2], [9, 2, 2, 9]], np.float32)
    assert levels_of(boxes) == [0, 0, 0, 0]


@pytest.mark.torch
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (5, 9)])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_and_its_gradient_equal_torchvision(aligned, ratio, size):
    torch = pytest.importorskip("torch")
    roi_align = pytest.importorskip("torchvision").ops.roi_align
    pyramid, (boxes, _, valid) = pyramid_of(6)[:1], boxes_of()
    levels, everything = np.zeros(valid.shape, np.int32), np.ones(valid.shape, bool)
    cotangent = np.random.default_rng(3).normal(size=(2, 6, *size, 6)).astype(np.float32)

    @jax.jit
    def run(pyramid, cotangent):
        one = lambda p: align(
            p, boxes, levels, everything, output_size=size, sampling_ratio=ratio, aligned=aligned
        )
        out, pull = jax.vjp(one, pyramid)
        return out, pull(cotangent)[0][0]

    out, gradient = run(pyramid, cotangent)
    features = torch.tensor(pyramid[0]).permute(0, 3, 1, 2).requires_grad_()
    theirs = roi_align(features, list(torch.tensor(boxes)), size, 0.25, ratio, aligned)
    theirs.backward(torch.tensor(cotangent.reshape(12, *size, 6)).permute(0, 3, 1, 2))
    want = theirs.detach().permute(0, 2, 3, 1).numpy().reshape(out.shape)
    np.testing.assert_allclose(out, want, atol=1e-5)
    want = features.grad.permute(0, 2, 3, 1).numpy()
    # A cell under several small boxes sums hundreds of samples, in another order.
    np.testing.assert_allclose(gradient, want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.torch
def test_levels_equal_torchvisions_mapper():
    torch = pytest.importorskip("torch")
    poolers = pytest.importorskip("torchvision.ops.poolers")
    rng = np.random.default_rng(7)
    corner = rng.uniform(0, 300, (500, 2))
    extent = np.exp(rng.uniform(1, 7, (500, 2)))
    boxes = np.concatenate([corner, corner + extent], 1).astype(np.float32)
    mapper = poolers.initLevelMapper(2, 5, 224, 4, 1e-6)
    want = mapper([torch.tensor(boxes)]).tolist()
    assert levels_of(boxes, eps=1e-6, eps_inside_log=False) == want
