"""The torch twin against sephjax, stage by stage, on real pictures one of which is padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo, sephv14
from tests import narrow
from tests.export import cases, parity

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

pytestmark = [pytest.mark.torch, pytest.mark.data]
TOLERANCE = 1e-4  # of the largest value of a tensor: the promise


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """Other processes share the machine: torch's waiting threads would take from them."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batch(shared_data):
    return parity.pictures(shared_data / "coco_tiny")


def tensors(batch):
    return torch.from_numpy(batch.image), torch.from_numpy(batch.size)


def last(maps):
    """NCHW as NHWC."""
    return maps.permute(0, 2, 3, 1).numpy()


def check_stages(config, batch):
    """Every stage of both sides on one batch."""
    twin, params, frozen = parity.settled(config, batch)
    ours, theirs = parity.ours(config, params, frozen, batch), twin(*tensors(batch))
    assert sorted(theirs["pyramid"]) == list(ours.pyramid)
    for level, maps in ours.pyramid.items():
        assert parity.error(last(theirs["pyramid"][level]), maps) < TOLERANCE, level
    assert parity.error(theirs["rpn_logits"], ours.rpn.logits) < TOLERANCE
    assert parity.error(theirs["rpn_deltas"], ours.rpn.deltas) < TOLERANCE
    check_proposals(ours, theirs)
    check_detections(ours, theirs, len(batch.size), masks=config.mask.enabled)


def check_proposals(ours, theirs):
    """The same boxes, and what the box head says of each."""
    for i, valid in enumerate(ours.proposals.valid):
        found = {name: part.numpy() for name, part in theirs["proposals"][i].items()}
        mate = parity.paired(ours.proposals.boxes[i][valid], found["boxes"])
        assert len(mate) >= 10
        boxes, logits = theirs["box_deltas"][i].numpy()[mate], theirs["box_logits"][i].numpy()[mate]
        assert parity.error(found["boxes"][mate], ours.proposals.boxes[i][valid]) < TOLERANCE
        assert parity.error(found["scores"][mate], ours.proposals.scores[i][valid]) < TOLERANCE
        assert parity.error(logits, ours.boxes.logits[i][valid]) < TOLERANCE
        assert parity.error(boxes, ours.boxes.deltas[i][valid]) < TOLERANCE
        assert ("box_iou" in theirs) == (ours.boxes.iou is not None)
        if ours.boxes.iou is not None:
            iou = theirs["box_iou"][i].numpy()[mate]
            assert parity.error(iou, ours.boxes.iou[i][valid]) < TOLERANCE


def check_detections(ours, theirs, count, *, masks):
    for i in range(count):
        valid = ours.found.valid[i]
        found = {name: part.numpy() for name, part in theirs["detections"][i].items()}
        labels = ours.found.labels[i][valid]
        mate = parity.paired(ours.found.boxes[i][valid], found["boxes"], labels, found["labels"])
        assert len(mate) >= 10
        np.testing.assert_allclose(found["scores"][mate], ours.found.scores[i][valid], atol=1e-4)
        assert set(found) == {"boxes", "scores", "labels", *(("masks",) if masks else ())}
        if masks:
            np.testing.assert_allclose(found["masks"][mate], ours.found.masks[i][valid], atol=1e-3)
            assert np.ptp(found["masks"]) > 0.9


@pytest.mark.parametrize("name", cases.CASES)
def test_every_stage_of_a_narrow_model(name, batch):
    check_stages(cases.config(cases.CASES[name]), batch)


def test_every_stage_of_the_demo(batch):
    check_stages(demo.get_config(), batch)


def test_every_stage_of_sephv14(batch):
    check_stages(sephv14.get_config(), batch)


@pytest.mark.parametrize(
    ("depth", "layout", "norm", "extra"),
    [
        (18, "torchvision", "evonorm_s0", "conv_c5"),
        (34, "slim", "gn", "max_pool"),
        (50, "slim", "bn", "conv_c5"),
        (101, "msra", "frozen_bn", "max_pool"),
    ],
)
def test_the_pyramid_of_other_depths_layouts_and_norms(depth, layout, norm, extra, batch):
    values = {"backbone.depth": depth, "backbone.layout": layout, "backbone.norm": norm}
    twin, model, params, frozen = parity.drawn(cases.config(values | {"fpn.extra": extra}))
    run = lambda params, frozen, batch: model.apply(params, frozen, batch, method="pyramid")
    expected = narrow.jit(run)(params, frozen, jax.tree.map(jnp.asarray, batch))
    with torch.no_grad():
        found = twin.pyramid(*tensors(batch))
    assert list(found) == list(expected)
    for level, maps in expected.items():
        assert parity.error(last(found[level]), maps) < TOLERANCE, level
