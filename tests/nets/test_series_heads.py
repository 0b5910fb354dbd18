"""Heads of single rows of the series: against PyTorch, by hand, and in a narrow detector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import build, check
from sephjax.errors import UserError
from sephjax.nets.functional import flat_paths, functional
from sephjax.nets.roi import box_head
from sephjax.nets.roi.res5 import Res5
from sephjax.weights import table
from tests import narrow
from tests.nets import reference

SIZES, COUNTS = [(50, 70), (64, 96)], [0, 3]
SHARED = {"name": "shared_conv", "conv_dims": (16, 16), "branch_dim": 8, "norm": "evonorm_s0"}
SEPARATE_V2 = {"name": "separate_v2", "fc_dims": (32,), "conv_dims": (16,), "norm": "evonorm_s0"}
MULTI_SCALE = {"name": "multi_scale", "scale": 1.5, "level_of": "box"}
RES5 = {"name": "res5", "blocks": 2, "width": 8, "norm": "bn", "eps": 1e-5, "decay": 0.999}
READS = {"roi.head": RES5, "roi.levels": ("p3",), "mask.input": "head", "mask.pool": 7}
CASES = {
    "res5": READS,
    "shared_conv": {"roi.head": SHARED},
    "multi_scale": {"roi.head": SEPARATE_V2, "roi.pooler": MULTI_SCALE},
}


def nchw(x):
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))


def pooled(count, *shape, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def learned(changes, seed=1):
    """Terms, outputs and gradients of a narrow detector; the first picture has no objects."""
    config = narrow.config("frozen_bn", **changes)
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    for part in ("rpn", "box_head"):
        params[part]["deltas"]["kernel"] *= 0.1
    params["box_head"]["logits"]["kernel"] *= 0.05
    batch = narrow.batch(SIZES, COUNTS)
    return narrow.learn(build.losses(config), model, params, frozen, batch, seed)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_finite_and_every_tensor_learns(name):
    terms, outputs, slopes = learned(CASES[name])
    assert all(np.isfinite(value) and value > 0 for value in terms.values()), terms
    assert not np.any(outputs.rois.positive[0])
    assert np.any(outputs.rois.positive[1])
    assert [path for path, slope in slopes.items() if not np.all(np.isfinite(slope))] == []
    assert [path for path, slope in slopes.items() if not np.any(slope)] == []


def test_the_shared_head_of_the_series_has_the_sizes_of_its_document():
    make = lambda rngs: box_head.FastRCNNConvHead((7, 7, 256), box_head.Predictors(80), rngs=rngs)
    shapes = {path: leaf.shape for path, leaf in flat_paths(functional(make).abstract[0])}
    assert {path: shape for path, shape in shapes.items() if path.endswith("kernel")} == {
        "tower/conv0/kernel": (3, 3, 256, 384),
        **{f"tower/conv{i}/kernel": (3, 3, 384, 384) for i in (1, 2, 3)},
        "classify/conv0/kernel": (3, 3, 384, 256),
        "refine/conv0/kernel": (3, 3, 384, 256),
        "logits/kernel": (6400, 81),
        "deltas/kernel": (6400, 320),
    }
    assert [path for path in shapes if path.endswith("bias")] == ["deltas/bias", "logits/bias"]


@pytest.mark.torch
def test_the_shared_head_agrees_with_pytorch():
    torch = pytest.importorskip("torch")
    conv2d = torch.nn.functional.conv2d
    options = {"conv_dims": (8, 6), "branch_dim": 4, "norm": "none"}
    make = lambda rngs: box_head.FastRCNNConvHead(
        (4, 5, 3), box_head.Predictors(5), rngs=rngs, **options
    )
    model = functional(make)
    params, frozen = reference.draw(model)
    x = pooled(6, 4, 5, 3)
    out = model.apply(params, frozen, jnp.asarray(x))

    def layer(x, part, padding):
        kernel = torch.from_numpy(np.array(part["kernel"]).transpose(3, 2, 0, 1))
        bias = torch.from_numpy(np.array(part["bias"]))
        return torch.relu(conv2d(x, kernel, bias, padding=padding))

    def predicted(x, part):
        rows = x.permute(0, 2, 3, 1).flatten(1).numpy()  # 2 x 3 cells are left, channels innermost
        assert rows.shape == (6, 2 * 3 * 4)
        return rows @ np.array(part["kernel"]) + np.array(part["bias"])

    shared = torch.from_numpy(nchw(x))
    for i in range(2):
        shared = layer(shared, params["tower"][f"conv{i}"], 1)
    classes, boxes = (layer(shared, params[part]["conv0"], 0) for part in ("classify", "refine"))
    np.testing.assert_allclose(out.logits, predicted(classes, params["logits"]), atol=1e-4)
    deltas = predicted(boxes, params["deltas"]).reshape(6, 5, 4)
    np.testing.assert_allclose(out.deltas, deltas, atol=1e-4)


def test_class_and_box_share_the_tower_of_the_shared_head_and_nothing_else():
    make = lambda rngs: box_head.FastRCNNConvHead(
        (4, 5, 3), box_head.Predictors(5), conv_dims=(8,), branch_dim=4, rngs=rngs
    )
    model = functional(make)
    params, frozen = reference.draw(model)
    x = jnp.asarray(pooled(6, 4, 5, 3))
    still = lambda tree: all(np.all(leaf == 0) for leaf in jax.tree.leaves(tree))
    for output, own, other in (("logits", "classify", "refine"), ("deltas", "refine", "classify")):
        value = lambda p, output=output: jnp.sum(
            jnp.sin(getattr(model.apply(p, frozen, x), output))
        )
        slopes = jax.grad(value)(params)
        assert still(slopes[other])
        assert not still(slopes[own])
        assert not still(slopes["tower"])


def test_batch_norm_of_the_shared_head_counts_valid_rois_only():
    make = lambda rngs: box_head.FastRCNNConvHead(
        (4, 5, 3), box_head.Predictors(5), conv_dims=(8,), branch_dim=4, norm="bn", rngs=rngs
    )
    model = functional(make)
    params, frozen = reference.draw(model)
    x, valid = jnp.asarray(pooled(6, 4, 5, 3)), jnp.asarray([True] * 4 + [False] * 2)
    padded, updated = model.apply_and_update(params, frozen, x, valid, train=True)
    alone, expected = model.apply_and_update(params, frozen, x[:4], train=True)
    np.testing.assert_allclose(padded.logits[:4], alone.logits, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updated, expected)
    none, still = model.apply_and_update(params, frozen, x, valid & False, train=True)
    assert np.all(np.isfinite(none.logits))
    jax.tree.map(np.testing.assert_array_equal, still, frozen)


def test_batch_norm_of_the_heads_has_the_eps_and_the_decay_of_its_key():
    found = {}
    for eps, decay in ((1e-5, 0.9), (1e-5, 0.997), (1e-1, 0.9)):
        head = {"name": "separate", "conv_dims": (8,), "norm": "bn"}
        changes = {"roi.head": head, "mask.norm": "bn", "mask.deconv_norm": "bn"}
        if (eps, decay) != (1e-5, 0.9):  # the default
            changes["heads_bn"] = {"eps": eps, "decay": decay}
        model = build.model(narrow.config("frozen_bn", **changes), narrow.CLASSES)
        params, frozen = narrow.draw(model)
        boxes, masks = (jnp.asarray(pooled(4, side, side, 16)) for side in (7, 14))
        labels = jnp.zeros((4,), jnp.int32)
        call = lambda part, *x, model=model, params=params, frozen=frozen: model.apply_and_update(
            params, frozen, *x, train=True, method=f"{part}.__call__"
        )
        out, after = call("box_head", boxes)
        mask, after_mask = call("mask_head", masks, labels)
        found[eps, decay] = (
            np.concatenate([out.logits.ravel(), mask.ravel()]),
            [
                np.asarray(after["box_head"]["classify"]["norm0"]["mean"]),
                np.asarray(after_mask["mask_head"]["norm0"]["mean"]),
                np.asarray(after_mask["mask_head"]["deconv_norm"]["mean"]),
            ],
        )
    outputs, means = found[1e-5, 0.9]
    slower, slow_means = found[1e-5, 0.997]
    np.testing.assert_array_equal(outputs, slower)
    for mean, slow in zip(means, slow_means, strict=True):
        assert np.abs(mean).min() > 0
        np.testing.assert_allclose(slow, mean * 0.003 / 0.1, rtol=1e-4)
    assert np.abs(found[1e-1, 0.9][0] - outputs).max() > 0.01


def test_the_stage_of_the_c3_rows_has_the_sizes_of_its_document():
    make = lambda rngs: Res5((7, 7, 256), box_head.Predictors(80), rngs=rngs)
    model = functional(make)
    shapes = {path: leaf.shape for path, leaf in flat_paths(model.abstract[0])}
    kernels = {
        "block0/conv1/kernel": (1, 1, 256, 512),
        "block0/shortcut_conv/kernel": (1, 1, 256, 2048),
        "logits/kernel": (2048, 81),
        "deltas/kernel": (2048, 320),
    }
    for i in range(3):
        kernels[f"block{i}/conv2/kernel"] = (3, 3, 512, 512)
        kernels[f"block{i}/conv3/kernel"] = (1, 1, 512, 2048)
    kernels |= {f"block{i}/conv1/kernel": (1, 1, 2048, 512) for i in (1, 2)}
    assert {path: shape for path, shape in shapes.items() if path.endswith("kernel")} == kernels
    assert {path for path, _ in flat_paths(model.abstract[1])} == {
        f"block{i}/{norm}/{kind}"
        for i in range(3)
        for norm in ("norm1", "norm2", "norm3", *(("shortcut_norm",) if i == 0 else ()))
        for kind in ("mean", "variance")
    }


@pytest.mark.torch
@pytest.mark.parametrize("train", [True, False])
def test_the_stage_agrees_with_torchvisions_bottlenecks(train):
    """In training with the batch's statistics, which move the stored ones by a thousandth."""
    torch = pytest.importorskip("torch")
    tv = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    norm = lambda channels: torch.nn.BatchNorm2d(channels, eps=1e-5, momentum=1 - 0.999)
    shortcut = torch.nn.Sequential(torch.nn.Conv2d(6, 16, 1, bias=False), norm(16))
    peer = torch.nn.Sequential(
        tv.Bottleneck(6, 4, downsample=shortcut, norm_layer=norm),
        tv.Bottleneck(16, 4, norm_layer=norm),
    ).train(train)
    for value in (*peer.parameters(), *peer.buffers()):
        if value.is_floating_point() and value.ndim == 1:
            value.data.uniform_(0.5, 1.5)
    make = lambda rngs: Res5((7, 7, 6), box_head.Predictors(5), blocks=2, width=4, rngs=rngs)
    model = functional(make)
    ours, frozen = model.abstract
    heads = {name: ours[name] for name in ("logits", "deltas")}
    blocks = {name: part for name, part in ours.items() if name not in heads}
    rules = [
        table.Rule("block{b}/conv{c}/kernel", "{b}.conv{c}.weight", table.CONV),
        table.Rule("block{b}/shortcut_conv/kernel", "{b}.downsample.0.weight", table.CONV),
    ]
    for a, b in reference.NORM.items():
        rules += [
            table.Rule("block{b}/norm{c}/" + a, "{b}.bn{c}." + b),
            table.Rule("block{b}/shortcut_norm/" + a, "{b}.downsample.1." + b),
        ]
    part = reference.Abstract((blocks, frozen))
    params, frozen = reference.from_torch(rules, part, peer)
    params |= reference.draw(reference.Abstract((heads, {})))[0]
    x = pooled(6, 7, 7, 6)
    out, after = model.apply_and_update(params, frozen, jnp.asarray(x), train=train)
    with torch.no_grad():
        maps = peer(torch.from_numpy(nchw(x)))
    means = maps.mean(dim=(2, 3)).numpy()
    for name, found in (("logits", out.logits), ("deltas", out.deltas.reshape(6, -1))):
        expected = means @ np.array(params[name]["kernel"]) + np.array(params[name]["bias"])
        np.testing.assert_allclose(found, expected, atol=1e-4)
    _, expected = reference.from_torch(rules, part, peer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, expected)
    assert (out.features is not None) == train
    if train:
        np.testing.assert_allclose(nchw(out.features), maps, atol=1e-4)


