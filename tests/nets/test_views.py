"""The pooler with a larger crop for the box branch (sephv19), by a loop and in a detector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import build, check, recipe
from sephjax.errors import UserError
from sephjax.nets.roi.pool import Pooler
from sephjax.ops import boxes as box_ops
from tests import narrow

CANONICAL = {"size": 32.0, "level": 4, "eps": 1e-6, "eps_inside_log": True}
EXTENT = [(64, 96), (40, 56)]
HEAD = {"name": "separate_v2", "fc_dims": (32,), "conv_dims": (16,), "norm": "evonorm_s0"}
MULTI_SCALE = {"name": "multi_scale", "scale": 1.5, "level_of": "box"}
# On 64 x 96: small, large, over the corner when enlarged, without area.
BOXES = np.float32([[30, 20, 46, 36], [10, 5, 80, 60], [0, 0, 30, 24], [5, 5, 5, 5]])


def pooler(**changes):
    kind = MULTI_SCALE | changes
    return Pooler(("p3", "p4"), (8.0, 16.0), CANONICAL, 3, kind)


def maps(channels=3):
    rng = np.random.default_rng(0)
    shape = lambda i: (2, 64 // 2**i, 96 // 2**i, channels)
    return {f"p{i}": rng.normal(size=shape(i)).astype(np.float32) for i in (3, 4)}


def picture(level, image):
    """A map of one picture, without what lies beyond it."""
    height, width = (-(-side // 2**level) for side in EXTENT[image])
    return maps()[f"p{level}"][image, :height, :width]


def crop(x, box, extent, side):
    """TensorFlow's crop_and_resize as a loop: x [h, w, c], which ends with the picture."""
    height, width = x.shape[:2]
    out = np.zeros((side, side, x.shape[2]))
    x1, y1, x2, y2 = np.float64(box) / np.tile(extent[::-1], 2)
    for i in range(side):
        for j in range(side):
            y = (y1 + (y2 - y1) * i / (side - 1)) * (height - 1)
            z = (x1 + (x2 - x1) * j / (side - 1)) * (width - 1)
            if not (0 <= y <= height - 1 and 0 <= z <= width - 1):
                continue
            for a, down in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
                for b, right in ((int(z), 1 - z % 1), (int(z) + 1, z % 1)):
                    if down * right:
                        out[i, j] += down * right * x[a, b]
    return out


def enlarged(box, scale):
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return np.concatenate([centre - scale * half, centre + scale * half])


def views(pool, boxes=BOXES, valid=None):
    boxes = jnp.asarray(np.stack([boxes, boxes * 0.6]))
    valid = jnp.ones(boxes.shape[:2], bool) if valid is None else valid
    run = lambda maps: pool.views(maps, boxes, valid, side=7, extent=jnp.asarray(EXTENT))
    return np.asarray(boxes), jax.tree.map(np.asarray, narrow.jit(run)(maps()))


def test_a_box_is_scaled_about_its_centre():
    found = box_ops.scale(jnp.float32([[10, 20, 30, 60], [0, 0, 4, 4], [5, 5, 5, 5]]), 1.5)
    np.testing.assert_allclose(found, [[5, 10, 35, 70], [-1, -1, 5, 5], [5, 5, 5, 5]])


@pytest.mark.parametrize("level_of", ["box", "view"])
def test_two_crops_without_a_maximum_as_by_a_loop(level_of):
    pool = pooler(level_of=level_of)
    boxes, (near, wide) = views(pool)
    sides = np.sqrt(np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1))
    # A side of 32 pixels is p4's first: the small box, 1.5 times as large, stays on p3.
    levels = lambda scale: np.where(sides * scale >= 32, 4, 3)
    assert (levels(1.0) != levels(1.5)).any()
    assert {3, 4} <= set(levels(1.0).ravel())
    for image, extent in enumerate(EXTENT):
        for n in range(len(BOXES)):
            box = boxes[image, n]
            own = levels(1.0)[image, n]
            other = own if level_of == "box" else levels(1.5)[image, n]
            np.testing.assert_allclose(
                near[image, n], crop(picture(own, image), box, extent, 7), atol=1e-5
            )
            expected = crop(picture(other, image), enlarged(box, 1.5), extent, 7)
            np.testing.assert_allclose(wide[image, n], expected, atol=1e-5)
    np.testing.assert_array_equal(wide[0, 2, 0], 0)  # beyond the picture


def test_an_invalid_roi_gives_zeros_and_gradients_are_finite():
    pool, valid = pooler(), jnp.asarray([[False, True, True, True]] * 2)
    _, (near, wide) = views(pool, valid=valid)
    assert not near[:, 0].any()
    assert not wide[:, 0].any()
    boxes = jnp.asarray(np.stack([BOXES, BOXES]))

    def loss(maps):
        two = pool.views(maps, boxes, valid, side=7, extent=jnp.asarray(EXTENT))
        return jnp.sum(jnp.sin(two[1]))

    for slope in jax.tree.leaves(narrow.jit(jax.grad(loss))(maps())):
        assert np.all(np.isfinite(slope))
        assert np.any(slope)


def test_a_pooler_of_one_crop_has_one_view():
    pool = pooler(name="crop_max", bins=(2, 2))
    kind = {"name": "crop_max", "bins": (2, 2)}
    pool = Pooler(pool.levels, pool.strides, CANONICAL, 3, kind)
    _, found = views(pool)
    assert len(found) == 1


def test_in_the_detector_the_class_reads_the_box_and_the_box_branch_more():
    """With predictors that differ in nothing else the class is the parent's, the deltas are not."""
    found = {}
    for name, pool in (("multi", MULTI_SCALE), ("parent", {"name": "crop_max", "bins": (1, 1)})):
        config = narrow.config("frozen_bn", **{"roi.head": HEAD, "roi.pooler": pool})
        model = build.model(config, narrow.CLASSES)
        params, frozen = narrow.draw(model)
        batch = jax.tree.map(jnp.asarray, narrow.batch([(50, 70)], [3]))
        run = lambda p, f, b, model=model: model.apply(p, f, b, method="candidates")
        _, proposals, found[name] = narrow.jit(run)(params, frozen, batch)
    valid = np.asarray(proposals.valid)
    assert valid.sum() >= 5
    logits, deltas = (
        [np.asarray(getattr(found[name], part))[valid] for name in ("multi", "parent")]
        for part in ("logits", "deltas")
    )
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    assert np.abs(deltas[0] - deltas[1]).max() > 0.1 * np.abs(deltas[1]).max()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"roi.pooler": MULTI_SCALE}, "'fast_rcnn_conv_fc' cannot read apart; use 'separate' or"),
        (
            {"roi.head": HEAD, "roi.pooler": MULTI_SCALE | {"level_of": "image"}},
            "roi.pooler.level_of is 'image'; use 'box'",
        ),
    ],
)
def test_what_cannot_be_pooled_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        check.check(narrow.config("frozen_bn", **changes))


def test_an_unknown_pooler_is_refused():
    config = narrow.config("frozen_bn", **{"roi.pooler": {"name": "crop"}})
    with pytest.raises(UserError, match=r"roi\.pooler\.name is 'crop'; use one of 'roi_align'"):
        recipe.pooler_of(config)
