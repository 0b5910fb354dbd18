"""weights/torchvision.py: round trips, and the whole model against torchvision's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scene
from configs import mask_rcnn
from sephjax import build, recipe
from sephjax.errors import UserError
from sephjax.train import step
from sephjax.weights import table, torchvision
from tests.narrow import random_tree

HEIGHT, WIDTH = 128, 160
BACKGROUND_ROWS = {"bbox_pred": 4, "mask_fcn_logits": 1}


def config_without_tiers(**values):
    config = mask_rcnn.get_config("torchvision")
    config.roi.tiers, config.mask.tiers = (), ()  # one program each: they compile faster
    config.update_from_flattened_dict(values)
    return config


@pytest.fixture(scope="module")
def model():
    return build.model(config_without_tiers(), 90)


@pytest.fixture(scope="module")
def peer():
    """torchvision's model in evaluation, its picture, and the number of detections on it."""
    pytest.importorskip("torchvision")
    from benchmarks import peer

    image = scene.draw(HEIGHT, WIDTH, 5, 90).image
    theirs = peer.mask_rcnn(HEIGHT, WIDTH)
    return theirs, image, peer.settle(theirs, image, detections=40)


def to_numpy(state):
    return {name: value.numpy() for name, value in state.items()}


def test_what_is_dumped_is_loaded_again_unchanged(model):
    params, frozen = (random_tree(part, 0) for part in model.abstract)
    state = torchvision.dump_detector(params, frozen)
    loaded_params, loaded_frozen, report = torchvision.load_detector(state, *model.abstract)
    assert report.unused == report.missing == ()
    assert len(report.used) == len(state)
    jax.tree.map(np.testing.assert_array_equal, (loaded_params, loaded_frozen), (params, frozen))


@pytest.mark.torch
def test_a_state_dict_comes_back_but_for_rows_that_nothing_reads(model, peer):
    theirs = peer[0]
    state = to_numpy(theirs.state_dict())
    params, frozen, report = torchvision.load_detector(state, *model.abstract)
    assert len(report.used) == len(state)
    dumped = torchvision.dump_detector(params, frozen)
    assert dumped.keys() == state.keys()
    for name, value in state.items():
        layer = name.split(".")[-2]
        rows = BACKGROUND_ROWS.get(layer, 0) if name.startswith("roi_heads") else 0
        assert not dumped[name][:rows].any()
        np.testing.assert_array_equal(dumped[name][rows:], value[rows:], err_msg=name)


@pytest.mark.torch
def test_torchvision_loads_what_is_dumped_strictly(model):
    torch = pytest.importorskip("torch")
    detection = pytest.importorskip("torchvision.models.detection")
    params, frozen = (random_tree(part, 1) for part in model.abstract)
    state = {k: torch.from_numpy(v) for k, v in torchvision.dump_detector(params, frozen).items()}
    from benchmarks import peer

    peer.mask_rcnn(HEIGHT, WIDTH).load_state_dict(state, strict=True)
    boxes_only = {k: v for k, v in state.items() if "mask_" not in k}
    plain = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    tracked = {k: v for k, v in plain.state_dict().items() if k.endswith("num_batches_tracked")}
    plain.load_state_dict(boxes_only | tracked, strict=True)
    faster = build.model(config_without_tiers(**{"mask.enabled": False}), 90)
    loaded, _, report = torchvision.load_detector(to_numpy(plain.state_dict()), *faster.abstract)
    assert set(report.unused) == set(tracked)
    kept = {name: part for name, part in params.items() if name != "mask_head"}
    jax.tree.map(np.testing.assert_array_equal, loaded, kept)


@pytest.mark.torch
def test_names_of_older_files_are_read_as_torchvision_reads_them(model):
    torch = pytest.importorskip("torch")
    params, frozen = (random_tree(part, 2) for part in model.abstract)
    state = torchvision.dump_detector(params, frozen)
    older = {}
    for name, value in state.items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        if "_blocks." in name:
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        for i in range(4):
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        older[name] = value
    assert len(older.keys() - state.keys()) == 16 + 2 + 8
    from benchmarks import peer

    theirs = peer.mask_rcnn(HEIGHT, WIDTH)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in older.items()}, strict=True)
    for name, value in to_numpy(theirs.state_dict()).items():
        np.testing.assert_array_equal(value, state[name])
    again, _, _ = torchvision.load_detector(older, *model.abstract)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_variance_makes_up_for_another_eps(model):
    params, frozen = (random_tree(part, 3) for part in model.abstract)
    state = torchvision.dump_detector(params, frozen)
    _, loaded, _ = torchvision.load_detector(state, *model.abstract, eps=0.0)
    flat, before = table.flatten(loaded), table.flatten(frozen)
    for path, value in flat.items():
        expected = before[path] - np.float32(1e-5 if path.endswith("/variance") else 0)
        np.testing.assert_array_equal(value, expected)


