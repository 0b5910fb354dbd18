"""The parity report on torchvision's model: clean weights agree, and a planted fault is named."""

import json
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scene
from configs import mask_rcnn
from sephjax import build
from sephjax.errors import UserError
from sephjax.parity import compare, report, run
from sephjax.weights import table
from tests.tiny import command, quick  # noqa: F401 - a fixture for the whole module

pytestmark = pytest.mark.torch

HEIGHT, WIDTH = 64, 90  # the canvas is 64x96: there is padding
DETECTIONS = 16
ROW = "configs/mask_rcnn.py:torchvision"
CHANGES = {  # ResNet-18, one program each for the heads: they compile in seconds
    "backbone.depth": 18,
    "roi.tiers": (),
    "mask.tiers": (),
    "test.detections": 24,
    "data.eval.short_sides": (HEIGHT,),
    "data.eval.long_side": 96,
    "data.eval.aspects": (),
}


class Files(NamedTuple):
    weights: str
    picture: str


@pytest.fixture(scope="module")
def picture():
    return scene.draw(64, 96, 5, 90).image[:HEIGHT, :WIDTH]


@pytest.fixture(scope="module")
def files(tmp_path_factory, picture) -> Files:
    """A state dict of torchvision that finds about 16 objects on the picture, and the picture."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from benchmarks import peer

    folder = tmp_path_factory.mktemp("parity")
    theirs = peer.mask_rcnn(HEIGHT, WIDTH, depth=18)
    peer.settle(theirs, picture, detections=DETECTIONS)
    torch.save(theirs.state_dict(), folder / "weights.pth")
    cv2.imwrite(str(folder / "picture.png"), picture[..., ::-1])
    return Files(str(folder / "weights.pth"), str(folder / "picture.png"))


@pytest.fixture(scope="module")
def sides(files, picture) -> run.Sides:
    config = mask_rcnn.get_config("torchvision")
    config.update_from_flattened_dict(CHANGES)
    sides = run.load(config, f"torchvision:{files.weights}")
    rows = {"proposals": config.rpn.proposals.test_post, "detections": config.test.detections}
    theirs = sides.peer.run(picture, **rows)
    # Every fault is on our side and there is one picture: torchvision need not run again.
    sides.peer.run = lambda *_, **__: theirs
    return sides


def with_config(sides: run.Sides, **changes: Any) -> run.Sides:
    """The same weights under a config that computes something else; `__` is a dot."""
    config = sides.config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return sides._replace(config=config, model=build.model(config, sides.peer.classes))


def with_kernel(sides: run.Sides, path: str, change) -> run.Sides:
    """Other values of one parameter."""
    flat = table.flatten(sides.params)
    return sides._replace(params=table.unflatten(flat | {path: change(flat[path])}))


def report_of(files: Files, folder, *words: str):
    """What the command tells, and its JSON."""
    changes = [f"--config.{key}={value}" for key, value in CHANGES.items()]
    source = f"--source=torchvision:{files.weights}"
    found = command(
        f"--config={ROW}", "--mode=parity", source, f"--images={files.picture}",
        f"--output={folder}", *changes, *words,
    )  # fmt: skip
    return found, json.loads((folder / "parity.json").read_text())


@pytest.fixture(scope="module")
def told(files, quick, tmp_path_factory):  # noqa: F811
    return report_of(files, tmp_path_factory.mktemp("report"))


def test_clean_weights_agree_in_every_stage_and_end_to_end(told):
    found, made = told
    assert (found.code, found.err) == (0, "")
    assert made["agrees"]
    assert made["first"] is None
    assert made["pictures"] == [{"file": "picture.png", "size": [64, 90], "canvas": [64, 96]}]
    rows = {row["stage"]: row for row in made["stages"]}
    assert len(rows) == 4 + 8 + 9 + 15 + 1 + 1 + 2 + 2 + 2 + 2 + 7 + 3
    for name, row in rows.items():
        assert row["verdict"] == "agrees", name
        assert row["own_inputs"]["unmatched"] == 0, name
        # Sums of up to 12544 products in two orders: some 1e-5 of the largest number at most.
        assert row["own_inputs"]["relative"] < 5e-5, name
    assert rows["detections"]["same_inputs"]["compared"] > 4 * 10
    assert rows["end to end (masks)"]["own_inputs"]["compared"] > 28 * 28 * 10


def test_the_table_has_both_sides_names(told):
    out = told[0].out
    for words in (
        "not torchvision's own resize",
        "backbone/stage4/block1  backbone.body.layer4.1",
        "box_head/dense/fc0      roi_heads.box_head.fc6",
        "agree within 0.0001",
    ):
        assert words in out


def test_a_disagreement_is_exit_code_1_and_names_the_stage(files, tmp_path, quick):  # noqa: F811
    # Without any tolerance rounding disagrees: torchvision divides the pixels by 255 first.
    found, made = report_of(files, tmp_path, "--config.parity.tolerance=0.0")
    assert found.code == 1
    assert found.err.startswith("sephjax: the first stage that disagrees is network input (torch")
    assert found.err.count("\n") == 1
    assert (made["agrees"], made["first"]) == (False, "network input")


def disagreeing(sides: run.Sides, picture) -> list[str]:
    """Stages that disagree when fed with torchvision's inputs; the first is the one it names."""
    made = run.make_report(sides, [("picture", picture)])
    assert made.first is not None
    names = [row.name for row in made.disagreeing if row.same is not None]
    assert made.first.name == names[0]
    assert f"the first stage that disagrees is {names[0]} (torchvision: " in made.sentence()
    # What comes out of the whole program differs too.
    assert [row.name for row in made.disagreeing if row.same is None]
    return names


