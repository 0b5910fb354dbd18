"""A linear model on drawn pictures in two canvases: the smallest thing that the loop can train.

Run as a program it trains in a process of its own:
`python -m tests.train.toy WORKDIR STEPS [events]`.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import base
from sephjax.train import loop, optimizer, sharding
from sephjax.train.setup import Setup
from sephjax.types import Batch, TrainState, Truth

IMAGES = 8
BUCKETS = ((8, 12), (12, 8))


class ToyBatches:
    """Batch t is a function of t; `poison` puts a NaN label box into one of them."""

    def __init__(self, poison: int | None = None, odd: int | None = None, on_batch=None):
        self.buckets, self.at = BUCKETS, 0
        self.poison, self.odd, self.on_batch = poison, odd, on_batch

    def __iter__(self):
        return self

    def __next__(self):
        if self.on_batch:
            self.on_batch(self.at)
        rng = np.random.default_rng(self.at)
        height, width = BUCKETS[rng.integers(2)] if self.at > 1 else BUCKETS[self.at]
        if self.odd == self.at:
            height += 1
        image = rng.integers(0, 256, (IMAGES, height, width, 3), dtype=np.uint8)
        boxes = np.float32(image.mean((1, 2))[:, None, [0, 1, 2, 0]])
        if self.poison == self.at:
            boxes[0] = np.nan
        truth = Truth(boxes, np.zeros((IMAGES, 1), np.int32), np.ones((IMAGES, 1), bool), None)
        size = np.full((IMAGES, 2), (height, width), np.int32)
        index = np.arange(IMAGES, dtype=np.int32) + IMAGES * self.at
        self.at += 1
        return Batch(image, size, size, index, np.ones(IMAGES, bool), truth), {"objects": 1}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def toy_config(steps: int):
    config = base.get_config()
    config.optimizer.update({"lr": 0.1, "no_decay": (), "freeze": ()})
    config.schedule.update({"warmup_steps": 2, "milestones": (3,)})
    config.train.update({"steps": steps, "batch": IMAGES, "log_every": 2})
    config.eval.every, config.checkpoint.every, config.checkpoint.keep = 0, 0, 2
    return config


def toy_setup(workdir, steps: int = 4, config=None, **batches) -> Setup:
    config = config or toy_config(steps)
    workdir = pathlib.Path(workdir)
    shapes = {"head": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
    tx = optimizer.make_optimizer(config, shapes)

    def init():
        kernel = 0.1 * jax.random.normal(jax.random.key(1), (3, 4))
        params = {"head": {"kernel": kernel, "bias": jnp.zeros(4)}}
        frozen = {"mean": jnp.full(3, 0.5)}
        key = jax.random.key(config.seed)
        return TrainState(jnp.int32(0), params, frozen, tx.init(params), key)

    def train_step(state, batch):
        key = jax.random.fold_in(state.key, state.step)

        def objective(params):
            pixels = batch.image.astype(jnp.float32) / 255.0
            features = pixels.mean((1, 2)) - state.frozen["mean"][None, :]
            noise = 0.01 * jax.random.normal(key, features.shape)
            guess = (features + noise) @ params["head"]["kernel"] + params["head"]["bias"][None, :]
            loss = jnp.mean((guess - batch.truth.boxes[:, 0] / 255.0) ** 2)
            return loss, {"loss": loss, "loss/toy": loss}

        grads, terms = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = TrainState(state.step + 1, params, state.frozen, opt_state, state.key)
        return after, terms | {"grad_norm": optax.tree.norm(grads)}

    def evaluate(step, params, frozen):
        folder = workdir / "eval" / str(step)
        folder.mkdir(parents=True)  # a second evaluation of a step would fail here
        metrics = {"step": step, "images": 2, "bbox": {"AP": 0.25}, "sum": float(frozen["mean"][0])}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return metrics

    return Setup(
        config=config,
        mesh=sharding.make_mesh(),
        init=init,
        abstract=jax.eval_shape(init),
        train_step=train_step,
        batches=ToyBatches(**batches),
        evaluate=evaluate,
    )


if __name__ == "__main__":
    folder, steps, *more = sys.argv[1:]
    loop.train(toy_setup(folder, int(steps)), folder, tensorboard="events" in more)
