"""Whole Mask R-CNN against torchvision's: `python -m benchmarks.model [--repeats K] [--only NAME]`.

One picture of 512x512 with 8 objects, 91 classes, R50-FPN, float32, the same weights on both sides.
The weights are made once by `benchmarks.peer` and written to a file, so that a process that
measures our memory holds no torch: `--peak ours WORK FILE` runs one side three times and prints
its peak.
"""

import argparse
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import scene, timing
from configs import mask_rcnn
from sephjax import build
from sephjax.evaluation import results
from sephjax.train import optimizer, programs, sharding, step
from sephjax.train.setup import Setup
from sephjax.types import Batch, TrainState
from sephjax.weights import torchvision

SIDE, OBJECTS, CLASSES = 512, 8, 90
DETECTIONS = 25  # asked of the random weights
# Of both sides. So low that the weights, and with them the work, stay what they are.
LR, MOMENTUM, DECAY = 1e-5, 0.9, 1e-4
WORKS = ("train", "inference")


def rows(repeats: int = 5, only: str = "", *, memory: bool = True) -> list[timing.Row]:
    """Measures train step and inference, where their name contains `only`."""
    chosen = [work for work in WORKS if only in _name(work)]
    if not chosen:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.npz"
        found = write_weights(path)
        return [_row(work, path, repeats, found, memory=memory) for work in chosen]


def _name(work: str) -> str:
    what = {"train": "train step", "inference": "inference"}[work]
    return f"Mask R-CNN {what} {SIDE}x{SIDE}"


def _row(work: str, path: pathlib.Path, repeats: int, found: int, *, memory: bool) -> timing.Row:
    peaks = (float("nan"), float("nan"))
    if memory:
        one = lambda side: timing.peak_of("benchmarks.model", "--peak", side, work, str(path))
        peaks = one("ours"), one("theirs")
    name = _name(work) + (f", {found} detections" if work == "inference" else "")
    sides = side("ours", work, path), side("theirs", work, path)
    return timing.compare(name, *sides, repeats=repeats, peaks=peaks)


def picture() -> scene.Scene:
    """What both sides see."""
    return scene.draw(SIDE, SIDE, OBJECTS, CLASSES)


def write_weights(path: pathlib.Path) -> int:
    """Writes torchvision's state dict; returns the number of detections that it finds."""
    from benchmarks import peer

    model = peer.mask_rcnn(SIDE, SIDE)
    found = peer.settle(model, picture().image, detections=DETECTIONS)
    np.savez(path, **{name: value.numpy() for name, value in model.state_dict().items()})
    return found


def side(which: str, work: str, path: pathlib.Path) -> timing.Side:
    """One side of one piece of work, ready to run."""
    makers = {
        ("ours", "train"): our_train,
        ("ours", "inference"): our_inference,
        ("theirs", "train"): their_train,
        ("theirs", "inference"): their_inference,
    }
    return makers[which, work](path)


def our_config() -> ConfigDict:
    """`mask_rcnn:torchvision` at batch 1."""
    config = mask_rcnn.get_config("torchvision")
    config.train.batch = 1
    config.optimizer.lr, config.optimizer.momentum, config.optimizer.weight_decay = (
        LR,
        MOMENTUM,
        DECAY,
    )
    config.schedule.warmup_steps = 0
    return config


def our_weights(path: pathlib.Path, config: ConfigDict):
    """The model and its `(params, frozen)`."""
    model = build.model(config, CLASSES)
    with np.load(path) as archive:
        state = {name: archive[name] for name in archive.files}
    params, frozen, _ = torchvision.load_detector(state, *model.abstract)
    return model, params, frozen


class _Canvas:
    """All that the compiled train step asks of an input: how many canvas sizes there are."""

    buckets = ((SIDE, SIDE),)


