"""The compiled train step: one program for each canvas size, counted, never one more."""

import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sephjax.errors import RunError
from sephjax.train import optimizer, sharding
from sephjax.train.setup import Scalars, Setup
from sephjax.types import Batch, TrainState


def train_program(config: ConfigDict, train_step: Callable[..., Any], mesh: Mesh) -> Any:
    """The jitted `train_step`, which gives away its state and reports the learning rate too."""
    rate = optimizer.make_schedule(config)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        after, scalars = train_step(state, batch)
        return after, {"lr": rate(state.step)} | scalars

    whole, cut = sharding.replicated(mesh), sharding.batched(mesh)
    return jax.jit(step, in_shardings=(whole, cut), out_shardings=(whole, whole), donate_argnums=0)


def predict_program(predict_step: Callable[..., Any], mesh: Mesh) -> Any:
    """The jitted `predict_step(params, frozen, batch)`, each device on its own images."""
    whole, cut = sharding.replicated(mesh), sharding.batched(mesh)
    run = sharding.by_device(mesh, predict_step, (0, 1))
    return jax.jit(run, in_shardings=(whole, whole, cut), out_shardings=cut)


def give_back_memory() -> None:
    """Hands what the compiler freed back to the system, after a compilation; glibc keeps it.

    Without glibc nothing happens. Of a ResNet-50 train step it is 0.9 GB (docs/DECISIONS.md).
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Programs:
    """Compiles the step of `setup` when a batch of new shapes arrives.

    Compilation is explicit (`lower(...).compile()`), so `len(programs)` is the number of compiled
    steps, and a state or batch of other shapes cannot cause a silent one. The state is donated.
    """

    def __init__(self, setup: Setup):
        self._jitted = train_program(setup.config, setup.train_step, setup.mesh)
        self._limit = len(setup.batches.buckets)
        self._compiled: dict[Any, Any] = {}
        self.last_seconds = 0.0  # what the newest compilation took

    def __len__(self) -> int:
        return len(self._compiled)

    def has(self, batch: Batch) -> bool:
        """Is there a program for the shapes of `batch`?"""
        return _shapes(batch) in self._compiled

    def compile(self, state: TrainState, batch: Batch) -> None:
        """Adds the program for the shapes of `batch`.

        Raises:
            RunError: if there are already as many as the input has canvas sizes.
        """
        if len(self) >= self._limit:
            known = sorted(str(shape) for shapes in self._compiled for shape in shapes[:1])
            raise RunError(
                f"a batch with images of shape {batch.image.shape} would need a train program of"
                f" its own, and the {self._limit} canvas sizes of the input already have theirs"
                f" ({', '.join(known)}); the input must give every canvas size one set of shapes."
            )
        began = time.perf_counter()
        self._compiled[_shapes(batch)] = self._jitted.lower(state, batch).compile()
        give_back_memory()
        self.last_seconds = time.perf_counter() - began

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        """Runs one step; `state` is gone afterwards."""
        return self._compiled[_shapes(batch)](state, batch)


def _shapes(batch: Batch) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(batch)
    return (*((leaf.shape, str(leaf.dtype)) for leaf in leaves), structure)
