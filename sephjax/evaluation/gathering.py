"""Brings what each process of a run found together, on every process."""

import json
from typing import Any

import jax
import numpy as np


def local_rows(array: Any) -> np.ndarray:
    """This process's rows of an array sharded over its first axis, in their global order.

    A host array, or one that lies wholly here, comes back whole.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    rows: dict[int, np.ndarray] = {}
    for shard in array.addressable_shards:  # replicas of a row say the same
        rows[shard.index[0].start or 0] = np.asarray(shard.data)
    return np.concatenate([rows[start] for start in sorted(rows)])


def all_rows(rows: list[Any]) -> list[Any]:
    """The lists of all processes, one after another, the same everywhere.

    The rows are JSON values; every process must call it the same number of times. With one process
    it returns `rows`.
    """
    if jax.process_count() == 1:
        return rows
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([text.size], np.int32)))
    lengths = lengths.reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)  # every process must offer the same shape
    padded[: text.size] = text
    texts = np.asarray(multihost_utils.process_allgather(padded)).reshape(lengths.size, -1)
    gathered: list[Any] = []
    for line, length in zip(texts, lengths, strict=True):
        gathered.extend(json.loads(line[:length].tobytes()))
    return gathered
