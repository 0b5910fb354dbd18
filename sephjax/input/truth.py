"""The ground truth of a source in the form that pycocotools wants."""

from collections.abc import Callable
from typing import Any

from sephjax.input.example import Source
from sephjax.input.objects import Objects, coco_annotations


def coco_ground_truth(source: Source, objects: Callable[[int], Objects]) -> dict[str, Any]:
    """All annotations of the images of `source`, crowds and unusable boxes included.

    Args:
        source: the images.
        objects: the annotations of image `i`, untouched.

    Returns:
        A COCO JSON object: `images`, `annotations`, `categories`. Annotation ids that are missing,
        zero or repeated are numbered anew from 1: pycocotools takes a match with id 0 for no match.
    """
    images, annotations = [], []
    for i, (image_id, (height, width)) in enumerate(zip(source.ids, source.sizes, strict=True)):
        images.append(
            {
                "id": int(image_id),
                "file_name": source.file_name(i),
                "height": int(height),
                "width": int(width),
            }
        )
        annotations.extend(coco_annotations(int(image_id), objects(i), source.categories.ids))
    ids = {annotation["id"] for annotation in annotations}
    if len(ids) < len(annotations) or any(number <= 0 for number in ids):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    names = zip(source.categories.ids, source.categories.names, strict=True)
    categories = [{"id": number, "name": name} for number, name in names]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}
