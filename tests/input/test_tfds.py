"""tfds: `prepare` loses nothing, the stock form reads, and TensorFlow stays out of reading."""

import json
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from sephjax.errors import UserError
from sephjax.input.builder import prepare
from sephjax.input.coco import open_coco
from sephjax.input.pipeline import eval_batches, train_batches
from sephjax.input.sources import open_source, require_masks
from sephjax.input.tfds_source import find_directory, index_path, open_tfds

# pycocotools converts its results in a way that NumPy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def quietly(write, *arguments):
    """TensorFlow and its friends warn about themselves while they write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write(*arguments)


def write_stock(source, data_dir):
    """The rows of `source` as tfds' own builder `coco/2017` stores them."""
    import tensorflow_datasets as tfds

    def rows():
        for i in range(len(source)):
            picture, objects = source.picture(i), source.objects(i)
            h, w = picture.height, picture.width
            yield (
                picture.image_id,
                {
                    "image": picture.data,
                    "image/filename": picture.file_name,
                    "image/id": picture.image_id,
                    "objects": [
                        {
                            "area": int(objects.area[row]),
                            "bbox": tfds.features.BBox(
                                ymin=y / h, xmin=x / w, ymax=(y + bh) / h, xmax=(x + bw) / w
                            ),
                            "id": int(objects.ids[row]),
                            "is_crowd": bool(objects.crowd[row]),
                            "label": int(objects.labels[row]),
                        }
                        for row, (x, y, bw, bh) in enumerate(objects.bbox.tolist())
                    ],
                },
            )

    class Coco(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "coco"
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="2017", version="1.1.0"),)

        def _info(self):
            f = tfds.features
            one = {
                "area": np.int64,
                "bbox": f.BBoxFeature(),
                "id": np.int64,
                "is_crowd": np.bool_,
                "label": f.ClassLabel(names=source.categories.names),
            }
            features = {
                "image": f.Image(encoding_format="jpeg"),
                "image/filename": f.Text(),
                "image/id": np.int64,
                "objects": f.Sequence(one),
            }
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": rows()}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Coco(data_dir=data_dir, config="2017", file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


@pytest.fixture
def made(coco):
    """Two categories with gaps in their ids; images 5, 2 (no objects), 9 (crowd only), 3 (PNG)."""
    for number, suffix in ((5, ".jpg"), (2, ".jpg"), (9, ".jpg"), (3, ".png")):
        coco.image(number, suffix=suffix)
    coco.object(5, (10.1, 8.2, 20.3, 15.7), area=1 / 3)
    coco.object(5, (0.0, 0.0, 0.0, 5.0))
    coco.object(5, (50.0, 30.0, 20.0, 20.0), category_id=3)
    coco.crowd(5)
    coco.crowd(9)
    coco.object(3, segmentation={"size": [40, 60], "counts": [100, 50, 2250]})
    return coco


def same_batches(a, b):
    count = 0
    for (x, dropped_x), (y, dropped_y) in zip(a, b, strict=True):
        assert dropped_x == dropped_y
        leaves = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        assert all(p.dtype == q.dtype and np.array_equal(p, q) for p, q in leaves)
        count += 1
    return count


def test_prepare_keeps_everything(made, tmp_path):
    annotations, images = made.write()
    splits = {"train": (annotations, images), "validation": (annotations, images)}
    directory = quietly(prepare, splits, str(tmp_path / "tfds"))
    assert directory == find_directory("coco_instances", str(tmp_path / "tfds"))
    for split, train in (("train", True), ("validation", False)):
        ours = open_tfds("coco_instances", str(tmp_path / "tfds"), split, train=train)
        theirs = open_coco(annotations, images, train=train)
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.sizes.tolist() == theirs.sizes.tolist()
        assert ours.categories == theirs.categories
        assert ours.notes == theirs.notes
        assert ours.has_masks == theirs.has_masks
        assert ours.ground_truth() == theirs.ground_truth()
        for i in range(len(ours)):
            assert ours.file_name(i) == theirs.file_name(i)
            a, b = ours.example(i), theirs.example(i)
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.boxes, b.boxes)
            np.testing.assert_array_equal(a.area, b.area)
    with pytest.raises(UserError, match="exists: remove it"):
        prepare(splits, str(tmp_path / "tfds"))


def test_without_its_index_a_prepared_set_reads_the_same(made, tmp_path):
    """Slices of a split have no index either."""
    annotations, images = made.write()
    directory = quietly(prepare, {"train": (annotations, images)}, str(tmp_path))
    first = open_tfds("coco_instances", str(tmp_path), "train", train=True)
    from etils import epath

    index_path(epath.Path(directory), "train").unlink()
    second = open_tfds("coco_instances", str(tmp_path), "train", train=True)
    assert second.ids.tolist() == first.ids.tolist()
    assert second.sizes.tolist() == first.sizes.tolist()
    assert second.notes == first.notes
    half = open_tfds("coco_instances", str(tmp_path), "train[:50%]", train=False)
    assert half.ids.tolist() == [2, 3]


