"""The training loop: steps, logging, checkpoints and evaluations, and going on after a stop.

It does I/O and nothing numeric. What it promises: N + M steps in one run are N steps, a new process
and M steps, bit for bit on one platform with as many devices; one compiled program a canvas size;
no hidden transfer between host and device; no state after a loss that is not finite is ever saved.
"""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import numpy as np

from sephjax.checkpoint import Checkpoints, DamagedError
from sephjax.errors import RunError
from sephjax.observe import Observer, Window
from sephjax.train import agreement, feed, sharding, signals, workdir
from sephjax.train.programs import Programs
from sephjax.train.setup import Scalars, Setup
from sephjax.types import TrainState


@dataclasses.dataclass(frozen=True)
class _Done:
    """A step that was dispatched and not yet looked at."""

    step: int
    scalars: Scalars
    index: np.ndarray


def train(setup: Setup, folder: str | pathlib.Path, *, tensorboard: bool = True) -> int:
    """Trains to `train.steps`, going on from the latest checkpoint of `folder` if there is one.

    SIGTERM and SIGINT end it after the step under way, with a checkpoint, as a success.

    Args:
        setup: what to train.
        folder: the workdir, made if needed.
        tensorboard: write events beside `metrics.jsonl`.

    Returns:
        The step it ended at.

    Raises:
        UserError: if the folder belongs to another config.
        RunError: if a loss is not finite, or the input breaks its promises.
    """
    config, folder = setup.config, pathlib.Path(folder)
    values: Any = config.train
    sharding.check_batch(values.batch, setup.mesh, "train.batch", values.accumulate)
    notes = workdir.claim(folder, config)
    if (step := workdir.finished(folder, config)) is not None:
        Observer(folder, step, 1, tensorboard=False).say(
            f"{folder} is trained to step {step} and evaluated: nothing to do."
        )
        return step
    checkpoints = workdir.checkpoints_of(folder, config)
    try:
        with (
            signals.caught() as stop,
            Observer(folder, values.steps, values.batch, tensorboard=tensorboard) as observer,
        ):
            for note in notes:
                observer.say(note)
            run = _Run(setup, folder, checkpoints, observer, stop)
            with jax.transfer_guard("disallow"):
                run.run()
            return run.step
    finally:
        checkpoints.close()


