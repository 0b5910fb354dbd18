"""Parts of the torch twin on drawn inputs: every norm in every head, poolers, anchors, no finds."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from configs import mask_rcnn, sephv14
from sephjax import recipe
from sephjax.export import torch as export
from tests import narrow, test_predict
from tests.export import cases, parity
from tests.ops import test_nms

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
twin_ops = pytest.importorskip("sephjax.export.twin_ops")

pytestmark = pytest.mark.torch
TOLERANCE = 1e-4  # of the largest value of a tensor: the promise
CANVAS, SIZES = (64, 96), np.array([[64, 96], [50, 70]], np.int32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def maps(prefix, levels, channels):
    shape = lambda level: (2, *(-(-side // 2**level) for side in CANVAS))
    widths = channels if isinstance(channels, dict) else dict.fromkeys(levels, channels)
    return {f"{prefix}{i}": normal(i, *shape(i), widths[i]) for i in levels}


@pytest.mark.parametrize("norm", cases.NORMS)
@pytest.mark.parametrize("head", cases.HEADS)
def test_every_box_head_with_every_norm(head, norm):
    branch = {"roi.iou_branch": {"name": "v1", "negative_weight": 0.3}}
    twin, model, params, frozen = parity.drawn(cases.with_head(head, norm, branch))
    pooled = normal(0, 6, 7, 7, 16)
    run = lambda *args: model.apply(*args, method="box_head.__call__")
    expected = narrow.jit(run)(params, frozen, pooled)
    with torch.no_grad():
        logits, deltas, iou = twin.box_head(nchw(pooled))
    assert parity.error(logits, expected.logits) < TOLERANCE
    assert parity.error(deltas, expected.deltas) < TOLERANCE
    assert parity.error(iou, expected.iou) < TOLERANCE


@pytest.mark.parametrize("norm", cases.NORMS)
def test_neck_rpn_and_mask_head_with_every_norm(norm):
    twin, model, params, frozen = parity.drawn(cases.with_head("fast_rcnn_conv_fc", norm))
    features = maps("c", (2, 3, 4, 5), {2: 8, 3: 16, 4: 32, 5: 64})
    pyramid, pooled = maps("p", (2, 3, 4, 5, 6), 16), normal(1, 6, 14, 14, 16)
    labels = np.arange(6, dtype=np.int32) % parity.CLASSES

    def run(params, frozen, features, pyramid, pooled, labels, size):
        call = lambda part, *args: model.apply(params, frozen, *args, method=f"{part}.__call__")
        neck, rpn = call("fpn", features, size), call("rpn", pyramid, size)
        return neck, rpn, call("mask_head", pooled, labels)

    neck, rpn, masks = narrow.jit(run)(params, frozen, features, pyramid, pooled, labels, SIZES)
    sizes = SIZES.tolist()
    with torch.no_grad():
        found = twin.fpn({name: nchw(x) for name, x in features.items()}, sizes)
        logits, deltas = twin.rpn({name: nchw(x) for name, x in pyramid.items()}, sizes)
        theirs = twin.mask_head(nchw(pooled), torch.from_numpy(labels).long())
    for level, x in neck.items():
        assert parity.error(found[level].permute(0, 2, 3, 1), x) < TOLERANCE, level
    assert parity.error(logits, rpn.logits) < TOLERANCE
    assert parity.error(deltas, rpn.deltas) < TOLERANCE
    assert parity.error(theirs, masks) < TOLERANCE


@pytest.mark.parametrize("norm", cases.NORMS)
def test_retinanets_head_with_every_norm(norm):
    changes = {"rpn.name": "retinanet", "rpn.convs": 2, "rpn.norm": norm}
    twin, model, params, frozen = parity.drawn(cases.config(changes))
    pyramid = maps("p", (2, 3, 4, 5, 6), 16)
    run = lambda *args: model.apply(*args, method="rpn.__call__")
    expected = narrow.jit(run)(params, frozen, pyramid, SIZES)
    with torch.no_grad():
        logits, deltas = twin.rpn({name: nchw(x) for name, x in pyramid.items()}, SIZES.tolist())
    assert parity.error(logits, expected.logits) < TOLERANCE
    assert parity.error(deltas, expected.deltas) < TOLERANCE


@pytest.mark.parametrize("use", ["none", "product", "order"])
def test_a_predicted_iou_scores_or_ranks_the_twins_detections(use):
    from sephjax.export import twin as twins

    outputs, proposals = test_predict.drawn(13, branch=True)
    changes = (("iou_score", use), ("one_class_per_box", True))
    ours = test_predict.run(outputs, proposals, changes)
    rules = config_dict.ConfigDict(test_predict.OPTIONS | dict(changes))
    valid = np.asarray(proposals.valid)
    tensor = lambda leaf: torch.from_numpy(np.array(leaf)[valid])
    parts = [tensor(x) for x in (outputs.logits, outputs.deltas, outputs.iou, proposals.boxes)]
    size = tuple(int(side) for side in test_predict.SIZE)
    theirs = twins.detections(*parts, size, test_predict.WEIGHTS, rules)
    count = len(theirs["boxes"])
    np.testing.assert_array_equal(ours.valid, np.arange(len(ours.valid)) < count)
    assert count >= 10
    np.testing.assert_allclose(theirs["boxes"], ours.boxes[:count], atol=1e-4)
    np.testing.assert_allclose(theirs["scores"], ours.scores[:count], atol=1e-5)
    np.testing.assert_array_equal(theirs["labels"], ours.labels[:count])


def test_without_proposals_a_twin_has_no_detections():
    rule = cases.RETINANET["rpn.proposals"] | {"test_score": 1.0}
    for name in ("slim-series-retinanet-boxes", "torchvision-cascade", "cascade-iou-order"):
        changes = cases.CASES[name] | cases.RETINANET | {"rpn.proposals": rule}
        twin, _, _, _ = parity.drawn(cases.config(changes))
        out = twin(torch.zeros((2, *CANVAS, 3), dtype=torch.uint8), torch.from_numpy(SIZES))
        assert [len(rows["boxes"]) for rows in out["proposals"]] == [0, 0]
        assert [len(rows["boxes"]) for rows in out["detections"]] == [0, 0]


HOOKS = [{"fpn.before": "non_local"}, {"fpn.after": "fusion"}, {"fpn.after": "balance"}]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("changes", HOOKS, ids=lambda hook: next(iter(hook.values())))
def test_every_hook_of_the_neck(changes, padded):
    twin, model, params, frozen = parity.drawn(cases.config(changes))
    ((key, _),) = changes.items()
    before = key == "fpn.before"
    given = maps("c", (2, 3, 4, 5), {2: 8, 3: 16, 4: 32, 5: 64})
    given = given if before else maps("p", (2, 3, 4, 5, 6), 16)
    part, size = key.replace(".", "_"), jnp.asarray(SIZES) if padded else None
    run = lambda params, frozen, x: model.apply(params, frozen, x, size, method=f"{part}.__call__")
    expected = narrow.jit(run)(params, frozen, given)
    theirs = {name: nchw(x) for name, x in given.items()}
    with torch.no_grad():
        found = getattr(twin, part)(theirs, SIZES.tolist() if padded else None)
    assert sorted(found) == list(expected)  # a jitted program sorts its keys
    changed = [name for name in found if name not in theirs or (found[name] != theirs[name]).any()]
    assert changed == {"non_local": ["c4", "c5"], "fusion": ["f2"]}.get(changes[key], list(found))
    for name, x in expected.items():
        for i, (height, width) in enumerate(SIZES if padded else [CANVAS] * 2):
            stride = 2 ** int(name[1:])
            rows, columns = -(-height // stride), -(-width // stride)
            inside = np.asarray(x)[i, :rows, :columns]
            ours = found[name][i].permute(1, 2, 0)[:rows, :columns]
            assert parity.error(ours, inside) < TOLERANCE, name


def boxes_of(canvas):
    """Drawn boxes, then some at the edges, on the bounds between levels, and without area."""
    height, width = canvas
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, [width - 9, height - 9], (2, 60, 2))
    sides = rng.uniform(2, 200, (2, 60, 2))
    drawn = np.concatenate([corners, np.minimum(corners + sides, [width, height])], axis=2)
    until = np.concatenate([corners, np.broadcast_to([width, height], corners.shape)], axis=2)
    exact = [[0, 0, width, height], [3, 4, 59, 60], [3, 4, 115, 116], [7, 9, 7, 30], [0, 0, 1, 1]]
    exact = np.broadcast_to(np.array(exact, np.float64), (2, 5, 4))
    return np.concatenate([drawn, until, exact], axis=1).astype(np.float32)


POOLERS = {
    "aligned": {"name": "roi_align", "sampling_ratio": 2, "aligned": True},
    "unaligned": {"name": "roi_align", "sampling_ratio": 3, "aligned": False},
    "crop_max": {"name": "crop_max", "bins": (2, 2)},
    "crop": {"name": "crop_max", "bins": (1, 1)},
}


@pytest.mark.parametrize("eps_inside_log", [True, False])
@pytest.mark.parametrize("kind", POOLERS)
def test_every_pooler(kind, eps_inside_log):
    canonical = {"size": 112.0, "level": 4, "eps": 1e-6, "eps_inside_log": eps_inside_log}
    config = cases.config({"roi.pooler": POOLERS[kind], "roi.canonical": canonical})
    pooler, canvas = recipe.pooler_of(config), (192, 256)
    extents = [canvas, (150, 201)]  # of the second picture, smaller than the canvas
    pyramid = {
        f"p{i}": normal(i, 2, canvas[0] // 2**i, canvas[1] // 2**i, 16) for i in (2, 3, 4, 5)
    }
    boxes = boxes_of(canvas)
    # As proposals are: beyond the picture a sample on the edge of a cell is 0 or not by rounding.
    boxes[1] = np.clip(boxes[1], 0, [201, 150, 201, 150])
    run = lambda maps, boxes: pooler(
        maps, boxes, jnp.ones(boxes.shape[:2], bool), side=7, extent=jnp.array(extents)
    )
    expected = narrow.jit(run)(pyramid, boxes).reshape(-1, 7, 7, 16)
    twin = export.build_twin(config, parity.CLASSES)
    rows = [torch.from_numpy(row) for row in boxes]
    found = twin.pool({name: nchw(x) for name, x in pyramid.items()}, rows, extents, 7)
    assert parity.error(found.permute(0, 2, 3, 1), expected) < TOLERANCE


@pytest.mark.parametrize("level_of", ["box", "view"])
def test_the_larger_crop_of_the_box_branch(level_of):
    canonical = {"size": 112.0, "level": 4, "eps": 1e-6, "eps_inside_log": True}
    kind = {"name": "multi_scale", "scale": 1.5, "level_of": level_of}
    head = {"name": "separate", "conv_dims": (8,), "norm": "gn"}
    changes = {"roi.pooler": kind, "roi.canonical": canonical, "roi.head": head}
    config, canvas = cases.config(changes), (192, 256)
    pooler, extents = recipe.pooler_of(config), [canvas, (150, 201)]
    pyramid = {
        f"p{i}": normal(i, 2, canvas[0] // 2**i, canvas[1] // 2**i, 16) for i in (2, 3, 4, 5)
    }
    boxes = boxes_of(canvas)[:, :60]
    boxes[1] = np.clip(boxes[1], 0, [201, 150, 201, 150])
    run = lambda maps, boxes: pooler.views(
        maps, boxes, jnp.ones(boxes.shape[:2], bool), side=7, extent=jnp.array(extents)
    )
    expected = narrow.jit(run)(pyramid, boxes)
    twin = export.build_twin(config, parity.CLASSES)
    rows = [torch.from_numpy(row) for row in boxes]
    theirs = {name: nchw(x) for name, x in pyramid.items()}
    assert len(expected) == 2
    for view, scale in zip(expected, (1.0, 1.5), strict=True):
        found = twin.pool(theirs, rows, extents, 7, scale).permute(0, 2, 3, 1)
        assert parity.error(found, view.reshape(-1, 7, 7, 16)) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "canvas"),
    [
        (mask_rcnn.get_config(), (192, 256)),
        (mask_rcnn.get_config("torchvision"), (200, 250)),
        (sephv14.get_config(), (200, 250)),
    ],
)
def test_anchors(config, canvas):
    from sephjax.export import twin_proposals

    shapes = {
        name: tuple(-(-side // 2 ** int(name[1:])) for side in canvas)
        for name in recipe.levels_of(config)
    }
    expected = recipe.anchors_of(config)(canvas, tuple(shapes.values()))
    found = twin_proposals.anchors_of(config.anchors, canvas, shapes, torch.device("cpu"))
    for ours, theirs in zip(expected, found.values(), strict=True):
        # 1e-5 pixels: the last bit of a corner, whose root is taken in another order.
        np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=1e-6)


def test_evonorm_is_timms():
    timm = pytest.importorskip("timm")
    from sephjax.export import twin_layers

    theirs = timm.layers.EvoNorm2dS0(64, groups=32)
    ours = twin_layers.make_norm("evonorm_s0", 64)
    with torch.no_grad():
        for mine, their in (("weight", "weight"), ("bias", "bias"), ("v", "v")):
            values = torch.from_numpy(normal(7, 64))
            getattr(ours, mine).copy_(values)
            getattr(theirs, their).copy_(values)
        x = torch.from_numpy(normal(8, 2, 64, 5, 6))
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_a_norm_does_not_see_the_padding():
    from sephjax.export import twin_layers

    x = torch.from_numpy(normal(9, 2, 16, 8, 12))
    for name in ("gn", "evonorm_s0"):
        norm = twin_layers.make_norm(name, 16)
        alone = norm(x[1:, :, :5, :7])
        torch.testing.assert_close(norm(x, [(8, 12), (5, 7)])[1:, :, :5, :7], alone)
        assert not torch.allclose(norm(x)[1:, :, :5, :7], alone, atol=1e-3)


@pytest.mark.parametrize("count", [5, 40, 60, 1000])
def test_exactly_k_of_the_twin_follows_the_series_rule(count):
    for seed in range(4):
        boxes, scores, valid = test_nms.clustered(seed + 20)
        order = [i for i in np.argsort(-scores, kind="stable") if valid[i]]
        boxes, scores = boxes[order], scores[order]
        want = test_nms.exactly(boxes, scores, np.ones(len(order), bool), 0.7, count)
        assert len(want) == min(count, len(order))
        found = twin_ops.nms_exactly_k(*map(torch.from_numpy, (boxes, scores)), 0.7, count)
        assert found.tolist() == want


@pytest.mark.parametrize("name", ["msra-gn-modern-convolutions", "slim-evonorm-series-separate"])
def test_without_detections_there_are_none(name):
    config = cases.config(cases.CASES[name] | {"test.score_threshold": 1.0})
    twin, _, _, _ = parity.drawn(config)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, *CANVAS, 3), np.uint8))
    out = twin(images, torch.from_numpy(SIZES))
    for rows in out["detections"]:
        shapes = {name: tuple(part.shape) for name, part in rows.items()}
        assert shapes == {"boxes": (0, 4), "scores": (0,), "labels": (0,), "masks": (0, 28, 28)}
    assert all(len(rows["boxes"]) > 0 for rows in out["proposals"])
