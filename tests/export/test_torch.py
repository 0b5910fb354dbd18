"""export/torch.py: weights there and back bit for bit, twin files, and what is refused."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import demo, mask_rcnn, sephv14
from configs._chain import plain
from sephjax import build
from sephjax.checkpoint import Checkpoints
from sephjax.errors import UserError
from sephjax.export import names
from sephjax.export import torch as export
from sephjax.weights import table
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


@pytest.fixture(scope="module")
def weights():
    config = CONFIGS[SMALL]
    return config, *random_tree(build.model(config, parity.CLASSES).abstract)


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_come_back_from_a_twin_bit_for_bit(name):
    pytest.importorskip("torch")
    config = CONFIGS[name]
    abstract = build.model(config, parity.CLASSES).abstract
    params, frozen = random_tree(abstract)
    twin = export.build_twin(config, parity.CLASSES)
    assert len(twin.state_dict()) == len(jax.tree.leaves(abstract))
    export.load_twin(twin, params, frozen)
    same(export.dump_twin(twin), (params, frozen))


@pytest.mark.torch
def test_an_orbax_checkpoint_comes_back_from_a_twin_file_bit_for_bit(weights, tmp_path):
    torch = pytest.importorskip("torch")
    config, params, frozen = weights
    abstract = build.model(config, parity.CLASSES).abstract
    file = tmp_path / "model.pth"
    before, after = (Checkpoints(tmp_path / name) for name in ("before", "after"))
    before.save_weights(7, params, frozen)
    count = export.save_twin(config, parity.CLASSES, *before.restore_weights(7, *abstract), file)
    found_params, found_frozen, report = export.load_twin_file(file, config, parity.CLASSES)
    assert report.unused == report.missing == ()
    assert len(report.used) == count == len(jax.tree.leaves(abstract))
    after.save_weights(0, found_params, found_frozen)
    same(jax.device_get(after.restore_weights(0, *abstract)), (params, frozen))
    before.close(), after.close()
    twin = export.twin_from_file(file)
    assert plain(twin.config) == plain(config)
    same(export.dump_twin(twin), (params, frozen))
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
    other = cases.config(cases.CASES[SMALL] | {"backbone.layout": "msra"})
    with pytest.raises(UserError, match=r"backbone.layout is 'slim' there and 'msra' here"):
        export.load_twin_file(file, other, parity.CLASSES)
    other = cases.config(cases.CASES[SMALL] | {"roi.pooler": {"name": "crop_max", "bins": (1, 1)}})
    with pytest.raises(UserError, match=r"roi.pooler.bins is \(2, 2\) there and \(1, 1\) here"):
        export.load_twin_file(file, other, parity.CLASSES)
    with pytest.raises(UserError, match="has 5 classes and this model 6"):
        export.load_twin_file(file, config, 6)
    harmless = cases.config(
        cases.CASES[SMALL] | {"rpn.normalizer": "sampled", "test.detections": 7}
    )
    same(export.load_twin_file(file, harmless, parity.CLASSES)[:2], (params, frozen))


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
        export.load_twin_file(file, config, parity.CLASSES)
    with pytest.raises(UserError, match="cannot be written"):
        export.save_twin(config, parity.CLASSES, params, frozen, tmp_path / "no" / "model.pth")
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
            export.load_twin_file(tmp_path / "changed.pth", config, parity.CLASSES)

    name = "rpn.logits.weight"
    refused(lambda state: state.pop(name), "missing: rpn/logits/kernel")
    refused(lambda state: state.update(extra=torch.zeros(1)), "left over: extra")
    refused(lambda state: state.update({name: state[name].half()}), "is float16; it must be")
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
