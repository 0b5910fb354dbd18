"""detectron2's Mask and Faster R-CNN ResNet-FPN, and the MSRA ResNets under them: layout `msra`.

Model-zoo files are pickles of NumPy arrays, read without executing anything in them; what its own
training wrote is a `.pth`. Names and conventions are those of detectron2 0.6; background is its
last class, as ours. Its detectors subtract another pixel mean than our layout: the difference is
folded into the mean of the first norm, exact but for the three pixels at the picture's edge.
"""

import re
import zipfile
from typing import Any

import numpy as np

from sephjax.errors import UserError
from sephjax.nets.backbone import resnet
from sephjax.weights import files, kinds, table
from sephjax.weights.contents import Contents

EPS = 1e-5  # of its FrozenBatchNorm2d
PIXEL_MEAN = (103.53, 116.28, 123.675)  # BGR; MODEL.PIXEL_MEAN of its defaults

DETECTOR, MSRA = "detector of detectron2", "Caffe2 ResNet (MSRA)"
_STEM, _MEAN = "backbone.bottom_up.stem.conv1", "backbone.bottom_up.stem.conv1.norm.running_mean"
_NORM = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "variance": "running_var"}
_CAFFE2 = {"gamma": "bn_s", "beta": "bn_b", "mean": "bn_rm", "variance": "bn_riv"}
_CAFFE2_LATER = {"bn_gamma": "bn_s", "bn_beta": "bn_b", "bn_running_mean": "bn_rm"}
_CAFFE2_LATER |= {"bn_running_var": "bn_riv"}


