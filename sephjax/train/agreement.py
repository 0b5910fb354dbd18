"""What the processes of a run decide together; all must ask, at the same place of the program."""

import hashlib
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(value: int) -> int:
    """What process 0 says (a flag as 0 or 1): folders may look older to the others for a while."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def any_process(flag: bool) -> bool:  # noqa: FBT001 - it is the value
    """Does any process say so?"""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def alike(content: bytes) -> bool:
    """Do all processes hold the same bytes?"""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    rows = multihost_utils.process_allgather(digest)
    return bool((rows == rows[0]).all())


def gathered(value: dict[str, Any]) -> list[Any]:
    """The value of each process, in the order of their indices."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]
