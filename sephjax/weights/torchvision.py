"""torchvision's ResNets, and its Mask and Faster R-CNN ResNet-FPN (versions 1 and 2), in and out.

A state dict is a mapping of names to NumPy arrays (`{k: v.numpy() for k, v in state.items()}`);
nothing here imports torch. Background is torchvision's class 0 and our last: its logit moves to the
end; its box deltas and its mask, which neither side ever reads, are left out of ours and are zeros
in theirs.
"""

import hashlib
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from sephjax.errors import UserError
from sephjax.types import Params
from sephjax.weights import contents, files, kinds, table
from sephjax.weights.contents import Contents

MODEL_EPS = 1e-5  # of our layout `torchvision` and of torchvision's norms
# SHA-256 of the files whose models torchvision builds with eps 0: Mask and Faster R-CNN's COCO_V1.
ZERO_EPS = ("bf2d0c1e", "258fb6c6")


def _without_background(rows: int, then: table.Transform) -> table.Transform:
    """Leaves out the first `rows` of an output axis; zeros on the way back."""

    def to_theirs(x: np.ndarray) -> np.ndarray:
        theirs = then.to_theirs(x)
        return np.concatenate([np.zeros((rows, *theirs.shape[1:]), theirs.dtype), theirs])

    return table.Transform(lambda x: then.to_ours(x[rows:]), to_theirs)


def _layer(
    ours: str,
    theirs: str,
    kernel: table.Transform,
    bias: table.Transform = table.SAME,
) -> list[table.Rule]:
    return [
        table.Rule(f"{ours}/kernel", f"{theirs}.weight", kernel),
        table.Rule(f"{ours}/bias", f"{theirs}.bias", bias),
    ]


def _norm(ours: str, theirs: str) -> list[table.Rule]:
    kinds = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "variance": "running_var"}
    return [table.Rule(f"{ours}/{a}", f"{theirs}.{b}") for a, b in kinds.items()]


_BLOCK = "backbone/stage{s}/block{b}"
_BODY = "backbone.body.layer{s}.{b}"
_SHARED = [
    table.Rule("backbone/stem/conv/kernel", "backbone.body.conv1.weight", table.CONV),
    table.Rule(_BLOCK + "/conv{c}/kernel", _BODY + ".conv{c}.weight", table.CONV),
    table.Rule(_BLOCK + "/shortcut_conv/kernel", _BODY + ".downsample.0.weight", table.CONV),
    *_norm("backbone/stem/norm", "backbone.body.bn1"),
    *_norm(_BLOCK + "/norm{c}", _BODY + ".bn{c}"),
    *_norm(_BLOCK + "/shortcut_norm", _BODY + ".downsample.1"),
    *_layer("fpn/lateral{i:+2}", "backbone.fpn.inner_blocks.{i}.0", table.CONV),
    *_layer("fpn/output{i:+2}", "backbone.fpn.layer_blocks.{i}.0", table.CONV),
    *_norm("fpn/lateral_norm{i:+2}", "backbone.fpn.inner_blocks.{i}.1"),
    *_norm("fpn/output_norm{i:+2}", "backbone.fpn.layer_blocks.{i}.1"),
    *_layer("rpn/conv{i}", "rpn.head.conv.{i}.0", table.CONV),
    *_layer("rpn/logits", "rpn.head.cls_logits", table.CONV),
    *_layer("rpn/deltas", "rpn.head.bbox_pred", table.CONV),
    *_layer(
        "box_head/logits",
        "roi_heads.box_predictor.cls_score",
        table.background_first(table.LINEAR),
        table.background_first(table.SAME),
    ),
    *_layer(
        "box_head/deltas",
        "roi_heads.box_predictor.bbox_pred",
        _without_background(4, table.LINEAR),
        _without_background(4, table.SAME),
    ),
    *_layer("mask_head/conv{i}", "roi_heads.mask_head.{i}.0", table.CONV),
    *_norm("mask_head/norm{i}", "roi_heads.mask_head.{i}.1"),
    *_layer("mask_head/deconv", "roi_heads.mask_predictor.conv5_mask", table.CONV_TRANSPOSE),
    *_layer(
        "mask_head/predictor",
        "roi_heads.mask_predictor.mask_fcn_logits",
        _without_background(1, table.CONV),
        _without_background(1, table.SAME),
    ),
]
_TWO_FC = [
    *_layer("box_head/dense/fc0", "roi_heads.box_head.fc6", table.fc_after_pool(7, 7)),
    *_layer("box_head/dense/fc1", "roi_heads.box_head.fc7", table.LINEAR),
]
_FOUR_CONV_FC = [  # 4 is the flattening
    *_layer("box_head/tower/conv{i}", "roi_heads.box_head.{i}.0", table.CONV),
    *_norm("box_head/tower/norm{i}", "roi_heads.box_head.{i}.1"),
    *_layer("box_head/dense/fc0", "roi_heads.box_head.5", table.fc_after_pool(7, 7)),
]


def rules(*, v2: bool) -> list[table.Rule]:
    """The table of version 1 or 2: their box heads differ."""
    return _SHARED + (_FOUR_CONV_FC if v2 else _TWO_FC)


