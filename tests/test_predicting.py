"""Prediction on files, with a prediction step that finds what it is told to."""

import dataclasses
import functools
import json
import types

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from configs import base
from sephjax import predicting
from sephjax.errors import UserError
from sephjax.types import Detections

CATEGORIES = types.SimpleNamespace(ids=(3, 8), names=("cat", "dog"))
# pycocotools' decode warns with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def save(path, height=60, width=90, channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if channels == 3 else (height, width)
    cv2.imwrite(str(path), np.full(shape, 90, np.uint8))
    return path


def halves(batch):
    """A sure dog on the left half of each picture, an unsure cat on the whole."""
    rows = len(batch.index)
    height, width = np.asarray(batch.size, np.float32).T
    zero = np.zeros(rows, np.float32)
    whole = np.stack([zero, zero, width, height], 1)
    half = np.stack([zero, zero, width / 2, height], 1)
    return Detections(
        boxes=np.stack([half, whole], 1),
        scores=np.tile(np.float32([0.75, 0.3]), (rows, 1)),
        labels=np.tile(np.int32([1, 0]), (rows, 1)),
        valid=np.ones((rows, 2), bool),
        masks=np.ones((rows, 2, 28, 28), np.float32),
    )


@pytest.fixture(scope="module")
def make_batches():
    data = base.get_config().data.unlock()
    data.eval.short_sides, data.eval.long_side = (64,), 128
    return functools.partial(predicting.bucketed, data=data, rows=2)


@pytest.fixture
def predict(make_batches, tmp_path):
    def run(paths, step=halves, score_threshold=0.5):
        done = predicting.predict_files(
            paths,
            step,
            make_batches,
            categories=CATEGORIES,
            output=tmp_path / "out",
            score_threshold=score_threshold,
        )
        return done, json.loads(done.output.read_text())

    return run


def test_boxes_and_masks_come_in_pixels_of_the_file(tmp_path, predict):
    paths = [save(tmp_path / "in" / "b.png", 60, 90), save(tmp_path / "in" / "a.jpg", 100, 50)]
    done, rows = predict(paths)
    assert (done.images, done.detections, done.failed) == (2, 2, ())
    first, second = rows
    assert list(first)[:2] == ["file_name", "image_id"]
    assert [row["file_name"] for row in rows] == ["b.png", "a.jpg"]
    assert [row["image_id"] for row in rows] == [1, 2]
    assert first["bbox"] == [0, 0, 45, 60]
    assert second["bbox"] == [0, 0, 25, 100]
    assert first["category_id"] == 8
    assert first["score"] == 0.75
    mask = coco_mask.decode(first["segmentation"])
    assert mask.shape == (60, 90)
    assert mask[:, :44].all()
    assert not mask[:, 46:].any()


def test_each_picture_is_drawn_at_its_size_under_its_stem(tmp_path, predict):
    paths = [save(tmp_path / "in" / f"{name}.png", 60 + n, 90) for n, name in enumerate("abcde")]
    predict(paths)
    out = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert out == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "predictions.json"]
    for n, name in enumerate("abcde"):
        drawn = cv2.imread(str(tmp_path / "out" / f"{name}.jpg"))
        assert drawn.shape == (60 + n, 90, 3)
        assert drawn.std() > 5


def test_the_score_threshold_is_inclusive_and_applies(tmp_path, predict):
    path = save(tmp_path / "x.png")
    assert len(predict([path], score_threshold=0.75)[1]) == 1
    assert len(predict([path], score_threshold=0.2)[1]) == 2
    assert predict([path], score_threshold=0.9)[1] == []
    assert (tmp_path / "out" / "x.jpg").exists()


def test_a_grey_and_a_transparent_picture_predict(tmp_path, predict):
    grey = save(tmp_path / "grey.png", channels=1)
    clear = tmp_path / "clear.png"
    cv2.imwrite(str(clear), np.zeros((40, 60, 4), np.uint8))
    done, _ = predict([grey, clear])
    assert done.images == 2
    np.testing.assert_array_equal(predicting.read_image(grey), np.full((60, 90, 3), 90))


