"""Prediction on files: which pictures, what is found in them, and the pictures drawn."""

import collections
import dataclasses
import glob
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

import cv2
import jax
import numpy as np

from sephjax import atomic, pictures
from sephjax.errors import UserError
from sephjax.evaluation import results
from sephjax.input import buckets, pipeline
from sephjax.types import Batch, Detections

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"))
PICTURE_QUALITY = 92  # JPEG
THREADS = 2  # that paste masks and draw while the device computes
READ_AHEAD = 32  # pictures held in memory, from which the batches of each canvas are filled

Row = dict[str, Any]
MakeBatches = Callable[[list[np.ndarray]], Iterable[tuple[Batch, Sequence[int]]]]


class Categories(Protocol):
    """The classes in label order."""

    @property
    def ids(self) -> Sequence[int]:
        """Category id of each label."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Name of each label."""
        ...


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What `predict_files` did."""

    images: int  # predicted
    detections: int  # written
    failed: tuple[str, ...]  # files that are no readable picture
    output: Path  # the predictions.json


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    file_name: str
    image_id: int
    picture: Path


def find_images(pattern: str) -> list[Path]:
    """The pictures that a file name, a folder or a glob stands for, sorted.

    A folder gives the pictures directly in it; a glob (`**` goes into folders) gives those of its
    files that are pictures by their suffix; a file that is named is taken whatever its suffix.

    Raises:
      UserError: nothing of the kind is there.
    """
    try:
        path = Path(pattern).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            matches = list(path.iterdir())
        else:
            matches = [Path(name) for name in sorted(set(glob.glob(str(path), recursive=True)))]
    except (OSError, RuntimeError) as error:  # too long a name; no such user's home
        raise UserError(f"--images={pattern} cannot be looked up ({error}): correct it.") from error
    found = sorted(one for one in matches if one.suffix.lower() in SUFFIXES and one.is_file())
    if not found:
        why = (
            f"has {len(matches)} entries, none of them a picture" if matches else "matches nothing"
        )
        raise UserError(
            f"--images={pattern} {why}: give a picture, a folder or a quoted glob of"
            f" {', '.join(sorted(SUFFIXES))} files."
        )
    return found


def read_image(path: Path) -> np.ndarray | None:
    """Reads a picture as it is seen: uint8 [h, w, 3] RGB, grey repeated, EXIF rotation applied.

    Returns None where the file cannot be read or decoded.
    """
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except (OSError, cv2.error):  # a missing or an empty file
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def bucketed(
    images: Sequence[np.ndarray], *, data: Any, rows: int
) -> Iterator[tuple[Batch, list[int]]]:
    """Sorts pictures by the canvas they fit, in batches of one fixed number of rows.

    Args:
      images: uint8 [h, w, 3] RGB each.
      data: `config.data`.
      rows: of a batch; what is over in the last batch of a canvas is not valid.

    Yields:
      A batch, and the positions in `images` of its valid rows.
    """
    frame = data.eval
    choices = buckets.evaluation(data)
    sizes = np.array([image.shape[:2] for image in images]).reshape(-1, 2)
    where = buckets.assign(sizes, choices, frame.short_sides, frame.long_side, data.resize)
    for bucket in np.unique(where):
        inside = np.flatnonzero(where == bucket).tolist()
        for start in range(0, len(inside), rows):
            some = inside[start : start + rows]
            yield pipeline.image_batch([images[at] for at in some], data, rows=rows), some


def predict_files(
    paths: Sequence[Path],
    predict: Callable[[Batch], Detections],
    make_batches: MakeBatches,
    *,
    categories: Categories,
    output: Path,
    score_threshold: float,
) -> Predicted:
    """Predicts on picture files; writes `predictions.json` and one annotated JPEG a picture.

    A row of `predictions.json` is a COCO result with `file_name` (relative to the folder that all
    the files share), boxes in pixels of the picture as it is seen (EXIF rotation applied), and the
    mask as RLE where the model has masks. `image_id` is the number in the file's name if every name
    is a different number, as in COCO, so that the file can be scored; else the position from 1.
    An unreadable file is reported and left out.

    Args:
      paths: the files, see `find_images`.
      predict: from a host batch to detections: the compiled step with parameters and placement
        bound.
      make_batches: from RGB pictures to pairs of a batch and the positions of its valid rows in the
        list: `bucketed` with the config bound.
      categories: `ids` and `names` by label.
      output: folder, made if it is not there.
      score_threshold: lower detections are neither written nor drawn.

    Raises:
      UserError: the pictures would be written over the files that they were made from, or the
        folder cannot be made.
    """
    files = _named(paths, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={output} cannot be made ({error.strerror}); choose another."
        ) from error
    rows: dict[int, list[Row]] = {}
    failed: list[str] = []
    with futures.ThreadPoolExecutor(THREADS, thread_name_prefix="draw") as pool:
        for start in range(0, len(files), READ_AHEAD):
            known, images = _read(files[start : start + READ_AHEAD], failed)
            waiting = []
            for batch, positions in make_batches(images):
                here = [(known[at], images[at]) for at in positions]
                task = pool.submit(
                    _finish, batch, predict(batch), here, categories, score_threshold
                )
                waiting.append(task)
            for task in waiting:
                rows.update(task.result())
    found = [row for image_id in sorted(rows) for row in rows[image_id]]
    path = output / "predictions.json"
    atomic.write_text(path, json.dumps(found), "choose another --output")
    return Predicted(len(rows), len(found), tuple(failed), path)


def _read(files: Sequence[_File], failed: list[str]) -> tuple[list[_File], list[np.ndarray]]:
    known, images = [], []
    for file in files:
        image = read_image(file.path)
        if image is None:
            failed.append(str(file.path))
            print(f"{file.path} is no readable picture: left out.", file=sys.stderr, flush=True)
        else:
            known.append(file)
            images.append(image)
    return known, images


def _finish(
    batch: Batch,
    detections: Detections,
    here: Sequence[tuple[_File, np.ndarray]],
    categories: Categories,
    score_threshold: float,
) -> dict[int, list[Row]]:
    """Rows by image id of one batch; its pictures are written."""
    detections = jax.tree.map(np.asarray, detections)
    sure = detections.valid & (detections.scores >= score_threshold)
    names = dict(zip(categories.ids, categories.names, strict=True))
    rows: dict[int, list[Row]] = {file.image_id: [] for file, _ in here}
    present = np.asarray(batch.valid)
    image_ids = np.full(present.shape, -1)
    image_ids[present] = [file.image_id for file, _ in here]
    for row in results.to_results(
        dataclasses.replace(detections, valid=sure),  # before the masks are pasted
        sizes=np.asarray(batch.size),
        originals=np.asarray(batch.original),
        image_ids=image_ids.tolist(),
        category_ids=categories.ids,
        present=present,
    ):
        rows[row["image_id"]].append(row)
    for file, image in here:
        found = rows[file.image_id]
        _write_picture(file.picture, image, found, names)
        # The file's name goes first, where a reader of the JSON looks for it.
        rows[file.image_id] = [{"file_name": file.file_name, **row} for row in found]
    return rows


def _write_picture(
    path: Path, image: np.ndarray, rows: Sequence[Row], names: Mapping[int, str]
) -> None:
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    drawn = pictures.annotate(
        image,
        boxes,
        [names[row["category_id"]] for row in rows],
        [row["score"] for row in rows],
        [row["segmentation"] for row in rows] if rows and "segmentation" in rows[0] else None,
    )
    quality = [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), quality)
    if not done:  # a JPEG has at most 65,500 pixels a side
        print(f"{path} is too large a picture for a JPEG: not drawn.", file=sys.stderr, flush=True)
        return
    with atomic.draft(path, "choose another --output") as draft:
        draft.write_bytes(data.tobytes())


def _named(paths: Sequence[Path], output: Path) -> list[_File]:
    """What each file is called in the output."""
    base = os.path.commonpath([path.absolute().parent for path in paths])
    names = [Path(os.path.relpath(path.absolute(), base)) for path in paths]
    numbers = [int(name.stem) if name.stem.isdecimal() else None for name in names]
    if any(n is None or n >= 2**63 for n in numbers) or len(set(numbers)) < len(numbers):
        numbers = list(range(1, len(names) + 1))
    drawn = [output / f"{name}.jpg" for name in _picture_names(names)]
    inputs = {path.resolve() for path in paths}
    if clash := sorted(str(picture) for picture in drawn if picture.resolve() in inputs):
        raise UserError(
            f"{clash[0]} would be written over the picture it was made from: choose another"
            " --output."
        )
    return [
        _File(path, name.as_posix(), number, picture)
        for path, name, number, picture in zip(paths, names, numbers, drawn, strict=True)
        if number is not None
    ]


def _picture_names(names: Sequence[Path]) -> list[str]:
    """Stems; where files share one, their folders before it, then the suffix, then a number."""
    candidates = [
        [name.stem for name in names],
        ["__".join(name.with_suffix("").parts) for name in names],
        ["__".join(name.parts) for name in names],
    ]
    counts = [collections.Counter(level) for level in candidates]
    taken: set[str] = set()
    chosen = []
    for at in range(len(names)):
        options = [
            level[at]
            for level, count in zip(candidates, counts, strict=True)
            if count[level[at]] == 1
        ]
        numbered = (f"{candidates[-1][at]}-{number}" for number in itertools.count(2))
        chosen.append(next(one for one in itertools.chain(options, numbered) if one not in taken))
        taken.add(chosen[-1])
    return chosen
