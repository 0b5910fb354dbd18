"""The modes from end to end, on a tiny detector and drawn shapes."""

import contextlib
import io
import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

from sephjax import modes
from sephjax.checkpoint import Checkpoints
from sephjax.errors import UserError
from sephjax.train import programs, sharding
from tests.input.test_tfds import quietly, write_stock
from tests.tiny import (
    ROOT,
    DrawnCoco,
    config_file,
    environment,
    quick,  # noqa: F401 - a fixture for the whole module
    refused,
    rows,
    tiny_config,
)

CANVASES = {(64, 96), (96, 64)}


class Trained(NamedTuple):
    """A run of four steps in one go."""

    workdir: pathlib.Path
    compiled: list[tuple[int, int]]  # canvas of each compilation of the step
    buckets: int
    out: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick) -> Trained:  # noqa: F811
    workdir = tmp_path_factory.mktemp("trained") / "run"
    compiled, made = [], []

    class Counted(programs.Programs):
        def __init__(self, setup):
            super().__init__(setup)
            made.append((self, setup))

        def compile(self, state, batch):
            compiled.append(batch.image.shape[1:3])
            super().compile(state, batch)

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("sephjax.train.loop.Programs", Counted)
        assert modes.train(tiny_config(), str(workdir)) == 0
    ((counted, setup),) = made
    assert len(counted) == len(compiled)
    return Trained(workdir, compiled, len(setup.batches.buckets), out.getvalue())


