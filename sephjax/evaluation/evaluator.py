"""Runs a prediction step over an evaluation set, once an image, and scores what it finds."""

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich import console, progress

from sephjax import atomic
from sephjax.errors import RunError
from sephjax.evaluation import coco, gathering, reference, results
from sephjax.types import Batch, Detections

# Batches whose detections wait for the host: one is pasted while the device computes the next.
IN_FLIGHT = 3
THREADS = 2


class Categories(Protocol):
    """The classes of a data set, in label order."""

    @property
    def ids(self) -> Sequence[int]:
        """Category id of each label."""
        ...


class Source(Protocol):
    """What the evaluator asks of a data source."""

    @property
    def ids(self) -> np.ndarray:
        """Image ids [n]; `Batch.index` is the position in it."""
        ...

    @property
    def categories(self) -> Categories:
        """The classes."""
        ...

    def ground_truth(self) -> Mapping[str, Any]:
        """The COCO instances dict, crowds included."""
        ...


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation is called and where it goes."""

    directory: Path  # eval/<step>; made if it is not there
    step: int
    name: str  # first column of the row in the results log
    masks: bool = True  # score segm too
    backend: str = "pycocotools"  # pycocotools | faster
    # How large the network sees a file, height and width: the log's own metric is computed too.
    input_size: reference.InputSize | None = None


def evaluate(
    predict: Callable[[Batch], Detections],
    batches: Iterable[Batch],
    source: Source,
    report: Report,
) -> dict[str, Any]:
    """Evaluates every image of a source once, writes the results and prints them.

    The host pastes the masks of one batch while the device computes the next. In a run of several
    processes each one hands in its own batches, all scores come from everybody's rows, and process
    0 writes and prints.

    Args:
      predict: from a host batch to device detections, without waiting for them: the compiled step
        with parameters and placement bound.
      batches: host batches; rows with `valid` False are left out. A `len` gives the progress line
        its end.
      source: ids, categories and ground truth of the images.
      report: where the files go and what is scored.

    Returns:
      The content of `metrics.json`: `step`, `images`, `bbox` and `segm` (the latter with masks) of
      12 numbers each, `per_class` of AP by class name and kind; -1 without ground truth. With
      `report.input_size` also `reference`, see `reference.score`.

    Raises:
      RunError: an image came twice or not at all, or masks were asked of a model without a mask
        head.
    """
    begun = time.perf_counter()
    rows: list[dict[str, Any]] = []
    seen: list[int] = []
    found = _detect(predict, batches, source, report)
    for batch_rows, batch_seen in _shown(found, batches):
        rows.extend(batch_rows)
        seen.extend(batch_seen)
    rows, seen = gathering.all_rows(rows), gathering.all_rows(seen)
    _require_each_once(seen, len(source.ids))
    # An order that does not depend on batches or processes, so that a repeated run writes the same.
    rows.sort(key=lambda row: row["image_id"])
    spent = time.perf_counter() - begun
    # What only the log's metric reads; before the files are written.
    shapes = [row.pop("shape") for row in rows] if _shapes(report) else None
    metrics = _score(rows, shapes, source, report)
    if jax.process_index() == 0:
        _write(report.directory / "detections.json", rows)
        _write(report.directory / "metrics.json", metrics)
        print(summary(metrics, report.name))
        print(f"{len(seen)} images in {spent:.1f} s ({len(seen) / spent:.2f} images/s)", flush=True)
    return metrics


def summary(metrics: Mapping[str, Any], name: str) -> str:
    """The 12 COCO lines of each kind, then a row of the results log for each, then its own."""
    kinds: list[coco.Kind] = ["bbox", "segm"] if "segm" in metrics else ["bbox"]
    lines = []
    for kind in kinds:
        lines += [f"type={kind}", coco.coco_lines(metrics, kind)]
    lines += [coco.log_row(name if k == "bbox" else f"{name} {k}", metrics, k) for k in kinds]
    lines += reference.log_rows(name, metrics["reference"]) if "reference" in metrics else []
    return "\n".join(lines)


def _detect(
    predict: Callable[[Batch], Detections],
    batches: Iterable[Batch],
    source: Source,
    report: Report,
) -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
    """COCO rows and the image positions of one batch after another."""
    waiting: collections.deque[futures.Future[Any]] = collections.deque()
    with futures.ThreadPoolExecutor(THREADS, thread_name_prefix="paste") as pool:
        for batch in batches:
            detections = predict(batch)
            if report.masks and detections.masks is None:
                raise RunError("segm was asked of a model without a mask head: set mask.enabled.")
            if not report.masks:  # before the transfer
                detections = dataclasses.replace(detections, masks=None)
            waiting.append(pool.submit(_to_host, batch, detections, source, shapes=_shapes(report)))
            if len(waiting) == IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _shapes(report: Report) -> bool:
    return report.masks and report.input_size is not None


def _to_host(
    batch: Batch,
    detections: Detections,
    source: Source,
    *,
    shapes: bool,
) -> tuple[list[dict[str, Any]], list[int]]:
    present = np.asarray(batch.valid)
    index = np.asarray(batch.index)
    rows = results.to_results(
        jax.tree.map(gathering.local_rows, detections),
        sizes=np.asarray(batch.size),
        originals=np.asarray(batch.original),
        image_ids=np.asarray(source.ids)[np.where(present, index, 0)].tolist(),
        category_ids=source.categories.ids,
        present=present,
        shapes=shapes,
    )
    return rows, index[present].tolist()


def _shown(found: Iterator[Any], batches: Iterable[Batch]) -> Iterator[Any]:
    """Passes items on, with a progress line where the output is a terminal."""
    screen = console.Console()
    if not screen.is_terminal or jax.process_index() != 0:
        yield from found
        return
    total = len(batches) if isinstance(batches, Sized) else None
    yield from progress.track(
        found, description="evaluating", total=total, console=screen, transient=True
    )


def _require_each_once(seen: Sequence[int], images: int) -> None:
    counts = collections.Counter(seen)
    missing = sorted(set(range(images)) - counts.keys())
    wrong = sorted(index for index, count in counts.items() if count > 1 or index >= images)
    if missing or wrong:
        raise RunError(
            f"Of {images} evaluation images {len(missing)} never came (first positions"
            f" {missing[:3]}) and {len(wrong)} came twice or are unknown ({wrong[:3]}): the batches"
            " must hold each image of the source once."
        )


def _score(
    rows: list[dict[str, Any]],
    shapes: list[dict[str, Any]] | None,
    source: Source,
    report: Report,
) -> dict[str, Any]:
    truth = source.ground_truth()
    ids = [int(image_id) for image_id in source.ids]
    metrics: dict[str, Any] = {"step": report.step, "images": len(ids)}
    per_class: dict[str, dict[str, float]] = {}
    kinds: list[coco.Kind] = ["bbox", "segm"] if report.masks else ["bbox"]
    for kind in kinds:
        scores = coco.score(truth, rows, kind, backend=report.backend, image_ids=ids)
        for name, ap in scores.pop("per_class").items():
            per_class.setdefault(name, {})[kind] = ap
        metrics[kind] = scores
    metrics["per_class"] = per_class
    if report.input_size is not None:
        metrics["reference"] = reference.score(
            truth,
            rows,
            report.input_size,
            shapes=shapes,
            image_ids=ids,
            backend=report.backend,
        )
    return metrics


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1 if isinstance(content, dict) else None)
    atomic.write_text(path, text, "make room, or choose another workdir")
