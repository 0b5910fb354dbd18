"""torchvision's Mask R-CNN with random weights that behave like trained ones.

Fresh weights find nothing, or find everything: either makes a comparison of whole models unfair.
Here each predictor is shifted and scaled, on one picture, until its outputs have the spread of a
trained model's, and the bias of the background class is set so that a wanted number of detections
is left.
"""

from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

CLASSES = 91  # with background
T = TypeVar("T", bound=nn.Module)


def mask_rcnn(height: int, width: int, *, seed: int = 0, depth: int = 50) -> MaskRCNN:
    """`maskrcnn_resnet50_fpn` as it is with pretrained weights, for pictures of one size.

    Asked for without weights, torchvision's own constructor takes trainable batch norm and freezes
    nothing. Stem and layer1 are frozen here; the resize does nothing.
    """
    body = _frozen_body(seed, depth)
    short, long = sorted((height, width))
    return _varied(MaskRCNN(body, CLASSES, min_size=short, max_size=long))


def faster_rcnn(height: int, width: int, *, seed: int = 0) -> FasterRCNN:
    """`fasterrcnn_resnet50_fpn` in the same way."""
    body = _frozen_body(seed)
    short, long = sorted((height, width))
    return _varied(FasterRCNN(body, CLASSES, min_size=short, max_size=long))


def mask_rcnn_v2(height: int, width: int, *, seed: int = 0) -> MaskRCNN:
    """`maskrcnn_resnet50_fpn_v2` for pictures of one size; its norms are trainable batch norm."""
    torch.manual_seed(seed)
    short, long = sorted((height, width))
    bare = {"weights": None, "weights_backbone": None}
    return _varied(maskrcnn_resnet50_fpn_v2(**bare, min_size=short, max_size=long))


def _frozen_body(seed: int, depth: int = 50) -> nn.Module:
    torch.manual_seed(seed)
    resnet = getattr(models, f"resnet{depth}")
    return _resnet_fpn_extractor(resnet(weights=None, norm_layer=FrozenBatchNorm2d), 3)


def tensor(image: np.ndarray) -> torch.Tensor:
    """An RGB uint8 picture [h, w, 3] as torchvision takes it."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


@torch.no_grad()
def settle(model: FasterRCNN, image: np.ndarray, *, detections: int, contrast: float = 2.0) -> int:
    """Gives the predictors a trained spread on `image`: `contrast` of the class logits.

    Returns the number of detections on it, the nearest to `detections` that a bias of the
    background class can give.
    """
    parts: Any = model.eval()  # torch's types know a submodule as Tensor | Module
    images, _ = parts.transform([tensor(image)])
    features = parts.backbone(images.tensors)
    head, heads = parts.rpn.head, parts.roi_heads
    outputs = [torch.cat([x.flatten(2)[0].T for x in part]) for part in head([*features.values()])]
    _spread(head.cls_logits, outputs[0], 3.0)
    _spread(head.bbox_pred, outputs[1], 0.2)
    proposals, _ = parts.rpn(images, features)
    pooled = heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes))
    predictor = heads.box_predictor
    logits, deltas = predictor(pooled)
    _spread(predictor.cls_score, logits, contrast)
    _spread(predictor.bbox_pred, deltas, 0.5)
    logits, deltas = predictor(pooled)

    def found(bias: float) -> tuple[torch.Tensor, torch.Tensor]:
        shifted = logits.clone()
        shifted[:, 0] += bias
        args = shifted, deltas, proposals, images.image_sizes
        boxes, _, labels = heads.postprocess_detections(*args)
        return boxes[0], labels[0]

    low, high = -20.0, 40.0
    for _ in range(16):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if len(found(middle)[0]) > detections else (low, middle)
    predictor.cls_score.bias[0] += high
    boxes, _ = found(high)
    if not heads.has_mask():
        return len(boxes)
    pooled = heads.mask_roi_pool(features, [boxes], images.image_sizes)
    masks = heads.mask_predictor(heads.mask_head(pooled))
    _spread(
        heads.mask_predictor.mask_fcn_logits, masks.transpose(0, 1).flatten(1).T, 1.5 * contrast
    )
    return len(boxes)


@torch.no_grad()
def _varied(model: T) -> T:
    """Norms that differ, around values that keep the activations in range, and biases beside 0."""
    bottlenecks = hasattr(model.backbone.body.layer1[0], "bn3")
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            norm: Any = module
            closes_block = name.endswith("bn3" if bottlenecks else "bn2")
            norm.weight.uniform_(*((0.2, 0.4) if closes_block else (0.7, 1.3)))
            norm.bias.normal_(0.0, 0.1)
            norm.running_mean.normal_(0.0, 0.1)
            norm.running_var.uniform_(0.7, 1.3)
    for name, value in model.named_parameters():
        if name.endswith("bias") and not value.any():
            value.normal_(0.0, 0.05)
    return model


def _spread(layer: Any, outputs: torch.Tensor, std: float) -> None:
    """Centres a layer's outputs [n, o] and gives them a standard deviation."""
    scale = std / float(outputs.std(dim=0).mean())
    layer.bias.copy_((layer.bias - outputs.mean(dim=0)) * scale)
    layer.weight.mul_(scale)
