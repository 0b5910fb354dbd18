"""export/torch.py: weights there and back bit for bit, twin files, and what is refused."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import demo, mask_rcnn, sephv14
from configs._chain import plain
from sephjax import build, convert, initial
from sephjax.checkpoint import Checkpoints
from sephjax.errors import UserError
from sephjax.export import names
from sephjax.export import torch as export
from sephjax.weights import classes, table
from tests.export import cases, parity
from tests.narrow import random_tree

CONFIGS = {
    **{name: cases.config(changes) for name, changes in cases.CASES.items()},
    "defaults": cases.config({"roi.head": {"name": "separate_v2"}, "backbone.depth": 101}),
    "no dense layers": cases.config({"roi.head.fc_dims": (), "mask.convs": 0}),
    "demo": demo.get_config(),
    "mask_rcnn": mask_rcnn.get_config(),
    "sephv14": sephv14.get_config(),
}
SMALL = "slim-evonorm-series-separate"


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == np.float32


def take_in(config, file, workdir):
    """`--mode=convert --source=twin:FILE`."""
    assert convert.convert(config, str(workdir), None, f"twin:{file}", None) == 0


@pytest.fixture(scope="module")
def weights():
    config = CONFIGS[SMALL]
    return config, *random_tree(build.model(config, parity.CLASSES).abstract)


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_come_back_from_a_twin_file_bit_for_bit(name, tmp_path):
    pytest.importorskip("torch")
    config, file = CONFIGS[name], tmp_path / "model.pth"
    model = build.model(config, parity.CLASSES)
    params, frozen = random_tree(model.abstract)
    count = export.save_twin(config, parity.CLASSES, params, frozen, file)
    assert count == len(jax.tree.leaves(model.abstract))
    # As `--mode=convert --source=twin:model.pth` takes them in.
    found = initial.read(config, "twin", str(file), convert.SOURCES)
    wanted = classes.named(parity.CLASSES)
    taken = initial.fill(config, model, jax.random.key(0), tmp_path, wanted, found)
    same(taken, (params, frozen))
    assert (tmp_path / "weights.txt").read_text().endswith(f"{count} used, 0 unused, 0 missing\n")
    twin = export.build_twin(config, parity.CLASSES)
    export.load_twin(twin, params, frozen)
    same({k: v.numpy() for k, v in twin.state_dict().items()}, found.tensors)


@pytest.mark.torch
def test_a_workdir_comes_back_from_a_twin_file_bit_for_bit(weights, tmp_path):
    torch = pytest.importorskip("torch")
    config, params, frozen = weights
    file, workdir = tmp_path / "model.pth", tmp_path / "run"
    export.save_twin(config, parity.CLASSES, params, frozen, file)
    take_in(config, file, workdir)
    abstract = build.model(config, parity.CLASSES).abstract
    after = Checkpoints(workdir / "checkpoints")
    same(jax.device_get(after.restore_weights(0, *abstract)), (params, frozen))
    twin = export.twin_from_file(file)
    assert plain(twin.config) == plain(config)
    same({k: v.numpy() for k, v in twin.state_dict().items()}, export.read(str(file)).tensors)
    images = torch.zeros((1, 64, 64, 3), dtype=torch.uint8)
    assert len(twin(images, torch.tensor([[64, 64]]))["detections"]) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.pth"]


def test_every_name_of_a_twin_is_plain():
    for config in CONFIGS.values():
        flat = [table.flatten(part) for part in build.model(config, parity.CLASSES).abstract]
        theirs = table.save(
            names.rules(config),
            {path: np.empty(leaf.shape) for part in flat for path, leaf in part.items()},
        )
        assert not [name for name in theirs if "/" in name or "kernel" in name]


@pytest.mark.torch
def test_a_file_of_another_model_is_refused(weights, tmp_path):
    pytest.importorskip("torch")
    config, params, frozen = weights
    file = tmp_path / "model.pth"
    export.save_twin(config, parity.CLASSES, params, frozen, file)
    pooler = {"name": "crop_max", "bins": (1, 1)}
    for key, value, words in (
        ("backbone.layout", "msra", "of layout 'slim' and the config asks for .*'msra'"),
        ("mask_padding", False, "mask_padding is True there and False here"),
        ("roi.pooler", pooler, r"roi.pooler.bins is \(2, 2\) there and \(1, 1\) here"),
    ):
        with pytest.raises(UserError, match=words):
            take_in(cases.config(cases.CASES[SMALL] | {key: value}), file, tmp_path / "run")
    harmless = cases.config(
        cases.CASES[SMALL] | {"rpn.normalizer": "sampled", "test.detections": 7}
    )
    take_in(harmless, file, tmp_path / "run")


@pytest.mark.torch
def test_what_is_no_twin_file_is_refused(weights, tmp_path):
    torch = pytest.importorskip("torch")
    config, params, frozen = weights
    file = tmp_path / "model.pth"
    with pytest.raises(UserError, match="cannot be read"):
        export.twin_from_file(file)
    file.write_bytes(b"no torch file")
    with pytest.raises(UserError, match="is no twin file"):
        export.twin_from_file(file)
    torch.save({"weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="is no twin file of format"):
        take_in(config, file, tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written"):
        export.save_twin(config, parity.CLASSES, params, frozen, file / "model.pth")
    export.save_twin(config, parity.CLASSES, params, frozen, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="is no twin file"):
        export.twin_from_file(file)


@pytest.mark.torch
def test_a_changed_state_dict_is_refused(weights, tmp_path):
    torch = pytest.importorskip("torch")
    config, params, frozen = weights
    file = tmp_path / "model.pth"
    export.save_twin(config, parity.CLASSES, params, frozen, file)

    def refused(change, words):
        content = torch.load(file, weights_only=True)
        change(content["state_dict"])
        torch.save(content, tmp_path / "changed.pth")
        with pytest.raises(UserError, match=words):
            take_in(config, tmp_path / "changed.pth", tmp_path / "run")

    name = "rpn.logits.weight"
    refused(lambda state: state.pop(name), "missing: rpn/logits/kernel")
    refused(lambda state: state.update(extra=torch.zeros(1)), "left over: extra")
    for kind in (torch.float16, torch.bfloat16):
        change = lambda state, kind=kind: state.update({name: state[name].to(kind)})
        refused(change, rf" is {str(kind)[6:]}; it must be float32")
    refused(lambda state: state.update({name: state[name][:1]}), "wrong shape: rpn/logits/kernel")


@pytest.mark.torch
def test_weights_of_another_model_are_refused(weights):
    pytest.importorskip("torch")
    config, params, frozen = weights
    twin = export.build_twin(config, parity.CLASSES + 1)
    with pytest.raises(UserError, match="box_head/logits/kernel has shape"):
        export.load_twin(twin, params, frozen)
    wide = jax.tree.map(np.float64, params)
    with pytest.raises(UserError, match="is float64; it must be float32"):
        export.load_twin(export.build_twin(config, parity.CLASSES), wide, frozen)


@pytest.mark.torch
def test_what_the_twin_does_not_have_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    config = cases.with_head("separate", "none")
    monkeypatch.delitem(names.BOX_HEADS, "separate")
    words = "roi.head.name is 'separate', which the PyTorch twin does not have"
    with pytest.raises(UserError, match=words):
        export.build_twin(config, parity.CLASSES)
    abstract = build.model(config, parity.CLASSES).abstract
    with pytest.raises(UserError, match=words):
        export.save_twin(config, parity.CLASSES, *random_tree(abstract), tmp_path / "model.pth")


def test_without_torch_a_sentence_says_so(weights, monkeypatch, tmp_path):
    config, params, frozen = weights
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch is not installed.*pip install 'sephjax\[torch\]'"):
        export.build_twin(config, parity.CLASSES)
    with pytest.raises(UserError, match="torch is not installed"):
        export.save_twin(config, parity.CLASSES, params, frozen, tmp_path / "model.pth")


def test_torch_is_not_imported_before_it_is_needed():
    code = "import sys, sephjax.export.torch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
