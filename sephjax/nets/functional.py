"""The one door between Flax NNX and JAX: a constructor becomes `init` and `apply` over plain dicts.

NNX builds the module; what runs takes two nested dicts with string keys, `params` and `frozen`. No
other file splits or merges. `nnx.merge` pairs values with the module by the *sorted position* of
their paths, so a wrong name would permute the weights in silence: names and shapes are compared
first.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from sephjax.errors import UserError
from sephjax.types import Params

T = TypeVar("T")


class Frozen(nnx.Variable):
    """Loaded with the weights, saved with them, never differentiated (batch-norm statistics)."""


def flat_paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `("a/b/kernel", leaf)` of a nested dict, in sorted order of the keys."""
    for key in sorted(tree):
        if isinstance(tree[key], Mapping):
            yield from flat_paths(tree[key], f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", tree[key]


def check_same(expected: Mapping[str, Any], given: Mapping[str, Any], what: str) -> None:
    """Compares names and shapes of two nested dicts.

    Raises:
        UserError: naming every tensor that is missing, unknown or of the wrong shape.
    """
    want = {path: tuple(leaf.shape) for path, leaf in flat_paths(expected)}
    have = {path: tuple(leaf.shape) for path, leaf in flat_paths(given)}
    if want == have:
        return
    problems = [f"{path} is missing" for path in want.keys() - have.keys()]
    problems += [f"{path} is not part of the model" for path in have.keys() - want.keys()]
    problems += [
        f"{path} has shape {have[path]} where the model has {want[path]}"
        for path in want.keys() & have.keys()
        if want[path] != have[path]
    ]
    raise UserError(f"The {what} do not fit this model: " + "; ".join(sorted(problems)) + ".")


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as pure functions of `params` (trained) and `frozen` (never differentiated).

    Attributes:
        make_model: The constructor.
        graph: The structure of the module, as NNX split it.
        abstract: `(params, frozen)` of `jax.ShapeDtypeStruct`; nothing was allocated for them.
    """

    make_model: Callable[[nnx.Rngs], nnx.Module]
    graph: Any
    abstract: tuple[Params, Params]

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Draws the initial `(params, frozen)`; may be jitted."""
        _, params, frozen = nnx.split(self.make_model(nnx.Rngs(key)), nnx.Param, Frozen)
        return dict(nnx.to_pure_dict(params)), dict(nnx.to_pure_dict(frozen))

    def apply(
        self, params: Params, frozen: Params, *args: Any, method: str = "__call__", **kwargs: Any
    ) -> Any:
        """Calls `method` (which may be dotted: `"neck.__call__"`) of the model with these values.

        Raises:
            UserError: the names or shapes of `params` or `frozen` are not those of the model.
        """
        return self._bound(params, frozen, method)[1](*args, **kwargs)

    def apply_and_update(
        self, params: Params, frozen: Params, *args: Any, method: str = "__call__", **kwargs: Any
    ) -> tuple[Any, Params]:
        """As `apply`, with the `frozen` that the call left behind (moving batch statistics)."""
        model, call = self._bound(params, frozen, method)
        outputs = call(*args, **kwargs)
        _, _, updated = nnx.split(model, nnx.Param, Frozen)
        return outputs, dict(nnx.to_pure_dict(updated))

    def inside(self, params: Params, frozen: Params, look: Callable[[Any], T]) -> T:
        """`look(model)` of the model with these values, for what its methods do not return."""
        check_same(self.abstract[0], params, "parameters")
        check_same(self.abstract[1], frozen, "frozen values")
        return look(nnx.merge(self.graph, params, frozen))

    def _bound(
        self, params: Params, frozen: Params, method: str
    ) -> tuple[nnx.Module, Callable[..., Any]]:
        getter = operator.attrgetter(method)
        return self.inside(params, frozen, lambda model: (model, getter(model)))


def functional(make_model: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Splits a constructor into `init(key)` and `apply(params, frozen, *args)`.

    The constructor is traced once for its names and shapes; no array is made. All variables of the
    model must be `nnx.Param` or `Frozen`.
    """
    graph, *states = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))), nnx.Param, Frozen)
    params, frozen = (dict(nnx.to_pure_dict(state)) for state in states)
    return Functional(make_model, graph, (params, frozen))


def detach(module: nnx.Module) -> tuple[Callable[..., tuple[Any, Params]], Params, Params]:
    """Splits a part of a running model into a pure function and the values it has now.

    For transformations that must see the values as arguments (a custom gradient, a checkpoint).
    `call(params, frozen, *args, **kwargs)` gives what the module's `__call__` gives, and the frozen
    values that it moved (`attach` brings them back into the module).
    """
    graph, *states = nnx.split(module, nnx.Param, Frozen)

    def call(params: Params, frozen: Params, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        part = nnx.merge(graph, params, frozen)
        outputs = part(*args, **kwargs)
        _, _, updated = nnx.split(part, nnx.Param, Frozen)
        return outputs, _moved(frozen, nnx.to_pure_dict(updated))

    params, frozen = (dict(nnx.to_pure_dict(state)) for state in states)
    return call, params, frozen


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> Params:
    """What of a nested dict is another array than before.

    The rest must stay itself: what comes out of a transformation is a new array even where nothing
    happened to it, and devices would then take the mean of equal values (`train/step.py`).
    """
    found: Params = {}
    for name, value in after.items():
        if not isinstance(value, Mapping):
            if value is not before[name]:
                found[name] = value
        elif inner := _moved(before[name], value):
            found[name] = inner
    return found


def attach(module: nnx.Module, frozen: Params) -> None:
    """Gives a part of a running model the frozen values that a call of `detach` moved."""
    nnx.update(module, frozen)


def rematerialized(module: nnx.Module, *args: Any, **static: Any) -> Any:
    """Calls a part of a running model so that the backward pass computes its inside again.

    Of the call only `args`, parameters and results are kept for the gradient (`jax.checkpoint`).

    Args:
        module: what is called.
        *args: pytrees of arrays.
        **static: what is no array.
    """
    call, params, frozen = detach(module)
    run = jax.checkpoint(functools.partial(call, **static))
    outputs, moved = run(params, frozen, *args)
    attach(module, moved)
    return outputs
