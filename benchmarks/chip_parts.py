"""What parts of a Mask R-CNN train step cost a chip, as its compiler counts; no chip is needed.

`python -m benchmarks.chip_parts [--topology v5e:2x2] [--images 2] [PART ...]` compiles each part of
`mask_rcnn` at 800x1344, bfloat16, by itself for one chip, and prints a Markdown row: processor
seconds to compile, temporaries, FLOPs and bytes. A loop's body counts once.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from configs import mask_rcnn
from sephjax import build, describe
from sephjax.ahead import account, chips
from sephjax.nets.detector import Detector
from sephjax.nets.functional import Functional
from sephjax.ops import masks

Part = tuple[Callable[..., Any], tuple[Any, ...]]  # of the detector and arguments, and those
CANVAS = (800, 1344)


def squared(tree: Any) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    return sum((jnp.sum(x.astype(jnp.float32) ** 2) for x in leaves), jnp.float32(0))


def best(detector: Detector, outputs: Any, levels: Any) -> Any:
    cuts = [sum(level.shape[0] for level in levels[:i]) for i in range(1, len(levels))]
    counts = detector.recipe.pre_nms(len(levels), True)
    parts = zip(jnp.split(outputs.logits, cuts, axis=1), counts, strict=True)
    return [jax.lax.top_k(logits, min(count, logits.shape[1])) for logits, count in parts]


def pool(detector: Detector, pyramid: Any, rois: Any, batch: Any) -> Any:
    extent = detector.extent(batch.image, batch.size)
    views = detector.recipe.pooler.views
    return views(pyramid, rois.boxes, rois.valid, side=7, extent=extent)


def mask_targets(detector: Detector, rois: Any, batch: Any) -> Any:
    most, side = detector.recipe.mask_rois, 2 * detector.recipe.mask_pool
    crop = lambda m, gt, b, i: masks.crop_masks(m, gt, b, i, output_size=side)
    truth = batch.truth
    return jax.vmap(crop)(truth.masks, truth.boxes, rois.boxes[:, :most], rois.matched[:, :most])


def mask_loss(detector: Detector, pyramid: Any, rois: Any, batch: Any) -> Any:
    extent = detector.extent(batch.image, batch.size)
    return detector._mask_sum(pyramid, rois, None, batch.truth, extent)  # noqa: SLF001


def slope(run: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of what `run` gives by the pyramid."""
    loss = lambda maps, detector, *rest: squared(run(detector, maps, *rest))
    return lambda detector, pyramid, *rest: jax.grad(loss)(pyramid, detector, *rest)


def parts(model: Functional, batch: Any) -> dict[str, Part]:
    def shapes(run: Callable[..., Any], *arguments: Any) -> Any:
        return jax.eval_shape(inside(model, run), *model.abstract, *arguments)

    images = batch.image.shape[0]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    pyramid = shapes(lambda d, b: d.pyramid(b, train=True), batch)
    score = lambda d, b, p: d.score(b, p, train=True)
    outputs, levels, usable = shapes(score, batch, pyramid)
    propose = lambda d, o, a, u, b: d.propose(o, a, u, b.size, train=True)
    proposals = shapes(propose, outputs, levels, usable, batch)
    sample = lambda d, k, p, b: d.recipe.roi_targets(k, p, b.truth)
    rois = shapes(sample, keys, proposals, batch)
    pooled = pyramid, rois, batch
    return {
        "backbone": (lambda d, b: d.backbone(d.normalize(b.image, b.size), None), (batch,)),
        "RPN head": (lambda *rows: score(*rows)[0], (batch, pyramid)),
        "RPN targets": (lambda d, b, k: d.rpn_targets(b, k), (batch, keys)),
        "top-k": (best, (outputs, levels)),
        "proposals": (propose, (outputs, levels, usable, batch)),
        "ROI targets": (sample, (keys, proposals, batch)),
        "ROIAlign": (pool, pooled),
        "ROIAlign, gradient": (slope(pool), pooled),
        "mask targets": (mask_targets, (rois, batch)),
        "mask branch": (mask_loss, pooled),
        "mask branch, gradient": (slope(mask_loss), pooled),
    }


def inside(model: Functional, run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, frozen, *rest: model.inside(params, frozen, lambda d: run(d, *rest))


def row(name: str, model: Functional, part: Part, device: Any) -> str:
    run, arguments = part
    place = SingleDeviceSharding(device)
    began = time.process_time()
    jitted = jax.jit(inside(model, run), in_shardings=place, out_shardings=place)
    compiled = jitted.lower(*model.abstract, *arguments).compile()
    spent = time.process_time() - began
    memory, work = account.memory(compiled), account.work(compiled)
    counts = [f"{1e-9 * (number or 0):.2f}" for number in work]
    return f"| {name} | {spent:.0f} | {1e-6 * memory.temporary:.0f} | {' | '.join(counts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--images", type=int, default=2)
    arguments = parser.parse_args()
    config = mask_rcnn.get_config()
    config.compute_dtype = "bfloat16"
    model = build.model(config, describe.CLASSES)
    device = chips.topology(arguments.topology).devices[0]
    batch = describe.abstract_batch(config, arguments.images, *CANVAS)
    print("| part | compiled in CPU s | temporaries MB | GFLOP | GB |\n|---|---:|---:|---:|---:|")
    for name, part in parts(model, batch).items():
        if not arguments.parts or name in arguments.parts:
            print(row(name, model, part, device), flush=True)


if __name__ == "__main__":
    main()