def test_channels_in_the_order_bgr_are_found_in_the_stem(sides, picture, quick):  # noqa: F811
    wrong = with_kernel(sides, "backbone/stem/conv/kernel", lambda x: x[:, :, ::-1])
    assert disagreeing(wrong, picture) == ["backbone/stem/conv"]


def test_a_dense_layer_in_the_order_chw_is_found_at_fc6(sides, picture):
    cells = (256, 7, 7)
    keep = lambda x: x.reshape(7, 7, 256, -1).transpose(2, 0, 1, 3).reshape(np.prod(cells), -1)
    wrong = with_kernel(sides, "box_head/dense/fc0/kernel", keep)
    assert disagreeing(wrong, picture) == ["box_head/dense/fc0"]


def test_half_a_pixel_in_roi_align_is_found_at_the_roi_features(sides, picture):
    wrong = with_config(sides, roi__pooler__aligned=True)
    assert disagreeing(wrong, picture) == ["roi features", "mask features"]


def test_another_eps_is_found_at_the_first_norm(sides, picture):
    found = disagreeing(with_config(sides, backbone__norm_eps=1e-3), picture)
    blocks = [f"backbone/stage{i}/block{j}" for i in range(1, 5) for j in range(2)]
    assert found == ["backbone/stem/norm", *blocks]


def test_a_shifted_level_is_found_at_the_level_rule(sides, picture):
    wrong = with_config(sides, roi__canonical__level=5)
    found = disagreeing(wrong, picture)
    assert found[:2] == ["roi levels", "roi features"]
    assert set(found[2:]) <= {"mask features"}  # the objects found may be too small to move


def test_the_numbers_are_those_of_a_known_difference(sides, picture):
    # One of the three anchors of a cell gets 0.5 more: the largest difference is 0.5, the mean a
    # third of it, at the logits of every level and nowhere else.
    more = np.array([0.0, 0.5, 0.0], np.float32)
    wrong = with_kernel(sides, "rpn/logits/bias", lambda x: x + more)
    made = run.make_report(wrong, [("picture", picture)])
    found = {row.name: row.same for row in made.disagreeing if row.same is not None}
    assert list(found) == [f"rpn/logits/p{level}" for level in range(2, 7)]
    for tally in found.values():
        assert tally.max == pytest.approx(0.5, abs=1e-4)  # beside rounding of the logits
        assert tally.mean == pytest.approx(0.5 / 3, abs=1e-4)
    assert made.rows["network input"].same.max < 1e-6
    assert made.rows["rpn/logits/p2"].own.max == pytest.approx(0.5, abs=1e-3)


