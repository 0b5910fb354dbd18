"""The command line: every mistake is one sentence with what to do, and exit code 2."""

import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT, refused

DEMO = "--config=configs/demo.py"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("word", "wrong", "near"),
    [
        ("--config.rpn.mather=1", "rpn.mather", "rpn.matcher"),
        ("--config.rpn.matcher.nam=atss", "rpn.matcher.nam", "rpn.matcher.name"),
        ("--config.trian.steps=1", "trian.steps", "train.steps"),
        ("--config.lr=1", "lr", "optimizer.lr"),
        ("--config.steps=1", "steps", "train.steps"),
        ("--config.train.batch.x=1", "train.batch.x", "train.batch"),
        ("--config.data.train.short_side[0]=1", "data.train.short_side", "data.train.short_sides"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(word, wrong, near):
    flag = word.partition("=")[0]
    said = refused(DEMO, word)
    assert said == f"sephjax: {flag}: the config has no key {wrong!r}; did you mean {near!r}?\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([DEMO + ":big"], "demo has no rows; leave ':big' out"),
        (["--config=configs/sephv14.py:nosuch"], "no row 'nosuch'; did you mean 'r"),
        ([DEMO, "--mode=trian"], "--mode=trian is unknown; did you mean train?"),
        ([DEMO], "--mode=train needs --workdir"),
        ([DEMO, "--workdir=w", "--mode=predict"], "--mode=predict needs --images"),
        ([DEMO, "--workdir=w", "--mode=predict", "--images=x"], "needs --output"),
        ([DEMO, "--workdir=w", "--mode=predict", "--coordinator=auto"], "the work of one process"),
        ([DEMO, "--workdir=w", "--mode=export"], "--mode=export needs --output"),
        ([DEMO, "--mode=parity", "--images=x"], "--mode=parity needs --source"),
        ([DEMO, "--mode=parity", "--source=x"], "--mode=parity needs --images"),
        (["--workdir=w"], "--config is missing"),
        (["--config=configs/dmo.py"], "configs/dmo.py is no file; did you mean configs/demo.py?"),
        (["--config", "/nowhere/a.py"], "/nowhere/a.py is no file; check the path"),
        (["--config=pyproject.toml"], "pyproject.toml does not run: SyntaxError"),
        ([DEMO, "--wrokdir=w"], "there is no flag --wrokdir; did you mean --workdir?"),
        ([DEMO, "train"], "'train' is no flag"),
        ([DEMO, "--config.train.batch=abc"], "batch=abc has a value of the wrong kind (it takes a"),
        ([DEMO, "--config.optimizer.lr=1,2"], "it takes a number"),
        ([DEMO, "--config.mask.enabled=maybe"], "it takes True or False"),
        ([DEMO, "--config.rpn.matcher=x"], "it is a group of keys"),
        ([DEMO, "--config.data.train.short_sides=('a',)"], "holds 'a', which is no number"),
        ([DEMO, "--workdir=gs://b/run"], "--workdir=gs://b/run is no local path; mount the bucket"),
        ([DEMO, "--step=x"], "--step=x is wrong: it takes a whole number"),
    ],
)
def test_a_wrong_command_is_one_sentence(words, said):
    assert said in refused(*words)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("backbone.norm=layer", "backbone.norm is 'layer'; use 'none', 'evonorm_s0', 'gn'"),
        ("backbone.depth=51", "backbone.depth is 51; use 18, 34, 50 or 101"),
        ("data.source=coc", "data.source is 'coc'; use 'coco', 'tfds' or 'shapes'"),
        ("eval.backend=cocoapi", "eval.backend is 'cocoapi'"),
        ("init.format=kears", "init.format is 'kears'; use 'none', 'torchvision', 'timm'"),
        ("train.log_every=0", "train.log_every is 0; it must be at least 1"),
        ("optimizer.clip=-1.0", "optimizer.clip is -1.0; it must be 0 or more"),
        ("test.nms=1.5", "test.nms is 1.5; it must be from 0 to 1"),
        ("data.train.short_sides=(0,)", "data.train has a side or an aspect among (0,"),
        ("data.train.limit=-1", "data.train.limit is -1; it must be 0 or more"),
        ("data.eval.short_sides=(1, 2)", "an evaluation has exactly one"),
    ],
)
def test_a_value_that_means_nothing_is_refused_before_anything_is_made(tmp_path, word, said):
    workdir = tmp_path / "run"
    assert said in refused(DEMO, f"--workdir={workdir}", f"--config.{word}")
    assert not workdir.exists()


def process(*words, **options):
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_help_is_no_failure():
    told = process("-m", "sephjax.main", "--help")
    assert told.returncode == 0
    assert "--workdir" in told.stdout


def test_the_program_itself_leaves_with_the_code_and_the_sentence():
    told = process("-m", "sephjax.main", DEMO, "--config.rpn.mather=1")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.count("\n") == 1
    assert "'rpn.matcher'" in told.stderr


def test_describe_needs_no_workdir_and_tells_the_chain():
    told = process("-m", "sephjax.main", "--config=configs/demo.py", "--mode=describe")
    assert told.returncode == 0, told.stderr
    assert "chain       base > demo" in told.stdout
    assert told.stderr == ""


IMPORT = """
import sys, time
begun = time.perf_counter()
import sephjax
took = time.perf_counter() - begun
heavy = {"jax", "tensorflow", "torch", "flax", "numpy"} & set(sys.modules)
assert not heavy, heavy
import sephjax.main
assert "jax" not in sys.modules
import sephjax.modes
heavy = {"tensorflow", "torch", "torchvision"} & set(sys.modules)
assert not heavy, heavy
print(took)
"""


def test_importing_is_quick_and_leaves_tensorflow_and_torch_alone():
    told = process("-c", IMPORT)
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) < 1.0
