"""What a run tells, read back."""

import io
import json
import subprocess
import tarfile
import time

import jax
import pytest
from rich.console import Console

from configs import base
from sephjax import observe
from sephjax.observe import Observer, Window
from tests.tiny import ROOT

SCALARS = {"loss": 1.25, "loss/rpn": 1.0, "lr": 0.02, "grad_norm": 3.0}


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=60)


def test_a_logged_step_is_one_json_object_with_the_promised_keys(tmp_path):
    window = Window(started=time.perf_counter() - 5.0, excluded=1.0, waited=1.0, steps=8)
    with Observer(tmp_path, 100, 16, tensorboard=False, console=plain_console()) as observer:
        observer.log(20, SCALARS, window)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row.items() >= ({"step": 20} | SCALARS).items()
    assert row.keys() - SCALARS.keys() == {
        "step", "images_per_sec", "step_time", "data_wait_share"
    }  # fmt: skip
    # 8 steps of 16 images in 5 - 1 seconds, one of them spent waiting
    assert row["images_per_sec"] == pytest.approx(32.0, rel=0.05)
    assert row["step_time"] == pytest.approx(0.5, rel=0.05)
    assert row["data_wait_share"] == pytest.approx(0.25, rel=0.05)


def test_without_a_terminal_a_logged_step_is_one_line(tmp_path):
    console = plain_console()
    window = Window(started=time.perf_counter() - 4.0, steps=8)
    with Observer(tmp_path, 100, 16, tensorboard=False, console=console) as observer:
        observer.log(20, SCALARS, window)
    (line,) = console.file.getvalue().splitlines()  # longer than the console is wide
    assert line.startswith("step 20/100  loss 1.2500  lr 0.02  3")
    assert "images/s  ETA 0:00:40  data wait 0%" in line


def test_on_a_terminal_the_line_is_drawn_in_place(tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Observer(tmp_path, 100, 16, tensorboard=False, console=console) as observer:
        observer.log(20, SCALARS, Window(steps=1))
    assert "step 20/100" in console.file.getvalue()


def test_paused_time_does_not_count():
    window = Window(steps=1)
    with window.pause():
        time.sleep(0.2)
    assert window.rates(1)["step_time"] < 0.1


def test_what_the_input_left_out_adds_up_and_is_told_at_the_end(tmp_path):
    console = plain_console()
    with Observer(tmp_path, 1, 1, tensorboard=False, console=console) as observer:
        observer.log_dropped({"objects": 2, "images": 0})
        observer.log_dropped({"objects": 3})
        assert observer.dropped == {"objects": 5}
    assert "left out: 5 objects" in console.file.getvalue()


def test_an_evaluation_is_told_by_its_aps(tmp_path):
    console = plain_console()
    metrics = {"step": 5, "bbox": {"AP": 0.5, "AP50": 0.7}, "segm": {"AP": 0.25}}
    with Observer(tmp_path, 1, 1, tensorboard=False, console=console) as observer:
        observer.log_evaluation(5, metrics)
    assert "evaluated at step 5: bbox/AP 0.5000, segm/AP 0.2500" in console.file.getvalue()


def test_the_manifest_is_json_and_names_config_versions_and_devices():
    told = json.loads(json.dumps(observe.manifest(base.get_config())))
    assert told["config"]["optimizer"]["lr"] == 0.02
    assert told["config"]["data"]["train"]["short_sides"] == [640, 672, 704, 736, 768, 800]
    assert told["versions"]["jax"] == jax.__version__
    assert told["devices"]["platform"] == "cpu"
    assert told["date"].endswith("+00:00")


def test_an_archive_of_the_tree_knows_its_commit(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "out"
    (tree / "sephjax").mkdir(parents=True), out.mkdir()
    for name in (".gitattributes", "sephjax/observe.py"):
        (tree / name).write_text((ROOT / name).read_text())
    git = lambda *words: subprocess.run(
        ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    git("init"), git("add", "."), git("commit", "-m", "all")
    git("archive", "--output", str(out / "all.tar"), "HEAD")
    with tarfile.open(out / "all.tar") as archive:
        text = archive.extractfile("sephjax/observe.py").read().decode()
    assert f'ARCHIVED = "{git("rev-parse", "HEAD")}"' in text