def test_a_model_with_another_number_of_classes_is_an_error(model):
    params, frozen = (random_tree(part, 4) for part in model.abstract)
    state = torchvision.dump_detector(params, frozen)
    other = build.model(config_without_tiers(), 20).abstract
    with pytest.raises(UserError, match="wrong shape: mask_head/predictor/kernel"):
        torchvision.load_detector(state, *other)
    del state["rpn.head.cls_logits.bias"]
    with pytest.raises(UserError, match="missing: rpn/logits/bias"):
        torchvision.load_detector(state, *model.abstract)


@pytest.fixture(scope="module")
def both(model, peer):
    """Pyramid, RPN outputs and detections of both sides on one picture."""
    torch = pytest.importorskip("torch")
    from benchmarks import peer as peers

    theirs, image, count = peer
    config = config_without_tiers()
    params, frozen, _ = torchvision.load_detector(to_numpy(theirs.state_dict()), *model.abstract)
    predict = step.make_predict_step(model, build.classify(config), masks=True)

    def everything(params, frozen, batch):
        pyramid = model.apply(params, frozen, batch, method="pyramid")
        rpn = model.apply(params, frozen, pyramid, method="rpn.__call__")
        return pyramid, rpn, predict(params, frozen, batch)

    batch = jax.tree.map(jnp.asarray, scene.draw(HEIGHT, WIDTH, 5, 90).batch(8))
    ours = jax.device_get(jax.jit(everything)(params, frozen, batch))
    with torch.no_grad():
        images, _ = theirs.transform([peers.tensor(image)])
        assert images.tensors.shape == (1, 3, HEIGHT, WIDTH)
        features = theirs.backbone(images.tensors)
        rpn = theirs.rpn.head(list(features.values()))
        proposals, _ = theirs.rpn(images, features)
        found, _ = theirs.roi_heads(features, proposals, images.image_sizes)
    assert len(found[0]["boxes"]) == count
    return ours, (features, rpn, {name: value.numpy() for name, value in found[0].items()})


def relative_error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.torch
def test_the_pyramid_is_torchvisions(both):
    (pyramid, _, _), (features, _, _) = both
    assert len(pyramid) == len(features) == 5
    for ours, theirs in zip(pyramid.values(), features.values(), strict=True):
        assert relative_error(ours, theirs.permute(0, 2, 3, 1).numpy()) < 1e-4


@pytest.mark.torch
def test_rpn_logits_and_deltas_are_torchvisions_in_order(both):
    (_, rpn, _), (_, (logits, deltas), _) = both
    last = lambda maps, width: np.concatenate(
        [x.permute(0, 2, 3, 1).reshape(1, -1, width).numpy() for x in maps], axis=1
    )
    assert np.abs(rpn.logits - last(logits, 1)[..., 0]).max() < 1e-4
    assert np.abs(rpn.deltas - last(deltas, 4)).max() < 1e-4


@pytest.mark.torch
def test_detections_are_torchvisions_one_to_one(both):
    (_, _, found), (_, _, theirs) = both
    kept = np.flatnonzero(found.valid[0])
    boxes, labels, scores, masks = (
        x[0][kept] for x in (found.boxes, found.labels, found.scores, found.masks)
    )
    assert len(kept) == len(theirs["boxes"]) > 20
    distance = np.abs(theirs["boxes"][:, None] - boxes[None]).max(-1)
    distance += 1e3 * (theirs["labels"][:, None] != labels[None] + 1)
    mine = distance.argmin(axis=1)
    assert sorted(mine) == list(range(len(kept)))
    assert distance[np.arange(len(mine)), mine].max() < 1e-2
    np.testing.assert_allclose(scores[mine], theirs["scores"], atol=1e-4)
    np.testing.assert_allclose(masks[mine], theirs["masks"][:, 0], atol=1e-3)


@pytest.mark.torch
def test_the_anchors_are_torchvisions(peer):
    torch = pytest.importorskip("torch")
    from torchvision.models.detection.image_list import ImageList

    theirs = peer[0].rpn.anchor_generator
    shapes = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    images = ImageList(torch.zeros(1, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)])
    expected = theirs(images, [torch.zeros(1, 256, *shape) for shape in shapes])[0].numpy()
    levels = recipe.anchors_of(config_without_tiers())((HEIGHT, WIDTH), tuple(shapes))
    np.testing.assert_array_equal(np.concatenate(levels), expected)
