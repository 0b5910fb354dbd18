"""nets/roi/box_head.py and mask_head.py against torchvision's heads and their own definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.nets.functional import flat_paths, functional
from sephjax.nets.roi import box_head
from sephjax.nets.roi.mask_head import MaskHead
from sephjax.weights import table
from tests.nets import reference

POOLED = (3, 4, 64)  # height, width, channels: unequal, so that a transposition shows


def shapes_of(model):
    return {path: leaf.shape for path, leaf in flat_paths(model.abstract[0])}


def boxes(kind, classes=5, **options):
    options = {"predictors": box_head.Predictors(classes)} | options
    return functional(lambda rngs: kind(POOLED, rngs=rngs, **options))


def masks(**options):
    options = {"dim": 64, "convs": 2} | options
    return functional(lambda rngs: MaskHead(64, 5, rngs=rngs, **options))


def pooled(count=6, seed=0, shape=POOLED):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *shape)), jnp.float32)


KINDS = [
    box_head.FastRCNNConvFC,
    box_head.SeparateFastRCNNConvFCHead,
    box_head.SeparateFastRCNNConvFCHeadV2,
]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_float32_logits_and_deltas_of_every_class(kind):
    for agnostic in (False, True):
        model = boxes(kind, predictors=box_head.Predictors(5, class_agnostic=agnostic))
        x = jax.ShapeDtypeStruct((6, *POOLED), jnp.bfloat16)
        out = jax.eval_shape(model.apply, *model.abstract, x)
        assert (out.logits.shape, out.logits.dtype) == ((6, 6), jnp.float32)
        assert (out.deltas.shape, out.deltas.dtype) == ((6, 1 if agnostic else 5, 4), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_iou_branch_is_one_more_float32_logit_of_a_roi(kind):
    model = boxes(kind, predictors=box_head.Predictors(5, iou=True))
    x = jax.ShapeDtypeStruct((6, *POOLED), jnp.bfloat16)
    out = jax.eval_shape(model.apply, *model.abstract, x)
    assert (out.iou.shape, out.iou.dtype) == ((6,), jnp.float32)
    without = boxes(kind)
    assert jax.eval_shape(without.apply, *without.abstract, x).iou is None
    more = {"iou/kernel", "iou/bias"}
    if kind is box_head.SeparateFastRCNNConvFCHeadV2:
        more |= {"overlap/conv0/kernel", *(f"overlap/norm0/{x}" for x in ("beta", "gamma", "v"))}
    assert shapes_of(model).keys() - shapes_of(without).keys() == more
    assert shapes_of(without).keys() <= shapes_of(model).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_deltas_do_not_know_of_an_iou_branch(kind):
    with_, without = boxes(kind, predictors=box_head.Predictors(5, iou=True)), boxes(kind)
    params, frozen = reference.draw(with_)
    kept = {name: part for name, part in params.items() if name in without.abstract[0]}
    out, expected = with_.apply(params, frozen, pooled()), without.apply(kept, frozen, pooled())
    np.testing.assert_array_equal(out.logits, expected.logits)
    np.testing.assert_array_equal(out.deltas, expected.deltas)


@pytest.mark.parametrize("convs", [1, 4])
def test_the_iou_branch_of_v2_is_a_convolution_beside_the_last_of_the_box(convs):
    options = {"conv_dims": (64,) * convs, "fc_dims": (16,)}
    predictors = box_head.Predictors(5, class_agnostic=True, iou=True)
    model = boxes(box_head.SeparateFastRCNNConvFCHeadV2, predictors=predictors, **options)
    params, frozen = reference.draw(model)
    # With the last convolution's values it is a fifth delta.
    last = f"conv{convs - 1}", f"norm{convs - 1}"
    params["overlap"] = {f"{name[:4]}0": params["refine"][name] for name in last}
    params["iou"] = {name: x[..., 2:3] for name, x in params["deltas"].items()}
    out = model.apply(params, frozen, pooled())
    np.testing.assert_allclose(out.iou, out.deltas[:, 0, 2], rtol=1e-5, atol=1e-5)
    slopes = jax.grad(lambda p: jnp.sum(model.apply(p, frozen, pooled()).iou))(params)
    shared = [f"conv{i}" for i in range(convs) if np.any(slopes["refine"][f"conv{i}"]["kernel"])]
    assert shared == [f"conv{i}" for i in range(convs - 1)]
    for part in ("classify", "logits", "deltas"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes[part])), part


def test_the_iou_branch_of_the_series_reads_the_third_of_four_convolutions():
    predictors = box_head.Predictors(80, iou=True)
    head = box_head.SeparateFastRCNNConvFCHeadV2
    shapes = shapes_of(functional(lambda rngs: head((7, 7, 256), predictors, rngs=rngs)))
    assert shapes["overlap/conv0/kernel"] == (3, 3, 256, 256)
    assert "overlap/conv1/kernel" not in shapes
    assert shapes["iou/kernel"] == (12544, 1)


def test_the_series_head_v2_has_two_dense_layers_and_four_convolutions():
    model = functional(
        lambda rngs: box_head.SeparateFastRCNNConvFCHeadV2(
            (7, 7, 256), box_head.Predictors(80), rngs=rngs
        )
    )
    shapes = shapes_of(model)
    kernels = {path: shape for path, shape in shapes.items() if path.endswith("kernel")}
    assert kernels == {
        "classify/fc0/kernel": (12544, 1024),
        "classify/fc1/kernel": (1024, 1024),
        **{f"refine/conv{i}/kernel": (3, 3, 256, 256) for i in range(4)},
        "logits/kernel": (1024, 81),
        "deltas/kernel": (12544, 320),
    }
    # a layer with a normaliser has no bias
    assert [path for path in shapes if path.endswith("bias")] == ["deltas/bias", "logits/bias"]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_class_and_box_share_nothing_in_separate_heads(kind):
    model = boxes(kind)
    params, frozen = reference.draw(model)
    grads = jax.grad(lambda p: jnp.sum(model.apply(p, frozen, pooled()).logits))(params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((grads["refine"], grads["deltas"])))
    grads = jax.grad(lambda p: jnp.sum(model.apply(p, frozen, pooled()).deltas))(params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((grads["classify"], grads["logits"])))


def test_a_row_does_not_depend_on_its_neighbours():
    model = boxes(box_head.SeparateFastRCNNConvFCHeadV2)
    params, frozen = reference.draw(model)
    out, alone = (model.apply(params, frozen, x) for x in (pooled(), pooled()[2:3]))
    np.testing.assert_allclose(out.logits[2:3], alone.logits, atol=1e-5)
    np.testing.assert_allclose(out.deltas[2:3], alone.deltas, atol=1e-5)


def test_batch_norm_in_a_head_counts_valid_rois_only():
    model = boxes(
        box_head.FastRCNNConvFC, conv_dims=(8,), fc_dims=(8,), conv_norm="bn", fc_norm="bn"
    )
    params, frozen = reference.draw(model)
    valid = jnp.asarray([True] * 4 + [False] * 2)
    padded, updated = model.apply_and_update(params, frozen, pooled(), valid, train=True)
    alone, expected = model.apply_and_update(params, frozen, pooled()[:4], train=True)
    np.testing.assert_allclose(padded.logits[:4], alone.logits, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updated, expected)


def test_a_mask_of_one_class_is_what_its_column_of_the_predictor_says():
    model = masks(norm="evonorm_s0", deconv_norm="evonorm_s0")
    params, frozen = reference.draw(model)
    labels = jnp.asarray([4, 0, 3, 3, 1, 2], jnp.int32)
    own = model.apply(params, frozen, pooled(), labels)
    assert own.shape == (6, 6, 8)
    features = np.asarray(model.apply(params, frozen, pooled(), method="features"))
    kernel, bias = (np.asarray(params["predictor"][name]) for name in ("kernel", "bias"))
    for found, rows, label in zip(own, features, labels.tolist(), strict=True):
        expected = rows @ kernel[0, 0, :, label] + bias[label]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_mask_of_background_is_finite():
    model = masks()
    params, frozen = reference.draw(model)
    assert np.isfinite(model.apply(params, frozen, pooled(), jnp.full((6,), 5, jnp.int32))).all()


def test_masks_are_float32_whatever_the_compute_type():
    model = masks(norm="gn")
    x = jax.ShapeDtypeStruct((6, *POOLED), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((6,), jnp.int32)
    assert jax.eval_shape(model.apply, *model.abstract, x, labels).dtype == jnp.float32


def test_names_of_the_mask_head_do_not_change():
    shapes = shapes_of(masks(norm="gn"))
    assert {path for path in shapes if not path.startswith("norm")} == {
        "conv0/kernel",
        "conv1/kernel",
        "deconv/kernel",
        "deconv/bias",
        "predictor/kernel",
        "predictor/bias",
    }
    assert shapes["predictor/kernel"] == (1, 1, 64, 5)


def dense(ours, theirs, transform):
    return [
        table.Rule(f"{ours}/kernel", f"{theirs}.weight", transform),
        table.Rule(f"{ours}/bias", f"{theirs}.bias"),
    ]


@pytest.mark.torch
def test_two_dense_layers_agree_with_torchvision():
    torch = pytest.importorskip("torch")
    tv = pytest.importorskip("torchvision.models.detection.faster_rcnn")
    torch.manual_seed(0)
    peer = torch.nn.ModuleDict(
        {"head": tv.TwoMLPHead(3 * 4 * 64, 32), "predictor": tv.FastRCNNPredictor(32, 6)}
    )
    rules = [
        *dense("dense/fc0", "head.fc6", table.fc_after_pool(3, 4)),
        *dense("dense/fc1", "head.fc7", table.LINEAR),
        *dense("logits", "predictor.cls_score", table.LINEAR),
        *dense("deltas", "predictor.bbox_pred", table.LINEAR),
    ]
    model = boxes(box_head.FastRCNNConvFC, fc_dims=(32, 32))
    params = dict(model.abstract[0])
    # torchvision has deltas for the background too
    params["deltas"] = {
        "kernel": jax.ShapeDtypeStruct((32, 24), jnp.float32),
        "bias": jax.ShapeDtypeStruct((24,), jnp.float32),
    }
    loaded, _ = reference.from_torch(rules, reference.Abstract((params, {})), peer)
    for kind in ("kernel", "bias"):
        loaded["deltas"][kind] = loaded["deltas"][kind][..., 4:]
    out = model.apply(loaded, {}, pooled())
    with torch.no_grad():
        x = torch.from_numpy(np.array(pooled())).permute(0, 3, 1, 2)
        logits, deltas = peer["predictor"](peer["head"](x))
    np.testing.assert_allclose(out.logits, logits, atol=1e-5)
    np.testing.assert_allclose(out.deltas, deltas.reshape(6, 6, 4)[:, 1:], atol=1e-5)


@pytest.mark.torch
def test_convolutions_and_a_dense_layer_agree_with_torchvision_v2():
    torch = pytest.importorskip("torch")
    tv = pytest.importorskip("torchvision.models.detection.faster_rcnn")
    torch.manual_seed(0)
    peer = tv.FastRCNNConvFCHead((64, 3, 4), [16, 16], [32], norm_layer=torch.nn.BatchNorm2d).eval()
    for value in (*peer.parameters(), *peer.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.1, 0.3) if value.ndim == 1 else value.data.normal_(0, 0.1)
    rules = [
        table.Rule("tower/conv{i}/kernel", "{i}.0.weight", table.CONV),
        *(table.Rule("tower/norm{i}/" + a, "{i}.1." + b) for a, b in reference.NORM.items()),
        *dense("dense/fc0", "3", table.fc_after_pool(3, 4)),
    ]
    options = {"conv_dims": (16, 16), "fc_dims": (32,), "conv_norm": "frozen_bn"}
    model = boxes(box_head.FastRCNNConvFC, **options)
    heads = {name: model.abstract[0][name] for name in ("logits", "deltas")}
    rest = {name: model.abstract[0][name] for name in ("tower", "dense")}
    part = reference.Abstract((rest, model.abstract[1]))
    params, frozen = reference.from_torch(rules, part, peer)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), heads)
    # read the 32 features through the deltas: 5 boxes of 4 show the first 20
    zeros["deltas"]["kernel"] = jnp.eye(32, 20)
    out = model.apply(params | zeros, frozen, pooled())
    with torch.no_grad():
        expected = peer(torch.from_numpy(np.array(pooled())).permute(0, 3, 1, 2))
    np.testing.assert_allclose(out.deltas.reshape(6, 20), expected[:, :20], atol=1e-5)


@pytest.mark.torch
def test_mask_head_agrees_with_torchvision():
    torch = pytest.importorskip("torch")
    tv = pytest.importorskip("torchvision.models.detection.mask_rcnn")
    torch.manual_seed(0)
    peer = torch.nn.ModuleDict(
        {
            "head": tv.MaskRCNNHeads(64, (64, 64), 1),
            "predictor": tv.MaskRCNNPredictor(64, 64, 5),
        }
    )
    rules = [
        *dense("conv{i}", "head.{i}.0", table.CONV),
        *dense("deconv", "predictor.conv5_mask", table.CONV_TRANSPOSE),
        *dense("predictor", "predictor.mask_fcn_logits", table.CONV),
    ]
    model = masks()
    params, frozen = reference.from_torch(rules, model, peer)
    with torch.no_grad():
        x = torch.from_numpy(np.array(pooled())).permute(0, 3, 1, 2)
        expected = peer["predictor"](peer["head"](x)).permute(0, 2, 3, 1)
    for label in range(5):
        masks_of = model.apply(params, frozen, pooled(), jnp.full((6,), label, jnp.int32))
        np.testing.assert_allclose(masks_of, expected[..., label], atol=1e-5)