def test_batch_norm_of_the_stage_counts_valid_rois_only():
    make = lambda rngs: Res5((7, 7, 6), box_head.Predictors(5), blocks=2, width=4, rngs=rngs)
    model = functional(make)
    params, frozen = reference.draw(model)
    x, valid = jnp.asarray(pooled(6, 7, 7, 6)), jnp.asarray([True] * 4 + [False] * 2)
    padded, updated = model.apply_and_update(params, frozen, x, valid, train=True)
    alone, expected = model.apply_and_update(params, frozen, x[:4], train=True)
    np.testing.assert_allclose(padded.logits[:4], alone.logits, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updated, expected)
    none, still = model.apply_and_update(params, frozen, x, valid & False, train=True)
    assert np.all(np.isfinite(none.logits))
    jax.tree.map(np.testing.assert_array_equal, still, frozen)


def test_the_mask_head_reads_the_stages_map():
    """Masks have 14x14 cells, and the stage learns from them and from nothing else here."""
    config = narrow.config("frozen_bn", **(READS | {"mask.convs": 0}))
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    assert params["mask_head"]["deconv"]["kernel"].shape == (2, 2, 32, 16)
    batch = jax.tree.map(jnp.asarray, narrow.batch(SIZES, [2, 3]))

    def mask_sum(params):
        keys = jax.random.split(jax.random.key(1), 2)
        return model.apply(params, frozen, batch, keys, method="training").mask_sum

    slopes = dict(flat_paths(narrow.jit(jax.grad(mask_sum))(params)))
    assert all(np.all(np.isfinite(slope)) for slope in slopes.values())
    for path, slope in slopes.items():
        if path.startswith("box_head/block"):
            assert np.any(slope), path
        elif path.startswith("box_head/"):
            assert not np.any(slope), path
    rows = batch.truth.boxes, batch.truth.labels, batch.truth.valid

    def masks(params):
        pyramid = model.apply(params, frozen, batch, method="pyramid")
        return model.apply(params, frozen, batch, pyramid, *rows, method="masks")

    found = np.asarray(narrow.jit(masks)(params))
    assert found.shape == (2, 3, 14, 14)
    assert np.ptp(found[0, :2]) > 0.1
    np.testing.assert_array_equal(found[0, 2], 0)  # there are two objects


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask.input": "head"}, "roi.head.name='fast_rcnn_conv_fc' has no map for a mask head"),
        (READS | {"mask.pool": 14}, "mask.pool is 14, but with mask.input='head'"),
        ({"mask.input": "boxes"}, "mask.input is 'boxes'; use 'pooled' or 'head'"),
    ],
)
def test_a_mask_head_without_a_map_to_read_is_refused(changes, words):
    changes = {key: value for key, value in changes.items() if (key, value) != ("mask.pool", 14)}
    with pytest.raises(UserError, match=words):
        check.check(narrow.config("frozen_bn", **changes))
