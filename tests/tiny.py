"""The whole program at a size that compiles in seconds: a config, a COCO set and a way to call it.

`quick` is a fixture that the end-to-end tests import: XLA optimizes less, and a program that one
test compiled the others take from disk.
"""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import warnings
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from configs import demo
from sephjax import observe
from sephjax.input.schedule import stream
from sephjax.input.shapes import KINDS, draw

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = {
    "backbone.width": 8,
    "fpn.channels": 16,
    "rpn.samples": 32,
    "rpn.proposals.train_pre": 50,
    "rpn.proposals.train_post": 20,
    "rpn.proposals.test_pre": 50,
    "rpn.proposals.test_post": 10,
    "roi.samples": 16,
    "roi.head.fc_dims": (32,),
    "mask.convs": 1,
    "mask.dim": 16,
    "test.detections": 5,
    "test.score_threshold": 0.0,
    "test.candidates": 50,
    "data.train.short_sides": (64,),
    "data.train.long_side": 96,
    "data.eval.short_sides": (64,),
    "data.eval.long_side": 96,
    "data.max_objects": 4,
    "data.shapes.height": 64,
    "data.shapes.width": 96,
    "data.shapes.train_images": 12,
    "data.shapes.eval_images": 4,
    "schedule.name": "step",
    "schedule.warmup_steps": 4,
    "train.steps": 4,
    "train.batch": 2,
    "train.log_every": 1,
    "eval.batch": 4,
    "checkpoint.every": 0,
    "predict.score_threshold": 0.0,
}


def tiny_config(**changes: Any) -> ConfigDict:
    """The demo, tiny; `changes` by path, with `__` for the dot."""
    config = demo.get_config()
    paths = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(SIZES | paths)
    return config


def config_file(folder: pathlib.Path, **changes: Any) -> str:
    """A config file of `tiny_config(**changes)`."""
    path = folder / "tiny.py"
    path.write_text(
        "from tests.tiny import tiny_config\n\n\n"
        f"def get_config():\n    return tiny_config(**{changes!r})\n"
    )
    return str(path)


class Told(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    err: str


def command(*words: str) -> Told:
    """Runs `sephjax.main` in this process."""
    # Not above: a config file that imports this one would define the flags of main twice.
    from sephjax import main

    argv = ["sephjax", *words]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        flagsaver.flagsaver(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        # 2026-11: ml_collections 1.1 loads the config file in the old way.
        warnings.filterwarnings("ignore", message=r"the load_module\(\) method is deprecated")
        patch.setattr(sys, "argv", argv)
        flags.FLAGS.unparse_flags()
        try:
            main.main(main._parse(argv))
        except SystemExit as left:
            code = left.code
        else:
            raise AssertionError("the program did not leave by itself")
    assert isinstance(code, int)
    return Told(code, out.getvalue(), err.getvalue())


def refused(*words: str) -> str:
    """The sentence that a wrong command ends with; checks that it is one and that the code is 2."""
    told = command(*words)
    assert told.code == 2, told
    assert told.err.startswith("sephjax: "), told.err
    assert told.err.count("\n") == 1, told.err
    assert "Traceback" not in told.err
    return told.err


def _settings(factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or factory.getbasetemp() / "compiled"
    return {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory):
    """Quick compilation; no TensorBoard, whose TensorFlow warns about itself while it starts."""
    settings = _settings(tmp_path_factory)
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "_Events", _NoEvents)
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


class _NoEvents:
    def __init__(self, workdir: pathlib.Path):
        pass

    def write(self, step: int, scalars: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that compiles as quickly."""
    settings = _settings(tmp_path_factory)
    return os.environ | {"JAX_PLATFORMS": "cpu"} | {k.upper(): str(v) for k, v in settings.items()}


def printed(
    factory: pytest.TempPathFactory, devices: int, *words: str, timeout: float = 1200
) -> Any:
    """The JSON that `python -m words` prints last, in a process with so many CPU devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment(factory) | flags,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """`metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class DrawnCoco:
    """A COCO set of drawn shapes: 64 x 96 pictures as JPEG, polygons, and what a test adds."""

    def __init__(self, root: pathlib.Path, count: int):
        self.images, self.annotations = root / "images", root / "instances.json"
        self.images.mkdir(parents=True)
        names = enumerate(KINDS["plain"].names, start=1)
        self.content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for number, name in names],
        }
        for number in range(1, count + 1):
            self.draw(number)

    def draw(self, number: int) -> None:
        """Adds a picture with two or more objects."""
        drawing = draw(stream(0, 9, number), 64, 96, 3, KINDS["plain"])
        self.picture(number, drawing.image)
        for label, mask in zip(drawing.labels.tolist(), drawing.masks, strict=True):
            outlines, _ = cv2.findContours(
                mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
            )
            rings = [ring.reshape(-1).tolist() for ring in outlines if len(ring) >= 3]
            y, x = np.nonzero(mask)
            box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            self.object(number, [float(side) for side in box], label, segmentation=rings)

    def picture(self, number: int, pixels: np.ndarray) -> pathlib.Path:
        """Adds a picture without objects: RGB or grey."""
        path = self.images / f"{number:06d}.jpg"
        cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
        height, width = pixels.shape[:2]
        record = {"id": number, "file_name": path.name, "height": height, "width": width}
        self.content["images"].append(record)
        return path

    def object(self, image: int, box: list[float], label: int = 0, **changes: Any) -> None:
        """Adds an object, a rectangle unless `changes` say otherwise."""
        x, y, w, h = box
        annotation = {
            "id": len(self.content["annotations"]) + 1,
            "image_id": image,
            "category_id": label + 1,
            "iscrowd": 0,
            "area": w * h,
            "bbox": box,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        self.content["annotations"].append(annotation | changes)

    def crowd(self, image: int) -> None:
        """Adds a crowd over the left half of a 64 x 96 picture, as an RLE."""
        rle = {"size": [64, 96], "counts": [0, 48 * 64, 48 * 64]}
        self.object(image, [0.0, 0.0, 48.0, 64.0], iscrowd=1, segmentation=rle)

    def write(self) -> dict[str, Any]:
        """Writes the annotations; returns the changes of a config that reads them."""
        self.annotations.write_text(json.dumps(self.content))
        paths = {"annotations": str(self.annotations), "images": str(self.images)}
        views = {f"data__{v}__{k}": path for v in ("train", "eval") for k, path in paths.items()}
        return {"data__source": "coco", **views}
