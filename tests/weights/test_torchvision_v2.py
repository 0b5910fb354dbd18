"""weights/torchvision.py: the names of `maskrcnn_resnet50_fpn_v2`, both ways."""

import jax
import numpy as np
import pytest

from configs import mask_rcnn
from sephjax import build
from sephjax.weights import torchvision
from tests.narrow import random_tree

BACKGROUND_ROWS = {"bbox_pred": 4, "mask_fcn_logits": 1}
TRACKED = "num_batches_tracked"  # counts of PyTorch's batch norm that nothing reads


@pytest.fixture(scope="module")
def model():
    return build.model(mask_rcnn.get_config("torchvision_v2"), 90)


def test_what_is_dumped_is_loaded_again_unchanged(model):
    params, frozen = (random_tree(part, 0) for part in model.abstract)
    state = torchvision.dump_detector(params, frozen)
    loaded_params, loaded_frozen, report = torchvision.load_detector(state, *model.abstract)
    assert report.missing == ()
    assert all(name.endswith(TRACKED) for name in report.unused)
    jax.tree.map(np.testing.assert_array_equal, (loaded_params, loaded_frozen), (params, frozen))


def test_another_eps_of_the_backbone_moves_its_variances_alone(model):
    params, frozen = (random_tree(part, 0) for part in model.abstract)
    plain = torchvision.dump_detector(params, frozen)
    moved = torchvision.dump_detector(params, frozen, eps=1e-3)
    differ = {name for name in plain if not np.array_equal(plain[name], moved[name])}
    norms = {name for name in plain if name.endswith("running_var")}
    assert differ == {name for name in norms if name.startswith("backbone.body.")} < norms
    for name in differ:
        np.testing.assert_allclose(moved[name] - plain[name], 1e-3 - 1e-5, rtol=1e-3)


@pytest.mark.torch
def test_a_state_dict_of_torchvision_goes_through_and_back(model):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from benchmarks import peer

    theirs = peer.mask_rcnn_v2(128, 160)
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    params, frozen, report = torchvision.load_detector(state, *model.abstract)
    norms = sum(name.endswith("running_var") for name in state)
    assert len(report.used) == len(state) - norms
    assert len(report.unused) == norms
    dumped = torchvision.dump_detector(params, frozen)
    assert dumped.keys() == state.keys()
    for name, value in state.items():
        layer = name.split(".")[-2]
        rows = BACKGROUND_ROWS.get(layer, 0) if name.startswith("roi_heads") else 0
        if rows:  # nothing reads what is said of the background
            assert not dumped[name][:rows].any()
            value = value[rows:]
        np.testing.assert_array_equal(dumped[name][rows:] if rows else dumped[name], value)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in dumped.items()}, strict=True)