def test_what_prepare_cannot_take_is_a_sentence(made, tmp_path):
    annotations, images = made.write()
    with pytest.raises(UserError, match=r"data\.data_dir is empty"):
        prepare({"train": (annotations, images)}, "")
    other = tmp_path / "other.json"
    content = {**made.content, "categories": [*made.content["categories"], {"id": 9, "name": "x"}]}
    other.write_text(json.dumps(content))
    with pytest.raises(UserError, match="same categories"):
        prepare({"a": (annotations, images), "b": (str(other), images)}, str(tmp_path))


def test_a_dataset_that_is_not_there_is_a_sentence(made, tmp_path):
    with pytest.raises(UserError, match=r"data\.data_dir is empty"):
        open_tfds("coco/2017", "", "train", train=True)
    with pytest.raises(UserError, match=r"coco/2017 holds no prepared dataset: make it with"):
        open_tfds("coco/2017", str(tmp_path), "train", train=True)
    quietly(prepare, {"train": made.write()}, str(tmp_path))
    with pytest.raises(UserError, match="no split 'val': choose one of train"):
        open_tfds("coco_instances", str(tmp_path), "val", train=True)
    with pytest.raises(UserError, match="no prepared dataset of version"):
        open_tfds("coco_instances:3.0.0", str(tmp_path), "train", train=True)


def test_the_stock_form_reads_and_has_boxes_only(coco, data, tmp_path):
    for number in (5, 2, 9):
        coco.image(number)
    coco.object(5, (10.1, 8.2, 20.3, 15.7))
    coco.crowd(5)
    coco.object(9, category_id=3)
    theirs = open_coco(*coco.write(), train=False)
    quietly(write_stock, theirs, str(tmp_path))
    data.update({"source": "tfds", "name": "coco/2017", "data_dir": str(tmp_path)})
    source = open_source(data, train=True)
    assert source.ids.tolist() == [5, 9]
    assert source.sizes.tolist() == [[40, 60]] * 2
    assert source.categories.names == ("cat", "dog")
    np.testing.assert_allclose(
        source.example(0).boxes, theirs.example(1).boxes[:1], atol=60 * 2**-23
    )
    truth = source.ground_truth()
    assert [a["category_id"] for a in truth["annotations"]] == [1, 1, 0]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1, 0]
    with pytest.raises(UserError, match="boxes only") as error:
        require_masks(source)
    assert "\n" not in str(error.value)
    batches = list(train_batches(source, data, seed=0, batch=2, steps=3, masks=False))
    assert len(batches) == 3
    assert all(batch.truth.valid.any(axis=1).all() for batch, _ in batches)


@pytest.mark.data
def test_tfds_batches_are_the_coco_batches_bit_for_bit(tiny, tmp_path):
    config = tiny(24)
    splits = {
        "train": (config.train.annotations, config.train.images),
        "validation": (config.eval.annotations, config.eval.images),
    }
    quietly(prepare, splits, str(tmp_path))
    coco = [open_source(config, train=train) for train in (True, False)]
    config.source, config.data_dir = "tfds", str(tmp_path)
    stored = [open_source(config, train=train) for train in (True, False)]
    pipelines = [
        train_batches(s[0], config, seed=7, batch=4, steps=8, masks=True) for s in (coco, stored)
    ]
    assert same_batches(*pipelines) == 8
    evaluations = [eval_batches(s[1], config, batch=4) for s in (coco, stored)]
    for a, b in zip(*evaluations, strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert coco[1].ground_truth() == stored[1].ground_truth()

    config.workers = 2
    workers = train_batches(stored[0], config, seed=7, batch=4, steps=4, masks=True)
    again = train_batches(coco[0], config, seed=7, batch=4, steps=4, masks=True)
    assert same_batches(workers, again) == 4


READ = """
import sys
from configs import base
from sephjax.input.pipeline import train_batches
from sephjax.input.sources import open_source
config = base.get_config()
config.data.source, config.data.data_dir = "tfds", sys.argv[1]
source = open_source(config.data, train=True)
batch, _ = next(train_batches(source, config.data, seed=0, batch=1, steps=1, masks=True))
assert batch.truth.valid.any() and source.ground_truth()["annotations"]
sys.exit("tensorflow was imported" if "tensorflow" in sys.modules else 0)
"""


def test_reading_does_not_import_tensorflow(made, tmp_path, pytestconfig):
    quietly(prepare, {"train": made.write()}, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
