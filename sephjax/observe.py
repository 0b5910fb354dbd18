"""What a run tells: manifest, `metrics.jsonl`, TensorBoard events and a progress line.

Only process 0 writes. TensorFlow (for TensorBoard, through clu) takes seconds to import, so a
thread of its own does that and the writing; `metrics.jsonl` never waits for it.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

import sephjax
from sephjax.errors import RunError

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
    "opencv-python-headless", "pycocotools", "ml_collections", "clu",
)  # fmt: skip
ARCHIVED = "$Format:%H$"  # `git archive` writes the commit here (.gitattributes)


def manifest(config: ConfigDict) -> dict[str, Any]:
    """What is needed to tell where a result came from: config, commit, versions, devices, date."""
    devices = jax.devices()
    versions = {"sephjax": sephjax.__version__, "python": platform.python_version()}
    return {
        "config": plain_config(config),
        "commit": _commit(),
        "command": sys.argv,
        "versions": versions | {name: _version(name) for name in PACKAGES},
        "devices": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def plain_config(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON holds it: dicts, lists and scalars."""
    return json.loads(json.dumps(config.to_dict()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree, `+` behind it when files differ from it.

    Without git that of the archive that the tree came from; None if it came from none.
    """
    folder = pathlib.Path(__file__).resolve().parents[1]
    try:
        told = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None if ARCHIVED.startswith("$") else ARCHIVED
    return told.stdout.strip()


@dataclasses.dataclass
class Window:
    """The wall time since the last logged step, without compiling, evaluating and saving."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    excluded: float = 0.0  # seconds
    waited: float = 0.0  # seconds in which the device had nothing to do for want of data
    steps: int = 0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside it does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.excluded += time.perf_counter() - began

    def rates(self, batch: int) -> dict[str, float]:
        """`images_per_sec`, `step_time` (seconds) and `data_wait_share` (0 to 1)."""
        seconds = max(time.perf_counter() - self.started - self.excluded, 1e-9)
        return {
            "images_per_sec": batch * self.steps / seconds,
            "step_time": seconds / max(self.steps, 1),
            "data_wait_share": min(self.waited / seconds, 1.0),
        }


class Observer:
    """Writes what a run says; a context manager, quiet on every process but the first.

    Args:
        workdir: where `metrics.jsonl` and the events go; it exists.
        total_steps: of the whole run, for the time that is left.
        batch: images a step, over all processes.
        tensorboard: write events as well.
        console: where lines go; standard output by default.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        total_steps: int,
        batch: int,
        *,
        tensorboard: bool = True,
        console: Console | None = None,
    ):
        self.console = console or Console()
        self.dropped: dict[str, int] = {}
        self._total, self._batch = total_steps, batch
        self._main = jax.process_index() == 0
        self._file = workdir / "metrics.jsonl"
        self._events = _Events(workdir) if self._main and tensorboard else None
        self._progress = self._task = None
        if self._main and self.console.is_terminal:
            columns = (BarColumn(bar_width=10), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("starting", total=total_steps)

    def __enter__(self) -> "Observer":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        if self.dropped:
            self.say(f"the input left out: {self._dropped_text()}")
        if self._events:
            self._events.close()

    def doing(self, what: str) -> None:
        """What takes its time now, where the progress line is."""
        if self._progress and self._task is not None:
            self._progress.update(self._task, description=what)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """No progress line inside it: what runs there draws and prints on its own."""
        if not self._progress:
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self._main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def log_dropped(self, counts: Mapping[str, int]) -> None:
        """Adds what the input had to leave out of a batch, by reason."""
        for reason, count in counts.items():
            if count:
                self.dropped[reason] = self.dropped.get(reason, 0) + int(count)

    def log(self, step: int, scalars: Mapping[str, float], window: Window) -> None:
        """Writes one logged step: scalars of that step, rates of the window that ends with it."""
        rates = window.rates(self._batch)
        row = {"step": step, **{name: float(value) for name, value in scalars.items()}, **rates}
        if self._main:
            try:
                with self._file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise RunError(
                    f"{self._file} cannot be written ({error.strerror}); make room or mend it, and"
                    " give the same command again."
                ) from error
        if self._events:
            extra = {f"dropped/{reason}": float(count) for reason, count in self.dropped.items()}
            self._events.write(step, {k: v for k, v in row.items() if k != "step"} | extra)
        if self._progress and self._task is not None:
            line = self._line(step, row, " ")  # with the bar it should fit 80 columns
            self._progress.update(self._task, completed=step, description=line)
        else:
            self.say(self._line(step, row))

    def log_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends the numbers of an evaluation to TensorBoard, and says the APs."""
        numbers = dict(_numbers("eval", metrics))
        if self._events:
            self._events.write(step, numbers)
        heads = [
            f"{k.removeprefix('eval/')} {v:.4f}" for k, v in numbers.items() if k.endswith("/AP")
        ]
        self.say(f"evaluated at step {step}: {', '.join(heads) or 'see eval/'}")

    def _line(self, step: int, row: Mapping[str, float], gap: str = "  ") -> str:
        left = datetime.timedelta(seconds=round((self._total - step) * row["step_time"]))
        parts = [f"step {step}/{self._total}", f"loss {row['loss']:.4f}"]
        parts += [f"lr {row['lr']:.3g}"] if "lr" in row else []
        parts += [
            f"{row['images_per_sec']:.1f} images/s",
            f"ETA {left}",
            f"data wait {100 * row['data_wait_share']:.0f}%",
        ]
        return gap.join(parts)

    def _dropped_text(self) -> str:
        return ", ".join(
            f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(self.dropped.items())
        )


def _numbers(prefix: str, tree: Mapping[str, Any]) -> list[tuple[str, float]]:
    found = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}/{name}", float(value)))
    return found


class _Events:
    """TensorBoard events, written by a thread that imports what that needs."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._queue.put((step, scalars))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._write_all()
        except Exception as error:  # a run does not die of its curves
            logging.warning("no TensorBoard events are written: %s", error)

    def _write_all(self) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its start-up chatter
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        import tensorflow as tf
        from clu import metric_writers

        tf.config.set_visible_devices([], "GPU")  # the memory of an accelerator is JAX's
        writer = metric_writers.SummaryWriter(str(self._workdir))
        while (item := self._queue.get()) is not None:
            step, scalars = item
            writer.write_scalars(step, scalars)
            if self._queue.empty():
                writer.flush()
        writer.close()
