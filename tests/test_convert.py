"""`--mode=convert` through real files: torchvision's detectors in and out, and what is refused."""

import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from configs import mask_rcnn
from sephjax import build, convert, initial, observe
from sephjax.checkpoint import Checkpoints
from sephjax.errors import UserError
from sephjax.input.example import Categories
from sephjax.weights import classes, files, table
from tests.narrow import draw
from tests.tiny import (
    DrawnCoco,
    command,
    config_file,
    quick,  # noqa: F401 - a fixture for the whole module
    refused,
    tiny_config,
)

HEADS = {"roi_heads.box_predictor.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1}


def config_of(**values):
    """`mask_rcnn:torchvision` on a ResNet-18."""
    config = mask_rcnn.get_config("torchvision")
    config.backbone.depth = 18
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def peer(classes=91):
    """torchvision's Mask R-CNN on a ResNet-18 whose norms were trained."""
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    torch.manual_seed(0)
    model = MaskRCNN(_resnet_fpn_extractor(models.resnet18(weights=None), 3), classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.uniform_(0.2, 0.8)
            module.running_var.uniform_(0.5, 1.5)
    return model


def same_but_for_background(out, state):
    """Bit for bit, without what nothing reads: the background's rows and BatchNorm2d's counter."""
    counted = {name for name in state if name.endswith("num_batches_tracked")}
    assert out.keys() == state.keys() - counted
    for name, value in out.items():
        rows = HEADS.get(name.rpartition(".")[0], 0)
        assert not value[:rows].any()
        np.testing.assert_array_equal(value[rows:], state[name][rows:], err_msg=name)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("torch") / "maskrcnn_resnet18.pth"
    torch.save(peer().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory):
    """A workdir with that file's weights."""
    workdir = tmp_path_factory.mktemp("converted") / "run"
    assert convert.convert(config_of(), str(workdir), None, f"torchvision:{file}", None) == 0
    return workdir


@pytest.mark.torch
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_torchvision_in_and_out_is_the_same_bit_for_bit(converted, file, tmp_path, ending, capsys):
    out = tmp_path / f"out.{ending}"
    assert convert.convert(config_of(), str(converted), None, None, f"torchvision:{out}") == 0
    assert "for maskrcnn_resnet50_fpn with num_classes=91" in capsys.readouterr().out
    same_but_for_background(files.read_torch(str(out)), files.read_torch(str(file)))
    torch = pytest.importorskip("torch")
    state = {k: torch.from_numpy(v) for k, v in files.read_torch(str(out)).items()}
    peer().load_state_dict(state, strict=True)
    again = tmp_path / "again"
    assert convert.convert(config_of(), str(again), None, f"torchvision:{out}", None) == 0
    first, second = (
        table.flatten(Checkpoints(w / "checkpoints").read_weights(0)) for w in (converted, again)
    )
    assert first.keys() == second.keys()
    assert all(first[path].tobytes() == second[path].tobytes() for path in first)


@pytest.mark.torch
def test_into_a_twin_and_back_is_the_same_bit_for_bit(converted, tmp_path):
    file, again = tmp_path / "model.pth", tmp_path / "again"
    assert convert.convert(config_of(), str(converted), None, None, f"twin:{file}") == 0
    assert convert.convert(config_of(), str(again), None, f"twin:{file}", None) == 0
    first, second = (
        table.flatten(Checkpoints(w / "checkpoints").read_weights(0)) for w in (converted, again)
    )
    assert first.keys() == second.keys()
    assert all(first[path].tobytes() == second[path].tobytes() for path in first)
    other = config_of(roi__pooler__aligned=True)
    with pytest.raises(UserError, match=r"another model: roi\.pooler\.aligned"):
        convert.convert(other, str(tmp_path / "other"), None, f"twin:{file}", None)


@pytest.mark.torch
def test_a_converted_workdir_says_what_became_of_each_tensor_and_has_coco_numbers(converted, file):
    report = (converted / "weights.txt").read_text().splitlines()
    names = set(files.read_torch(str(file)))
    assert {line.split()[-1] for line in report[:-1]} == names
    rows = json.loads((converted / "categories.json").read_text())
    assert [row["id"] for row in rows] == list(range(1, 91))
    assert [row["name"] for row in rows][11:13] == ["N/A", "stop sign"]
    assert (converted / "config.json").exists()


@pytest.mark.data
@pytest.mark.torch
def test_coco_data_takes_the_rows_of_its_categories(shared_data, file, tmp_path, capsys):
    annotations = shared_data / "coco_tiny" / "annotations" / "instances_val.json"
    ids = [row["id"] for row in json.loads(annotations.read_text())["categories"]]
    assert len(ids) == 80
    config = config_of(data__eval__annotations=str(annotations))
    assert convert.convert(config, str(tmp_path), None, f"torchvision:{file}", None) == 0
    assert "80 of its 90 classes are taken, by COCO category" in capsys.readouterr().out
    state = files.read_torch(str(file))
    weights = table.flatten(Checkpoints(tmp_path / "checkpoints").read_weights(0))
    head = "roi_heads.box_predictor."
    logits = state[f"{head}cls_score.weight"][[*ids, 0]]  # torchvision's background is 0
    np.testing.assert_array_equal(weights["box_head/logits/kernel"], logits.T)
    deltas = state[f"{head}bbox_pred.weight"].reshape(91, 4, -1)[ids].reshape(320, -1)
    np.testing.assert_array_equal(weights["box_head/deltas/kernel"], deltas.T)
    masks = state["roi_heads.mask_predictor.mask_fcn_logits.bias"][ids]
    np.testing.assert_array_equal(weights["mask_head/predictor/bias"], masks)
    rows = json.loads((tmp_path / "categories.json").read_text())
    assert [row["id"] for row in rows] == ids


@pytest.mark.data
def test_the_categories_are_those_of_coco(shared_data):
    file = shared_data / "coco_tiny" / "annotations" / "instances_val.json"
    rows = json.loads(file.read_text())["categories"]
    assert {row["id"]: row["name"] for row in rows} == classes.COCO


@pytest.mark.torch
def test_other_data_keeps_all_but_the_predictors(file, tmp_path, capsys):
    wanted = Categories((1, 2), ("bolt", "nut"))
    config = config_of()
    model = build.model(config, 2)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.abstract)
    drawn = types.SimpleNamespace(abstract=model.abstract, init=lambda key: zeros)
    found = initial.read(config, "torchvision", str(file))
    params, _ = initial.fill(config, drawn, jax.random.key(0), tmp_path, wanted, found)
    said = capsys.readouterr().out
    heads = "box_head/deltas, box_head/logits, mask_head/predictor"
    assert f"it has 90 classes and the model 2: {heads} start anew" in said
    kernels = {p: x for p, x in table.flatten(params).items() if p.endswith("/kernel")}
    untouched = {path.rpartition("/")[0] for path, value in kernels.items() if not value.any()}
    assert untouched == set(heads.split(", "))


@pytest.mark.torch
def test_the_published_coco_v1_files_are_known_by_their_hash(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    state = peer().state_dict()
    torch.save(state, path)
    config = config_of()
    model = build.model(config, 90)
    found = initial.read(config, "torchvision", str(path))
    assert found.notes == ("its norms have eps 0, as torchvision's COCO_V1",)
    wanted = classes.named(90)
    _, frozen = initial.fill(config, model, jax.random.key(0), tmp_path, wanted, found)
    stored = state["backbone.body.bn1.running_var"].numpy().astype(np.float64)
    ours = np.float64(frozen["backbone"]["stem"]["norm"]["variance"]) + 1e-5
    np.testing.assert_allclose(ours, stored, rtol=2e-7)


@pytest.mark.torch
def test_what_torchvision_does_not_have_is_refused(converted, tmp_path):
    out = f"torchvision:{tmp_path / 'x.pth'}"
    other = {
        "roi__pooler__aligned": True,
        "roi__pooler__sampling_ratio": 3,
        "roi__weights": (1.0, 1.0, 1.0, 1.0),
        "mask_padding": True,
        "anchors__sizes": (16, 32, 64, 128, 256),
        "anchors__ratios": (0.5, 1.0, 3.0),
    }
    for key, value in other.items():
        with pytest.raises(UserError, match="torchvision has no model of this config"):
            convert.convert(config_of(**{key: value}), str(converted), None, None, out)
    changed = config_of(backbone__norm="evonorm_s0")
    with pytest.raises(UserError, match="is of another model"):
        convert.convert(changed, str(converted), None, None, out)


def test_a_norm_that_torchvision_does_not_have_is_refused(tmp_path):
    config = config_of(backbone__norm="gn", mask__enabled=False)
    model = build.model(config, 2)
    with pytest.raises(UserError, match=r"backbone\.norm is 'gn'"):
        convert.TARGETS["torchvision"](config, *draw(model), str(tmp_path / "x.pth"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A workdir of the tiny config with drawn weights, as training leaves it."""
    workdir = tmp_path_factory.mktemp("sephjax") / "run"
    config = tiny_config()
    from sephjax.train import workdir as claims

    claims.claim(workdir, config)
    claims.save_categories(workdir, Categories((1, 2, 3), ("a", "b", "c")))
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save_weights(3, *draw(build.model(config, 3)))
    checkpoints.close()
    return workdir


def test_the_same_model_comes_back_bit_for_bit(run, tmp_path):
    assert convert.convert(tiny_config(), str(tmp_path), None, f"sephjax:{run}", None) == 0
    a = table.flatten(Checkpoints(run / "checkpoints").read_weights(3))
    b = table.flatten(Checkpoints(tmp_path / "checkpoints").read_weights(0))
    assert a.keys() == b.keys()
    assert all(a[path].tobytes() == b[path].tobytes() for path in a)


def test_training_starts_from_it(run, tmp_path):
    config = tiny_config(init__format="sephjax", init__path=str(run))
    model, names = build.model(config, 3), Categories((1, 2, 3), ("a", "b", "c"))
    params, frozen = initial.weights(config, model, jax.random.key(0), tmp_path, names)
    jax.tree.map(np.testing.assert_array_equal, (params, frozen), draw(model))
    assert (tmp_path / "weights.txt").read_text().endswith("0 unused, 0 missing\n")


def test_training_starts_from_its_backbone_alone(run, tmp_path, capsys):
    config = tiny_config(init__format="sephjax", init__path=str(run), init__backbone_only=True)
    config.fpn.channels = 32  # the rest of the file would not fit
    model, names = build.model(config, 3), Categories((1, 2, 3), ("a", "b", "c"))
    params, frozen = initial.weights(config, model, jax.random.key(0), tmp_path, names)
    theirs = draw(build.model(tiny_config(), 3))
    for ours, drawn in zip((params, frozen), theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours.get("backbone"), drawn.get("backbone"))
    own, _ = jax.jit(model.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params["fpn"], own["fpn"])
    assert "its backbone alone: " in (tmp_path / "weights.txt").read_text()


@pytest.mark.parametrize("kind", ["sephjax", pytest.param("twin", marks=pytest.mark.torch)])
def test_another_class_count_draws_the_predictors_and_says_so(run, tmp_path, capsys, kind):
    place = f"sephjax:{run}/checkpoints/3"
    if kind == "twin":
        pytest.importorskip("torch")
        place = f"twin:{tmp_path / 'model.pth'}"
        assert convert.convert(tiny_config(), str(run), None, None, place) == 0
    coco = DrawnCoco(tmp_path / "coco", 1)
    coco.content["categories"].append({"id": 9, "name": "star"})
    config = tiny_config(**coco.write())
    assert convert.convert(config, str(tmp_path / "run"), None, place, None) == 0
    said = capsys.readouterr().out
    assert "it has 3 classes and the model 4: box_head/deltas, box_head/logits, mask_h" in said
    a = table.flatten(Checkpoints(run / "checkpoints").read_weights(3))
    b = table.flatten(Checkpoints(tmp_path / "run" / "checkpoints").read_weights(0))
    differ = {path for path in a if not np.array_equal(a[path], b[path])}
    heads = ("box_head/logits", "box_head/deltas", "mask_head/predictor")
    assert differ == {path for path in a if path.startswith(heads)}


def test_anything_else_that_differs_is_an_error_that_names_every_tensor(run, tmp_path):
    config = tiny_config(fpn__channels=32)
    with pytest.raises(UserError, match=r"wrong shape: box_head/dense/fc0/kernel.*more; each"):
        convert.convert(config, str(tmp_path), None, f"sephjax:{run}", None)
    told = (tmp_path / "weights.txt").read_text()
    assert "wrong shape: fpn/lateral2/kernel" in told
    assert "wrong shape: rpn/logits/kernel" in told
    config = tiny_config(backbone__layout="msra")
    with pytest.raises(UserError, match="layout 'torchvision' and the config asks"):
        convert.convert(config, str(tmp_path), None, f"sephjax:{run}", None)


def test_converted_weights_are_not_trained_over_in_silence(run, tmp_path):
    command_line = (f"--config={config_file(tmp_path)}", f"--workdir={tmp_path / 'run'}")
    told = command(*command_line, "--mode=convert", f"--source=sephjax:{run}")
    assert told.code == 0, told.err
    assert "0 unused, 0 missing" in told.out
    said = refused(*command_line)
    assert "holds converted weights and no training to go on from" in said
    assert "--config.init.format=sephjax" in said
    said = refused(*command_line, "--mode=convert", f"--source=sephjax:{run}")
    assert "holds checkpoints (steps [0])" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "takes --source=<format>:<file> or --target=<format>:<file>: give one"),
        (("--source=keras:x", "--target=torchvision:y"), "give one of them"),
        (("--source=weights.pth",), "names no file: write <format>:<file>"),
        (("--source=torch:x.pth",), "did you mean torchvision? The formats are torchvision"),
        (("--target=keras:x.npz",), "--target=keras:x.npz has an unknown format"),
        (("--source=torchvision:none.pth",), "There is no weight file none.pth"),
        (("--source=sephjax:none",), "none holds no finished checkpoint"),
        (("--target=torchvision:x.pth",), "holds no finished checkpoint"),
    ],
)
def test_a_wrong_command_is_one_sentence(tmp_path, words, said):
    command_line = (f"--config={config_file(tmp_path)}", f"--workdir={tmp_path / 'run'}")
    assert said in refused(*command_line, "--mode=convert", *words)


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (("c", "a", "b"), [2, 0, 1], "3 of its 3 classes are taken, by name"),
        (("b",), [1], "1 of its 3 classes are taken, by name"),
        (("a", "b", "bolt"), [0, 1, 2], "its classes have other names: the predictors are taken"),
        (("a", "b", "c"), [0, 1, 2], ""),
    ],
)
def test_classes_of_a_run_are_taken_over_by_name(run, tmp_path, capsys, names, rows, said):
    found = initial.read(tiny_config(), "sephjax", str(run))
    wanted = Categories(tuple(range(1, len(names) + 1)), names)
    model = build.model(tiny_config(), len(names))
    params, _ = initial.fill(tiny_config(), model, jax.random.key(0), tmp_path, wanted, found)
    printed = capsys.readouterr().out
    assert said in printed
    assert "by name" in said or "by name" not in printed
    theirs = Checkpoints(run / "checkpoints").read_weights(3)
    logits = theirs["box_head"]["logits"]["kernel"]
    np.testing.assert_array_equal(params["box_head"]["logits"]["kernel"], logits[:, [*rows, 3]])
    deltas = theirs["box_head"]["deltas"]["bias"].reshape(3, 4)[rows].ravel()
    np.testing.assert_array_equal(params["box_head"]["deltas"]["bias"], deltas)
    masks = theirs["mask_head"]["predictor"]["bias"][rows]
    np.testing.assert_array_equal(params["mask_head"]["predictor"]["bias"], masks)


def test_a_list_of_classes_that_is_broken_is_told(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "categories.json").write_text("{")
    with pytest.raises(UserError, match=r"categories\.json does not say what the classes are"):
        initial.read(tiny_config(), "sephjax", str(folder))


def test_deltas_that_all_classes_share_stay_for_a_single_class(tmp_path):
    """They are as wide as those of one class."""
    config = tiny_config(roi__class_agnostic=True)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save_weights(3, *draw(build.model(config, 3)))
    checkpoints.close()
    (tmp_path / "run" / "config.json").write_text(json.dumps(observe.plain_config(config)))
    found = initial.read(config, "sephjax", str(tmp_path / "run"))
    one = Categories((1,), ("bolt",))
    params, _ = initial.fill(
        config, build.model(config, 1), jax.random.key(0), tmp_path, one, found
    )
    kept = Checkpoints(tmp_path / "run" / "checkpoints").read_weights(3)["box_head"]["deltas"]
    jax.tree.map(np.testing.assert_array_equal, params["box_head"]["deltas"], kept)
    assert params["box_head"]["logits"]["bias"].shape == (2,)
