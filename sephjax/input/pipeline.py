"""Batches for training and evaluation: Grain reads ahead, the order is `schedule`'s.

The same batches come out whatever the number of threads, workers, hosts and devices: a batch is a
function of its number alone, and Grain only decides who computes it and when.
"""

import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain.python as grain
import numpy as np
from absl import logging

from sephjax import types
from sephjax.errors import UserError
from sephjax.input.batches import (
    EvalBatches,
    Prepared,
    TrainBatches,
    blank,
    frame_of,
    place_image,
    to_batch,
)
from sephjax.input.buckets import Canvas, assign, evaluation, training
from sephjax.input.buckets import group as by_bucket
from sephjax.input.example import Source
from sephjax.input.schedule import Schedule


class TrainPipeline:
    """Iterates over the training batches of this process; see `train_batches`."""

    def __init__(self, source: Source, make: TrainBatches, data: Any, steps: int):
        self.buckets: list[Canvas] = list(make.buckets)  # those that hold pictures
        self._source, self._make, self._data, self._steps = source, make, data, steps
        self._step = 0
        # At most one iterator, closed and let go at exit while Grain's modules are still whole.
        self._ahead: list[Iterator[Prepared]] = []
        weakref.finalize(self, _close, self._ahead)
        self._known: set[int] = set()

    def __iter__(self) -> "TrainPipeline":
        return self

    def __next__(self) -> tuple[types.Batch, dict[str, int]]:
        """The next batch, and how many pictures and objects could not be used."""
        if not self._ahead:
            self._ahead.append(_read_ahead(self._make, self._step, self._steps, self._data))
        prepared = next(self._ahead[0])
        self._step += 1
        _log_unreadable(prepared, self._source, self._known)
        dropped = {"unreadable_images": len(prepared.unreadable), **prepared.lost}
        return to_batch(prepared.arrays), {name: n for name, n in dropped.items() if n}

    def get_state(self) -> dict[str, int]:
        """Where the iterator stands; valid for any number of workers and hosts."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a place that `get_state` gave."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends reading ahead."""
        _close(self._ahead)