def test_a_detector_without_a_mask_head_is_compared_too(files, picture, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.load(files.weights, weights_only=True)
    torch.save({k: v for k, v in state.items() if "mask" not in k}, tmp_path / "boxes.pth")
    config = mask_rcnn.get_config("torchvision")
    config.update_from_flattened_dict(CHANGES | {"mask.enabled": False})
    sides = run.load(config, f"torchvision:{tmp_path / 'boxes.pth'}")
    made = run.make_report(sides, [("picture", picture)])
    assert made.first is None
    assert [name for name in made.rows if "mask" in name] == []
    assert list(made.rows)[-2:] == ["end to end (boxes)", "end to end (scores)"]


def test_the_whole_program_is_allowed_ten_times_what_a_stage_is():
    apart = lambda x: compare.Difference(x, x, 1.0, 1, 0)
    for differ, stage, whole in ((0.9e-4, True, True), (9e-4, False, True), (1.1e-3, False, False)):
        made = report.Report(1e-4)
        made.row("rpn/anchors", "", "").same.add(apart(differ))
        made.row(report.END, "masks", "").own.add(apart(differ))
        verdicts = [row.verdict(made.tolerance) == report.AGREES for row in made.rows.values()]
        assert verdicts == [stage, whole]


def test_what_is_not_a_number_disagrees():
    made = report.Report(1e-4)
    row = made.row("rpn/anchors", "", "")
    for value in (float("nan"), 0.0):
        row.same.add(compare.Difference(value, value, 1.0, 1, 0))
    assert row.verdict(made.tolerance) == report.DISAGREES
    assert row.same.plain()["max"] == "nan"


def boxes(*corners, labels=None):
    found = {"boxes": jnp.asarray(corners, jnp.float32), "valid": jnp.ones(len(corners), bool)}
    return found | ({"labels": jnp.asarray(labels)} if labels else {})


def test_boxes_are_paired_one_to_one_whatever_their_order():
    a, b, c = (0, 0, 10, 10), (5, 5, 20, 20), (30, 0, 40, 9)
    near = (5.25, 5, 20, 20)
    pairs = compare.match(boxes(near, c, a), boxes(a, b, c))
    assert pairs.index.tolist() == [2, 0, 1]
    assert pairs.valid.all()
    assert pairs.unmatched == 0
    found = compare.rows(boxes(near, c, a)["boxes"], boxes(a, b, c)["boxes"], pairs)
    assert (found.max, found.sum, found.scale, found.count) == (0.25, 0.25, 40.0, 12)


def test_a_box_without_a_pair_is_counted_and_not_measured():
    a, b = (0, 0, 10, 10), (50, 50, 60, 60)
    ours, theirs = boxes(a, (80, 80, 90, 90)), boxes(a, b)
    pairs = compare.match(ours, theirs)
    assert pairs.valid.tolist() == [True, False]
    assert pairs.unmatched == 2
    found = compare.rows(ours["boxes"], theirs["boxes"], pairs)
    assert (found.max, found.count) == (0.0, 4)


def test_equal_boxes_are_paired_by_rank_and_other_labels_never():
    a = (0, 0, 10, 10)
    assert compare.match(boxes(a, a), boxes(a, a)).index.tolist() == [0, 1]
    assert compare.match(boxes(a, a), boxes(a, a)).unmatched == 0
    twice = boxes(a, a, labels=[1, 2])
    assert compare.match(twice, boxes(a, a, labels=[2, 1])).index.tolist() == [1, 0]
    assert compare.match(twice, boxes(a, a, labels=[3, 1])).unmatched == 2


def test_nothing_on_either_side_is_no_disagreement():
    none = {"boxes": jnp.zeros((3, 4)), "valid": jnp.zeros(3, bool)}
    pairs = compare.match(none, none)
    assert pairs.unmatched == 0
    found = jax.device_get(compare.rows(none["boxes"], none["boxes"], pairs))
    assert (found.max, found.count) == (0.0, 0)


def test_weights_of_another_model_are_refused(files):
    config = mask_rcnn.get_config("torchvision")
    source = f"torchvision:{files.weights}"
    with pytest.raises(UserError, match=r"ResNet-18 .* asks for a ResNet-50"):
        run.load(config, source)
    config.update_from_flattened_dict(CHANGES | {"mask.enabled": False})
    with pytest.raises(UserError, match=r"mask\.enabled is False, but .* has a mask head"):
        run.load(config, source)
    with pytest.raises(UserError, match="torchvision:<file>; write one"):
        run.load(config, files.weights)
    with pytest.raises(UserError, match="torchvision:<file>; write one"):
        run.load(config, f"keras:{files.weights}")
    with pytest.raises(UserError, match="no weight file"):
        run.load(config, "torchvision:nowhere.pth")


def test_weights_of_a_backbone_are_refused(files, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.load(files.weights, weights_only=True)
    body = "backbone.body."
    found = {k.removeprefix(body): v for k, v in state.items() if k.startswith(body)}
    more = {"fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(9)}
    torch.save(found | more, tmp_path / "backbone.pth")
    config = mask_rcnn.get_config("torchvision")
    config.update_from_flattened_dict(CHANGES)
    with pytest.raises(UserError, match="holds a backbone"):
        run.load(config, f"torchvision:{tmp_path / 'backbone.pth'}")
