"""nets/backbone/resnet.py against torchvision, and its own claims about taps and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.nets.backbone import resnet
from sephjax.nets.functional import flat_paths, functional
from tests.nets import reference


def network(**options):
    options = {"depth": 18, "layout": "torchvision", "width": 8} | options
    return functional(lambda rngs: resnet.ResNet(rngs=rngs, **options))


def shapes(model, height=64, width=96):
    image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    maps = jax.eval_shape(model.apply, *model.abstract, image)
    return {level: x.shape for level, x in maps.items()}


def test_names_of_a_small_network_do_not_change():
    params, frozen = network(norm="bn").abstract
    block = [
        "conv1/kernel",
        "conv2/kernel",
        "norm1/beta",
        "norm1/gamma",
        "norm2/beta",
        "norm2/gamma",
    ]
    shortcut = ["shortcut_conv/kernel", "shortcut_norm/beta", "shortcut_norm/gamma"]
    expected = ["stem/conv/kernel", "stem/norm/beta", "stem/norm/gamma"]
    expected += [
        f"stage{s}/block{b}/{name}" for s in (1, 2, 3, 4) for b in (0, 1) for name in block
    ]
    expected += [f"stage{s}/block0/{name}" for s in (2, 3, 4) for name in shortcut]
    assert [path for path, _ in flat_paths(params)] == sorted(expected)
    means = [path for path, _ in flat_paths(frozen) if path.endswith("/mean")]
    assert len(means) == 1 + 16 + 3


@pytest.mark.parametrize("layout", ["msra", "torchvision"])
def test_maps_of_the_usual_layouts(layout):
    assert shapes(network(depth=50, layout=layout, width=64)) == {
        "c2": (2, 16, 24, 256),
        "c3": (2, 8, 12, 512),
        "c4": (2, 4, 6, 1024),
        "c5": (2, 2, 3, 2048),
    }


@pytest.mark.parametrize("depth", [50, 101])
def test_slim_taps_shallower_maps(depth):
    assert shapes(network(depth=depth, layout="slim", width=64)) == {
        "c2": (2, 16, 24, 256),
        "c3": (2, 8, 12, 256),
        "c4": (2, 4, 6, 512),
        "c5": (2, 2, 3, 2048),
    }


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("layout", list(resnet.LAYOUTS))
def test_declared_channels_and_strides_are_those_of_the_maps(depth, layout):
    model = network(depth=depth, layout=layout)
    maps = shapes(model)
    built = []
    jax.eval_shape(lambda: built.append(model.make_model(resnet.nnx.Rngs(0))))
    assert built[0].channels == {level: shape[3] for level, shape in maps.items()}
    assert built[0].strides == {level: 64 // shape[1] for level, shape in maps.items()}


def test_slim_maps_have_passed_2_3_7_and_16_bottlenecks():
    model = network(depth=50, layout="slim", norm="none", width=1)
    params, frozen = model.abstract
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    # The bottlenecks whose 3x3 kernel is needed to compute a map, by dead-code elimination.
    jaxpr = jax.make_jaxpr(lambda p, x: model.apply(p, frozen, x))(params, image).jaxpr
    paths = [path for path, _ in flat_paths(params)]
    seen = {}
    for i, level in enumerate(("c2", "c3", "c4", "c5")):
        _, used = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [i == j for j in range(4)])
        seen[level] = sum(
            flag and path.startswith("stage") and path.endswith("conv2/kernel")
            for flag, path in zip(used[:-1], paths, strict=True)
        )
    assert seen == {"c2": 2, "c3": 3, "c4": 7, "c5": 16}


@pytest.mark.parametrize("layout", list(resnet.LAYOUTS))
def test_the_stride_sits_where_the_layout_says(layout):
    built = []
    jax.eval_shape(
        lambda: built.append(
            resnet.ResNet(depth=50, layout=layout, width=1, rngs=resnet.nnx.Rngs(0))
        )
    )
    found = [
        (f"stage{s}", b, f"conv{c}")
        for s in range(1, 5)
        for b in range(resnet.DEPTHS[50][s - 1])
        for c in (1, 2, 3)
        if getattr(getattr(getattr(built[0], f"stage{s}"), f"block{b}"), f"conv{c}").stride == 2
    ]
    assert (
        found
        == {
            "slim": [("stage1", 2, "conv2"), ("stage2", 3, "conv2"), ("stage3", 5, "conv2")],
            "msra": [("stage2", 0, "conv1"), ("stage3", 0, "conv1"), ("stage4", 0, "conv1")],
            "torchvision": [("stage2", 0, "conv2"), ("stage3", 0, "conv2"), ("stage4", 0, "conv2")],
        }[layout]
    )


def test_slim_trains_gamma_and_beta_and_the_others_do_not():
    names = lambda layout: {
        path.split("/")[-1] for path, _ in flat_paths(network(layout=layout).abstract[0])
    }
    assert names("slim") == {"kernel", "gamma", "beta"}
    assert names("msra") == names("torchvision") == {"kernel"}


@pytest.mark.parametrize(
    ("layout", "norm"),
    [
        ("torchvision", "frozen_bn"),
        ("torchvision", "bn"),
        ("torchvision", "evonorm_s0"),
        ("slim", "frozen_bn"),
        ("msra", "gn"),
    ],
)
def test_a_picture_has_the_same_features_on_a_larger_canvas(norm, layout):
    model = network(norm=norm, layout=layout)
    params, frozen = reference.draw(model)
    picture = jax.random.normal(jax.random.key(1), (1, 40, 64, 3))
    size = jnp.asarray([[40, 64]], jnp.int32)
    canvas = jnp.full((1, 64, 96, 3), 7.0).at[:, :40, :64].set(picture)
    apply = jax.jit(functools.partial(model.apply, train=True))
    alone, padded = apply(params, frozen, picture, None), apply(params, frozen, canvas, size)
    for level, x in alone.items():
        inside = padded[level][:, : x.shape[1], : x.shape[2]]
        scale = float(jnp.max(jnp.abs(x)))
        np.testing.assert_allclose(inside / scale, x / scale, atol=1e-5, err_msg=level)


def test_pixels_are_normalised_as_the_weights_expect():
    image = jnp.asarray([[[[255, 0, 100]]]], jnp.uint8)
    np.testing.assert_allclose(
        resnet.normalize_image(image, "msra")[0, 0, 0],
        [100 - 103.939, -116.779, 255 - 123.68],
        atol=1e-4,
    )
    np.testing.assert_allclose(
        resnet.normalize_image(image, "slim")[0, 0, 0],
        [255 - 123.68, -116.779, 100 - 103.939],
        atol=1e-4,
    )
    # torchvision: pixels / 255 by mean (.485, .456, .406) and std (.229, .224, .225)
    np.testing.assert_allclose(
        resnet.normalize_image(image, "torchvision")[0, 0, 0],
        [(1 - 0.485) / 0.229, -0.456 / 0.224, (100 / 255 - 0.406) / 0.225],
        rtol=1e-5,
    )
    assert resnet.normalize_image(image, "slim", jnp.bfloat16).dtype == jnp.bfloat16


def test_an_unknown_depth_or_layout_is_refused():
    for options in ({"depth": 20}, {"layout": "caffe"}):
        with pytest.raises(ValueError, match="No ResNet"):
            network(**options)


@pytest.mark.torch
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_layout_agrees_with_torchvision(depth):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    peer = getattr(models, f"resnet{depth}")(weights=None).eval()
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.uniform_(0.2, 0.8)
            module.running_var.uniform_(0.5, 1.5)
    model = network(depth=depth, width=64)
    params, frozen = reference.from_torch(
        reference.torchvision_resnet_rules(), model, peer, ignore=("^fc",)
    )
    x = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype(np.float32)
    maps = jax.jit(model.apply)(params, frozen, jnp.asarray(x))
    with torch.no_grad():
        y = torch.from_numpy(x).permute(0, 3, 1, 2)
        y = peer.maxpool(peer.relu(peer.bn1(peer.conv1(y))))
        for i in range(1, 5):
            y = getattr(peer, f"layer{i}")(y)
            expected = y.permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(
                maps[f"c{i + 1}"], expected, atol=1e-4 * np.abs(expected).max()
            )
