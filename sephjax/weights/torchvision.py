"""torchvision's Mask and Faster R-CNN R50-FPN (version 1), to and from `mask_rcnn:torchvision`.

A state dict is a mapping of names to NumPy arrays (`{k: v.numpy() for k, v in state.items()}`);
nothing here imports torch. Background is torchvision's class 0 and our last: its logit moves to the
end; its box deltas and its mask, which neither side ever reads, are left out of ours and are zeros
in theirs.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from sephjax.types import Params
from sephjax.weights import table

MODEL_EPS = 1e-5  # of our layout `torchvision` and of torchvision's FrozenBatchNorm2d


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


def rules(paths: Iterable[str]) -> list[table.Rule]:
    """The table for a detector with these paths: that of v2 if its box head has convolutions."""
    return _SHARED + (_FOUR_CONV_FC if _is_v2(paths) else _TWO_FC)


def _is_v2(paths: Iterable[str]) -> bool:
    return any(path.startswith("box_head/tower/") for path in paths)


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
    flat_params, flat_frozen = table.flatten(params), table.flatten(frozen)
    ours = flat_params | flat_frozen
    arrays, report = table.load(
        rules(ours),
        ours,
        theirs,
        source="the state dict of torchvision",
        ignore=(r"\.num_batches_tracked$",),
    )
    if eps != MODEL_EPS:
        shift = np.float32(eps - MODEL_EPS)
        arrays |= {p: x + shift for p, x in arrays.items() if p.endswith("/variance")}
    return (
        table.unflatten({path: arrays[path] for path in flat_params}),
        table.unflatten({path: arrays[path] for path in flat_frozen}),
        report,
    )


def dump_detector(params: Params, frozen: Params) -> table.Arrays:
    """The state dict of a row `torchvision` of `mask_rcnn`, as torchvision loads it strictly.

    It fits a model whose norms are torchvision's `FrozenBatchNorm2d` with its default eps, or, of
    v2, `BatchNorm2d`; the number of batches that those count is 0, and nothing reads it.

    Raises:
        UserError: a tensor that torchvision's model has no place for.
    """
    ours = table.flatten(params) | table.flatten(frozen)
    theirs = table.save(rules(ours), ours)
    if _is_v2(ours):
        norms = [name for name in theirs if name.endswith(".running_var")]
        counts = {name.replace("running_var", "num_batches_tracked") for name in norms}
        theirs |= dict.fromkeys(counts, np.zeros((), np.int64))
    return theirs


def _modern(name: str) -> str:
    """A name of torchvision before 0.13 as it is today."""
    name = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
    name = re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)
    old = re.match(r"^roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)$", name)
    return f"roi_heads.mask_head.{int(old[1]) - 1}.0.{old[2]}" if old else name
