"""The next batch, fetched and sent to the devices by a thread while they work on this one."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sephjax.errors import RunError
from sephjax.train import sharding
from sephjax.train.setup import Batches
from sephjax.types import Batch


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A batch on the devices, and what is known of it on the host."""

    batch: Batch
    index: np.ndarray  # int32 [b], this process' images
    dropped: Mapping[str, int]


class Feed:
    """Holds at most one batch ahead; nothing is fetched unless asked for.

    So after `take` and before the next `start` the place of `batches` is exactly behind the batch
    taken: that is when a checkpoint asks for it.
    """

    def __init__(self, mesh: Mesh, batches: Batches):
        self._mesh, self._batches = mesh, batches
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._next: concurrent.futures.Future[Fetched] | None = None

    def start(self) -> concurrent.futures.Future[Fetched]:
        """Begins to fetch the next batch, unless that is under way."""
        if self._next is None:
            self._next = self._thread.submit(self._fetch)
        return self._next

    def take(self, busy: Any = None) -> tuple[Fetched, float]:
        """The next batch, and for how many seconds the devices had nothing to do for want of it.

        Args:
            busy: arrays of the step that the devices work on; until it is done, waiting is free.
        """
        coming = self.start()
        waited = 0.0
        if not coming.done():
            jax.block_until_ready(busy)
            began = time.perf_counter()
            concurrent.futures.wait([coming])
            waited = time.perf_counter() - began
        self._next = None
        return coming.result(), waited

    def close(self) -> None:
        """Lets a fetch that is under way end."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self) -> Fetched:
        with jax.transfer_guard("disallow"):
            try:
                batch, dropped = next(self._batches)
            except StopIteration:
                raise RunError("the input has no further batch; check data.train.") from None
            return Fetched(sharding.put_batch(self._mesh, batch), np.array(batch.index), dropped)
