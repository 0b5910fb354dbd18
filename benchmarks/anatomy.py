"""Where the time of a train step goes.

`python -m benchmarks.anatomy --config=configs/demo.py [--repeats=5] [--config.<key>=<value>]`
compiles the step up to each of its parts and times these programs in turn on one real batch of the
config; a part costs what its program takes longer than the one before. So the parts sum to the
step, but what XLA fuses over a border lies on one side of it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from sephjax import build, learner, modes
from sephjax.nets.detector import Detector
from sephjax.train import optimizer, sharding
from sephjax.train import workdir as claims
from sephjax.types import Batch

CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", "Config file, with :row.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Times that each program runs.")
WORKDIR = flags.DEFINE_string("workdir", "", "Folder for the run's notes; empty: a temporary one.")

Part = Callable[[Detector, Batch, Any], Any]


def backbone(detector: Detector, batch: Batch, keys: Any) -> Any:
    del keys
    size = batch.size if detector.recipe.mask_padding else None
    return detector.backbone(detector.normalize(batch.image, batch.size), size, train=True)


def neck(detector: Detector, batch: Batch, keys: Any) -> Any:
    del keys
    return detector.pyramid(batch, train=True)


def rpn(detector: Detector, batch: Batch, keys: Any) -> Any:
    pyramid = neck(detector, batch, keys)
    return pyramid, *detector.score(batch, pyramid, train=True)


def rpn_targets(detector: Detector, batch: Batch, keys: Any) -> Any:
    return rpn(detector, batch, keys), detector.rpn_targets(batch, keys)


def proposals(detector: Detector, batch: Batch, keys: Any) -> Any:
    (pyramid, outputs, levels, inside), targets = rpn_targets(detector, batch, keys)
    found = detector.propose(outputs, levels, inside, batch.size, train=True)
    return pyramid, outputs, targets, found


def rois(detector: Detector, batch: Batch, keys: Any) -> Any:
    pyramid, outputs, targets, found = proposals(detector, batch, keys)
    keys = jax.vmap(jax.random.split)(keys)[:, 1]
    return pyramid, outputs, targets, detector.recipe.roi_targets(keys, found, batch.truth)


def pooling(detector: Detector, batch: Batch, keys: Any) -> Any:
    pyramid, outputs, targets, sampled = rois(detector, batch, keys)
    extent = detector.extent(batch.image, batch.size)
    boxes = sampled.boxes, sampled.valid
    pooled = detector.recipe.pooler.views(pyramid, *boxes, side=7, extent=extent)
    return pyramid, outputs, targets, sampled, pooled


def box_head(detector: Detector, batch: Batch, keys: Any) -> Any:
    outputs = detector.training(batch, keys)
    return outputs.rpn, outputs.rpn_targets, outputs.rois, outputs.boxes, outputs.later


def mask_head(detector: Detector, batch: Batch, keys: Any) -> Any:
    return detector.training(batch, keys)


PARTS: dict[str, Part] = {
    "backbone": backbone,
    "neck": neck,
    "RPN head": rpn,
    "RPN targets (matching, sampling)": rpn_targets,
    "proposals (top-k, decoding, NMS)": proposals,
    "ROI targets (matching, sampling)": rois,
    "ROI pooling of the box head": pooling,
    "box head": box_head,
    "mask branch (pooling, targets, head and its gradient)": mask_head,
}


def programs(config: Any, workdir: Path) -> tuple[dict[str, Callable[[], Any]], float]:
    """The compiled step up to each part, bound to one batch; seconds that a batch took to make."""
    setup = modes.make_setup(config, workdir)
    model = build.model(config, len(claims.load_categories(workdir)))
    state, batches = setup.init(), iter(setup.batches)
    next(batches)
    began = time.perf_counter()
    host = [next(batches)[0] for _ in range(3)]
    fetched = (time.perf_counter() - began) / len(host)
    batch = sharding.put_batch(setup.mesh, host[-1])
    mask = learner.fixed_mask(config, model)
    losses = build.losses(config)

    def keys_of(batch: Batch) -> Any:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(state.key, batch.index)

    def up_to(part: Part) -> Callable[..., Any]:
        look = lambda batch: lambda detector: part(detector, batch, keys_of(batch))
        return lambda params, frozen, batch: model.inside(params, frozen, look(batch))

    def loss(params: Any, frozen: Any, batch: Batch) -> Any:
        outputs = model.apply(params, frozen, batch, keys_of(batch), method="training")
        return losses(outputs, batch.size.astype("float32"))["loss"]

    def slopes(params: Any, frozen: Any, batch: Batch) -> Any:
        trained, fixed = optimizer.split_by_mask(params, mask)
        return jax.grad(lambda some: loss(optimizer.join(some, fixed), frozen, batch))(trained)

    weights = state.params, state.frozen, batch
    found = {name: _compiled(up_to(part), *weights) for name, part in PARTS.items()}
    if not config.mask.enabled:
        del found[list(PARTS)[-1]]
    found["losses"] = _compiled(loss, *weights)
    found["backward pass"] = _compiled(slopes, *weights)
    found["update and scalars"] = _compiled(setup.train_step, state, batch)
    return found, fetched


def _compiled(run: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    compiled = jax.jit(run).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def seconds(found: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each program, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(repeats + 1):
        for name, run in found.items():
            began = time.perf_counter()
            run()
            if turn:  # the first is the warm-up
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def table(taken: dict[str, float], fetched: float) -> str:
    """Parts, their milliseconds and their share of the step, as a Markdown table."""
    total, before = list(taken.values())[-1], 0.0
    lines = ["| part | ms | share |", "|---|---|---|"]
    for name, until in taken.items():
        lines.append(f"| {name} | {1e3 * (until - before):.1f} | {(until - before) / total:.1%} |")
        before = until
    lines.append(f"| **step** | {1e3 * total:.1f} | |")
    wait = max(fetched - total, 0.0)
    lines.append(f"| a batch from the input (beside the step; {1e3 * wait:.1f} ms wait for it) |")
    lines[-1] += f" {1e3 * fetched:.1f} | |"
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as folder:
        found, fetched = programs(CONFIG.value, Path(WORKDIR.value or folder))
        print(table(seconds(found, REPEATS.value), fetched))


if __name__ == "__main__":
    app.run(main)
