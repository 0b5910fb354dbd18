"""torchvision's Faster and Mask R-CNN as a parity report reads them: every stage, in our layouts.

Stages have the names of `parity/stages.py`. torch is imported where it is first needed, since it is
an optional extra (`pip install sephjax[torch]`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sephjax.errors import UserError

Arrays = Mapping[str, np.ndarray]
# Blocks a stage to depth; (3, 4, 6, 3) with bottlenecks is 50.
RESNETS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34, (3, 4, 23, 3): 101}
CLASSES = "roi_heads.box_predictor.cls_score.bias"


class Tap(NamedTuple):
    """A module of torchvision whose output is a stage of ours."""

    path: str
    name: str
    convert: Callable[[Any], np.ndarray]


class Peer:
    """A detector of torchvision in evaluation.

    Attributes:
        classes: without background.
        has_masks: whether it has a mask head.
        paths: name of a stage to torchvision's module.
    """

    def __init__(self, state: Arrays, eps: float):
        """Builds the model that a state dict fits, and loads it strictly.

        Args:
            state: of a Faster or Mask R-CNN, version 1 or 2.
            eps: of the batch norms that the weights were trained with.

        Raises:
            UserError: there is no such model, or torch is not installed.
        """
        torch = _torch()
        self.classes = len(state[CLASSES]) - 1
        self.has_masks = "roi_heads.mask_predictor.conv5_mask.weight" in state
        self._model = _build(state, self.classes + 1, masks=self.has_masks).eval()
        try:
            self._model.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:3]]
            told = " ".join(lines)[:300]
            raise UserError(f"torchvision has no model for these weights: {told}.") from error
        for module in self._model.modules():
            if hasattr(module, "running_var"):
                module.eps = eps
        self._taps = _taps(self._model)
        self.paths = {name: tap.path for tap in self._taps for name in _names(tap)} | {
            "network input": "transform",
            "rpn/anchors": "rpn.anchor_generator",
            "rpn/proposals": "rpn",
            "roi levels": "roi_heads.box_roi_pool.map_levels",
            "detections": "roi_heads",
        }

    def run(self, picture: np.ndarray, *, proposals: int, detections: int) -> dict[str, Any]:
        """Every stage of one picture, as `parity.stages.stages` says.

        Args:
            picture: uint8 RGB [h, w, 3]; it is not resized.
            proposals: fill rows that belong to proposals with zeros up to so many, which spares
                our side a program for every number.
            detections: likewise.
        """
        torch = _torch()
        from torchvision.models.detection.image_list import ImageList

        model = self._model
        seen: dict[str, np.ndarray] = {}
        hooks = [self._watch(tap, seen) for tap in self._taps]
        try:
            with torch.no_grad():
                pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
                canvas = model.transform.batch_images([model.transform.normalize(pixels)])
                size = (picture.shape[0], picture.shape[1])
                images = ImageList(canvas, [size])
                features = model.backbone(canvas)
                boxes, _ = model.rpn(images, features)
                found, _ = model.roi_heads(features, boxes, images.image_sizes)
        finally:
            for hook in hooks:
                hook.remove()
        levels = model.roi_heads.box_roi_pool.map_levels(boxes)
        values: dict[str, Any] = seen | {
            "network input": _maps(canvas),
            "rpn/proposals": {"boxes": boxes[0].numpy()},
            "roi levels": levels.int().numpy(),
            "detections": _detections(found[0]),
        }
        if self.has_masks:
            name = "mask_head/predictor"
            values[name] = _own_masks(values[name], values["detections"]["labels"])
        rows = {"rpn/proposals": proposals, "roi ": proposals, "box_head": proposals}
        rows |= {"detections": detections, "mask": detections}
        for name, value in values.items():
            count = next((n for start, n in rows.items() if name.startswith(start)), None)
            values[name] = value if count is None else _fill(value, count)
        return values

    def _watch(self, tap: Tap, seen: dict[str, np.ndarray]) -> Any:
        names = _names(tap)

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            name = next(name for name in names if name not in seen)
            seen[name] = np.array(tap.convert(output))  # a copy: ReLUs work in place

        return self._model.get_submodule(tap.path).register_forward_hook(keep)


def _names(tap: Tap) -> list[str]:
    """The stages of a module: the RPN's head is called once a level."""
    if not tap.path.startswith("rpn.head."):
        return [tap.name]
    return [f"{tap.name}/p{level}" for level in range(2, 7)]


def _own_masks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each ROI's own class, [n, h, w]; `logits` [n, h, w, 1 + k] have background first."""
    return np.take_along_axis(logits[..., 1:], labels[:, None, None, None], axis=3)[..., 0]


def _fill(value: Any, count: int) -> Any:
    """Rows of zeros behind a value; a dict gets `valid`."""
    if isinstance(value, dict):
        valid = np.arange(max(count, len(value["boxes"]))) < len(value["boxes"])
        return {name: _fill(leaf, count) for name, leaf in value.items()} | {"valid": valid}
    return np.pad(value, [(0, max(count - len(value), 0))] + [(0, 0)] * (value.ndim - 1))


