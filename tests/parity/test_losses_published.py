"""The box head's losses against the numbers in detectron2's own test.

detectron2 tests/modeling/test_fast_rcnn.py draws its layers and features from torch's generator at
seed 132, so torch is needed to draw them again; the two losses are written in that file.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.losses import roi as roi_losses
from sephjax.types import BoxOutputs, Rois

torch = pytest.importorskip("torch")


@pytest.mark.torch
def test_the_losses_of_two_proposals_are_detectron2s():
    torch.manual_seed(132)
    # In the order of FastRCNNOutputLayers: both layers are made, then both are drawn again.
    layers = torch.nn.Linear(8, 6), torch.nn.Linear(8, 20)
    for layer, std in zip(layers, (0.01, 0.001), strict=True):
        torch.nn.init.normal_(layer.weight, std=std)
        torch.nn.init.constant_(layer.bias, 0)
    pooled = torch.rand(2, 8)
    logits, deltas = (layer(pooled).detach().numpy() for layer in layers)
    boxes = jnp.array([[[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7, 8]]])
    truth = jnp.array([[[1.0, 1, 3, 3], [2, 2, 6, 6]]])
    there = jnp.ones((1, 2), bool)
    rois = Rois(
        boxes=boxes,
        labels=jnp.array([[1, 2]]),
        matched=jnp.array([[0, 1]]),
        targets=truth,
        iou=jnp.ones((1, 2)),
        positive=there,
        valid=there,
    )
    found = roi_losses.box_losses(
        BoxOutputs(jnp.asarray(logits)[None], jnp.asarray(deltas).reshape(1, 2, 5, 4)),
        rois,
        box_loss={"name": "smooth_l1", "beta": 0.0},
        weights=(10.0, 10.0, 5.0, 5.0),
        class_weighting="none",
        size=jnp.array([[10.0, 10.0]]),
    )
    np.testing.assert_allclose(found["roi_cls"], 1.7951188087, rtol=1e-5)  # torch.allclose
    np.testing.assert_allclose(found["roi_box"], 4.0357131958, rtol=1e-5)
