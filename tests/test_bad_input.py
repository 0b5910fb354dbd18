"""Bad input ends the command with one sentence and exit code 2, or is skipped, counted and told.

What each source does with it is tested in `tests/input/`; here is what the person sees.
"""

import json
import pathlib

import cv2
import numpy as np
import pytest

from sephjax import modes
from tests.tiny import (
    DrawnCoco,
    config_file,
    quick,  # noqa: F401 - a fixture for the whole module
    refused,
    rows,
    tiny_config,
)


class Command:
    """A training command on a drawn COCO set."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.workdir = folder, folder / "run"
        self.coco = DrawnCoco(folder / "coco", 2)

    def refused(self, *words: str) -> str:
        file = config_file(self.folder, **self.coco.write())
        return refused(f"--config={file}", f"--workdir={self.workdir}", *words)


@pytest.fixture
def train(tmp_path) -> Command:
    return Command(tmp_path)


def test_annotations_that_are_not_there(train):
    said = train.refused("--config.data.train.annotations=/nowhere/a.json")
    assert "data.train.annotations=/nowhere/a.json cannot be read (No such file" in said
    assert "data.eval.annotations is empty" in train.refused("--config.data.eval.annotations=")


def test_pictures_that_are_not_there(train):
    (train.coco.images / "000002.jpg").unlink()
    said = train.refused()
    assert "1 of 2 images are not in data.train.images" in said
    assert "000002.jpg" in said
    assert "data.train.images=/nowhere is not a folder" in train.refused(
        "--config.data.train.images=/nowhere"
    )


def test_an_unknown_category(train):
    train.coco.object(1, [1.0, 1.0, 9.0, 9.0], category_id=99)
    assert "of image 1 has category_id 99, which is not among its 3 categories" in train.refused()


def test_an_empty_split(train):
    train.coco.content["annotations"].clear()
    assert "leaves no image to use" in train.refused()


def test_different_categories_in_training_and_evaluation(train, tmp_path):
    other = DrawnCoco(tmp_path / "other", 1)
    other.content["categories"].append({"id": 9, "name": "star"})
    views = other.write()
    said = train.refused(*(f"--config.data.eval.{k}={views[f'data__eval__{k}']}" for k in PATHS))
    assert "data.train and data.eval have different categories" in said


PATHS = ("annotations", "images")
KERAS = ("--config.init.format=keras", "--config.backbone.norm=frozen_bn", "--config.init.path")


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (None, (), "There is no weight file"),
        (b"", (), "init.path is empty"),
        (b"no archive", (), "weights.npz is no npz file"),
        (b"PK\x03\x04 cut short", (), "weights.npz is no npz file"),
        (
            "npz",
            (),
            "backbone/stem/conv/kernel has (3, 3) in the file, (7, 7, 3, 8) in the",
        ),
        ("odd", (), "holds tensors of neither (the first names: weight)"),
        ("npz", ("--config.backbone.layout=torchvision",), "layout 'torchvision'"),
    ],
)
def test_weights_that_do_not_do(tmp_path, content, words, said):
    path = tmp_path / "weights.npz"
    if content in ("npz", "odd"):
        names = {"npz": "conv1/kernel", "odd": "weight"}
        np.savez(path, **{names[content]: np.zeros((3, 3), np.float32)})
    elif content:
        path.write_bytes(content)
    model = ("--config.backbone.layout=msra", "--config.backbone.depth=50")
    given = (*KERAS[:2], f"{KERAS[2]}={'' if content == b'' else path}", *model, *words)
    command = (f"--config={config_file(tmp_path)}", f"--workdir={tmp_path / 'run'}")
    assert said in refused(*command, *given)


def test_a_first_command_that_failed_does_not_claim_the_folder(train):
    train.refused("--config.data.train.annotations=/nowhere/a.json", "--config.seed=1")
    said = train.refused("--config.data.train.annotations=/nowhere/b.json", "--config.seed=2")
    assert "b.json cannot be read" in said


def test_what_can_be_skipped_is_skipped_counted_and_told(train, tmp_path, capsys):
    coco = train.coco
    grey = coco.picture(3, np.full((64, 96), 90, np.uint8))
    assert cv2.imread(str(grey), cv2.IMREAD_UNCHANGED).ndim == 2
    for left in range(6):  # data.max_objects is 4
        coco.object(3, [10.0 * left, 5.0, 10.0 + left, 20.0])
    coco.object(3, [5.0, 5.0, 0.0, 9.0])
    coco.object(3, [100.0, 5.0, 9.0, 9.0])
    coco.object(3, [90.0, 50.0, 20.0, 20.0])
    cut = coco.picture(4, np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
    cut.write_bytes(cut.read_bytes()[:2000])
    coco.object(4, [5.0, 5.0, 30.0, 30.0])
    coco.picture(5, np.zeros((64, 96, 3), np.uint8))
    coco.picture(6, np.zeros((64, 96, 3), np.uint8))
    coco.crowd(6)
    changes = coco.write() | {"train__steps": 4}
    assert modes.train(tiny_config(**changes), str(train.workdir)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("train: 4 images, 3 classes; ")
    assert set(out[0].partition("; ")[2].split(", ")) == {
        "1 zero area boxes dropped",
        "1 boxes outside image dropped",
        "1 boxes clipped to image",
        "1 images without objects skipped",
        "1 crowd only images skipped",
    }
    assert out[1].startswith("eval: 6 images, 3 classes; ")
    assert "images that could not be read and were evaluated as black: 1" in out
    # 8 places of a batch, two epochs of 4 pictures: each of them came twice
    told = [line for line in out if line.startswith("the input left out: ")]
    assert told == ["the input left out: 6 objects over cap, 2 unreadable images"]
    assert len(rows(train.workdir)) == 4
    metrics = json.loads((train.workdir / "eval" / "4" / "metrics.json").read_text())
    assert metrics["images"] == 6
