"""The twelve COCO numbers of a list of detections, by pycocotools or faster-coco-eval."""

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sephjax.errors import UserError

Kind = Literal["bbox", "segm"]
Row = dict[str, Any]

# Keys of `metrics.json`, and what pycocotools prints beside each: AP or AR, IoU, area, maxDets.
LINES = {
    "AP": ("AP", "0.50:0.95", "all", 100),
    "AP50": ("AP", "0.50", "all", 100),
    "AP75": ("AP", "0.75", "all", 100),
    "APs": ("AP", "0.50:0.95", "small", 100),
    "APm": ("AP", "0.50:0.95", "medium", 100),
    "APl": ("AP", "0.50:0.95", "large", 100),
    "AR1": ("AR", "0.50:0.95", "all", 1),
    "AR10": ("AR", "0.50:0.95", "all", 10),
    "AR100": ("AR", "0.50:0.95", "all", 100),
    "ARs": ("AR", "0.50:0.95", "small", 100),
    "ARm": ("AR", "0.50:0.95", "medium", 100),
    "ARl": ("AR", "0.50:0.95", "large", 100),
}
METRICS = tuple(LINES)
_TITLES = {"AP": "Average Precision", "AR": "Average Recall"}


def score(
    ground_truth: Mapping[str, Any] | str | os.PathLike[str],
    results: Sequence[Row],
    kind: Kind,
    *,
    backend: str = "pycocotools",
    image_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Scores detections against COCO ground truth, printing nothing.

    Neither argument is changed. For `segm` the boxes of the results are left out, so that the
    small, medium and large columns go by mask area; for `bbox` the masks are. A missing `iscrowd`
    counts as 0 and a missing `area` as the box area.

    Args:
      ground_truth: a COCO instances dict, or the path of its JSON.
      results: rows of the COCO results format; an empty list is scored as no detections.
      kind: `bbox` or `segm`.
      backend: `pycocotools`, or `faster` (the same numbers, quicker; needs faster-coco-eval).
      image_ids: the images that count; None: all of the ground truth.

    Returns:
      The 12 numbers under the keys `METRICS`, and `per_class`: AP by class name. As in pycocotools,
      a number without any ground truth (an area range, a class) is -1.

    Raises:
      UserError: an unreadable file, rows of unknown images or categories, missing masks, or a
        backend that is not there.

    Source: pycocotools 2.0.11 `COCOeval`, default parameters.
    """
    truth = _read(ground_truth) if isinstance(ground_truth, str | os.PathLike) else ground_truth
    image_ids = _checked_ids(truth, results, image_ids)
    _require_masks(truth, results, kind)
    dropped = {"bbox": "segmentation", "segm": "bbox"}[kind]
    rows = [{key: value for key, value in row.items() if key != dropped} for row in results]
    coco_class, eval_class = _backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco_class()
        reference.dataset = _prepared(truth)
        reference.createIndex()
        if rows:
            found = reference.loadRes(rows)
        else:  # pycocotools' loadRes fails on an empty list
            found = coco_class()
            found.dataset = {**reference.dataset, "annotations": []}
            found.createIndex()
        evaluator = eval_class(reference, found, kind)
        evaluator.params.imgIds = sorted(image_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics: dict[str, Any] = dict(zip(METRICS, map(float, evaluator.stats[:12]), strict=True))
    metrics["per_class"] = _per_class(evaluator, truth["categories"])
    return metrics


def class_names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The names of categories by id; a name that several share is followed by the id."""
    names = [category["name"] for category in categories]
    return {
        category["id"]: name if names.count(name) == 1 else f"{name} ({category['id']})"
        for category, name in zip(categories, names, strict=True)
    }


def coco_lines(metrics: Mapping[str, Any], kind: Kind = "bbox") -> str:
    """The 12 lines that pycocotools prints, from `metrics` as in `metrics.json`."""
    lines = [
        f" {_TITLES[what]:<18} ({what}) @[ IoU={iou:<9} | area={area:>6s} | maxDets={most:>3d} ]"
        f" = {metrics[kind][key]:0.3f}"
        for key, (what, iou, area, most) in LINES.items()
    ]
    return "\n".join(lines)


def log_row(name: str, metrics: Mapping[str, Any], kind: Kind = "bbox") -> str:
    """One Markdown row in the column order of the results log: the name, then the 12 numbers."""
    return "|".join(["", name, *(f"{metrics[kind][key]:.3f}" for key in METRICS), ""])


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        truth = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable annotation JSON ({error}).") from error
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        raise UserError(f"{path} has no images, annotations and categories: give a COCO JSON.")
    return truth


def _checked_ids(
    truth: Mapping[str, Any], results: Sequence[Row], image_ids: Sequence[int] | None
) -> list[int]:
    known = {image["id"] for image in truth["images"]}
    wanted = known if image_ids is None else set(image_ids)
    checks = (
        (wanted, known, "the images to score", "image ids"),
        ({row["image_id"] for row in results}, known, "the detections", "image ids"),
        (
            {row["category_id"] for row in results},
            {category["id"] for category in truth["categories"]},
            "the detections",
            "category ids",
        ),
    )
    for given, allowed, whose, what in checks:
        if unknown := sorted(given - allowed):
            raise UserError(
                f"{len(unknown)} {what} of {whose} are not in the ground truth (first:"
                f" {unknown[0]}): score them against the annotations they were made for."
            )
    return list(wanted)


def _require_masks(truth: Mapping[str, Any], results: Sequence[Row], kind: Kind) -> None:
    if kind != "segm":
        return
    for whose, rows in (("ground truth", truth["annotations"]), ("detections", results)):
        if bare := [row for row in rows if "segmentation" not in row]:
            first = bare[0]
            which = f"annotation {first['id']} of " if "id" in first else ""
            raise UserError(
                f"{len(bare)} rows of the {whose} have no segmentation, the first is {which}image"
                f" {first['image_id']}: complete them, or score boxes only"
                " (--config.mask.enabled=False)."
            )


def _prepared(truth: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that the evaluators may write into, its annotations numbered from 1.

    pycocotools takes a match with annotation id 0 for no match, and loses repeated ids.
    """
    annotations = []
    for number, annotation in enumerate(truth["annotations"], start=1):
        _, _, width, height = annotation["bbox"]
        filled = {"iscrowd": 0, "area": width * height, **annotation, "id": number}
        annotations.append(filled)
    return {**truth, "annotations": annotations}


def _backend(name: str) -> tuple[Any, Any]:
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    if name != "faster":
        raise UserError(f"eval.backend is {name!r}: choose pycocotools or faster.")
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError(
            "eval.backend is faster, but faster-coco-eval is not installed: pip install"
            " faster-coco-eval (the extra sephjax[dev] has it), or choose pycocotools."
        ) from error
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def _per_class(evaluator: Any, categories: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    # precision: [IoU threshold, recall, class, area range, maxDets]
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]
    names = class_names(categories)
    scores = {}
    for column, category in enumerate(evaluator.params.catIds):
        values = precision[:, :, column]
        values = values[values > -1]
        scores[names[category]] = float(values.mean()) if values.size else -1.0
    return scores