class _Run:
    """One process' part of a run, from its start or resumption to its end."""

    def __init__(
        self,
        setup: Setup,
        folder: pathlib.Path,
        checkpoints: Checkpoints,
        observer: Observer,
        stop: signals.Stop,
    ):
        self.setup, self.folder = setup, folder
        self.config: Any = setup.config
        self.checkpoints, self.observer, self.stop = checkpoints, observer, stop
        self.total = self.config.train.steps
        self.state = self._begin()
        self.step = int(jax.device_get(self.state.step))
        workdir.trim_metrics(folder, self.step)
        workdir.write_manifest(folder, self.config, self.step)
        self.programs = Programs(setup)
        self.feed = feed.Feed(setup.mesh, setup.batches)
        self.window = Window()
        self.recent: list[_Done] = []
        self.stopping = False

    def _begin(self) -> TrainState:
        """The state and the place in the data to go on from."""
        abstract = sharding.abstract_on(self.setup.mesh, self.setup.abstract)
        while (step := workdir.latest(self.checkpoints)) is not None:
            try:
                state, place = self.checkpoints.restore(step, abstract)
            except DamagedError as error:
                # Without the last one the run would begin anew, over what it has written.
                last = len(self.checkpoints.steps(whole=True)) == 1
                if last or jax.process_count() > 1:
                    raise
                self.observer.say(f"{error} It is set aside as {step}.damaged.")
                self.checkpoints.set_aside(step)
                continue
            self.setup.batches.set_state(place)
            self.observer.say(f"going on from step {step}")
            self._tell_of_averages(step)
            return state
        # A copy, since the first step gives these arrays away.
        return sharding.put_whole(self.setup.mesh, self.setup.init())

    def _tell_of_averages(self, step: int) -> None:
        wanted, there = self.config.train.ema > 0, self.checkpoints.has_averages(step)
        if wanted and not there:
            self.observer.say("its weights were not averaged: the averages begin at them")
        if there and not wanted:
            self.observer.say("train.ema is 0: its averaged weights are left behind")

    def run(self) -> None:
        """Steps and evaluations until the end or a stop."""
        try:
            self._evaluate_if_due()
            while self.step < self.total and not self.stopping:
                self._advance()
                if not self.stopping:
                    self._evaluate_if_due()
        finally:
            self.feed.close()
        if self.stopping:
            self.observer.say(f"stopped at step {self.step}; the same command goes on from there")

    def _advance(self) -> None:
        """Dispatches one step, then logs, checks and saves what is due."""
        fetched = self._take()
        self.observer.log_dropped(fetched.dropped)
        if not self.programs.has(fetched.batch):
            self._compile(fetched)
        self.state, scalars = self.programs(self.state, fetched.batch)
        self.step += 1
        self.window.steps += 1
        self.recent.append(_Done(self.step, scalars, fetched.index))
        logging = self.step % self.config.train.log_every == 0 or self.step == self.total
        self.stopping = self._asked_to_stop(logging=logging)
        saving = self._saving()
        if not saving:
            self.feed.start()
        if logging or saving:
            self._look(log=logging)
        if saving:
            self._save()

    def _take(self) -> feed.Fetched:
        """The next batch; at most two steps are under way when it returns."""
        if len(self.recent) > 1:
            jax.block_until_ready(self.recent[-2].scalars)
        busy = self.recent[-1].scalars if self.recent else None
        fetched, waited = self.feed.take(busy)
        if not len(self.programs):
            self.window = Window()  # starting the input is no part of a rate
        else:
            self.window.waited += waited
        return fetched

    def _compile(self, fetched: feed.Fetched) -> None:
        height, width = fetched.batch.image.shape[1:3]
        self.observer.doing(f"compiling the step for a {height}x{width} canvas")
        jax.block_until_ready(self.recent[-1].scalars if self.recent else None)
        with jax.transfer_guard("allow"):
            self.programs.compile(self.state, fetched.batch)
        seconds = self.programs.last_seconds
        self.window.excluded += seconds
        self.observer.say(f"compiled the step for a {height}x{width} canvas in {seconds:.1f} s")
        self.observer.doing("training")

    def _asked_to_stop(self, *, logging: bool) -> bool:
        """Several processes agree at logged steps, since asking costs a message."""
        if jax.process_count() == 1:
            return self.stop.requested
        with jax.transfer_guard("allow"):
            return agreement.any_process(self.stop.requested) if logging else False

    def _saving(self) -> bool:
        # An evaluation comes after a checkpoint, so that it can be interrupted and had again.
        return (
            self.stopping
            or self.step == self.total
            or _every(self.step, self.config.checkpoint.every)
            or _every(self.step, self.config.eval.every)
        )

    def _look(self, *, log: bool) -> None:
        """Transfers the scalars of the steps since the last look, checks them, logs the last."""
        seen = jax.device_get([done.scalars for done in self.recent])
        for done, scalars in zip(self.recent, seen, strict=True):
            _check_finite(done, scalars)
        self.recent.clear()
        if log:
            self.observer.log(self.step, seen[-1], self.window)
            self.window = Window()

    def _save(self) -> None:
        with jax.transfer_guard("allow"), self.window.pause():
            place = self.setup.batches.get_state()
            self.checkpoints.save(self.step, self.state, place, wait=self.stopping)

    def _evaluate_if_due(self) -> None:
        due = self.step >= self.total or _every(self.step, self.config.eval.every)
        with jax.transfer_guard("allow"), self.window.pause():
            if not due or self.step == 0 or workdir.evaluated(self.folder, self.step):
                return
            try:
                with self.stop.droppable(), self.observer.aside():
                    best = self.state.best
                    metrics = self.setup.evaluate(self.step, best.params, best.frozen)
            except signals.Stopped:
                self.stopping = True
                return
            self.observer.log_evaluation(self.step, metrics)


def _every(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _check_finite(done: _Done, scalars: dict[str, Any]) -> None:
    """Raises RunError if the loss or the gradient norm of a step is not finite."""
    if all(math.isfinite(scalars[name]) for name in ("loss", "grad_norm") if name in scalars):
        return
    terms = ", ".join(f"{name} {float(value):.4g}" for name, value in sorted(scalars.items()))
    raise RunError(
        f"the loss or its gradient is not finite at step {done.step} ({terms}), on the images at"
        f" the places {done.index.tolist()} of the source; lower optimizer.lr, clip with"
        " optimizer.clip, or look at those images."
    )
