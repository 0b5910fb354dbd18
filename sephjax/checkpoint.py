"""Checkpoints: every Orbax call of the program.

A checkpoint holds the items `params`, `frozen`, `optimizer` (its state, the step, the key) and
`input` (the data iterator of each process, as JSON), so that evaluation reads only the first two.
With `train.ema` there are also `averages_params` and `averages_frozen`, and it reads those instead.
Saving runs in the background; what was not finished has another name until it is, and is never
restored.
"""

import contextlib
import dataclasses
import errno
import logging
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import args as ocp_args

from sephjax.errors import RunError, UserError
from sephjax.train import agreement
from sephjax.types import Params, TrainState, Weights

# Words by which TensorStore tells what the system said; the former may go well another time.
_PASSING = re.compile(
    "ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|UNKNOWN"
)
_STATUS = re.compile(f"{_PASSING.pattern}|DATA_LOSS|FAILED_PRECONDITION|NOT_FOUND|OUT_OF_RANGE")
WEIGHTS = ("params", "frozen")
AVERAGES = tuple(f"averages_{name}" for name in WEIGHTS)


class DamagedError(RunError):
    """A checkpoint whose files do not hold what they should."""


class Checkpoints:
    """The checkpoints of one directory; only the newest `keep` stay.

    Args:
        directory: made when it is first written to.
        keep: how many to keep; None keeps all.
        read_only: nothing in the directory is touched, where else what an earlier process did not
            finish saving is removed: a run may be saving there now.
    """

    def __init__(
        self, directory: str | pathlib.Path, keep: int | None = None, *, read_only: bool = False
    ):
        self.directory = epath.Path(directory).absolute()
        self._keep, self._read_only = keep, read_only
        self._opened: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            if self._read_only:
                options = ocp.CheckpointManagerOptions(
                    read_only=True, create=False, save_interval_steps=0
                )
            else:
                options = ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep, create=True, cleanup_tmp_directories=True
                )
            with _without("Given directory is read only"):
                self._opened = ocp.CheckpointManager(self.directory, options=options)
        return self._opened

    def steps(self, *, whole: bool = False) -> list[int]:
        """The steps of the finished checkpoints, oldest first.

        Args:
            whole: leave out those that hold weights only (what `save_weights` writes).
        """
        if not self.directory.is_dir():
            return []
        names = [entry.name for entry in self.directory.iterdir() if entry.name.isdigit()]
        needed = ("params/_METADATA", "_CHECKPOINT_METADATA")
        needed += ("optimizer/_METADATA", "input") if whole else ()
        return sorted(
            int(name)
            for name in names
            if all((self.directory / name / file).exists() for file in needed)
        )

    def latest(self, *, whole: bool = False) -> int | None:
        """The newest finished step, or None; `whole` as in `steps`."""
        steps = self.steps(whole=whole)
        return steps[-1] if steps else None

    def save(
        self, step: int, state: TrainState, input_state: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Saves all of a run at `step`, in the background unless `wait`.

        The arrays are copied before this returns, so `state` may be donated afterwards.
        """
        items = _weight_items(_named(Weights(state.params, state.frozen), state.averages))
        rest = {"opt_state": state.opt_state, "step": state.step, "key": _key_data(state.key)}
        items["optimizer"] = ocp_args.StandardSave(rest)
        items["input"] = ocp_args.JsonSave({"processes": agreement.gathered(input_state)})
        self._save(step, items, wait=wait)

    def save_weights(self, step: int, params: Params, frozen: Params) -> None:
        """Saves weights alone, and waits for it: for evaluation and export, not to resume from."""
        self._save(step, _weight_items(_named(Weights(params, frozen))), wait=True)

    def _save(self, step: int, items: dict[str, Any], *, wait: bool) -> None:
        finished = self.steps()
        if step in finished:
            raise UserError(
                f"{self.directory} already holds a checkpoint of step {step};"
                " choose another workdir or remove it."
            )
        # Orbax saves nothing at or below the step of any folder, be it half a checkpoint.
        for other in self._manager.all_steps():
            if other >= step and other not in finished:
                self.set_aside(other)
        with self._writing():
            saved = self._manager.save(step, args=ocp_args.Composite(**items))
        if not saved:
            raise RunError(
                f"step {step} was not saved: {self.directory} holds a newer one"
                f" ({self.latest()}); remove it or choose another workdir."
            )
        if wait:
            self.wait()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores what `save` saved.

        Args:
            step: one of `steps(whole=True)`.
            abstract: shapes, dtypes and shardings; the key may be a typed key or raw key data.

        Returns:
            The state, bit for bit, and this process' input state (that of all, for another number
            of processes than it was saved by). Where `abstract` has averages and
            the checkpoint has none, they begin at its weights; those that `abstract` does not have
            are not read. `has_averages` tells.

        Raises:
            UserError: if there is no such checkpoint, or it is of another model.
            DamagedError: if it cannot be read.
        """
        self._check_there(step, self.steps(whole=True))
        key = jax.eval_shape(_key_data, abstract.key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=abstract.step.sharding)
        rest = {"opt_state": abstract.opt_state, "step": abstract.step, "key": key}
        stored = abstract.averages if self.has_averages(step) else None
        named = _named(Weights(abstract.params, abstract.frozen), stored)
        targets = _present(named | {"optimizer": rest})
        got = self._restore(step, targets, {"input": ocp_args.JsonRestore()})
        rest, inputs = got["optimizer"], got["input"]["processes"]
        state = TrainState(
            step=rest["step"],
            params=got.get("params", {}),
            frozen=got.get("frozen", {}),
            opt_state=rest["opt_state"],
            key=_key_like(abstract.key)(rest["key"]),
            averages=None if stored is None else Weights(*(got.get(item, {}) for item in AVERAGES)),
        )
        if stored is None and abstract.averages is not None:
            # Copies, since a step gives the arrays of its state away, each once.
            copies = jax.tree.map(jnp.copy, Weights(state.params, state.frozen))
            state = dataclasses.replace(state, averages=copies)
        if len(inputs) == jax.process_count():
            return state, inputs[jax.process_index()]
        if any(place != inputs[0] for place in inputs):
            raise UserError(
                f"the checkpoint of step {step} was written by {len(inputs)} processes and this run"
                f" has {jax.process_count()}; resume with as many processes as before."
            )
        return state, inputs[0]

    def restore_weights(
        self, step: int, params: Params, frozen: Params, *, averages: bool = False
    ) -> tuple[Params, Params]:
        """Restores only the weights; arguments and errors as for `restore`.

        Args:
            step: one of `steps()`.
            params: shapes, dtypes and shardings.
            frozen: likewise.
            averages: the moving averages instead. Where `save_weights` has saved the weights, they
                are what there is; a checkpoint of training without averages is an error.
        """
        self._check_there(step, self.steps())
        names = AVERAGES if averages and step in self.steps(whole=True) else WEIGHTS
        if not self._has(step, names[0]):
            raise UserError(
                f"the checkpoint {self.directory / str(step)} holds no averaged weights; it was"
                " trained without them, so set --config.train.ema=0."
            )
        got = self._restore(step, _present(dict(zip(names, (params, frozen), strict=True))), {})
        return got.get(names[0], {}), got.get(names[1], {})

    def read_weights(self, step: int) -> dict[str, Any]:
        """All weights of a checkpoint as NumPy arrays, without knowing the model.

        They are the moving averages where the checkpoint has them.

        Returns:
            One nested dict of the trained and the frozen values.

        Raises:
            UserError: if there is no such checkpoint.
            DamagedError: if it cannot be read.
        """
        self._check_there(step, self.steps())
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        names = AVERAGES if self.has_averages(step) else WEIGHTS
        targets = {
            item: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                self._stored(step, item),
            )
            for item in names
            if self._has(step, item)
        }
        got = self._restore(step, targets, {})
        params, frozen = (jax.tree.map(np.asarray, got.get(item, {})) for item in names)
        return _merged(params, frozen)

    def has_averages(self, step: int) -> bool:
        """Does the checkpoint of a step hold moving averages of its weights?"""
        return self._has(step, AVERAGES[0])

    def _has(self, step: int, item: str) -> bool:
        return (self.directory / str(step) / item).exists()

    def _restore(self, step: int, targets: dict[str, Any], others: dict[str, Any]) -> Any:
        for item, target in targets.items():
            self._check_fits(step, item, target)
        items = {name: ocp_args.StandardRestore(target) for name, target in targets.items()}
        try:
            return self._manager.restore(step, args=ocp_args.Composite(**items, **others))
        except (ValueError, OSError, KeyError) as error:
            raise _unreadable(self.directory / str(step), error) from error

    def _check_there(self, step: int, steps: list[int]) -> None:
        if step not in steps:
            found = f"it holds the steps {steps}" if steps else "it holds none"
            raise UserError(
                f"{self.directory} has no finished checkpoint of step {step} ({found});"
                " train first, or name another workdir or step."
            )

    def _stored(self, step: int, item: str) -> Any:
        path = self.directory / str(step) / item
        try:
            return ocp.StandardCheckpointHandler().metadata(path).tree
        except (ValueError, OSError, KeyError, AttributeError) as error:
            raise _unreadable(path, error) from error

    def _check_fits(self, step: int, item: str, target: Any) -> None:
        path = self.directory / str(step) / item
        stored, wanted = _shapes(self._stored(step, item)), _shapes(target)
        wrong = [
            f"{name} ({stored.get(name, 'absent')} in the file, {wanted.get(name, 'absent')} here)"
            for name in sorted(wanted.keys() | stored.keys())
            if wanted.get(name) != stored.get(name)
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(
                f"the checkpoint {path} is of another model: {', '.join(wrong[:5])}{more};"
                " give the config it was trained with."
            )

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint to `<step>.damaged`, out of the way of the next save."""
        if jax.process_index() == 0:
            names = [f"{step}.damaged", *(f"{step}.damaged{number}" for number in range(2, 1000))]
            free = next(name for name in names if not (self.directory / name).exists())
            (self.directory / str(step)).rename(self.directory / free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not _STATUS.search(str(error)):
                raise  # a fault of ours
            raise RunError(
                f"{self.directory} cannot be written ({_first(error)}); make room or mend it, and"
                " give the same command again: earlier checkpoints are whole."
            ) from error

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        if self._opened is not None:
            with self._writing():
                self._opened.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees what the background saving holds."""
        if self._opened is not None:
            self.wait()
            self._opened.close()
            self._opened = None


@contextlib.contextmanager
def _without(said: str) -> Iterator[None]:
    """Leaves out a warning of Orbax about what was asked of it."""
    drop = lambda record: said not in record.getMessage()
    logger = logging.getLogger("absl")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def _unreadable(path: Any, error: Exception) -> RunError:
    """What to raise when a checkpoint could not be read: is it damaged, or only out of reach?"""
    if isinstance(error, OSError) and error.errno is not None:
        passing = error.errno not in (errno.ENOENT, errno.ENOTDIR)
    else:
        passing = _PASSING.search(str(error)) is not None
    if passing:
        return RunError(
            f"the checkpoint {path} cannot be read now ({_first(error)}); mend that, and give the"
            " same command again."
        )
    return DamagedError(
        f"the checkpoint {path} cannot be read ({_first(error)}); remove it to go on from what is"
        " left."
    )


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _named(weights: Weights, averages: Weights | None = None) -> dict[str, Any]:
    """The trees of weights by the names of their items."""
    found: dict[str, Any] = dict(zip(WEIGHTS, (weights.params, weights.frozen), strict=True))
    if averages is not None:
        found |= dict(zip(AVERAGES, (averages.params, averages.frozen), strict=True))
    return found


def _weight_items(trees: dict[str, Any]) -> dict[str, Any]:
    return {name: ocp_args.StandardSave(tree) for name, tree in _present(trees).items()}


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Both trees, which share no leaf, in one."""
    both = {key: _merged(a[key], b[key]) for key in a.keys() & b.keys()}
    return {**a, **b, **both}


def _present(trees: dict[str, Any]) -> dict[str, Any]:
    """Without the empty trees, which Orbax refuses to store."""
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    paths, _ = jax.tree.flatten_with_path(tree)
    return {_name(path): tuple(leaf.shape) for path, leaf in paths}


def _name(path: Any) -> str:
    # Stored metadata names the fields of a NamedTuple and the places of a tuple as dict keys.
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_typed(key: Any) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _key_data(key: Any) -> Any:
    return jax.random.key_data(key) if _is_typed(key) else key


def _key_like(abstract: Any) -> Callable[[Any], Any]:
    """What turns key data into a key of the kind of `abstract`."""
    if not _is_typed(abstract):
        return lambda data: data
    kinds = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), abstract)
    return lambda data: jax.random.wrap_key_data(data, impl=kinds[0])