def train_batches(  # noqa: PLR0913, each of the run or of the process
    source: Source,
    data: Any,
    *,
    seed: int,
    batch: int,
    steps: int,
    masks: bool,
    group: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainPipeline:
    """The training batches of one process.

    Args:
        source: a training view.
        data: `config.data`.
        seed: of order and augmentation.
        batch: images a step, over all processes.
        steps: the iterator ends after so many.
        masks: make mask crops.
        group: images among which `data.stitch` draws its pair (what the series had on one GPU:
            `rpn.sample_group`); 1: the whole batch.
        process_index: of this process, 0..process_count-1; it takes that slice of every batch.
        process_count: number of processes.

    Raises:
        UserError: the config or the source does not do.
    """
    choices = training(data)
    frame = frame_of(data, data.train, train=True, masks=masks)
    where = np.zeros(len(source), np.int64)
    if not frame.crop:
        where = assign(source.sizes, choices, frame.short_sides, frame.long_side, frame.resize)
    buckets, members = by_bucket(where, choices)
    local = _local(batch, process_count, "train.batch")
    if frame.copy_paste:
        _require_pasteable(source)
    make = TrainBatches(
        source=source,
        schedule=Schedule(seed, batch, tuple(members)),
        buckets=tuple(buckets),
        frame=frame,
        first=process_index * local,
        local=local,
        group=batch if group == 1 else min(group, batch),
    )
    return TrainPipeline(source, make, data, steps)


class EvalPipeline:
    """The evaluation batches of this process, each image once; can be iterated again.

    Attributes:
        buckets: canvases that occur.
        unreadable: positions of pictures that a black one stands for, found so far.
    """

    def __init__(self, source: Source, make: EvalBatches, data: Any):
        self.buckets: list[Canvas] = list(make.buckets)
        self.unreadable: set[int] = set()
        self._source, self._make, self._data = source, make, data

    def __len__(self) -> int:
        return len(self._make.plan)

    def __iter__(self) -> Iterator[types.Batch]:
        ahead = [_read_ahead(self._make, 0, len(self), self._data)]
        try:
            for prepared in ahead[0]:
                _log_unreadable(prepared, self._source, self.unreadable)
                yield to_batch(prepared.arrays)
        finally:
            _close(ahead)

    @property
    def dropped(self) -> dict[str, int]:
        """What could not be used so far."""
        return {"unreadable_images": len(self.unreadable)} if self.unreadable else {}


def eval_batches(
    source: Source, data: Any, *, batch: int, process_index: int = 0, process_count: int = 1
) -> EvalPipeline:
    """The evaluation batches of one process: bucket by bucket, ascending by id in each.

    The last batch of a bucket is filled with rows that are not valid. The truth is empty (no object
    slots): evaluation takes it from `source.ground_truth()`.

    Args:
        source: an evaluation view.
        data: `config.data`.
        batch: images a batch, over all processes.
        process_index: of this process; it takes that slice of every batch.
        process_count: number of processes.
    """
    frame, choices = _eval_frame(data)
    where = assign(source.sizes, choices, frame.short_sides, frame.long_side, frame.resize)
    buckets, members = by_bucket(where, choices)
    plan = tuple(
        (bucket, indices[start : start + batch])
        for bucket, indices in enumerate(members)
        for start in range(0, len(indices), batch)
    )
    local = _local(batch, process_count, "eval.batch")
    make = EvalBatches(source, plan, tuple(buckets), frame, process_index * local, local)
    return EvalPipeline(source, make, data)


def image_batch(images: Sequence[np.ndarray], data: Any, *, rows: int = 0) -> types.Batch:
    """One evaluation batch of pictures in memory, which must belong to one bucket.

    Args:
        images: uint8 [h, w, 3] RGB each.
        data: `config.data`.
        rows: fill up to so many rows; 0: as many as images.

    Returns:
        A batch whose `index` is the position in `images`.
    """
    frame, choices = _eval_frame(data)
    sizes = np.asarray([image.shape[:2] for image in images])
    where = assign(sizes, choices, frame.short_sides, frame.long_side, frame.resize)
    if len(set(where.tolist())) != 1:
        raise ValueError("image_batch takes pictures of one bucket; group them by buckets.assign")
    arrays = blank(max(rows, len(images)), choices[int(where[0])], 0, masks=False)
    for row, image in enumerate(images):
        place_image(arrays, row, image, frame.short_sides[0], frame)
        arrays["index"][row] = row
    return to_batch(arrays)


def _eval_frame(data: Any) -> tuple[Any, list[Canvas]]:
    if len(data.eval.short_sides) != 1:
        raise UserError(
            f"data.eval.short_sides={tuple(data.eval.short_sides)} must hold exactly one "
            f"short side."
        )
    return frame_of(data, data.eval, train=False, masks=False), evaluation(data)


def _require_pasteable(source: Source) -> None:
    if len(source) < 2:
        raise UserError("data.copy_paste needs a second picture: give more, or set it to 0.")
    if not source.has_masks:
        raise UserError(
            "The data has objects without a segmentation, which data.copy_paste cannot cut out: "
            "use data with masks, or set data.copy_paste to 0."
        )


def _local(batch: int, process_count: int, key: str) -> int:
    if batch <= 0 or batch % process_count:
        raise UserError(
            f"{key}={batch} cannot be split evenly over {process_count} processes: make it a "
            f"multiple of {process_count}."
        )
    return batch // process_count


def _read_ahead(
    make: Callable[[int], Prepared], start: int, stop: int, data: Any
) -> Iterator[Prepared]:
    """Calls `make` for start..stop-1, in order, ahead of use."""
    numbers = grain.MapDataset.range(start, stop).map(make)
    threads = max(int(data.threads), 1)
    ahead = max(int(data.prefetch), threads)
    dataset = numbers.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )
    if data.workers:
        per_worker = -(-ahead // int(data.workers))
        options = grain.MultiprocessingOptions(int(data.workers), per_worker)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_leave_interrupts)
    return iter(dataset)


def _leave_interrupts(_worker: int, _workers: int) -> None:
    """Ctrl-C reaches every process of a terminal; the run's own saves, and still needs its data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _close(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()


def _log_unreadable(prepared: Prepared, source: Source, known: set[int]) -> None:
    for index, reason in prepared.unreadable:
        if index not in known:
            known.add(index)
            logging.warning("Skipped image id %d: %s", int(source.ids[index]), reason)