def test_colours_are_rgb_and_rotation_by_exif_is_applied(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (40, 20), (200, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = predicting.read_image(tmp_path / "turned.jpg")
    assert read.shape == (40, 20, 3)
    assert read[..., 0].min() > 190
    assert read[..., 2].max() < 10


def test_unreadable_files_are_reported_and_the_rest_goes_on(tmp_path, predict, capsys):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    paths = [tmp_path / "text.jpg", tmp_path / "empty.jpg", save(tmp_path / "x.png")]
    done, rows = predict(paths)
    assert done.failed == (str(tmp_path / "text.jpg"), str(tmp_path / "empty.jpg"))
    assert done.images == len(rows) == 1
    assert capsys.readouterr().err.count("no readable picture: left out") == 2


def test_numbers_in_file_names_are_the_image_ids(tmp_path, predict):
    paths = [save(tmp_path / "000000000139.jpg"), save(tmp_path / "000000000285.jpg")]
    assert [row["image_id"] for row in predict(paths)[1]] == [139, 285]


def test_numbers_too_long_for_ids_are_names(tmp_path, predict):
    paths = [save(tmp_path / f"2023010112345678901{n}.jpg") for n in (1, 2)]
    assert [row["image_id"] for row in predict(paths)[1]] == [1, 2]


def test_an_output_that_cannot_be_is_refused(tmp_path, make_batches):
    path = save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"cannot be made \(Not a directory\); choose another"):
        predicting.predict_files(
            [path],
            halves,
            make_batches,
            categories=CATEGORIES,
            output=path / "out",
            score_threshold=0.5,
        )


def test_a_model_without_masks_predicts(tmp_path, predict):
    _, rows = predict(
        [save(tmp_path / "x.png")], lambda b: dataclasses.replace(halves(b), masks=None)
    )
    assert "segmentation" not in rows[0]


def test_equal_stems_get_pictures_of_their_own(tmp_path, predict):
    names = ["one/x.png", "two/x.png", "two/x.jpg", "two/y.png", "x.png"]
    _, rows = predict([save(tmp_path / name) for name in names])
    assert [row["file_name"] for row in rows] == names
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.jpg"))
    assert pictures == ["one__x.jpg", "two__x.jpg.jpg", "two__x.png.jpg", "x.jpg", "y.jpg"]


def test_a_picture_is_never_written_over_its_source(tmp_path, predict):
    path = save(tmp_path / "out" / "x.jpg")
    before = path.read_bytes()
    with pytest.raises(UserError, match="choose another --output"):
        predict([path])
    assert path.read_bytes() == before


def test_more_pictures_than_are_read_ahead_are_all_predicted(tmp_path, predict, monkeypatch):
    monkeypatch.setattr(predicting, "READ_AHEAD", 3)
    paths = [save(tmp_path / "in" / f"{n}.png", 60 + 30 * (n % 2), 75) for n in range(1, 8)]
    done, rows = predict(paths)
    assert done.images == 7
    assert [row["image_id"] for row in rows] == list(range(1, 8))
    assert [row["bbox"][3] for row in rows] == [60 + 30 * (n % 2) for n in range(1, 8)]


def test_a_file_a_folder_and_a_glob_are_found_in_order(tmp_path):
    b, a = save(tmp_path / "in" / "b.PNG"), save(tmp_path / "in" / "a.jpg")
    deep = save(tmp_path / "in" / "deep" / "c[1].png")
    (tmp_path / "in" / "notes.txt").write_text("")
    assert predicting.find_images(str(tmp_path / "in")) == [a, b]
    assert predicting.find_images(str(tmp_path / "in" / "*")) == [a, b]
    assert predicting.find_images(str(tmp_path / "in" / "**" / "*.png")) == [deep]
    assert predicting.find_images(str(deep)) == [deep]
    assert predicting.find_images(str(tmp_path / "**" / "**")) == [a, b, deep]


def test_nothing_to_predict_on_is_explained(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="has 1 entries, none of them a picture"):
        predicting.find_images(str(tmp_path))
    with pytest.raises(UserError, match="matches nothing: give a picture"):
        predicting.find_images(str(tmp_path / "absent.jpg"))
    for pattern in ("~nobody-of-this-name/x.jpg", "x" * 300):
        with pytest.raises(UserError, match="cannot be looked up"):
            predicting.find_images(pattern)
