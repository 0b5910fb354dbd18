"""ROI pooling over a pyramid against torchvision's MultiScaleRoIAlign and torch's grid_sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.nets.roi.pool import Pooler
from sephjax.ops import roi_align as ops

torch = pytest.importorskip("torch")
poolers = pytest.importorskip("torchvision.ops.poolers")

pytestmark = pytest.mark.torch
CANVAS = (128, 160)
CHANNELS = 3
EPS = {"eps": 1e-6, "eps_inside_log": False}  # torchvision's


def pyramid_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {f"p{k}": (2, CANVAS[0] >> k, CANVAS[1] >> k, CHANNELS) for k in (2, 3, 4, 5)}
    # Steps below 1 a cell: a sample 100 cells out is placed to 1e-5 of a cell in float32.
    return {name: rng.uniform(size=shape).astype(np.float32) for name, shape in shapes.items()}


def boxes_of():
    """[2, 20, 4]: inside, across and beyond the border, of every level, some at its boundary."""
    rng = np.random.default_rng(1)
    extent = np.exp(rng.uniform(np.log(4), np.log(900), (2, 14, 2)))
    centre = rng.uniform(-20, 180, (2, 14, 2))
    drawn = np.concatenate([centre - extent / 2, centre + extent / 2], 2)
    sides = [(112, 112), (224, 224), (448, 448), (56, 224), (223.99, 224), (896, 112)]
    fixed = np.array([[-3, -5, -3 + w, -5 + h] for w, h in sides])
    return np.concatenate([drawn, np.stack([fixed] * 2)], 1).astype(np.float32)


@pytest.mark.parametrize("side", [7, 14])
def test_pooling_and_its_gradient_equal_multi_scale_roi_align(way, side):
    pyramid, boxes = pyramid_of(0), boxes_of()
    pooler = Pooler(
        levels=tuple(pyramid),
        strides=(4.0, 8.0, 16.0, 32.0),
        canonical={"size": 224.0, "level": 4, **EPS},
        lowest=2,
        kind={"name": "roi_align", "sampling_ratio": 2, "aligned": False},
    )
    rois, valid = jnp.asarray(boxes), jnp.ones(boxes.shape[:2], bool)
    count = boxes.shape[0] * boxes.shape[1]
    cotangent = np.random.default_rng(2).normal(size=(*valid.shape, side, side, CHANNELS))
    cotangent = cotangent.astype(np.float32)

    @jax.jit
    def both(pyramid, cotangent):
        extent = jnp.array([CANVAS, CANVAS])
        out, pull = jax.vjp(lambda p: pooler(p, rois, valid, side=side, extent=extent), pyramid)
        return out, pull(cotangent)[0]

    out, gradient = both(pyramid, cotangent)
    maps = {k: torch.tensor(v).permute(0, 3, 1, 2).requires_grad_() for k, v in pyramid.items()}
    peer = poolers.MultiScaleRoIAlign(list(pyramid), side, 2)
    theirs = peer(maps, list(torch.tensor(boxes)), [CANVAS] * 2)
    theirs.backward(torch.tensor(cotangent.reshape(count, side, side, -1)).permute(0, 3, 1, 2))
    assert {int(k) for k in peer.map_levels(list(torch.tensor(boxes)))} == {0, 1, 2, 3}
    want = theirs.detach().permute(0, 2, 3, 1).numpy().reshape(out.shape)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for name, features in maps.items():
        want = features.grad.permute(0, 2, 3, 1).numpy()
        # A cell of a coarse map sums hundreds of samples, in another order.
        np.testing.assert_allclose(gradient[name], want, atol=1e-5 * max(1, np.abs(want).max()))


def test_levels_equal_torchvisions_at_their_boundaries_and_one_step_beside_them():
    # Sides of 224 times powers of two, and rectangles of the same area, exactly and with the last
    # bit of one side moved either way.
    boxes = []
    for side in (56, 112, 224, 448, 896):
        for width, height in ((side, side), (2 * side, side / 2), (side / 4, 4 * side)):
            exact = np.float32(width)
            beside = [np.nextafter(exact, np.float32(end)) for end in (0, 9e9)]
            near = [width * (1 + shift) for shift in (-1e-4, 1e-4)]
            boxes += [[0, 0, w, height] for w in (exact, *beside, *near)]
    boxes = np.array(boxes, np.float32)
    want = poolers.initLevelMapper(2, 5, 224, 4, 1e-6)([torch.tensor(boxes)]).tolist()
    assert ops.assign_levels(jnp.asarray(boxes), **EPS).tolist() == want
    assert set(want) == {0, 1, 2, 3}


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_roi_align_equals_torchs_grid_sample(way, ratio):
    # detectron2 tests/layers/test_roi_align.py::test_grid_sample_equivalence: a 30 x 30 map, box
    # (10, 10, 20, 20), 5 x 5 bins; the samples of a bin are averaged.
    image = (np.random.default_rng(3).uniform(size=(30, 30)) * 100).astype(np.float32)
    ours = ops.roi_align(
        [jnp.asarray(image)[None, :, :, None]],
        jnp.asarray([[[10.0, 10, 20, 20]]]),
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones((1, 1), bool),
        strides=(1.0,),
        output_size=(5, 5),
        sampling_ratio=ratio,
    )
    points = torch.linspace(10, 20, 2 * 5 * ratio + 1)[1::2] / 30 * 2 - 1
    grid = torch.stack(torch.meshgrid(points, points, indexing="xy"), -1)[None]
    samples = torch.nn.functional.grid_sample(
        torch.tensor(image)[None, None], grid, align_corners=False
    )
    want = torch.nn.functional.avg_pool2d(samples, ratio)[0, 0].numpy()
    np.testing.assert_allclose(ours[0, 0, :, :, 0], want, rtol=1e-5)
