"""What is wrong with the data is one sentence, or a count."""

import pathlib

import cv2
import numpy as np
import pytest
from PIL import Image

from sephjax.errors import RunError, UserError
from sephjax.input.coco import open_coco
from sephjax.input.pipeline import eval_batches, train_batches
from sephjax.input.sources import open_source, require_masks

# pycocotools converts its results in a way that NumPy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def fails(coco, *, match, train=True):
    with pytest.raises(UserError, match=match) as error:
        open_coco(*coco.write(), train=train)
    assert "\n" not in str(error.value)


def one_good(coco):
    coco.image(1)
    coco.object(1)
    return coco


def test_no_annotation_path(data):
    with pytest.raises(UserError, match=r"data\.train\.annotations is empty: set it"):
        open_source(data, train=True)


def test_a_missing_json(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read \(No such file"):
        open_coco(str(tmp_path / "none.json"), str(tmp_path), train=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "has no list 'images'"),
        ('{"images": [], "annotations": []}', "has no list 'categories'"),
        ('{"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no 'id'"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [3]}', "wrong kind"),
    ],
)
def test_a_json_that_is_not_coco(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_coco(str(path), str(tmp_path), train=True)
    assert str(path) in str(error.value)


def test_a_missing_image_folder_and_missing_images(coco):
    one_good(coco)
    annotations, images = coco.write()
    with pytest.raises(UserError, match=r"data\.eval\.images=/nowhere is not a folder"):
        open_coco(annotations, "/nowhere", train=False)
    coco.image(2)
    coco.object(2)
    pathlib.Path(images, "000002.jpg").unlink()
    fails(coco, match=r"1 of 2 images are not in data\.train\.images=.*first is 000002\.jpg")


def test_an_unknown_category(coco):
    one_good(coco).object(1, category_id=99)
    fails(coco, match=r"instances\.json: annotation 2 of image 1 has category_id 99")


def test_a_box_that_is_not_four_numbers(coco):
    one_good(coco).object(1)
    coco.content["annotations"][1]["bbox"] = [1, 2, 3]
    fails(coco, match=r"annotation 2 of image 1 has bbox \[1, 2, 3\]")
    coco.content["annotations"][1]["bbox"] = [1, 2, 3, float("nan")]
    fails(coco, match=r"annotation 2 of image 1 has bbox \[1, 2, 3, nan\]")


def test_an_rle_of_another_size(coco):
    one_good(coco).object(1, segmentation={"size": [3, 3], "counts": [9]})
    fails(coco, match=r"annotation 2 of image 1 has an RLE without counts or with size \[3, 3\]")


def test_two_images_or_categories_of_one_id(coco):
    one_good(coco).content["categories"].append({"id": 7, "name": "again"})
    fails(coco, match="two categories of the same id")
    coco.content["categories"].pop()
    coco.image(1)
    fails(coco, match="two images of id 1")


def test_zero_area_and_outside_boxes_are_dropped_and_counted_and_others_clipped(coco):
    one_good(coco)
    coco.object(1, (5.0, 5.0, 0.0, 9.0))
    coco.object(1, (70.0, 5.0, 9.0, 9.0))  # the picture is 60 wide
    coco.object(1, (-10.0, 30.0, 20.0, 20.0))
    source = open_coco(*coco.write(), train=True)
    assert source.notes == {
        "zero_area_boxes_dropped": 1,
        "boxes_outside_image_dropped": 1,
        "boxes_clipped_to_image": 1,
    }
    boxes = source.example(0).boxes
    np.testing.assert_allclose(boxes, [[10, 8, 30, 24], [0, 30, 10, 40]])
    assert len(source.ground_truth()["annotations"]) == 4  # pycocotools sees all


def test_images_without_objects_and_with_crowds_only_are_skipped_in_training_only(coco):
    one_good(coco)
    coco.crowd(1)
    coco.image(2)
    coco.image(3)
    coco.crowd(3)
    train = open_coco(*coco.write(), train=True)
    assert train.ids.tolist() == [1]
    assert train.notes == {"images_without_objects_skipped": 1, "crowd_only_images_skipped": 1}
    assert train.example(0).crowd.tolist() == [False]
    every = open_coco(*coco.write(), train=True, skip_empty=False)
    assert every.ids.tolist() == [1, 2, 3]
    assert [len(every.example(i).boxes) for i in range(3)] == [1, 0, 0]
    evaluation = open_coco(*coco.write(), train=False)
    assert evaluation.ids.tolist() == [1, 2, 3]
    assert evaluation.example(0).crowd.tolist() == [False, True]
    assert [a["iscrowd"] for a in evaluation.ground_truth()["annotations"]] == [0, 1, 1]


def test_the_limit_counts_usable_images_by_id(coco):
    for number in (9, 4, 2, 7):
        coco.image(number)
    for number in (9, 4, 7):
        coco.object(number)
    assert open_coco(*coco.write(), train=True, limit=2).ids.tolist() == [4, 7]
    assert open_coco(*coco.write(), train=False, limit=2).ids.tolist() == [2, 4]


def test_an_empty_split(coco):
    coco.image(1)
    fails(coco, match=r"leaves no image to use \(it lists 1; images without objects skipped: 1\)")
    coco.content["images"] = []
    fails(coco, match="leaves no image to use", train=False)


def test_annotations_of_unknown_images_are_counted(coco):
    one_good(coco).object(77)
    assert open_coco(*coco.write(), train=True).notes == {
        "annotations_of_unknown_images_ignored": 1
    }


def test_missing_areas_flags_and_ids_are_filled_in(coco):
    one_good(coco).object(1, (0.0, 0.0, 4.0, 5.0))
    for annotation in coco.content["annotations"]:
        for key in ("id", "area", "iscrowd"):
            del annotation[key]
    truth = open_coco(*coco.write(), train=False).ground_truth()["annotations"]
    assert [a["id"] for a in truth] == [1, 2]
    assert [a["area"] for a in truth] == [320.0, 20.0]
    assert [a["iscrowd"] for a in truth] == [0, 0]


def test_a_mask_config_needs_a_mask_for_every_object(coco):
    one_good(coco)
    require_masks(open_coco(*coco.write(), train=True))
    coco.object(1, segmentation=[])
    source = open_coco(*coco.write(), train=True)
    assert source.notes == {"objects_without_mask": 1}
    with pytest.raises(UserError, match="objects without a segmentation") as error:
        require_masks(source)
    assert "\n" not in str(error.value)


def truncate(path):
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: len(data) // 2])


def test_a_truncated_jpeg_gives_way_to_the_next_picture_and_is_counted(coco, data):
    for number in (1, 2, 3):
        path = coco.image(number)
        coco.object(number)
    truncate(path)
    source = open_coco(*coco.write(), train=True)
    batches = train_batches(source, data, seed=0, batch=3, steps=4, masks=True)
    for batch, dropped in batches:
        assert dropped == {"unreadable_images": 1}
        assert set(batch.index.tolist()) == {0, 1}
        assert batch.valid.all()


def test_no_readable_picture_at_all_ends_the_run(coco, data):
    truncate(coco.image(1))
    coco.object(1)
    batches = train_batches(
        open_coco(*coco.write(), train=True), data, seed=0, batch=2, steps=2, masks=False
    )
    with pytest.raises(RunError, match=r"000001\.jpg is cut short: repair"):
        next(batches)


def test_an_unreadable_evaluation_picture_is_black_and_counted(coco, data):
    coco.image(1)
    truncate(coco.image(2))
    batches = eval_batches(open_coco(*coco.write(), train=False), data, batch=2)
    (batch,) = list(batches)
    assert batch.valid.all()
    assert batch.image[0].any()
    assert not batch.image[1].any()
    assert batches.dropped == {"unreadable_images": 1}
    assert batches.unreadable == {1}


def test_a_picture_of_another_size_than_announced_is_unreadable(coco, data):
    coco.image(1)
    cv2.imwrite(coco.image(2), np.zeros((60, 40, 3), np.uint8))
    batches = eval_batches(open_coco(*coco.write(), train=False), data, batch=2)
    assert len(list(batches)) == 1
    assert batches.unreadable == {1}


def test_a_grey_jpeg_works(coco, data):
    Image.fromarray(np.full((40, 60), 90, np.uint8)).save(coco.image(1))
    coco.object(1)
    source = open_coco(*coco.write(), train=True)
    ((batch, dropped),) = train_batches(source, data, seed=0, batch=1, steps=1, masks=True)
    assert not dropped
    h, w = batch.size[0]
    assert np.abs(batch.image[0, :h, :w].astype(int) - 90).max() <= 2


def test_objects_over_the_cap_are_counted_and_the_smallest_go(coco, data):
    coco.image(1)
    for width in (20.0, 5.0, 30.0, 10.0):
        coco.object(1, (0.0, 0.0, width, 10.0))
    data.max_objects, data.flip, data.train.short_sides = 2, 0.0, (40,)
    source = open_coco(*coco.write(), train=True)
    ((batch, dropped),) = train_batches(source, data, seed=0, batch=1, steps=1, masks=True)
    assert dropped == {"objects_over_cap": 2}
    np.testing.assert_allclose(batch.truth.boxes[0, :, 2], [20.0, 30.0])
    assert batch.truth.valid.all()


def test_an_unknown_source_names_the_choices(data):
    data.source = "coc"
    with pytest.raises(UserError, match="choose one of coco, tfds, shapes"):
        open_source(data, train=True)
