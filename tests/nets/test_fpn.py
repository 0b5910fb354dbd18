"""nets/neck/fpn.py against torchvision's pyramid, and the series' form of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.nets.functional import flat_paths, functional
from sephjax.nets.neck import fpn
from sephjax.weights import table
from tests.nets import reference

WIDTHS = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
SERIES = {"norm": "evonorm_s0", "extra": "conv_c5", "init": "xavier_uniform", "channels": 64}


def neck(levels=("c2", "c3", "c4", "c5"), **options):
    widths = {level: WIDTHS[level] for level in levels}
    options = {"channels": 8} | options
    return functional(lambda rngs: fpn.FPN(in_channels=widths, rngs=rngs, **options))


def features(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return {
        level: jnp.asarray(
            rng.normal(size=(1, -(-height // 2**i), -(-width // 2**i), channels)), jnp.float32
        )
        for i, (level, channels) in enumerate(WIDTHS.items(), 2)
    }


def test_nearest_resize_takes_the_floor_of_the_scaled_index():
    x = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 4, 1, 1))
    # to 7 cells: floor(i * 4 / 7) = 0 0 1 1 2 2 3; to 8: every cell twice
    np.testing.assert_array_equal(fpn.resize_nearest(x, (7, 1))[0, :, 0, 0], [0, 0, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(
        fpn.resize_nearest(x, (8, 1))[0, :, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    )


def test_levels_run_fine_to_coarse_and_p6_is_every_second_cell_of_p5():
    model = neck()
    out = model.apply(*reference.draw(model), features(64, 96))
    assert {level: x.shape[1:] for level, x in out.items()} == {
        "p2": (16, 24, 8),
        "p3": (8, 12, 8),
        "p4": (4, 6, 8),
        "p5": (2, 3, 8),
        "p6": (1, 2, 8),
    }
    assert list(out) == ["p2", "p3", "p4", "p5", "p6"]
    np.testing.assert_array_equal(out["p6"], out["p5"][:, ::2, ::2])


def test_names_of_the_series_neck_do_not_change():
    params, frozen = neck(("c3", "c4", "c5"), **SERIES).abstract
    expected = ["extra/kernel", *(f"extra_norm/{name}" for name in ("beta", "gamma", "v"))]
    for i in (3, 4, 5):
        expected += [f"lateral{i}/kernel", f"lateral{i}/bias", f"output{i}/kernel"]
        expected += [f"output_norm{i}/{name}" for name in ("beta", "gamma", "v")]
    assert [path for path, _ in flat_paths(params)] == sorted(expected)
    assert list(flat_paths(frozen)) == []


def test_the_series_p6_comes_from_c5():
    model = neck(("c3", "c4", "c5"), **SERIES)
    params, frozen = reference.draw(model)
    maps = features(64, 96)
    out = model.apply(params, frozen, maps)
    assert out["p6"].shape == (1, 1, 2, 64)
    changed = model.apply(params, frozen, maps | {"c4": 2 * maps["c4"]})
    np.testing.assert_array_equal(changed["p6"], out["p6"])
    np.testing.assert_array_equal(changed["p5"], out["p5"])
    assert not np.allclose(changed["p3"], out["p3"])


def test_merged_maps_are_not_normalised():
    """A scale of c5 that EvoNorm would undo still reaches p4 through the sum."""
    model = neck(("c3", "c4", "c5"), **SERIES)
    params, frozen = reference.draw(model)
    maps = features(64, 96)
    merged = {}
    for factor in (1.0, 1e4):
        out = model.apply(params, frozen, maps | {"c5": factor * maps["c5"]})
        merged[factor] = out["p4"]
    # With c5 so large, p4 is the normalised image of c5 alone: c4 is about 1e-4 of the sum, which
    # 1e-2 leaves room for; an image of p4 that c5 does not rule differs by over 0.1 (below).
    alone = model.apply(params, frozen, maps | {"c4": 0 * maps["c4"], "c5": 1e4 * maps["c5"]})
    np.testing.assert_allclose(merged[1e4], alone["p4"], atol=1e-2)
    assert not np.allclose(merged[1.0], merged[1e4], atol=0.1)


@pytest.mark.parametrize("norm", ["evonorm_s0", "gn", "bn", "none"])
def test_a_picture_has_the_same_pyramid_on_a_larger_canvas(norm):
    model = neck(**(SERIES | {"norm": norm}))
    params, frozen = reference.draw(model)
    maps = features(64, 128)
    canvas = {
        level: jnp.pad(x, ((0, 0), (0, x.shape[1]), (0, x.shape[2]), (0, 0)), constant_values=5.0)
        for level, x in maps.items()
    }
    size = jnp.asarray([[64, 128]], jnp.int32)
    alone = model.apply(params, frozen, maps, train=True)
    padded = model.apply(params, frozen, canvas, size, train=True)
    for level, x in alone.items():
        inside = padded[level][:, : x.shape[1], : x.shape[2]]
        np.testing.assert_allclose(inside, x, atol=1e-5, err_msg=level)


def test_an_unknown_extra_level_is_refused():
    with pytest.raises(ValueError, match="p7"):
        neck(extra="p7")


@pytest.mark.torch
@pytest.mark.parametrize("size", [(64, 96), (52, 90)])
def test_pyramid_agrees_with_torchvision(size):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    peer = ops.FeaturePyramidNetwork(
        list(WIDTHS.values()), 8, ops.feature_pyramid_network.LastLevelMaxPool()
    )
    for value in peer.parameters():
        value.data.uniform_(-0.3, 0.3)
    rules = [
        table.Rule(f"{ours}{{i}}/{kind}", f"{theirs}.{{i:-2}}.0.{name}", transform)
        for ours, theirs in (("lateral", "inner_blocks"), ("output", "layer_blocks"))
        for kind, name, transform in (
            ("kernel", "weight", table.CONV),
            ("bias", "bias", table.SAME),
        )
    ]
    model = neck()
    params, frozen = reference.from_torch(rules, model, peer)
    maps = features(*size)
    out = model.apply(params, frozen, maps)
    with torch.no_grad():
        expected = peer(
            {k: torch.from_numpy(np.array(x)).permute(0, 3, 1, 2) for k, x in maps.items()}
        )
    for ours, theirs in zip(out.values(), expected.values(), strict=True):
        np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)
