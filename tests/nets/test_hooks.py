"""nets/neck/hooks.py: TensorFlow's resize, PyTorch's attention, padding, and a narrow detector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import build
from sephjax.errors import UserError
from sephjax.nets.functional import flat_paths, functional
from sephjax.nets.neck import hooks
from tests import narrow
from tests.nets import reference

INIT = "xavier_uniform"
SERIES = {
    "fpn.inputs": ("c3", "c4", "c5"),
    "fpn.extra": "conv_c5",
    "anchors.sizes": (16, 24, 32, 48),
}
# Softmax does not change when every score of a query moves by the same: a key's bias never learns.
NEVER = {f"fpn_before/{level}/key/bias" for level in ("c4", "c5")}


def drawn(make):
    model = functional(lambda rngs: make(init=INIT, rngs=rngs))
    return model, *reference.draw(model)


def quick(model):
    return narrow.jit(model.apply)


def maps(prefix, widths, height=64, width=128, seed=0):
    """A map a level of one picture."""
    rng = np.random.default_rng(seed)
    shape = lambda i: (-(-height // 2**i), -(-width // 2**i))
    return {
        f"{prefix}{i}": jnp.float32(rng.normal(size=(1, *shape(i), channels)))
        for i, channels in widths.items()
    }


PYRAMID = {3: 8, 4: 8, 5: 8, 6: 8}
MAKERS = {
    "non_local": (
        "c",
        {3: 8, 4: 16, 5: 32},
        lambda **o: hooks.NonLocalBefore({"c3": 8, "c4": 16, "c5": 32}, **o),
    ),
    "fusion": ("p", PYRAMID, lambda **o: hooks.Fusion(8, **o)),
    "balance": ("p", PYRAMID, lambda **o: hooks.Balance(8, **o)),
}


def legacy_resize(x, shape):
    """TensorFlow 1's bilinear resize as a loop; x [b, h, w, c]."""
    sides, out = x.shape[1:3], np.zeros((x.shape[0], *shape, x.shape[3]))
    for i in range(shape[0]):
        for j in range(shape[1]):
            y, z = i * sides[0] / shape[0], j * sides[1] / shape[1]
            top, left = int(y), int(z)
            for a, down in ((top, 1 - y + top), (min(top + 1, sides[0] - 1), y - top)):
                for b, right in ((left, 1 - z + left), (min(left + 1, sides[1] - 1), z - left)):
                    out[:, i, j] += down * right * x[:, a, b]
    return out


def test_a_row_is_doubled_and_halved_as_by_hand():
    x = jnp.arange(4.0)[None, None, :, None]
    doubled = hooks.resize_bilinear(x, (1, 8))[0, 0, :, 0]
    np.testing.assert_allclose(doubled, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_allclose(hooks.resize_bilinear(x, (1, 2))[0, 0, :, 0], [0, 2])


@pytest.mark.parametrize("shape", [(8, 10), (2, 3), (7, 9), (4, 5), (1, 1)])
def test_resize_agrees_with_tensorflow_and_with_a_loop(shape):
    tf = pytest.importorskip("tensorflow")
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    found = hooks.resize_bilinear(jnp.asarray(x), shape)
    theirs = tf.compat.v1.image.resize_bilinear(x, shape, align_corners=False).numpy()
    np.testing.assert_allclose(found, theirs, atol=1e-5)
    np.testing.assert_allclose(found, legacy_resize(x, shape), atol=1e-5)


def test_resize_repeats_the_last_cell_of_each_picture():
    x = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], (3, 4, 1, 1))
    extent = jnp.asarray([[2, 1], [4, 1], [0, 0]])
    found = hooks.resize_bilinear(x, (8, 1), extent=extent)[:, :, 0, 0]
    np.testing.assert_allclose(found[0], [0, 0.5, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found[1], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_allclose(found[2], np.zeros(8))  # a picture without cells: finite


@pytest.mark.torch
def test_attention_agrees_with_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 7, 4), (2, 9, 4), (2, 9, 16))
    )
    valid = np.arange(9)[None] < np.array([[9], [5]])
    found = hooks.attend(*map(jnp.asarray, (query, key, value)), jnp.asarray(valid))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (query, key, value)),
        attn_mask=torch.from_numpy(valid)[:, None],
    )
    np.testing.assert_allclose(found, theirs, atol=1e-6)


def test_attention_without_a_valid_position_is_finite():
    x = jnp.ones((1, 3, 4))
    slope = jax.grad(lambda x: jnp.sum(hooks.attend(x, x, x, jnp.zeros((1, 3), bool))))(x)
    assert np.all(np.isfinite(slope))


