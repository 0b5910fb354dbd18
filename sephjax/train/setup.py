"""What the training loop is given: all that depends on the model, the data and the config."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sephjax.types import Array, Batch, Params, TrainState

Scalars = dict[str, Array]


class Batches(Protocol):
    """An endless iterator over this process' part of each batch, whose place can be kept."""

    @property
    def buckets(self) -> Sequence[Any]:
        """The canvas sizes that batches come in; each is one compiled program."""
        ...

    def __iter__(self) -> Iterator[tuple[Batch, Mapping[str, int]]]: ...

    def __next__(self) -> tuple[Batch, Mapping[str, int]]:
        """A batch of NumPy arrays, and counts of what had to be left out of it, by reason."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The place after the last batch that was handed out, as JSON can hold it."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes back to a place: the next batch is the one that followed it."""
        ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """One run, ready to go.

    `train_step` is pure and not jitted. Its scalars go to `metrics.jsonl` under their own names;
    `loss` is there, and `loss/<term>` and `grad_norm` should be (the loop adds `lr`, and refuses to
    go on from a loss or gradient norm that is not finite).
    """

    config: ConfigDict
    mesh: Mesh
    init: Callable[[], TrainState]  # called once, when there is no checkpoint
    abstract: TrainState  # of jax.ShapeDtypeStruct: what `init` gives
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Scalars]]
    batches: Batches
    # (step, params, frozen) -> metrics; writes eval/<step>/ and there metrics.json last
    evaluate: Callable[[int, Params, Params], dict[str, Any]]