def _detections(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        "boxes": found["boxes"].numpy(),
        "scores": found["scores"].numpy(),
        "labels": found["labels"].int().numpy() - 1,  # background is 0 there
    }


def _taps(model: Any) -> list[Tap]:
    """Modules whose outputs are stages."""
    body, heads = model.backbone.body, model.roi_heads
    flat = lambda width: lambda x: _maps(x).reshape(1, -1, *width)
    found = [
        Tap("backbone.body.conv1", "backbone/stem/conv", _maps),
        Tap("backbone.body.relu", "backbone/stem/norm", _maps),
        Tap("backbone.body.maxpool", "backbone/stem/pool", _maps),
        Tap("backbone.fpn.extra_blocks", "fpn/p6", lambda out: _maps(out[0][-1])),
        Tap("rpn.head.cls_logits", "rpn/logits", flat(())),
        Tap("rpn.head.bbox_pred", "rpn/deltas", flat((4,))),
        Tap("rpn.anchor_generator", "rpn/anchors", lambda out: out[0].numpy()),
        Tap("roi_heads.box_roi_pool", "roi features", _maps),
        Tap("roi_heads.box_predictor.cls_score", "box_head/logits", _background_last),
        Tap("roi_heads.box_predictor.bbox_pred", "box_head/deltas", _foreground_deltas),
    ]
    for s in range(1, 5):
        for b in range(len(body[f"layer{s}"])):
            ours = f"backbone/stage{s}/block{b}"
            found.append(Tap(f"backbone.body.layer{s}.{b}", ours, _maps))
    for i in range(4):
        found.append(Tap(f"backbone.fpn.inner_blocks.{i}", f"fpn/lateral{i + 2}", _maps))
        found.append(Tap(f"backbone.fpn.layer_blocks.{i}", f"fpn/output{i + 2}", _maps))
    convs = range(len(model.rpn.head.conv))
    found += [Tap(f"rpn.head.conv.{i}", f"rpn/conv{i}", _maps) for i in convs]
    found += _box_head(heads.box_head)
    return found + (_mask_head(heads.mask_head) if heads.has_mask() else [])


def _box_head(head: Any) -> list[Tap]:
    """Version 1 is `fc6` and `fc7`, version 2 a row of convolutions, flatten and a dense layer."""
    found, convs, denses = [], 0, 0
    for name, module in head.named_children():
        path = f"roi_heads.box_head.{name}"
        if hasattr(module, "in_features"):
            found.append(Tap(path, f"box_head/dense/fc{denses}", lambda x: x.numpy()))
            denses += 1
        elif len(list(module.children())):
            found.append(Tap(path, f"box_head/tower/conv{convs}", _maps))
            convs += 1
    return found


def _mask_head(head: Any) -> list[Tap]:
    path = "roi_heads.mask_head"
    convs = [Tap(f"{path}.{i}", f"mask_head/conv{i}", _maps) for i in range(len(head))]
    return [
        Tap("roi_heads.mask_roi_pool", "mask features", _maps),
        *convs,
        Tap("roi_heads.mask_predictor.relu", "mask_head/deconv", _maps),
        Tap("roi_heads.mask_predictor.mask_fcn_logits", "mask_head/predictor", _maps),
    ]


def _maps(x: Any) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


def _background_last(x: Any) -> np.ndarray:
    return np.roll(x.numpy(), -1, axis=1)


def _foreground_deltas(x: Any) -> np.ndarray:
    return x.numpy().reshape(len(x), -1, 4)[:, 1:]


def _build(state: Arrays, rows: int, *, masks: bool) -> Any:
    """torchvision's model of these names and shapes, with random weights."""
    _torch()
    from torchvision.models import detection
    from torchvision.models.detection import backbone_utils

    nothing: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if "backbone.fpn.inner_blocks.0.1.weight" in state:  # a norm in the neck: version 2
        build = (
            detection.maskrcnn_resnet50_fpn_v2 if masks else detection.fasterrcnn_resnet50_fpn_v2
        )
        return build(**nothing, num_classes=rows)
    backbone = backbone_utils.resnet_fpn_backbone(
        backbone_name=f"resnet{_depth(state)}", weights=None, trainable_layers=0
    )
    return (detection.MaskRCNN if masks else detection.FasterRCNN)(backbone, rows)


def _depth(state: Arrays) -> int:
    blocks = {tuple(name.split(".")[2:4]) for name in state if name.startswith("backbone.body.la")}
    units = tuple(sum(stage == f"layer{s}" for stage, _ in blocks) for s in range(1, 5))
    bottleneck = "backbone.body.layer1.0.conv3.weight" in state
    if bottleneck and units == (3, 4, 6, 3):
        return 50
    if units in RESNETS:
        return RESNETS[units]
    raise UserError(f"The weights are of no ResNet-18, 34, 50 or 101: its stages have {units}.")


def _torch() -> Any:
    try:
        import torch
        import torchvision  # noqa: F401
    except ImportError as error:
        raise UserError(
            "A parity report runs torchvision, which is missing: pip install 'sephjax[torch]'."
        ) from error
    return torch
