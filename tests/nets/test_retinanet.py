"""nets/proposal/retinanet.py: torchvision's head, prior and losses; padding; levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sephv9
from sephjax import build
from sephjax.losses import rpn as rpn_losses
from sephjax.nets.functional import flat_paths, functional
from sephjax.nets.proposal.retinanet import RetinaNetHead
from sephjax.types import RpnOutputs, RpnTargets
from sephjax.weights import table
from tests.nets import reference
from tests.nets.test_rpn import LEVELS, pyramid

TOWERS = {
    "classify": ("classification_head", "logits", "cls_logits"),
    "refine": ("regression_head", "deltas", "bbox_reg"),
}


def head(**options):
    return functional(lambda rngs: RetinaNetHead(8, 3, levels=LEVELS, rngs=rngs, **options))


def torchvisions(norm="none"):
    """torchvision's head with drawn weights; its convolutions have a bias if no norm follows."""
    torch = pytest.importorskip("torch")
    retinanet = pytest.importorskip("torchvision.models.detection.retinanet")
    torch.manual_seed(0)
    layer = functools.partial(torch.nn.GroupNorm, 4) if norm == "gn" else None
    return retinanet.RetinaNetHead(8, 3, num_classes=1, norm_layer=layer), torch


def ours_of(peer, norm):
    """Its weights as ours: one norm of theirs is that of both levels here."""
    state = {name: value.numpy() for name, value in peer.state_dict().items()}
    tree = {}
    for tower, (part, last, theirs) in TOWERS.items():
        layers = {f"conv{i}": f"{part}.conv.{i}.0" for i in range(4)}
        tree[tower] = {ours: conv(state, name) for ours, name in layers.items()}
        if norm == "gn":
            tree[tower] |= {
                f"norm{i}_{level}": {
                    "gamma": state[f"{part}.conv.{i}.1.weight"],
                    "beta": state[f"{part}.conv.{i}.1.bias"],
                }
                for i in range(4)
                for level in LEVELS
            }
        tree[last] = conv(state, f"{part}.{theirs}")
    return jax.tree.map(jnp.asarray, tree)


def conv(state, name):
    found = {"kernel": table.CONV.to_ours(state[f"{name}.weight"])}
    return found | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


@pytest.mark.torch
@pytest.mark.parametrize("norm", ["none", "gn"])
def test_head_agrees_with_torchvisions(norm):
    peer, torch = torchvisions(norm)
    for value in peer.parameters():
        value.data.uniform_(-0.3, 0.3)
    maps = pyramid()
    with torch.no_grad():
        expected = peer([torch.from_numpy(np.array(x)).permute(0, 3, 1, 2) for x in maps.values()])
    model = head(convs=4, norm=norm)
    out = model.apply(ours_of(peer, norm), {}, maps)
    np.testing.assert_allclose(out.logits, expected["cls_logits"][..., 0], atol=1e-5)
    np.testing.assert_allclose(out.deltas, expected["bbox_regression"], atol=1e-5)


@pytest.mark.torch
def test_an_anchor_is_an_object_with_probability_one_in_a_hundred_at_the_start():
    peer, _ = torchvisions()
    params, _ = head().init(jax.random.key(0))
    bias = params["logits"]["bias"]
    np.testing.assert_allclose(bias, peer.classification_head.cls_logits.bias.detach(), rtol=1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(bias), np.full(3, 0.01), rtol=1e-5)
    np.testing.assert_array_equal(params["deltas"]["bias"], np.zeros(12))


@pytest.mark.torch
@pytest.mark.parametrize("positives", [5, 0])
def test_the_losses_of_sephv9_are_torchvisions(positives):
    peer, torch = torchvisions()
    peer.regression_head._loss_type = "giou"
    count, rng = 60, np.random.default_rng(0)
    corners = rng.uniform(50, 400, (count, 2))
    anchors = np.float32(np.concatenate([corners, corners + rng.uniform(20, 80, (count, 2))], 1))
    truth = anchors[:5] + np.float32(rng.uniform(-5, 5, (5, 4)))
    logits = np.float32(rng.normal(size=(1, count)))
    deltas = np.float32(0.2 * rng.normal(size=(1, count, 4)))
    # Background but for the positives and twenty ignored anchors.
    matched = np.full(count, -1)
    matched[:positives] = np.arange(positives)
    matched[-20:] = -2
    expected = peer.compute_loss(
        [{"boxes": torch.from_numpy(truth), "labels": torch.zeros(5, dtype=torch.long)}],
        {
            "cls_logits": torch.from_numpy(logits)[..., None],
            "bbox_regression": torch.from_numpy(deltas),
        },
        [torch.from_numpy(anchors)],
        [torch.from_numpy(matched)],
    )
    targets = RpnTargets(
        jnp.asarray(truth[matched.clip(0)])[None],
        jnp.asarray(matched >= 0)[None],
        jnp.asarray(matched == -1)[None],
    )
    options = build.losses(sephv9.get_config()).keywords["rpn"]
    found = rpn_losses.rpn_losses(
        RpnOutputs(jnp.asarray(logits), jnp.asarray(deltas)),
        targets,
        jnp.asarray(anchors),
        size=jnp.float32([[900, 900]]),
        **options,
    )
    np.testing.assert_allclose(found["rpn_cls"], float(expected["classification"]), rtol=1e-5)
    np.testing.assert_allclose(found["rpn_box"], float(expected["bbox_regression"]), rtol=1e-5)
    assert found["rpn_cls"] > 0


def test_towers_are_shared_by_levels_without_bias_and_norms_are_not():
    params, _ = head().abstract
    expected = [
        f"{tower}/norm0_{level}/{kind}"
        for tower in TOWERS
        for level in LEVELS
        for kind in ("beta", "gamma", "v")
    ]
    expected += [f"{tower}/conv0/kernel" for tower in TOWERS]
    expected += [f"{name}/{kind}" for name in ("logits", "deltas") for kind in ("bias", "kernel")]
    assert [path for path, _ in flat_paths(params)] == sorted(expected)
    model = head(init="xavier_uniform")
    params, frozen = reference.draw(model)
    before = model.apply(params, frozen, pyramid())
    params["classify"]["norm0_p4"]["gamma"] = 2 * params["classify"]["norm0_p4"]["gamma"]
    after = model.apply(params, frozen, pyramid())
    np.testing.assert_array_equal(after.deltas, before.deltas)  # the other tower
    np.testing.assert_array_equal(after.logits[:, :72], before.logits[:, :72])  # the other level
    assert not np.allclose(after.logits[:, 72:], before.logits[:, 72:])


def test_a_picture_has_the_same_outputs_on_a_larger_canvas():
    model = head(init="xavier_uniform")
    params, frozen = reference.draw(model)
    small = pyramid()
    pad = ((0, 0), (0, 2), (0, 5), (0, 0))
    large = {level: jnp.pad(x, pad, constant_values=9.0) for level, x in small.items()}
    alone = model.apply(params, frozen, small)
    padded = model.apply(params, frozen, large, jnp.asarray([[32, 48], [32, 48]], jnp.int32))
    fine = padded.logits[:, : 6 * 11 * 3].reshape(2, 6, 11, 3)[:, :4, :6]
    np.testing.assert_allclose(fine.reshape(2, -1), alone.logits[:, :72], atol=1e-5)
    fine = padded.deltas[:, : 6 * 11 * 3].reshape(2, 6, 11, 12)[:, :4, :6]
    np.testing.assert_allclose(fine.reshape(2, -1, 4), alone.deltas[:, :72], atol=1e-5)
