"""A detector as a list of stages, each a function of the values of earlier ones; one image.

A stage has the path of the module whose result it is. The same list serves twice: fed with its own
results it is the forward pass, fed with a peer's it tells which stage alone computes something
else.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sephjax.nets import layers
from sephjax.nets.backbone import resnet
from sephjax.nets.detector import Detector
from sephjax.nets.neck.fpn import resize_nearest
from sephjax.types import Array, BoxOutputs, Proposals, RpnOutputs

INPUT, ANCHORS, PROPOSALS = "network input", "rpn/anchors", "rpn/proposals"
LEVELS, POOLED = "roi levels", "roi features"
DETECTIONS, MASK_POOLED = "detections", "mask features"


class Stage(NamedTuple):
    """One step of the computation.

    Attributes:
        name: path of the module, or what is computed where no module does.
        inputs: names of the stages whose values it takes, or `image` and `size`.
        compute: the function of them.
        rows: the stage whose boxes the rows of the value belong to, or nothing.
    """

    name: str
    inputs: tuple[str, ...]
    compute: Callable[..., Any]
    rows: str = ""


def stages(detector: Detector, classify: Callable[..., Any]) -> list[Stage]:
    """Every stage, in an order in which they can be computed.

    The start values are `image`, uint8 [1, h, w, 3], and `size`, int32 [1, 2]. Maps are
    [1, h, w, c], logits and deltas of the RPN [1, n] and [1, n, 4], everything by ROI [n, ...].
    Proposals and detections are dicts of `boxes` and `valid` (and `scores`, `labels`).

    Args:
        detector: with a backbone whose stages end where the neck taps them (not `slim`).
        classify: `predict.detections` with its options bound.
    """
    found = [*_backbone(detector), *_neck(detector), *_rpn(detector)]
    found += _boxes(detector, classify)
    return found + (_masks(detector) if hasattr(detector, "mask_head") else [])


def _valid(detector: Detector, x: Array, size: Array, stride: int) -> Array | None:
    """What `layers` take as the valid part of a map."""
    padded = detector.recipe.mask_padding
    return layers.valid_mask(size, (x.shape[1], x.shape[2]), stride) if padded else None


def _backbone(detector: Detector) -> list[Stage]:
    net = detector.backbone
    cells = functools.partial(_valid, detector)
    stem, norm = net.stem, net.stem.norm
    padding = resnet.LAYOUTS[net.layout].pool_padding

    def unit(block, stride, x, size):
        before = cells(x, size, stride)
        after = cells(x[:, :: block.stride, :: block.stride], size, stride * block.stride)
        return block(x, (before, after), train=False)

    path = "backbone/stem"
    found = [
        Stage(INPUT, ("image", "size"), detector.normalize),
        Stage(f"{path}/conv", (INPUT, "size"), lambda x, s: stem.conv(x, cells(x, s, 1))),
        Stage(
            f"{path}/norm",
            (f"{path}/conv", "size"),
            lambda x, s: layers.act(norm(x, cells(x, s, 2)), norm),
        ),
        Stage(
            f"{path}/pool",
            (f"{path}/norm", "size"),
            lambda x, s: layers.max_pool_3x3(x, cells(x, s, 2), padding),
        ),
    ]
    stride = 4
    for i in range(1, 5):
        for j, step in enumerate(getattr(net, f"stage{i}").strides):
            block = getattr(getattr(net, f"stage{i}"), f"block{j}")
            compute = functools.partial(unit, block, stride)
            name = f"backbone/stage{i}/block{j}"
            found.append(Stage(name, (found[-1].name, "size"), compute))
            stride *= step
    return found


def _neck(detector: Detector) -> list[Stage]:
    fpn, net = detector.fpn, detector.backbone
    cells = functools.partial(_valid, detector)

    def lateral(i, x, size):
        valid = cells(x, size, 2**i)
        return getattr(fpn, f"lateral_norm{i}")(getattr(fpn, f"lateral{i}")(x), valid)

    def output(i, size, *laterals):
        merged = laterals[0]
        for finer in laterals[1:]:
            merged = finer + resize_nearest(merged, finer.shape[1:3])
        valid = cells(merged, size, 2**i)
        return getattr(fpn, f"output_norm{i}")(getattr(fpn, f"output{i}")(merged, valid), valid)

    found, above = [], []
    for level in reversed(fpn.levels):
        i = int(level[1:])
        last = len(getattr(net, f"stage{i - 1}").strides) - 1
        tap = f"backbone/stage{i - 1}/block{last}"
        above.append(f"fpn/lateral{i}")
        found += [
            Stage(above[-1], (tap, "size"), functools.partial(lateral, i)),
            Stage(f"fpn/output{i}", ("size", *above), functools.partial(output, i)),
        ]
    return [*found, Stage("fpn/p6", ("fpn/output5",), lambda p5: p5[:, ::2, ::2])]


def _pyramid(detector: Detector) -> dict[str, str]:
    """The stage that each level of the pyramid is the value of."""
    return {f"p{c[1:]}": f"fpn/output{c[1:]}" for c in detector.fpn.levels} | {"p6": "fpn/p6"}


def _rpn(detector: Detector) -> list[Stage]:
    rpn, recipe = detector.rpn, detector.recipe
    pyramid = {name: _pyramid(detector)[name] for name in recipe.rpn_levels}

    def conv(i, level, x, size):
        return rpn.layer(i, level, x, _valid(detector, x, size, 2 ** int(level[1:])))

    def anchors(image, *maps):
        shapes = tuple(x.shape[1:3] for x in maps)
        return jnp.concatenate(recipe.anchors(image.shape[1:3], shapes))

    def propose(size, every, *outputs):
        logits, deltas = outputs[: len(pyramid)], outputs[len(pyramid) :]
        cuts = [sum(x.shape[1] for x in logits[:i]) for i in range(1, len(logits))]
        raw = RpnOutputs(jnp.concatenate(logits, axis=1), jnp.concatenate(deltas, axis=1))
        levels, usable = tuple(jnp.split(every, cuts)), detector.usable(every, size)
        proposals = detector.propose(raw, levels, usable, size, train=False)
        return {"boxes": proposals.boxes[0], "valid": proposals.valid[0]}

    found = []
    for level, x in pyramid.items():
        for i in range(rpn.convs):
            name = f"rpn/conv{i}/{level}"
            found.append(Stage(name, (x, "size"), functools.partial(conv, i, level)))
            x = name
        flat = lambda y: rpn.logits(y).reshape(1, -1)
        found.append(Stage(f"rpn/logits/{level}", (x,), flat))
        found.append(Stage(f"rpn/deltas/{level}", (x,), lambda y: rpn.deltas(y).reshape(1, -1, 4)))
    heads = [f"rpn/{kind}/{level}" for kind in ("logits", "deltas") for level in pyramid]
    return [
        *found,
        Stage(ANCHORS, ("image", *pyramid.values()), anchors),
        Stage(PROPOSALS, ("size", ANCHORS, *heads), propose),
    ]


def _pool(detector: Detector, name: str, boxes: str, side: int) -> Stage:
    """The features of the boxes of a stage."""
    pooler, pyramid = detector.recipe.pooler, _pyramid(detector)

    def pool(image, size, rois, *maps):
        levels = dict(zip(pooler.levels, maps, strict=True))
        row = jax.tree.map(lambda leaf: leaf[None], rois)
        extent = detector.extent(image, size)
        return pooler(levels, row["boxes"], row["valid"], side=side, extent=extent)[0]

    maps = tuple(pyramid[level] for level in pooler.levels)
    return Stage(name, ("image", "size", boxes, *maps), pool, boxes)


def _boxes(detector: Detector, classify: Callable[..., Any]) -> list[Stage]:
    head, pooler = detector.box_head, detector.recipe.pooler

    def dense(i, x):
        if i:
            x = layers.act(x, getattr(head.dense, f"norm{i - 1}"))
        norm = getattr(head.dense, f"norm{i}")
        return norm(getattr(head.dense, f"fc{i}")(x.reshape(x.shape[0], -1)))

    def predict(layer, x):
        if head.dense.fcs:
            x = layers.act(x, getattr(head.dense, f"norm{head.dense.fcs - 1}"))
        return layer(x.reshape(x.shape[0], -1))

    def detect(size, proposals, logits, deltas):
        boxes = proposals["boxes"]
        rois = Proposals(boxes, jnp.zeros(boxes.shape[:1], jnp.float32), proposals["valid"])
        found = classify(BoxOutputs(logits, deltas), rois, size[0].astype(jnp.float32))
        names = ("boxes", "scores", "labels", "valid")
        return {name: getattr(found, name) for name in names}

    found = [
        Stage(LEVELS, (PROPOSALS,), lambda p: pooler.assign(p["boxes"][None])[0], PROPOSALS),
        _pool(detector, POOLED, PROPOSALS, 7),
        *_tower(head.tower, "box_head/tower", POOLED, PROPOSALS),
    ]
    for i in range(head.dense.fcs):
        compute = functools.partial(dense, i)
        found.append(Stage(f"box_head/dense/fc{i}", (found[-1].name,), compute, PROPOSALS))
    last = found[-1].name
    logits, deltas = (f"box_head/{part}" for part in ("logits", "deltas"))
    split = lambda x: predict(head.deltas, x).reshape(x.shape[0], -1, 4)
    return [
        *found,
        Stage(logits, (last,), functools.partial(predict, head.logits), PROPOSALS),
        Stage(deltas, (last,), split, PROPOSALS),
        Stage(DETECTIONS, ("size", PROPOSALS, logits, deltas), detect),
    ]


def _tower(tower: Any, path: str, before: str, rows: str) -> list[Stage]:
    """Convolutions, each with its norm and activation."""

    def conv(i, x):
        norm = getattr(tower, f"norm{i}")
        return layers.act(norm(getattr(tower, f"conv{i}")(x)), norm)

    names = [before, *(f"{path}/conv{i}" for i in range(tower.convs))]
    return [
        Stage(name, (names[i],), functools.partial(conv, i), rows)
        for i, name in enumerate(names[1:])
    ]


def _masks(detector: Detector) -> list[Stage]:
    head = detector.mask_head

    def predict(found, x):
        every = head.predictor(x)  # of all classes; the program computes the column of one
        return jnp.take_along_axis(every, found["labels"][:, None, None, None], axis=3)[..., 0]

    tower = _tower(head, "mask_head", MASK_POOLED, DETECTIONS)
    last = tower[-1].name if tower else MASK_POOLED
    grow = lambda x: layers.act(head.deconv_norm(head.deconv(x)), head.deconv_norm)
    return [
        _pool(detector, MASK_POOLED, DETECTIONS, detector.recipe.mask_pool),
        *tower,
        Stage("mask_head/deconv", (last,), grow, DETECTIONS),
        Stage("mask_head/predictor", (DETECTIONS, "mask_head/deconv"), predict, DETECTIONS),
    ]