def test_names_of_a_non_local_block_do_not_change():
    model, _, _ = drawn(lambda **o: hooks.NonLocal(16, **o))
    shapes = {path: leaf.shape for path, leaf in flat_paths(model.abstract[0])}
    kernels = {"query": (1, 1, 16, 2), "key": (1, 1, 16, 2), "value": (1, 1, 16, 8)}
    kernels["project"] = (1, 1, 8, 16)
    expected = {f"{name}/kernel": shape for name, shape in kernels.items()}
    expected |= {f"{name}/bias": shape[-1:] for name, shape in kernels.items()}
    assert shapes == expected | {"gain": (), "norm/gamma": (16,), "norm/beta": (16,)}


def test_a_non_local_block_starts_as_the_identity_and_only_its_gain_learns():
    model, params, frozen = drawn(lambda **o: hooks.NonLocal(16, **o))
    drawn_gain, fresh = params["gain"], model.init(jax.random.key(0))[0]["gain"]
    assert fresh == 0.0
    x = maps("c", {4: 16})["c4"]

    @narrow.jit
    def run(params):
        loss = lambda params: jnp.sum(jnp.sin(model.apply(params, frozen, x)))
        return model.apply(params, frozen, x), jax.grad(loss)(params)

    for gain in (fresh, drawn_gain):
        params["gain"] = gain
        out, slopes = run(params)
        moved = {path for path, slope in flat_paths(slopes) if np.any(np.abs(slope) > 1e-6)}
        if gain == 0.0:
            np.testing.assert_array_equal(out, x)
            assert moved == {"gain"}
        else:
            assert not np.allclose(out, x, atol=1e-3)
            assert moved == {path for path, _ in flat_paths(params)} - {"key/bias"}


def test_non_local_leaves_c3_alone():
    prefix, widths, make = MAKERS["non_local"]
    model, params, frozen = drawn(make)
    given = maps(prefix, widths)
    out = quick(model)(params, frozen, given)
    assert set(out) == set(given)
    np.testing.assert_array_equal(out["c3"], given["c3"])
    assert all(not np.allclose(out[level], given[level], atol=1e-3) for level in ("c4", "c5"))


def refined(x, kernel, norm):
    """A 3x3 convolution of its middle tap, then EvoNorm-S0 as its formula; x [b, h, w, c]."""
    x = x @ np.asarray(kernel)[1, 1]
    groups = x.shape[-1] // 2  # narrow layers have two channels to a group
    variance = x.reshape(*x.shape[:3], groups, 2).var(axis=(1, 2, 4)).repeat(2, axis=-1)
    gamma, beta, v = (np.asarray(norm[name]) for name in ("gamma", "beta", "v"))
    gate = 1 / (1 + np.exp(-v * x))
    return x * gate / np.sqrt(variance[:, None, None] + 1e-5) * gamma + beta


@pytest.mark.parametrize("name", ["fusion", "balance"])
def test_fusion_and_balance_agree_with_numpy(name):
    prefix, widths, make = MAKERS[name]
    model, params, frozen = drawn(make)
    params["conv"]["kernel"] = params["conv"]["kernel"] * jnp.zeros((3, 3, 1, 1)).at[1, 1].set(3.0)
    given = maps(prefix, widths)
    out = quick(model)(params, frozen, given)
    given = {level: np.float64(x) for level, x in given.items()}
    shape = {level: x.shape[1:3] for level, x in given.items()}
    refine = lambda x: refined(x, params["conv"]["kernel"], params["norm"])
    if name == "fusion":
        others = [legacy_resize(given[level], shape["p3"]) for level in ("p4", "p5", "p6")]
        both = np.concatenate([given["p3"], sum(others) / 3], axis=-1)
        expected = given | {"f3": refine(both)}
    else:
        every = [legacy_resize(x, shape["p4"]) for x in given.values()]
        shared = refine(sum(every) / 4)
        expected = {level: x + legacy_resize(shared, shape[level]) for level, x in given.items()}
    assert sorted(out) == sorted(expected)
    for level, x in expected.items():
        np.testing.assert_allclose(out[level], x, atol=1e-4, err_msg=level)


