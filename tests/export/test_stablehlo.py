"""`--mode=export`: the file does without sephjax what `--mode=predict` does with it."""

import re
import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import build, modes
from sephjax.checkpoint import Checkpoints
from sephjax.input.example import Categories
from sephjax.train import sharding, workdir
from sephjax.types import Batch, Truth
from tests.tiny import (
    ROOT,
    command,
    config_file,
    environment,
    quick,  # noqa: F401 - a fixture for the whole module
    refused,
    tiny_config,
)

CATEGORIES = Categories((3, 7, 90), ("ball", "box", "star"))
BLOCKED = "import sys\nsys.modules['sephjax'] = None\n"
KEPT = "\nnp.savez('found.npz', image=image, size=size, left=boxes, **found)\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick):  # noqa: F811
    """A workdir with a detector of random weights, and the config file."""
    folder = tmp_path_factory.mktemp("export")
    model = build.model(tiny_config(), len(CATEGORIES))
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    checkpoints.save_weights(4, *jax.jit(model.init)(jax.random.key(1)))
    checkpoints.close()
    workdir.save_categories(folder / "run", CATEGORIES)
    return folder, (f"--config={config_file(folder)}", f"--workdir={folder / 'run'}")


def readme_program():
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return program


def test_the_program_of_the_readme_finds_what_sephjax_finds(run, tmp_path_factory):
    folder, flags = run
    told = command(*flags, "--mode=export", f"--output={folder / 'model.stablehlo'}")
    assert told.code == 0, told.err
    assert "step 4" in told.out
    assert "takes uint8 [4, 64, 96, 3] and int32 [4, 2]" in told.out
    noise = np.random.default_rng(0).integers(0, 255, (100, 130, 3), np.uint8)
    cv2.imwrite(str(folder / "picture.jpg"), cv2.GaussianBlur(noise, (9, 9), 0))
    code = BLOCKED + readme_program() + KEPT
    env = environment(tmp_path_factory)
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(np.load(folder / "found.npz"))
    image, size = found.pop("image"), found.pop("size")
    np.testing.assert_array_equal(size[0], [64, 83])
    assert image[0, :64, :83].any()
    assert not image[0, :, 83:].any()

    config = tiny_config()
    model = build.model(config, len(CATEGORIES))
    params, frozen = jax.jit(model.init)(jax.random.key(1))
    none = Truth(jnp.zeros((4, 0, 4)), jnp.zeros((4, 0), int), jnp.zeros((4, 0), bool), None)
    batch = Batch(image, size, size, np.arange(4), np.ones(4, bool), none)
    ours = modes.predictor(config, model, sharding.make_mesh())(params, frozen, batch)
    valid = np.asarray(ours.valid)
    assert valid[0].sum() > 3
    np.testing.assert_array_equal(found["valid"], valid)
    ids = np.asarray(CATEGORIES.ids)[np.asarray(ours.labels)]
    np.testing.assert_array_equal(found["category_ids"][valid], ids[valid])
    # The weights are constants there, which the compiler folds: other roundings, 3.5e-6 seen.
    np.testing.assert_allclose(found["scores"][valid], ours.scores[valid], atol=2e-5)
    np.testing.assert_allclose(found["boxes"][valid], ours.boxes[valid], atol=1e-3)
    np.testing.assert_allclose(found["masks"][valid], ours.masks[valid], atol=1e-4)
    np.testing.assert_allclose(found["left"], np.asarray(ours.boxes)[0][valid[0]] / 0.64, rtol=1e-5)


def test_what_cannot_be_written_is_a_sentence(run, tmp_path):
    _, flags = run
    words = refused(*flags, "--mode=export", f"--output={tmp_path}")
    assert "is a folder; name a file" in words
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "model.stablehlo"
    assert "cannot be written" in refused(*flags, "--mode=export", f"--output={below}")
