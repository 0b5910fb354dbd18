"""Small COCO sets made on the spot, and the config section that reads them."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


class CocoFolder:
    """A COCO annotation file with its image folder, written as a test wants it."""

    def __init__(self, root: pathlib.Path):
        self.images = root / "images"
        self.images.mkdir(parents=True)
        self.annotations = root / "instances.json"
        self.content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [dict(category) for category in CATEGORIES],
        }

    def image(self, number: int, height: int = 40, width: int = 60, suffix: str = ".jpg") -> str:
        """Adds a picture of noise; returns its path."""
        name = f"{number:06d}{suffix}"
        pixels = np.random.default_rng(number).integers(0, 255, (height // 4, width // 4, 3))
        pixels = cv2.resize(pixels.astype(np.uint8), (width, height))
        cv2.imwrite(str(self.images / name), pixels)
        record = {"id": number, "file_name": name, "height": height, "width": width}
        self.content["images"].append(record)
        return str(self.images / name)

    def object(self, image: int, bbox: Any = (10.0, 8.0, 20.0, 16.0), **changes: Any) -> None:
        """Adds a rectangle as an annotation."""
        x, y, w, h = bbox
        annotation = {
            "id": len(self.content["annotations"]) + 1,
            "image_id": image,
            "category_id": 7,
            "iscrowd": 0,
            "area": w * h,
            "bbox": list(bbox),
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            **changes,
        }
        self.content["annotations"].append(annotation)

    def crowd(self, image: int, height: int = 40, width: int = 60) -> None:
        """Adds a crowd over the left half of a picture."""
        half = height * (width // 2)
        rle = {"size": [height, width], "counts": [0, half, height * width - half]}
        self.object(image, (0.0, 0.0, width / 2, height), iscrowd=1, segmentation=rle)

    def write(self) -> tuple[str, str]:
        """Writes the annotation file; returns its path and the image folder."""
        self.annotations.write_text(json.dumps(self.content))
        return str(self.annotations), str(self.images)


@pytest.fixture
def coco(tmp_path: pathlib.Path) -> CocoFolder:
    return CocoFolder(tmp_path / "coco")


def small(data: ConfigDict) -> ConfigDict:
    """Sizes at which tests are quick."""
    data.train.update({"short_sides": (32, 48, 64), "long_side": 96})
    data.eval.update({"short_sides": (64,), "long_side": 96, "aspects": (1.25,)})
    data.update({"max_objects": 20, "threads": 2})
    return data


@pytest.fixture
def data() -> ConfigDict:
    """`config.data` for small pictures."""
    config = base.get_config()
    with config.unlocked():
        return small(config.data)


@pytest.fixture
def tiny(data: ConfigDict, shared_data: pathlib.Path) -> Callable[..., ConfigDict]:
    """`config.data` for the shared COCO pictures."""
    root = shared_data / "coco_tiny"
    if not root.is_dir():
        pytest.skip("needs the shared coco_tiny data")
    for split, name in (("train", "train"), ("eval", "val")):
        data[split].annotations = str(root / "annotations" / f"instances_{name}.json")
        data[split].images = str(root / name)

    def make(limit: int = 0) -> ConfigDict:
        data.train.limit = data.eval.limit = limit
        return data

    return make
