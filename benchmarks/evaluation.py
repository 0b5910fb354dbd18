"""COCO scores beside plain pycocotools: `python -m benchmarks.evaluation TRUTH.json RESULTS.json`.

Ours is the whole of `coco.score`, theirs the lines of pycocotools' own demo, on the same detections
in memory. The pictures are repeated `--copies` times under new ids. Every run compares the 12
numbers too; the greatest difference is printed.
"""

import argparse
import contextlib
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks import timing
from sephjax.evaluation import coco

Rows = list[dict[str, Any]]
KINDS: tuple[coco.Kind, ...] = ("bbox", "segm")


def repeated(truth: Mapping[str, Any], rows: Rows, copies: int) -> tuple[dict[str, Any], Rows]:
    """A truth of `copies` times the pictures, and the detections of all of them."""
    step = max(image["id"] for image in truth["images"]) + 1
    images, annotations, found = [], [], []
    for copy in range(copies):
        add = copy * step
        images += [{**image, "id": image["id"] + add} for image in truth["images"]]
        annotations += [{**a, "image_id": a["image_id"] + add} for a in truth["annotations"]]
        found += [{**row, "image_id": row["image_id"] + add} for row in rows]
    annotations = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    return {**truth, "images": images, "annotations": annotations}, found


def theirs(truth: Mapping[str, Any], rows: Rows, kind: coco.Kind) -> np.ndarray:
    """The 12 numbers of plain pycocotools."""
    # Its loadRes writes into the rows, and takes a box's area for the mask's.
    unused = {"bbox": "segmentation", "segm": "bbox"}[kind]
    bare = [{key: value for key, value in row.items() if key != unused} for row in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = dict(truth)
        reference.createIndex()
        evaluator = COCOeval(reference, reference.loadRes(bare), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def ours(truth: Mapping[str, Any], rows: Rows, kind: coco.Kind, backend: str) -> np.ndarray:
    """The same numbers from `coco.score`."""
    score = coco.score(truth, rows, kind, backend=backend)
    return np.array([score[key] for key in coco.METRICS])


def fresh(truth: Mapping[str, Any]) -> dict[str, Any]:
    """A truth whose annotations an evaluator may change: pycocotools turns polygons into RLE."""
    return {**truth, "annotations": [dict(a) for a in truth["annotations"]]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="COCO scores beside plain pycocotools")
    parser.add_argument("truth", type=pathlib.Path)
    parser.add_argument("detections", type=pathlib.Path)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="faster", choices=("faster", "pycocotools"))
    options = parser.parse_args(arguments)
    loaded = (json.loads(path.read_text()) for path in (options.truth, options.detections))
    truth, rows = repeated(*loaded, options.copies)
    sizes = len(truth["images"]), len(truth["annotations"]), len(rows)
    print("{} images, {} annotations, {} detections".format(*sizes), flush=True)
    measured, gaps = [], {}
    for kind in KINDS:
        numbers = {}

        def mine(kind=kind, numbers=numbers):
            numbers["ours"] = ours(fresh(truth), rows, kind, options.backend)

        def plain(kind=kind, numbers=numbers):
            numbers["theirs"] = theirs(fresh(truth), rows, kind)

        row = timing.compare(
            f"COCO {kind}, {options.backend}",
            timing.Side(mine),
            timing.Side(plain),
            repeats=options.repeats,
            peaks=(float("nan"), float("nan")),
        )
        measured.append(row)
        gaps[kind] = float(np.abs(numbers["ours"] - numbers["theirs"]).max())
    print(timing.table(measured))
    total = lambda side: sum(getattr(row, side) for row in measured)
    wall, cpu = (total(f"ours_{what}") / total(f"theirs_{what}") for what in ("wall", "cpu"))
    print(f"both kinds: {wall:.2f} of the time, {cpu:.2f} of the processor time")
    print("greatest difference of a number:", ", ".join(f"{k} {v:.1e}" for k, v in gaps.items()))


if __name__ == "__main__":
    main()
