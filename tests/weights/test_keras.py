"""weights/keras.py: real ImageNet weights through our network and, by name, through PyTorch."""

import json
import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.errors import UserError
from sephjax.nets.backbone import resnet
from sephjax.nets.functional import functional
from sephjax.weights import contents, keras, table
from tests.narrow import jit

EPS = resnet.LAYOUTS["msra"].eps
UNITS = {2: "abc", 3: "abcd", 4: "abcdef", 5: "abc"}


def network(**options):
    options = {"depth": 50, "layout": "msra", "norm": "frozen_bn"} | options
    return functional(lambda rngs: resnet.ResNet(rngs=rngs, **options))


def load(path, model, eps=EPS):
    """`(params, frozen, report)` of a backbone."""
    parts = [{"backbone": part} for part in model.abstract]
    arrays, report = contents.load(keras.read(str(path)), *parts, eps=eps)
    trees = [table.unflatten({p: arrays[p] for p in table.flatten(part)}) for part in parts]
    return *(tree.get("backbone", {}) for tree in trees), report


@pytest.fixture
def weights(shared):
    path = shared / "weights" / "resnet50_imagenet_keras_fp16.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def torch_maps(torch, tensors, x):
    """keras.applications' ResNet50, written from the file's own names (weights README)."""
    F = torch.nn.functional

    def conv(x, name, stride=1, pad=0):
        kernel = torch.from_numpy(tensors[f"{name}/kernel"]).permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, torch.from_numpy(tensors[f"{name}/bias"]), stride, pad)

    def norm(x, name):
        mean, variance, gamma, beta = (
            torch.from_numpy(tensors[f"{name}/{kind}"])
            for kind in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3)

    x = F.relu(norm(conv(x, "conv1", 2, 3), "bn_conv1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, units in UNITS.items():
        for unit in units:
            stride = 2 if unit == "a" and stage > 2 else 1
            name = f"{stage}{unit}_branch"
            y = F.relu(norm(conv(x, f"res{name}2a", stride), f"bn{name}2a"))
            y = F.relu(norm(conv(y, f"res{name}2b", 1, 1), f"bn{name}2b"))
            y = norm(conv(y, f"res{name}2c"), f"bn{name}2c")
            if unit == "a":
                x = norm(conv(x, f"res{name}1", stride), f"bn{name}1")
            x = F.relu(x + y)
        yield x


@pytest.mark.data
@pytest.mark.torch
def test_imagenet_weights_give_the_features_that_torch_computes_from_them(weights):
    torch = pytest.importorskip("torch")
    model = network()
    params, frozen, report = load(weights, model)
    assert (len(report.used), report.missing) == (53 * 6, ())  # a bias goes into each mean
    assert report.unused == ("fc1000/bias", "fc1000/kernel")
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    x = resnet.normalize_image(jnp.asarray(image), "msra")
    maps = jax.jit(model.apply)(params, frozen, x)
    bgr = torch.from_numpy(image[..., ::-1] - np.float32([103.939, 116.779, 123.68]))
    with np.load(weights) as archive, torch.no_grad():
        tensors = {name: archive[name].astype(np.float32) for name in archive.files}
        expected = list(torch_maps(torch, tensors, bgr.permute(0, 3, 1, 2)))
    for ours, theirs in zip(maps.values(), expected, strict=True):
        theirs = theirs.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.data
def test_gamma_and_beta_go_where_the_model_has_them(weights):
    model = network(norm="bn")
    params, frozen, _ = load(weights, model)
    assert jax.tree.structure((params, frozen)) == jax.tree.structure(model.abstract)
    assert params["stem"]["norm"]["gamma"].dtype == np.float32


@pytest.mark.data
def test_the_variance_makes_up_for_another_eps(weights):
    model = network()
    with np.load(weights) as archive:
        stored = archive["bn_conv1/moving_variance"]
    for eps in (1e-5, 1e-3):
        _, frozen, _ = load(weights, model, eps)
        ours = np.asarray(frozen["stem"]["norm"]["variance"], np.float64) + eps
        np.testing.assert_allclose(ours, stored.astype(np.float64) + 1e-3, rtol=1e-6)


@pytest.mark.data
def test_a_network_of_another_width_or_norm_is_an_error(weights):
    with pytest.raises(UserError, match="wrong shape: backbone/stem/conv/kernel"):
        load(weights, network(width=32))
    with pytest.raises(UserError, match="left over: bn_conv1/moving_mean"):
        load(weights, network(norm="gn"))


@pytest.mark.data
@pytest.mark.parametrize(("layout", "depth"), [("torchvision", 50), ("msra", 101)])
def test_another_layout_or_depth_is_refused_in_a_sentence_that_names_both(weights, layout, depth):
    with pytest.raises(UserError, match=rf"msra.*ResNet-{depth} of layout '{layout}'"):
        contents.check_backbone(keras.read(str(weights)), layout, depth)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.npz"):
        keras.read(str(tmp_path / "none.npz"))


@pytest.mark.data
def test_the_cat_is_an_egyptian_cat(weights, shared):
    skimage = pytest.importorskip("skimage")
    picture = cv2.imread(str(pathlib.Path(skimage.__file__).parent / "data" / "chelsea.png"))
    side = picture.shape[0]  # 300 x 451: the middle square, as the network was trained on squares
    left = (picture.shape[1] - side) // 2
    square = cv2.resize(picture[:, left : left + side, ::-1], (224, 224))
    model = network()
    params, frozen, _ = load(weights, model)
    x = resnet.normalize_image(jnp.asarray(square[None]), "msra")
    c5 = jit(model.apply)(params, frozen, x)["c5"]
    with np.load(weights) as archive:
        kernel, bias = (archive[f"fc1000/{kind}"].astype(np.float32) for kind in ("kernel", "bias"))
    scores = np.asarray(jax.nn.softmax(np.asarray(c5).mean(axis=(0, 1, 2)) @ kernel + bias))
    labels = json.loads((shared / "weights" / "imagenet_labels.json").read_text())
    best = int(scores.argmax())
    assert labels[str(best)] == "Egyptian_cat"
    assert scores[best] > 0.5  # the file's README: 0.73
