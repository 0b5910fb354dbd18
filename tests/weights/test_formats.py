"""The readers of weights/: files with each library's names against that library's features."""

import functools
import pickle

import jax
import numpy as np
import pytest

from configs import mask_rcnn
from sephjax import build
from sephjax.errors import UserError
from sephjax.nets.backbone import resnet
from sephjax.weights import classes, contents, detectron2, files
from sephjax.weights.formats import FORMATS
from tests.nets.reference import NORM
from tests.weights import resnets

TORCHVISION, MSRA = {"layout": "torchvision"}, {"layout": "msra"}


def picture(seed=0):
    return np.random.default_rng(seed).normal(size=(1, 64, 96, 3)).astype(np.float32)


def dump(path, value):
    path.write_bytes(pickle.dumps(value, 2))
    return str(path)


@pytest.mark.torch
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_torchvisions_resnet_50_gives_torchvisions_features(tmp_path, ending):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    peer = resnets.vary(torch, models.resnet50(weights=None))
    path = tmp_path / f"resnet50.{ending}"
    if ending == "pth":
        torch.save(peer.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(peer.state_dict(), path)
    model = resnets.network(depth=50, **TORCHVISION)
    found = FORMATS["torchvision"](str(path))
    assert (found.depth, found.layout, found.whole) == (50, "torchvision", False)
    params, frozen, report = resnets.load(found, model)
    assert len(report.used) + len(report.unused) == len(peer.state_dict())
    assert {"fc.bias", "fc.weight"} < set(report.unused)
    x = picture()
    resnets.close(resnets.apply(model, params, frozen, x), resnets.maps(torch, peer, x))


@pytest.mark.torch
def test_timms_resnet_50_gives_timms_features(tmp_path):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    peer = resnets.vary(torch, timm.create_model("resnet50", pretrained=False))
    path = tmp_path / "model.safetensors"
    save_file(peer.state_dict(), path)
    features = timm.create_model("resnet50", features_only=True, pretrained=False).eval()
    features.load_state_dict({k: v for k, v in peer.state_dict().items() if k[:2] != "fc"})
    model = resnets.network(depth=50, **TORCHVISION)
    params, frozen, _ = resnets.load(FORMATS["timm"](str(path)), model)
    x = picture(1)
    with torch.no_grad():
        theirs = features(torch.from_numpy(x).permute(0, 3, 1, 2))[1:]
    theirs = [y.permute(0, 2, 3, 1).numpy() for y in theirs]
    resnets.close(resnets.apply(model, params, frozen, x), theirs)


@pytest.mark.torch
@pytest.mark.parametrize("depth", [18, 34, 101])
def test_timms_other_plain_resnets_fit(tmp_path, depth):
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    state = timm.create_model(f"resnet{depth}", pretrained=False).state_dict()
    torch.save({"state_dict": state}, path)
    found = FORMATS["timm"](str(path))
    assert found.depth == depth
    params, *_ = resnets.load(found, resnets.network(depth=depth, **TORCHVISION))
    kernel = state["layer4.1.conv2.weight"].numpy()
    ours = params["stage4"]["block1"]["conv2"]["kernel"]
    np.testing.assert_array_equal(ours, kernel.transpose(2, 3, 1, 0))
    with pytest.raises(UserError, match=f"ResNet-{depth} of layout 'torchvision' and .* 'msra'"):
        contents.check_backbone(found, "msra", 50)


@functools.cache
def msra_peer():
    torch = pytest.importorskip("torch")
    return resnets.msra(torch, pytest.importorskip("torchvision.models"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A model-zoo file of Mask R-CNN whose pixel mean is our layout's."""
    parts = resnets.to_detectron2(msra_peer().state_dict()) | resnets.detector_parts(80)
    mean = np.float32(resnet.LAYOUTS["msra"].mean).reshape(3, 1, 1)
    parts |= {"pixel_mean": mean, "pixel_std": np.ones((3, 1, 1), np.float32)}
    file = {"model": parts, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    return dump(tmp_path_factory.mktemp("zoo") / "model_final_f10217.pkl", file), parts


@pytest.mark.torch
def test_detectron2s_backbone_gives_the_features_of_bgr_and_stride_in_1x1(detector):
    torch = pytest.importorskip("torch")
    found = FORMATS["detectron2"](detector[0])
    assert (found.layout, found.depth, found.classes) == ("msra", 50, 80)
    model = resnets.network(depth=50, **MSRA)
    backbone = {k: v for k, v in found.tensors.items() if "bottom_up" in k}
    alone = contents.dataclasses.replace(found, tensors=backbone, whole=False)
    params, frozen, _ = resnets.load(alone, model)
    image = np.random.default_rng(2).integers(0, 256, (1, 64, 96, 3), np.uint8)
    ours = resnets.apply(
        model, params, frozen, resnet.normalize_image(jax.numpy.asarray(image), "msra")
    )
    bgr = image[..., ::-1].astype(np.float32) - detector[1]["pixel_mean"].reshape(3)
    resnets.close(ours, resnets.maps(torch, msra_peer(), bgr))


@pytest.mark.torch
def test_detectron2s_detector_fits_the_caffe_row_and_each_tensor_is_accounted_for(detector):
    found = FORMATS["detectron2"](detector[0])
    config = mask_rcnn.get_config("caffe")
    arrays, report = contents.load(
        found, *build.model(config, 80).abstract, eps=1e-5, categories=classes.named(80)
    )
    assert report.missing == ()
    names = [name for _, name in report.used] + list(report.unused)
    assert sorted([*names, "pixel_std"]) == sorted(detector[1])
    heads = "roi_heads.box_predictor."
    for ours, theirs in {"logits": "cls_score", "deltas": "bbox_pred"}.items():
        kernel = arrays[f"box_head/{ours}/kernel"]  # background is last on both sides
        np.testing.assert_array_equal(kernel, detector[1][f"{heads}{theirs}.weight"].T)
    # (c, h, w) there, (h, w, c) here
    fc1 = detector[1]["roi_heads.box_head.fc1.weight"].reshape(1024, 256, 7, 7)
    ours = arrays["box_head/dense/fc0/kernel"].reshape(7, 7, 256, 1024)
    np.testing.assert_array_equal(ours[1, 2, 3], fc1[:, 3, 1, 2])
    fcn = detector[1]["roi_heads.mask_head.mask_fcn1.weight"]
    np.testing.assert_array_equal(arrays["mask_head/conv0/kernel"][0, 2, 4, 5], fcn[5, 4, 0, 2])


@pytest.mark.torch
def test_detectron2s_pixel_mean_is_folded_exactly_where_nothing_is_padded(detector, tmp_path):
    torch = pytest.importorskip("torch")
    parts = {k: v for k, v in detector[1].items() if not k.startswith("pixel")}  # its own default
    found = FORMATS["detectron2"](dump(tmp_path / "model.pkl", {"model": parts}))
    stem = "backbone.bottom_up.stem.conv1"
    image = np.random.default_rng(3).integers(0, 256, (1, 40, 40, 3)).astype(np.float32)

    def after_norm(tensors, mean):
        kernel, *norm = (
            torch.from_numpy(tensors[f"{stem}.{name}"]).double()
            for name in (
                "weight",
                "norm.running_mean",
                "norm.running_var",
                "norm.weight",
                "norm.bias",
            )
        )
        x = torch.from_numpy(image - np.asarray(mean)).permute(0, 3, 1, 2)
        conv = torch.nn.functional.conv2d(x, kernel, stride=2)
        return torch.nn.functional.batch_norm(conv, *norm, eps=1e-5).numpy()

    ours = after_norm(found.tensors, resnet.LAYOUTS["msra"].mean)
    theirs = after_norm(parts, detectron2.PIXEL_MEAN)
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.torch
def test_detectron2s_torchvision_backbones_are_refused(detector, tmp_path):
    std = np.float32([57.375, 57.12, 58.395]).reshape(3, 1, 1)
    path = dump(tmp_path / "model.pkl", {"model": detector[1] | {"pixel_std": std}})
    with pytest.raises(UserError, match=r"divides pixels by \[57\.375.* not MSRA's"):
        FORMATS["detectron2"](path)


def caffe2(spelling):
    """R-50.pkl under Caffe2's names, its norms as scale and offset or whole."""
    state, found = resnets.to_detectron2(msra_peer().state_dict()), {}
    for name, value in state.items():
        name = name.removeprefix("backbone.bottom_up.").replace("stem.", "res_", 1)
        stem = name.startswith("res_conv1")
        conv, _, kind = name.replace(".norm", "").rpartition(".")
        if not stem:
            stage, block, layer = conv.split(".")
            branch = "1" if layer == "shortcut" else f"2{'abc'[int(layer[-1]) - 1]}"
            conv = f"{stage}_{block}_branch{branch}"
        if "norm" not in name:
            found["conv1_w" if stem else f"{conv}_w"] = value
        elif kind in spelling:
            found[f"{conv}_{spelling[kind]}"] = value
    extra = {"fc1000_w": (1000, 2048), "fc1000_b": (1000,), "conv1_b": (64,)}
    return found | {name: np.zeros(shape, np.float32) for name, shape in extra.items()}


FOLDED = {"weight": "bn_s", "bias": "bn_b"}
WHOLE = {"weight": "bn_gamma", "bias": "bn_beta"}
WHOLE |= {"running_mean": "bn_running_mean", "running_var": "bn_running_var"}


@pytest.mark.torch
@pytest.mark.parametrize("spelling", [FOLDED, WHOLE])
def test_msras_resnet_has_the_same_tensors_under_caffe2s_names(tmp_path, spelling):
    file = caffe2(spelling)
    assert {"res_conv1_" + spelling["weight"], "res2_0_branch2a_w", "res5_2_branch2c_w"} < set(file)
    found = FORMATS["detectron2"](dump(tmp_path / "R-50.pkl", file))
    model = resnets.network(depth=50, **MSRA)
    params, frozen, report = resnets.load(found, model)
    assert report.unused == ("conv1_b", "fc1000_b", "fc1000_w")
    state = msra_peer().state_dict()
    kernel = state["layer3.0.downsample.0.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["stage3"]["block0"]["shortcut_conv"]["kernel"], kernel)
    norm = frozen["stage2"]["block1"]["norm3"]
    for ours, theirs in NORM.items():
        value = state[f"layer2.1.bn3.{theirs}"].numpy()
        if theirs not in spelling:
            value = np.full_like(value, theirs == "running_var")
        np.testing.assert_array_equal(norm[ours], value)


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    """A checkpoint that TF-slim could have written: its prefix, and its values."""
    import tensorflow as tf

    rng, values = np.random.default_rng(4), {}

    def layer(name, *shape):
        values[f"{name}/weights"] = rng.standard_normal(shape, dtype=np.float32)
        for kind in ("gamma", "beta", "moving_mean", "moving_variance"):
            norm = rng.uniform(0.5, 1.5, shape[-1]).astype(np.float32)
            values[f"{name}/BatchNorm/{kind}"] = norm

    layer("resnet_v1_50/conv1", 7, 7, 3, 64)
    width = 64
    for s, units in enumerate((3, 4, 6, 3), 1):
        for u in range(1, units + 1):
            unit, depth = f"resnet_v1_50/block{s}/unit_{u}/bottleneck_v1", 32 * 2**s
            if u == 1:
                layer(f"{unit}/shortcut", 1, 1, width, 4 * depth)
            layer(f"{unit}/conv1", 1, 1, width, depth)
            layer(f"{unit}/conv2", 3, 3, depth, depth)
            layer(f"{unit}/conv3", 1, 1, depth, 4 * depth)
            width = 4 * depth
    values["resnet_v1_50/logits/weights"] = np.zeros((1, 1, 2048, 10), np.float32)
    values["resnet_v1_50/logits/biases"] = np.zeros(10, np.float32)
    values["resnet_v1_50/mean_rgb"] = np.float32([123.68, 116.779, 103.939])
    prefix = str(tmp_path_factory.mktemp("slim") / "resnet_v1_50.ckpt")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = {
            name: tf.compat.v1.get_variable(name, value.shape) for name, value in values.items()
        }
        variables["global_step"] = tf.compat.v1.train.create_global_step()
        session.run(tf.compat.v1.global_variables_initializer())
        for name, value in values.items():
            variables[name].load(value, session)
        tf.compat.v1.train.Saver(variables).save(session, prefix, write_meta_graph=False)
    return prefix, values


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_slims_checkpoint_fits_layout_slim(slim):
    prefix, values = slim
    found = FORMATS["slim"](prefix)
    assert (found.layout, found.depth) == ("slim", 50)
    params, frozen, report = resnets.load(found, resnets.network(depth=50, layout="slim"))
    assert len(report.used) == 53 * 5
    unused = {"logits/biases", "logits/weights", "mean_rgb"}
    assert set(report.unused) == {f"resnet_v1_50/{name}" for name in unused} | {"global_step"}
    unit = "resnet_v1_50/block3/unit_6/bottleneck_v1/conv2"
    block = params["stage3"]["block5"]
    np.testing.assert_array_equal(block["conv2"]["kernel"], values[f"{unit}/weights"])
    np.testing.assert_array_equal(block["norm2"]["gamma"], values[f"{unit}/BatchNorm/gamma"])
    mean = frozen["stage3"]["block5"]["norm2"]["mean"]
    np.testing.assert_array_equal(mean, values[f"{unit}/BatchNorm/moving_mean"])
    with pytest.raises(UserError, match=r"layout 'slim' and the config asks for .* 'torchvision'"):
        contents.check_backbone(found, "torchvision", 50)
    assert FORMATS["slim"](f"{prefix}.index").tensors.keys() == found.tensors.keys()


def test_a_wrong_rank_is_a_wrong_shape_and_not_a_crash(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    files.write_torch(str(path), {"conv1.weight": np.zeros((2, 2), np.float32)})
    found = FORMATS["torchvision"](str(path))
    abstract = resnets.network(depth=18, **TORCHVISION).abstract
    with pytest.raises(UserError, match=r"wrong shape: backbone/stem/conv/kernel has \(2, 2\)"):
        contents.load(found, *({"backbone": part} for part in abstract), eps=1e-5)
