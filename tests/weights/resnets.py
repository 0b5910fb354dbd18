"""Torch ResNets and detectors under the names of other libraries, for the tests of formats."""

import re

import jax
import numpy as np

from sephjax.nets.backbone import resnet
from sephjax.nets.functional import functional
from sephjax.weights import contents, table
from tests.narrow import jit


def network(**options):
    """Our backbone as pure functions."""
    return functional(lambda rngs: resnet.ResNet(rngs=rngs, **options))


def load(found, model, eps=1e-5):
    """`(params, frozen, report)` of our backbone with what a reader found."""
    parts = [{"backbone": part} for part in model.abstract]
    arrays, report = contents.load(found, *parts, eps=eps)
    trees = [table.unflatten({p: arrays[p] for p in table.flatten(part)}) for part in parts]
    return *(tree["backbone"] for tree in trees), report


def vary(torch, model):
    """Norms that are not trivial and keep the activations in range."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.uniform_(0.2, 0.8)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def maps(torch, peer, x):
    """`c2` to `c5` [b, h, w, c] of a torch ResNet with torchvision's modules."""
    with torch.no_grad():
        y = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
        y = peer.maxpool(torch.relu(peer.bn1(peer.conv1(y))))
        found = []
        for i in range(1, 5):
            y = getattr(peer, f"layer{i}")(y)
            found.append(y.permute(0, 2, 3, 1).numpy())
        return found


def close(ours, theirs):
    """Every map to 1e-4 of its largest value."""
    for mine, peer in zip(ours.values(), theirs, strict=True):
        np.testing.assert_allclose(mine, peer, atol=1e-4 * np.abs(peer).max())


def apply(model, params, frozen, x):
    return jit(model.apply)(params, frozen, jax.numpy.asarray(x))


def msra(torch, models, depth=50):
    """A ResNet with the stride in the first 1x1, detectron2's STRIDE_IN_1X1."""
    peer = vary(torch, getattr(models, f"resnet{depth}")(weights=None))
    for i in (2, 3, 4):
        block = getattr(peer, f"layer{i}")[0]
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    return peer


def to_detectron2(state):
    """A ResNet's state dict under detectron2's names, as arrays."""
    found = {}
    for name, value in state.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        name = re.sub(r"^(conv1|bn1)", r"stem.\1", name)
        name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        found[f"backbone.bottom_up.{name}"] = value.numpy()
    return found


def detector_parts(classes, seed=0):
    """What detectron2's Mask R-CNN FPN has beside its backbone: names and shapes of its code."""
    rng = np.random.default_rng(seed)
    shapes = {}
    for i, width in zip((2, 3, 4, 5), (256, 512, 1024, 2048), strict=True):
        shapes[f"backbone.fpn_lateral{i}"] = (256, width, 1, 1)
        shapes[f"backbone.fpn_output{i}"] = (256, 256, 3, 3)
    rpn, heads = "proposal_generator.rpn_head.", "roi_heads."
    shapes |= {f"{rpn}conv": (256, 256, 3, 3), f"{rpn}objectness_logits": (3, 256, 1, 1)}
    shapes |= {f"{rpn}anchor_deltas": (12, 256, 1, 1)}
    shapes |= {f"{heads}box_head.fc1": (1024, 256 * 49), f"{heads}box_head.fc2": (1024, 1024)}
    shapes |= {f"{heads}box_predictor.cls_score": (classes + 1, 1024)}
    shapes |= {f"{heads}box_predictor.bbox_pred": (4 * classes, 1024)}
    shapes |= {f"{heads}mask_head.mask_fcn{i}": (256, 256, 3, 3) for i in (1, 2, 3, 4)}
    shapes |= {f"{heads}mask_head.predictor": (classes, 256, 1, 1)}
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    found = {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}
    found |= {f"{name}.bias": draw(shape[0]) for name, shape in shapes.items()}
    deconv = f"{heads}mask_head.deconv"
    found |= {f"{deconv}.weight": draw(256, 256, 2, 2), f"{deconv}.bias": draw(256)}
    anchors = "proposal_generator.anchor_generator.cell_anchors"
    return found | {f"{anchors}.{i}": draw(3, 4) for i in range(5)}
