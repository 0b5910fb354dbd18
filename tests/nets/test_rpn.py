"""nets/proposal/rpn.py: order of its outputs, padding, and torchvision's head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.nets.functional import flat_paths, functional
from sephjax.nets.proposal.rpn import RPNHead
from sephjax.weights import table
from tests.nets import reference

LEVELS = ("p3", "p4")


def head(**options):
    return functional(lambda rngs: RPNHead(8, 3, levels=LEVELS, rngs=rngs, **options))


def pyramid(shapes=((4, 6), (2, 3)), seed=0):
    rng = np.random.default_rng(seed)
    return {
        level: jnp.asarray(rng.normal(size=(2, *shape, 8)), jnp.float32)
        for level, shape in zip(LEVELS, shapes, strict=True)
    }


def test_anchors_run_by_level_row_column_and_then_within_the_cell():
    model = head(convs=0, init="xavier_uniform")
    params, frozen = reference.draw(model)
    maps = pyramid()
    out = model.apply(params, frozen, maps)
    assert out.logits.shape == (2, 3 * (24 + 6))
    assert out.deltas.shape == (2, 3 * (24 + 6), 4)
    params = jax.tree.map(np.array, params)
    predict = lambda name, x: x @ params[name]["kernel"][0, 0] + params[name]["bias"]
    found_logits, found_deltas = np.asarray(out.logits), np.asarray(out.deltas)
    n = 0
    for level in LEVELS:
        x = np.array(maps[level])[1]
        logits, deltas = predict("logits", x), predict("deltas", x)
        for row in range(x.shape[0]):
            for column in range(x.shape[1]):
                for a in range(3):
                    assert found_logits[1, n] == pytest.approx(logits[row, column, a], abs=1e-5)
                    expected = deltas[row, column, 4 * a : 4 * a + 4]
                    np.testing.assert_allclose(found_deltas[1, n], expected, atol=1e-5)
                    n += 1


def test_outputs_are_float32_whatever_the_compute_type():
    model = head()
    maps = {level: x.astype(jnp.bfloat16) for level, x in pyramid().items()}
    out = model.apply(*reference.draw(model), maps)
    assert out.logits.dtype == out.deltas.dtype == jnp.float32


def test_a_norm_of_its_own_for_each_level_leaves_the_convolution_shared():
    params, _ = head(norm="evonorm_s0").abstract
    expected = [
        f"{name}/{kind}" for name in ("conv0", "deltas", "logits") for kind in ("bias", "kernel")
    ]
    expected += [f"norm0_{level}/{kind}" for level in LEVELS for kind in ("beta", "gamma", "v")]
    assert [path for path, _ in flat_paths(params)] == sorted(expected)
    model = head(norm="evonorm_s0", init="xavier_uniform")
    params, frozen = reference.draw(model)
    before = model.apply(params, frozen, pyramid())
    params["norm0_p4"]["gamma"] = 2 * params["norm0_p4"]["gamma"]
    after = model.apply(params, frozen, pyramid())
    np.testing.assert_array_equal(after.logits[:, :72], before.logits[:, :72])
    assert not np.allclose(after.logits[:, 72:], before.logits[:, 72:])


def test_a_picture_has_the_same_outputs_on_a_larger_canvas():
    model = head(norm="evonorm_s0", init="xavier_uniform")
    params, frozen = reference.draw(model)
    small = pyramid()
    large = {
        level: jnp.pad(x, ((0, 0), (0, 2), (0, 5), (0, 0)), constant_values=9.0)
        for level, x in small.items()
    }
    size = jnp.asarray([[32, 48], [32, 48]], jnp.int32)
    alone = model.apply(params, frozen, small)
    for strides in (None, {"p3": 8.0, "p4": 16.0}):
        padded = model.apply(params, frozen, large, size, strides)
        fine = padded.logits[:, : 6 * 11 * 3].reshape(2, 6, 11, 3)[:, :4, :6]
        np.testing.assert_allclose(fine.reshape(2, -1), alone.logits[:, :72], atol=1e-5)


@pytest.mark.torch
def test_head_agrees_with_torchvision():
    torch = pytest.importorskip("torch")
    rpn = pytest.importorskip("torchvision.models.detection.rpn")
    torch.manual_seed(0)
    peer = rpn.RPNHead(8, 3, conv_depth=2)
    for value in peer.parameters():
        value.data.uniform_(-0.3, 0.3)
    names = {"conv{i}": "conv.{i}.0", "logits": "cls_logits", "deltas": "bbox_pred"}
    rules = [
        table.Rule(f"{ours}/{kind}", f"{theirs}.{name}", transform)
        for ours, theirs in names.items()
        for kind, name, transform in (
            ("kernel", "weight", table.CONV),
            ("bias", "bias", table.SAME),
        )
    ]
    model = head(convs=2)
    params, frozen = reference.from_torch(rules, model, peer)
    maps = pyramid()
    out = model.apply(params, frozen, maps)
    with torch.no_grad():
        torch_maps = [torch.from_numpy(np.array(x)).permute(0, 3, 1, 2) for x in maps.values()]
        logits, deltas = rpn.concat_box_prediction_layers(*peer(torch_maps))
    np.testing.assert_allclose(out.logits.reshape(-1, 1), logits, atol=1e-5)
    np.testing.assert_allclose(out.deltas.reshape(-1, 4), deltas, atol=1e-5)