@pytest.mark.parametrize("name", MAKERS)
def test_a_picture_has_the_same_maps_on_a_larger_canvas(name):
    prefix, widths, make = MAKERS[name]
    model, params, frozen = drawn(make)
    given = maps(prefix, widths)
    # By 32 pixels: a p6 of 64 pixels a cell then has a cell that is only half on the canvas.
    pad = lambda x, i: jnp.pad(
        x, ((0, 0), (0, -(-96 // 2**i) - x.shape[1]), (0, -(-224 // 2**i) - x.shape[2]), (0, 0)),
        constant_values=7.0,
    )  # fmt: skip
    canvas = {level: pad(x, int(level[1:])) for level, x in given.items()}
    size = jnp.asarray([[64, 128]], jnp.int32)
    run = quick(model)
    alone, padded = run(params, frozen, given), run(params, frozen, canvas, size)
    assert set(alone) == set(padded)
    for level, x in alone.items():
        inside = padded[level][:, : x.shape[1], : x.shape[2]]
        np.testing.assert_allclose(inside, x, atol=1e-5, err_msg=level)


def training(config):
    """Of a config: its model, drawn values, and (params) -> terms and gradients of a batch."""
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    batch = jax.tree.map(jnp.asarray, narrow.batch([(50, 70), (64, 96)], [3, 3]))
    losses = build.losses(config)

    def objective(params):
        keys = jax.random.split(jax.random.key(1), 2)
        outputs = model.apply(params, frozen, batch, keys, method="training")
        terms = losses(outputs, batch.size.astype(jnp.float32))
        return terms["loss"], (terms, outputs.rpn)

    return params, narrow.jit(jax.value_and_grad(objective, has_aux=True))


def unmoved(slopes):
    flat = dict(flat_paths(slopes))
    assert [path for path, slope in flat.items() if not np.all(np.isfinite(slope))] == []
    # 1e-9: what rounding leaves of a key's bias.
    return {path for path, slope in flat.items() if not np.any(np.abs(slope) > 1e-9)}


def test_non_local_and_balance_act_in_the_detector():
    config = narrow.config(**(SERIES | {"roi.levels": ("p3", "p4", "p5", "p6")}
                              | {"fpn.before": "non_local", "fpn.after": "balance"}))  # fmt: skip
    params, run = training(config)
    params["rpn"]["deltas"]["kernel"] *= 0.1
    (start, (terms, rpn)), slopes = run(params)
    assert all(np.isfinite(value) for value in terms.values())
    blocks = {path for path, _ in flat_paths(params["fpn_before"]) if not path.endswith("gain")}
    assert unmoved(slopes) == {f"fpn_before/{path}" for path in blocks}
    for level in ("c4", "c5"):
        params["fpn_before"][level]["gain"] = jnp.float32(0.5)
    (moved, (terms, other)), slopes = run(params)
    assert all(np.isfinite(value) for value in terms.values())
    assert moved != start
    assert not np.allclose(rpn.logits, other.logits, atol=1e-3)
    assert unmoved(slopes) <= NEVER
    # Without the refined mean the levels are the parent's: gamma and beta are all there is to it.
    params["fpn_after"]["norm"] = jax.tree.map(jnp.zeros_like, params["fpn_after"]["norm"])
    (_, (_, without)), _ = run(params)
    assert not np.allclose(without.logits, other.logits, atol=1e-3)


def test_rois_are_pooled_from_the_fused_map_and_the_rpn_does_not_read_it():
    changes = SERIES | {"fpn.after": "fusion", "roi.levels": ("f3",)}
    params, run = training(narrow.config(**changes))
    assert params["box_head"]["dense"]["fc0"]["kernel"].shape[0] == 7 * 7 * 2 * 16
    params["rpn"]["deltas"]["kernel"] *= 0.1
    (start, (terms, rpn)), slopes = run(params)
    assert all(np.isfinite(value) for value in terms.values())
    assert unmoved(slopes) == set()
    assert rpn.logits.shape[1] == 3 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)
    params["fpn_after"]["norm"]["gamma"] *= 2.0
    (moved, (_, other)), _ = run(params)
    assert moved != start
    np.testing.assert_array_equal(other.logits, rpn.logits)


@pytest.mark.parametrize(
    ("levels", "after", "words"),
    [
        (("f3",), "none", "'f3', which the pyramid does not have"),
        (("f3", "p4"), "fusion", r"different widths, f3 \(32\), p4 \(16\)"),
    ],
)
def test_maps_that_cannot_be_pooled_together_are_refused(levels, after, words):
    changes = {"roi.levels": levels} | ({"fpn.after": after} if after != "none" else {})
    with pytest.raises(UserError, match=words):
        build.model(narrow.config(**(SERIES | changes)), narrow.CLASSES)
