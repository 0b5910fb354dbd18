"""A trained checkpoint in sephjax and in torchvision: the same detections, the same AP, both ways.

`python -m benchmarks.trained WORKDIR ANNOTATIONS IMAGES [--limit N] [--steps N]`: WORKDIR is a run
of `mask_rcnn:overfit`. Its weights go into torchvision's Mask R-CNN (with the strides of layout
`msra`), and both detect on the first N pictures, on the same canvases, scored by pycocotools. Then
torchvision trains them for some steps of its own, and its state dict comes back and is evaluated
here. Padding is not masked on either side, since torchvision cannot.
"""

import argparse
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.models import resnet50
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks import overfit_torchvision, peer
from configs import mask_rcnn
from sephjax import build, restore
from sephjax.evaluation import evaluator
from sephjax.input import pipeline, sources
from sephjax.modes import predictor
from sephjax.nets.backbone import resnet
from sephjax.train import sharding
from sephjax.types import Batch, Detections
from sephjax.weights import torchvision

LAYOUT = resnet.LAYOUTS["msra"]
STEM = "backbone.body.conv1.weight"
LR, MOMENTUM = 0.0005, 0.9


def make_peer(classes: int) -> MaskRCNN:
    """torchvision's Mask R-CNN with the stride of a stage in its first 1x1, fed 0..255 RGB."""
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    for stage in (body.layer2, body.layer3, body.layer4):
        block: Any = stage[0]
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    rgb = [value / 255 for value in LAYOUT.mean[::-1]]
    model = MaskRCNN(
        _resnet_fpn_extractor(body, 3), classes + 1, image_mean=rgb, image_std=[1 / 255] * 3
    )
    parts: Any = model
    parts.transform._skip_resize = True  # noqa: SLF001, pictures come at their size
    return model


def export(params: Any, frozen: Any) -> dict[str, torch.Tensor]:
    """The state dict of our weights; the stem reads RGB where ours reads BGR."""
    state = torchvision.dump_detector(params, frozen, eps=LAYOUT.eps)
    state[STEM] = state[STEM][:, ::-1]
    return {name: torch.tensor(np.ascontiguousarray(x)) for name, x in state.items()}


def take_back(model: MaskRCNN, abstract: tuple[Any, Any]) -> tuple[Any, Any]:
    """Our weights from torchvision's model."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state[STEM] = state[STEM][:, ::-1]
    params, frozen, _ = torchvision.load_detector(state, *abstract)
    return params, frozen


def predict_with(model: MaskRCNN, rows: int) -> Callable[[Batch], Detections]:
    """torchvision as a predict step: on our canvases, `rows` detections a picture."""
    parts: Any = model.eval()

    @torch.no_grad()
    def predict(batch: Batch) -> Detections:
        blank = (len(batch.size), rows)
        boxes, scores = np.zeros((*blank, 4), np.float32), np.zeros(blank, np.float32)
        labels, valid = np.zeros(blank, np.int32), np.zeros(blank, bool)
        masks = np.zeros((*blank, 28, 28), np.float32)
        for i, (image, size) in enumerate(zip(batch.image, batch.size.tolist(), strict=True)):
            if not batch.valid[i]:
                continue
            height, width = size
            canvas = torch.zeros(1, 3, *image.shape[:2])
            canvas[0, :, :height, :width] = parts.transform.normalize(
                peer.tensor(image[:height, :width])
            )
            features = parts.backbone(canvas)
            proposals, _ = parts.rpn(ImageList(canvas, [(height, width)]), features)
            found = parts.roi_heads(features, proposals, [(height, width)])[0][0]
            n = len(found["scores"])
            boxes[i, :n], scores[i, :n] = found["boxes"], found["scores"]
            labels[i, :n], masks[i, :n] = found["labels"] - 1, found["masks"][:, 0]
            valid[i, :n] = True
        return Detections(boxes, scores, labels, valid, masks)

    return predict


def train(model: MaskRCNN, data: Sequence[overfit_torchvision.Sample], steps: int) -> None:
    """Some steps of torchvision's own training; what it learns is all that matters here."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, LR, momentum=MOMENTUM)
    order = itertools.cycle(data)
    for _ in range(steps):
        images, targets = zip(*itertools.islice(order, 2), strict=True)
        losses = model(list(images), list(targets))
        sgd.zero_grad(set_to_none=True)
        torch.stack([*losses.values()]).sum().backward()
        sgd.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a trained checkpoint here and in torchvision")
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("annotations", type=pathlib.Path, help="COCO JSON")
    parser.add_argument("images", type=pathlib.Path, help="folder of its pictures")
    parser.add_argument("--limit", type=int, default=16, help="pictures")
    parser.add_argument("--steps", type=int, default=10, help="torchvision's own")
    options = parser.parse_args(arguments)
    config = mask_rcnn.get_config("overfit")
    config.mask_padding = False
    config.data.eval.update(
        annotations=str(options.annotations), images=str(options.images), limit=options.limit
    )
    source = sources.open_source(config.data, train=False)
    model = build.model(config, len(source.categories))
    step = restore.step_of(options.workdir, None)
    params, frozen = restore.weights(config, model, options.workdir, step)
    detect = predictor(config, model, sharding.make_mesh())
    theirs = make_peer(len(source.categories))

    def compare(title: str, params: Any, frozen: Any) -> None:
        rows = config.test.detections
        sides = {
            "sephjax": lambda batch: detect(params, frozen, batch),
            "torchvision": predict_with(theirs, rows),
        }
        scores = {}
        for name, predict in sides.items():
            batches = pipeline.eval_batches(
                source, config.data, batch=2, process_index=0, process_count=1
            )
            with tempfile.TemporaryDirectory() as folder:
                report = evaluator.Report(pathlib.Path(folder), step, name)
                scores[name] = evaluator.evaluate(predict, batches, source, report)
        print(f"\n{title}")
        for kind, key in itertools.product(("bbox", "segm"), ("AP", "AP50", "AP75", "AR100")):
            ours, peers = (scores[name][kind][key] for name in sides)
            print(f"{kind} {key:6} {ours:.5f} {peers:.5f} {ours - peers:+.5f}")

    theirs.load_state_dict(export(params, frozen), strict=True)
    compare(f"trained here to step {step}, exported:", params, frozen)
    train(theirs, overfit_torchvision.samples(options.annotations, options.images), options.steps)
    back = take_back(theirs, model.abstract)
    compare(f"{options.steps} more steps in torchvision, taken back:", *back)


if __name__ == "__main__":
    main()
