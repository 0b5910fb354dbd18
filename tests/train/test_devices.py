"""Eight devices with an image each do what one device with eight does."""

import pytest

from tests.tiny import printed
from tests.train import devices


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return printed(tmp_path_factory, 8, "tests.train.devices", "double")


@pytest.mark.multi
def test_the_losses_of_ten_steps_are_the_same(told):
    assert len(told["one"]) == len(told["eight"]) == devices.STEPS
    for one, eight in zip(told["one"], told["eight"], strict=True):
        assert one["positive_rois"] > 0
        assert eight["positive_rois"] == one["positive_rois"]
        # 4e-15 in the first step; its gradients are large, and ten steps make 3e-9 of it.
        for name, value in one.items():
            assert eight[name] == pytest.approx(value, rel=1e-6), name
    first = told["one"][0], told["eight"][0]
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-12)


@pytest.mark.multi
def test_the_detections_are_the_same(told):
    assert told["found"] > 8
    # Pixels, of boxes; 9e-5 measured, of parameters whose losses differ by 3e-9.
    assert max(told["detections"]) < 1e-3


@pytest.mark.multi
def test_devices_exchange_gradients_and_normalisers_only(told):
    """No features, proposals or detections; the gradient once."""
    found = told["exchanged"]["single"]
    assert {name for name, _ in found} == {"all-reduce"}
    total = sum(size for _, size in found)
    assert 0.99 < total / told["parameters"] < 1.01


@pytest.mark.multi
def test_a_group_over_devices_exchanges_labels_of_anchors_besides(told):
    rest = sum(size for name, size in told["exchanged"]["groups"] if name != "all-reduce")
    anchors = 1536  # of the 64x96 canvas, p2 to p6
    assert 0 < rest <= 6 * 8 * len(devices.SIZES) * anchors