def state_bits(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint by name, as bytes."""
    with contextlib.redirect_stdout(io.StringIO()):
        setup = modes.make_setup(tiny_config(), workdir)
    checkpoints = Checkpoints(workdir / "checkpoints")
    state, place = checkpoints.restore(step, sharding.abstract_on(setup.mesh, setup.abstract))
    checkpoints.close()
    assert place == {"step": step}
    parts = (state.params, state.frozen, state.opt_state, state.step)
    paths, _ = jax.tree.flatten_with_path((*parts, jax.random.key_data(state.key)))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in paths}


def test_a_run_leaves_what_it_promises(trained):
    folder = trained.workdir
    names = {"config.json", "manifest.json", "metrics.jsonl", "categories.json"}
    assert {path.name for path in folder.iterdir()} >= names | {"checkpoints", "eval", "pictures"}
    got = rows(folder)
    assert [row["step"] for row in got] == [1, 2, 3, 4]
    terms = {"rpn_cls", "rpn_box", "roi_cls", "roi_box", "mask"}
    assert {key.removeprefix("loss/") for key in got[0] if key.startswith("loss/")} == terms
    assert got[0].keys() >= {"loss", "lr", "grad_norm", "images_per_sec", "data_wait_share"}
    metrics = json.loads((folder / "eval" / "4" / "metrics.json").read_text())
    assert metrics.keys() == {"step", "images", "bbox", "segm", "per_class"}
    assert (metrics["step"], metrics["images"]) == (4, 4)
    found = json.loads((folder / "eval" / "4" / "detections.json").read_text())
    assert found
    assert found[0].keys() >= {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert len(list((folder / "pictures" / "4").glob("*.jpg"))) == 4
    assert trained.out.count(" Average Precision") == 12
    assert "\n|demo segm|" in trained.out


def test_one_compilation_a_canvas(trained):
    assert len(trained.compiled) == trained.buckets == 2
    assert set(trained.compiled) == CANVASES


def test_a_finished_run_ends_at_once(trained, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("it should have ended")

    monkeypatch.setattr(modes, "make_setup", never)
    assert modes.train(tiny_config(), str(trained.workdir)) == 0
    assert "trained to step 4 and evaluated: nothing to do" in capsys.readouterr().out


def test_eval_restores_and_gives_the_same_numbers(trained):
    folder = trained.workdir / "eval" / "4"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    assert modes.evaluate(tiny_config(), str(trained.workdir), None) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_eval_computes_the_logs_metric_when_asked(trained):
    path = trained.workdir / "eval" / "4" / "metrics.json"
    before = path.read_bytes()
    config = tiny_config(eval__reference_metric=True)
    assert modes.evaluate(config, str(trained.workdir), None) == 0
    beside = json.loads(path.read_text())["reference"]
    assert beside["images"] == 4
    assert beside["input"].keys() == beside["512"].keys() == {"bbox", "segm"}
    path.write_bytes(before)


def test_predict_does_what_it_can_and_counts_the_rest_as_a_failure(trained, tmp_path, capsys):
    folder, output = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "colour.jpg"), pixels)
    Image.fromarray(pixels[..., 0].T).save(folder / "grey.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (folder / "notes.txt").write_text("no picture either")
    workdir = str(trained.workdir)
    assert modes.predict(tiny_config(), workdir, None, str(folder), str(output)) == 1
    assert {path.name for path in output.iterdir()} == {
        "predictions.json", "colour.jpg", "grey.jpg"
    }  # fmt: skip
    found = json.loads((output / "predictions.json").read_text())
    assert {row["file_name"] for row in found} == {"colour.jpg", "grey.jpg"}
    sizes = {"colour.jpg": [50, 80], "grey.jpg": [80, 50]}
    assert all(row["segmentation"]["size"] == sizes[row["file_name"]] for row in found)
    told = capsys.readouterr()
    assert "broken.jpg" in told.err
    assert "2 pictures" in told.out


def test_two_and_two_steps_are_four_steps_bit_for_bit(trained, tmp_path, capsys):
    modes.train(tiny_config(train__steps=2), str(tmp_path / "parts"))
    modes.train(tiny_config(), str(tmp_path / "parts"))
    assert "going on from step 2" in capsys.readouterr().out
    whole, parts = state_bits(trained.workdir, 4), state_bits(tmp_path / "parts", 4)
    assert any("momentum" in name or "trace" in name for name in whole), list(whole)
    assert whole == parts
    losses = [[row["loss"] for row in rows(w)] for w in (trained.workdir, tmp_path / "parts")]
    assert losses[0] == losses[1]


def test_a_folder_of_another_config_is_refused(trained, tmp_path):
    workdir = f"--workdir={trained.workdir}"
    said = refused(f"--config={config_file(tmp_path)}", workdir, "--config.optimizer.lr=0.5")
    assert "belongs to another config: optimizer.lr is 0.02 there and 0.5 here" in said
    said = refused(f"--config={config_file(tmp_path)}", workdir, "--mode=eval", "--step=3")
    assert "holds no checkpoint of step 3; --step may be [4]" in said
    said = refused(
        f"--config={config_file(tmp_path)}", workdir, "--mode=eval", "--config.fpn.channels=32"
    )
    assert "is of another model" in said
    empty = f"--workdir={tmp_path / 'none'}"
    said = refused(f"--config={config_file(tmp_path)}", empty, "--mode=eval")
    assert "holds no finished checkpoint; train first" in said
    said = refused(f"--config={config_file(tmp_path)}", f"--workdir={tmp_path / 'tiny.py'}")
    assert "tiny.py is a file" in said


def run_losses(workdir: pathlib.Path, **changes: Any) -> list[dict[str, Any]]:
    modes.train(tiny_config(train__steps=2, **changes), str(workdir))
    timing = {"images_per_sec", "step_time", "data_wait_share"}
    return [{k: v for k, v in row.items() if k not in timing} for row in rows(workdir)]


def test_tfds_trains_as_coco_does_bit_for_bit(tmp_path):
    drawn = DrawnCoco(tmp_path / "coco", 5)
    drawn.crowd(2)
    drawn.picture(6, np.zeros((64, 96, 3), np.uint8))
    paths = drawn.write()
    stored = paths | {"data__data_dir": str(tmp_path / "tfds")}
    with pytest.raises(UserError, match=r"data\.train\.split and data\.eval\.split are both 'a'"):
        modes.prepare(tiny_config(**stored, data__train__split="a", data__eval__split="a"))
    assert quietly(modes.prepare, tiny_config(**stored)) == 0
    stored["data__source"] = "tfds"
    coco, tfds = run_losses(tmp_path / "a", **paths), run_losses(tmp_path / "b", **stored)
    assert len(coco) == 2
    assert coco == tfds
    evaluations = [
        (tmp_path / run / "eval" / "2" / name).read_bytes()
        for name in ("metrics.json", "detections.json")
        for run in "ab"
    ]
    assert evaluations[0] == evaluations[1]
    assert evaluations[2] == evaluations[3]


def test_boxes_without_masks_train_a_box_config_only(tmp_path):
    paths = DrawnCoco(tmp_path / "coco", 4).write()
    from sephjax.input.coco import open_coco

    source = open_coco(paths["data__train__annotations"], paths["data__train__images"], train=False)
    quietly(write_stock, source, str(tmp_path))
    stock = {
        "data__source": "tfds",
        "data__name": "coco/2017",
        "data__data_dir": str(tmp_path),
        "data__eval__split": "train",
    }
    file = f"--config={config_file(tmp_path, **stock)}"
    workdir = f"--workdir={tmp_path / 'run'}"
    said = refused(file, workdir)
    assert "objects without a segmentation, which a mask head cannot learn from" in said
    assert "--config.mask.enabled=False" in said
    # the same folder will do, since nothing was trained in it
    losses = run_losses(tmp_path / "run", mask__enabled=False, **stock)
    assert "loss/mask" not in losses[0]
    metrics = json.loads((tmp_path / "run" / "eval" / "2" / "metrics.json").read_text())
    assert metrics.keys() == {"step", "images", "bbox", "per_class"}


def test_sigterm_saves_and_ends_well_and_the_terminal_stays_clean(
    trained, tmp_path, tmp_path_factory
):
    workdir = tmp_path / "run"
    words = (f"--config={config_file(tmp_path, train__steps=1_000_000)}", f"--workdir={workdir}")
    told, complained = tmp_path / "out.txt", tmp_path / "err.txt"  # a pipe could fill up
    with told.open("w") as out_file, complained.open("w") as err_file:
        running = subprocess.Popen(
            [sys.executable, "-m", "sephjax.main", *words],
            cwd=ROOT,
            env=environment(tmp_path_factory),
            stdout=out_file,
            stderr=err_file,
        )
    log = workdir / "metrics.jsonl"
    try:
        until = time.monotonic() + 600
        while not (log.exists() and list(workdir.glob("events.*"))) and time.monotonic() < until:
            assert running.poll() is None, complained.read_text()
            time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=120) == 0, complained.read_text()
    finally:
        running.kill()
    assert complained.read_text() == ""
    step = Checkpoints(workdir / "checkpoints").latest(whole=True)
    assert step is not None
    out = told.read_text().splitlines()
    assert out[-1] == f"stopped at step {step}; the same command goes on from there"
    assert [row["step"] for row in rows(workdir)] == list(range(1, step + 1))
    assert [row["loss"] for row in rows(workdir)[:2]] == [
        row["loss"] for row in rows(trained.workdir)[:2]
    ]