def our_train(path: pathlib.Path) -> timing.Side:
    """The trainer's own compiled step, state donated."""
    config = our_config()
    mesh = sharding.make_mesh()
    model, params, frozen = our_weights(path, config)
    known = optimizer.parameter_names(frozen)
    mask = optimizer.frozen_mask(params, config.optimizer.freeze, known)
    trained, fixed = optimizer.split_by_mask(params, mask)
    tx = optimizer.make_optimizer(config, trained, [*optimizer.parameter_names(fixed), *known])
    state = TrainState(np.int32(0), params, frozen, tx.init(trained), jax.random.key(0))
    state = jax.device_put(state, sharding.replicated(mesh))
    del params, frozen, trained, fixed
    batch = sharding.put_batch(mesh, picture().batch(100))
    canvases: Any = _Canvas()
    compiled = programs.Programs(
        Setup(
            config=config,
            mesh=mesh,
            init=lambda: state,
            abstract=state,
            train_step=step.make_train_step(model, tx, build.losses(config), mask),
            batches=canvases,
            evaluate=lambda *_: {},
        )
    )
    compiled.compile(state, batch)
    held = [state]
    del state

    def run() -> dict[str, Any]:
        held[0], scalars = compiled(held[0], batch)
        return jax.block_until_ready((held[0].step, scalars))[1]

    return timing.Side(run, compiled.last_seconds)


def our_inference(path: pathlib.Path) -> timing.Side:
    """From a host batch to COCO rows with run-length masks of the whole picture."""
    config = our_config()
    mesh = sharding.make_mesh()
    model, params, frozen = our_weights(path, config)
    same, cut = sharding.replicated(mesh), sharding.batched(mesh)
    params, frozen = jax.device_put((params, frozen), same)
    predict = step.make_predict_step(model, build.classify(config), masks=True)
    jitted = jax.jit(predict, in_shardings=(same, same, cut), out_shardings=cut)
    batch: Batch = picture().batch(100)
    began = time.perf_counter()
    compiled = jitted.lower(params, frozen, sharding.put_batch(mesh, batch)).compile()
    programs.give_back_memory()
    seconds = time.perf_counter() - began

    def run() -> list[results.Row]:
        found = compiled(params, frozen, sharding.put_batch(mesh, batch))
        return results.to_results(
            jax.device_get(found),
            sizes=batch.size,
            originals=batch.original,
            image_ids=[0],
            category_ids=range(CLASSES),
        )

    return timing.Side(run, seconds)


def their_model(path: pathlib.Path):
    """torchvision's model with the weights of the file, and the picture as it takes it."""
    import torch

    from benchmarks import peer

    model = peer.mask_rcnn(SIDE, SIDE)
    with np.load(path) as archive:
        state = {name: torch.from_numpy(archive[name]) for name in archive.files}
    model.load_state_dict(state)
    return model, peer.tensor(picture().image)


def their_train(path: pathlib.Path) -> timing.Side:
    """Forward, backward and one SGD update with decay."""
    import torch

    model, image = their_model(path)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, LR, momentum=MOMENTUM, weight_decay=DECAY)
    drawn = picture()
    truth = {
        "boxes": torch.from_numpy(drawn.boxes),
        "labels": torch.from_numpy(drawn.labels).long() + 1,
        "masks": torch.from_numpy(drawn.masks()),
    }

    def run() -> None:
        losses = model([image], [truth])
        sgd.zero_grad(set_to_none=True)
        torch.stack([*losses.values()]).sum().backward()
        sgd.step()

    return timing.Side(run)


def their_inference(path: pathlib.Path) -> timing.Side:
    """Detections with masks pasted to the size of the picture by torchvision."""
    import torch

    model, image = their_model(path)
    model.eval()

    def run():
        with torch.inference_mode():
            return model([image])[0]

    return timing.Side(run)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Mask R-CNN against torchvision's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="part of the names to measure")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--peak", nargs=3, metavar=("SIDE", "WORK", "FILE"), help="of one side")
    options = parser.parse_args(arguments)
    if options.peak:
        which, work, path = options.peak
        one = side(which, work, pathlib.Path(path))
        for _ in range(3):
            one.run()
        print(json.dumps(timing.peak_gb()))
        return
    print(timing.table(rows(options.repeats, options.only, memory=not options.no_memory)))


if __name__ == "__main__":
    main()
