"""The whole detector: a picture's detections do not depend on its canvas; every tensor learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import build
from sephjax.train import step
from tests import narrow

NORMS = ["evonorm_s0", "gn", "frozen_bn"]
PICTURE = (50, 70)


@dataclasses.dataclass(frozen=True)
class Built:
    norm: str
    config: object
    model: object
    params: dict
    frozen: dict
    predict: object


def quieter(params, norm):
    """Kernels of unit gain, but predictors that move boxes by little and are not too sure."""
    for part, name in (("rpn", "deltas"), ("box_head", "deltas")):
        params[part][name]["kernel"] *= 0.1
    if norm == "frozen_bn":  # its features grow from block to block
        params["box_head"]["logits"]["kernel"] *= 0.05
    return params


@pytest.fixture(scope="module", params=NORMS)
def built(request):
    config = narrow.config(request.param)
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    predict = step.make_predict_step(model, build.classify(config), masks=True)
    return Built(
        request.param, config, model, quieter(params, request.param), frozen, narrow.jit(predict)
    )


@pytest.mark.parametrize("picture", [PICTURE, narrow.CANVAS], ids=["smaller", "as its canvas"])
def test_a_picture_has_the_same_detections_alone_and_beside_a_larger_one(built, picture):
    height, width = picture
    alone = narrow.batch([picture], [3])
    both = narrow.batch([picture, (90, 120)], [3, 2], canvas=(96, 128))
    np.testing.assert_array_equal(
        alone.image[0], both.image[0, : narrow.CANVAS[0], : narrow.CANVAS[1]]
    )
    one = built.predict(built.params, built.frozen, alone)
    two = built.predict(built.params, built.frozen, both)
    first = jax.tree.map(lambda leaf: leaf[:1], two)
    assert np.sum(one.valid) >= 5
    np.testing.assert_array_equal(one.valid, first.valid)
    np.testing.assert_array_equal(one.labels, first.labels)
    # 1e-3 is the promise; 1e-2 pixels since float32 sums run in another order on another canvas.
    np.testing.assert_allclose(one.scores, first.scores, atol=1e-3)
    np.testing.assert_allclose(one.boxes, first.boxes, atol=1e-2)
    np.testing.assert_allclose(one.masks, first.masks, atol=1e-3)
    assert np.ptp(np.asarray(one.scores)[np.asarray(one.valid)]) > 0.01  # not all alike
    assert np.all(one.boxes <= jnp.float32([width, height, width, height])[None, None])


def test_the_loss_is_finite_without_objects_and_every_tensor_gets_a_gradient(built):
    batch = narrow.batch([PICTURE, (64, 96)], [0, 3])
    losses = build.losses(built.config)
    terms, outputs, slopes = narrow.learn(losses, built.model, built.params, built.frozen, batch)
    assert all(np.isfinite(value) and value > 0 for value in terms.values()), terms
    assert not np.any(outputs.rois.positive[0])
    assert np.any(outputs.rois.positive[1])
    assert [name for name, slope in slopes.items() if not np.all(np.isfinite(slope))] == []
    assert [name for name, slope in slopes.items() if not np.any(slope)] == []