_PREFIX = "backbone.body."
BACKBONE_RULES = [  # of torchvision.models.resnet and of timm's plain ResNets
    rule._replace(theirs=rule.theirs.removeprefix(_PREFIX))
    for rule in _SHARED
    if rule.theirs.startswith(_PREFIX)
]


def read(path: str) -> Contents:
    """Reads a detector or a classification ResNet of torchvision: `.pth` or `.safetensors`.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    tensors = {_modern(name): value for name, value in files.read_torch(path).items()}
    kind = kinds.require(tensors, path, "torchvision", "detector of torchvision", kinds.RESNET)
    if kind == kinds.RESNET:
        return resnet(path, tensors)
    if "roi_heads.box_predictor.cls_score.bias" not in tensors:
        raise UserError(
            f"{path} is a detector of torchvision without the heads of a Mask or Faster R-CNN; "
            "take one of those."
        )
    old = _had_no_eps(path)
    note = ("its norms have eps 0, as torchvision's COCO_V1",) if old else ()
    return _detector(path, tensors, eps=0.0 if old else MODEL_EPS, notes=note)


def _detector(
    source: str, tensors: table.Arrays, *, eps: float, notes: tuple[str, ...] = ()
) -> Contents:
    scores = tensors.get("roi_heads.box_predictor.cls_score.bias")
    return Contents(
        source,
        tensors,
        rules(v2="roi_heads.box_head.5.weight" in tensors),
        layout="torchvision",
        eps=eps,
        whole=True,
        classes=None if scores is None else len(scores) - 1,
        coco=True,
        ignore=(r"\.num_batches_tracked$",),
        notes=notes,
    )


def resnet(path: str, tensors: table.Arrays) -> Contents:
    """The contents of a classification ResNet with torchvision's names."""
    return Contents(
        path,
        tensors,
        BACKBONE_RULES,
        layout="torchvision",
        eps=MODEL_EPS,
        ignore=(r"\.num_batches_tracked$", "^fc\\."),
    )


def _had_no_eps(path: str) -> bool:
    if any(start in pathlib.Path(path).stem for start in ZERO_EPS):
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(ZERO_EPS)


def load_detector(
    state: Mapping[str, np.ndarray], params: Params, frozen: Params, *, eps: float = MODEL_EPS
) -> tuple[Params, Params, table.LoadReport]:
    """Brings a state dict into the detector of a row `torchvision` of `mask_rcnn`.

    Args:
        state: Of `maskrcnn_resnet50_fpn` (row `torchvision`), `maskrcnn_resnet50_fpn_v2`
            (`torchvision_v2`) or `fasterrcnn_resnet50_fpn` (`box_only_torchvision`); the names that
            torchvision had before 0.13 are understood too.
        params: Trained values of the detector, or their shapes.
        frozen: Frozen values of the detector, or their shapes.
        eps: Of the batch norm that the weights were trained with. It is 0 for the published
            `COCO_V1`; the difference to the model's is folded into the variance.

    Returns:
        New `(params, frozen)` of NumPy arrays, and the report; `num_batches_tracked` is unused.

    Raises:
        UserError: tensors that are missing, left over or of the wrong shape.
    """
    theirs = {_modern(name): np.asarray(value) for name, value in state.items()}
    found = _detector("the state dict of torchvision", theirs, eps=eps)
    arrays, report = contents.load(found, params, frozen, eps=MODEL_EPS)
    pick = lambda tree: table.unflatten({path: arrays[path] for path in table.flatten(tree)})
    return pick(params), pick(frozen), report


def dump_detector(params: Params, frozen: Params, *, eps: float = MODEL_EPS) -> table.Arrays:
    """The state dict of a row `torchvision` of `mask_rcnn`, as torchvision loads it strictly.

    It fits a model whose norms are torchvision's, frozen or not, with their default eps; the number
    of batches that v2's norms count is 0, and nothing reads it.

    Args:
        params: Trained values of the detector.
        frozen: Frozen values of the detector.
        eps: Of the backbone's batch norm; the difference to torchvision's goes into the variance.

    Raises:
        UserError: a tensor that torchvision's model has no place for.
    """
    ours = table.flatten(params) | table.flatten(frozen)
    v2 = any(path.startswith("box_head/tower/") for path in ours)
    state = table.save(rules(v2=v2), ours)
    norms = [name for name in state if name.endswith(".running_var")]
    if shift := np.float32(eps - MODEL_EPS):
        body = [name for name in norms if name.startswith("backbone.body.")]
        state |= {name: state[name] + shift for name in body}
    if v2:
        counts = [name.replace("running_var", "num_batches_tracked") for name in norms]
        state |= {name: np.zeros((), np.int64) for name in counts}
    return state


def _modern(name: str) -> str:
    """A name of torchvision before 0.13 as it is today."""
    name = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
    name = re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)
    old = re.match(r"^roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)$", name)
    return f"roi_heads.mask_head.{int(old[1]) - 1}.0.{old[2]}" if old else name