def _layer(ours: str, theirs: str, kernel: table.Transform) -> list[table.Rule]:
    return [
        table.Rule(f"{ours}/kernel", f"{theirs}.weight", kernel),
        table.Rule(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _conv(ours: str, norm: str, theirs: str) -> list[table.Rule]:
    """A convolution of the backbone and its norm."""
    return [
        table.Rule(f"{ours}/kernel", f"{theirs}.weight", table.CONV),
        *(table.Rule(f"{norm}/{mine}", f"{theirs}.norm.{name}") for mine, name in _NORM.items()),
    ]


def _caffe2_conv(ours: str, norm: str, weight: str, theirs: str) -> list[table.Rule]:
    return [
        table.Rule(f"{ours}/kernel", f"{weight}_w", table.CONV),
        *(table.Rule(f"{norm}/{mine}", f"{theirs}_{name}") for mine, name in _CAFFE2.items()),
    ]


_OURS, _BLOCK = "backbone/stage{s}/block{b}/", "backbone.bottom_up.res{s:+1}.{b}."
RULES = [
    *_conv("backbone/stem/conv", "backbone/stem/norm", _STEM),
    *_conv(_OURS + "conv{c}", _OURS + "norm{c}", _BLOCK + "conv{c}"),
    *_conv(_OURS + "shortcut_conv", _OURS + "shortcut_norm", _BLOCK + "shortcut"),
    *_layer("fpn/lateral{i}", "backbone.fpn_lateral{i}", table.CONV),
    *_layer("fpn/output{i}", "backbone.fpn_output{i}", table.CONV),
    *_layer("rpn/conv0", "proposal_generator.rpn_head.conv", table.CONV),
    *_layer("rpn/logits", "proposal_generator.rpn_head.objectness_logits", table.CONV),
    *_layer("rpn/deltas", "proposal_generator.rpn_head.anchor_deltas", table.CONV),
    *_layer("box_head/dense/fc0", "roi_heads.box_head.fc1", table.fc_after_pool(7, 7)),
    *_layer("box_head/dense/fc1", "roi_heads.box_head.fc2", table.LINEAR),
    *_layer("box_head/logits", "roi_heads.box_predictor.cls_score", table.LINEAR),
    *_layer("box_head/deltas", "roi_heads.box_predictor.bbox_pred", table.LINEAR),
    *_layer("mask_head/conv{i}", "roi_heads.mask_head.mask_fcn{i:+1}", table.CONV),
    *_layer("mask_head/deconv", "roi_heads.mask_head.deconv", table.CONV_TRANSPOSE),
    *_layer("mask_head/predictor", "roi_heads.mask_head.predictor", table.CONV),
]
_RES = "res{s:+1}_{b}_branch"
MSRA_RULES = [
    *_caffe2_conv("backbone/stem/conv", "backbone/stem/norm", "conv1", "res_conv1"),
    *_caffe2_conv(_OURS + "conv{c}", _OURS + "norm{c}", _RES + "2{c:a1}", _RES + "2{c:a1}"),
    *_caffe2_conv(_OURS + "shortcut_conv", _OURS + "shortcut_norm", _RES + "1", _RES + "1"),
]


def read(path: str) -> Contents:
    """Reads a detector (`.pkl` or `.pth`) or an MSRA ResNet (`.pkl`).

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    tensors = _tensors(path)
    if kinds.require(tensors, path, "detectron2", DETECTOR, MSRA) == MSRA:
        return _msra(path, tensors)
    std = tensors.pop("pixel_std", np.ones(3, np.float32)).reshape(-1)
    if not np.array_equal(std, np.ones(3)):
        raise UserError(
            f"{path} divides pixels by {std.tolist()}: its backbone is not MSRA's (BGR, the stride "
            "in the first 1x1), and detectron2's other backbones cannot be read."
        )
    tensors, folded = _other_mean(tensors)
    scores = tensors.get("roi_heads.box_predictor.cls_score.bias")
    return Contents(
        path,
        tensors,
        RULES,
        layout="msra",
        eps=EPS,
        whole=True,
        classes=None if scores is None else len(scores) - 1,
        coco=True,
        ignore=(r"\.anchor_generator\.cell_anchors\.\d+$", r"\.num_batches_tracked$"),
        folded=folded,
        notes=("its pixel mean is folded into the first norm",),
    )


def _tensors(path: str) -> table.Arrays:
    if zipfile.is_zipfile(files.existing(path)):
        return files.read_torch(path)
    found = files.read_pickle(path)
    for key in ("model", "blobs"):  # the model zoo's, Detectron's
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} and no arrays by name.")
    return files.floats({str(k): v for k, v in found.items() if isinstance(v, np.ndarray)})


def _other_mean(tensors: table.Arrays) -> tuple[table.Arrays, dict[str, str]]:
    """The pixel mean moved to that of our layout: w (x - a) = w (x - b) + w (b - a)."""
    kernel, mean = tensors.get(f"{_STEM}.weight"), tensors.get(_MEAN)
    given = tensors.get("pixel_mean", np.asarray(PIXEL_MEAN, np.float32)).reshape(-1)
    left = {name: value for name, value in tensors.items() if name != "pixel_mean"}
    if kernel is None or mean is None or kernel.ndim != 4:
        return left, {}  # the table tells what is missing
    difference = np.asarray(resnet.LAYOUTS["msra"].mean) - given
    moved = mean - np.einsum("oihw,i->o", kernel.astype(np.float64), difference)
    folded = {"pixel_mean": _MEAN} if "pixel_mean" in tensors else {}
    return left | {_MEAN: moved.astype(np.float32)}, folded


def _msra(path: str, tensors: dict[str, Any]) -> Contents:
    """Caffe2's names; norms that are scale and offset alone get mean 0 and variance 1."""
    names = {name: _older(name) for name in tensors if not name.endswith("_momentum")}
    tensors = {new: tensors[name] for name, new in names.items()}
    for scale in [name for name in tensors if name.endswith("_bn_s")]:
        layer = scale.removesuffix("s")
        tensors.setdefault(f"{layer}rm", np.zeros_like(tensors[scale]))
        tensors.setdefault(f"{layer}riv", np.ones_like(tensors[scale]))
    return Contents(
        path,
        tensors,
        MSRA_RULES,
        layout="msra",
        eps=EPS,
        ignore=("^(fc1000|pred)_[wb]$", "^conv1_b$"),  # conv1_b is zero to 1e-8
    )


def _older(name: str) -> str:
    """A norm's name as Detectron wrote it first."""
    found = re.search("|".join(f"{later}$" for later in _CAFFE2_LATER), name)
    return name[: found.start()] + _CAFFE2_LATER[found[0]] if found else name
