"""weights/files.py and weights/kinds.py: no file executes anything, and a wrong one is refused."""

import os
import pathlib
import pickle

import numpy as np
import pytest

from sephjax.errors import UserError
from sephjax.weights import files
from sephjax.weights.formats import FORMATS


class Evil:
    """A pickle that makes a file when it is loaded in the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.fixture
def trap(tmp_path) -> pathlib.Path:
    """The file that must not come to be; checks that loading the pickle would make it."""
    path = tmp_path / "trap"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists()
    path.unlink()
    return path


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"a": x}}, lambda x: [(x,)]])
def test_a_malicious_pickle_executes_nothing(trap, tmp_path, protocol, wrap):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(wrap(Evil(trap)), protocol))
    with pytest.raises(UserError, match=r"no pickle of plain arrays \(it asks for \w+\.mknod\)"):
        files.read_pickle(str(path))
    with pytest.raises(UserError, match="it asks for"):
        FORMATS["detectron2"](str(path))
    assert not trap.exists()


@pytest.mark.torch
@pytest.mark.parametrize("format", ["torchvision", "timm", "detectron2"])
def test_a_malicious_pth_executes_nothing(trap, tmp_path, format):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save({"model": {"conv1.weight": Evil(trap)}}, path)
    with pytest.raises(UserError, match="can be read without executing code"):
        FORMATS[format](str(path))
    assert not trap.exists()


@pytest.mark.parametrize("asked", [("builtins", "eval"), ("numpy", "load"), ("os", "system")])
def test_a_pickle_finds_nothing_but_arrays(tmp_path, asked):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"c%s\n%s\n." % tuple(word.encode() for word in asked))
    with pytest.raises(UserError, match=rf"it asks for {asked[0]}\.{asked[1]}"):
        files.read_pickle(str(path))


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_arrays_come_out_of_a_pickle_as_they_went_in(tmp_path, protocol):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.float64(2.0)}
    arrays |= {"c": np.arange(3), "d": np.asfortranarray(np.ones((2, 2), np.float16))}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "rest": [("x", None, 1.5)]}, protocol))
    found = files.read_pickle(str(path))
    assert found["rest"] == [("x", None, 1.5)]
    for name, value in arrays.items():
        np.testing.assert_array_equal(found["model"][name], value)
        assert found["model"][name].dtype == value.dtype


def test_arrays_of_python_2_and_numpy_1_are_read(tmp_path):
    # What Python 2 wrote for np.arange(2, dtype="<f4"), as in R-50.pkl: text is bytes.
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x00\x00\x00\x00\x80?tb."
    )
    path = tmp_path / "r50.pkl"
    path.write_bytes(data)
    np.testing.assert_array_equal(files.read_pickle(str(path)), np.float32([0, 1]))


@pytest.mark.torch
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "sephjax"])
@pytest.mark.parametrize("content", [b"", b"weights, in words\n", pickle.dumps([1, 2])])
def test_a_file_that_is_none_is_refused_in_a_sentence(tmp_path, format, content):
    pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pth") as caught:
        FORMATS[format](str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "sephjax"])
def test_a_missing_file_is_named(tmp_path, format):
    with pytest.raises(UserError, match=r"There is no weight file .*none\.pth: check the path"):
        FORMATS[format](str(tmp_path / "none.pth"))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("format", "name", "said"),
    [
        ("timm", "backbone.body.conv1.weight", "a detector of torchvision: give it as torchvis"),
        ("torchvision", "backbone.bottom_up.stem.conv1.weight", "give it as detectron2"),
        ("detectron2", "conv1.weight", "a classification ResNet: give it as torchvision or timm"),
        ("detectron2", "stem.conv1.weight", "which no layout here has"),
        ("timm", "conv1.0.weight", "a ResNet with a deep stem, which no layout here has"),
        ("torchvision", "odd", "tensors of neither (the first names: odd)"),
        ("torchvision", "backbone.body.conv1.weight", "without the heads of a Mask or Faster"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is(tmp_path, format, name, said):
    path = tmp_path / "weights.safetensors"
    pytest.importorskip("torch")
    if format == "detectron2":
        path = tmp_path / "weights.pth"
    files.write_torch(str(path), {name: np.zeros(1, np.float32)})
    with pytest.raises(UserError) as caught:
        FORMATS[format](str(path))
    assert said in str(caught.value)


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tensors_of_every_shape_come_back_and_no_draft_is_left(tmp_path, suffix):
    pytest.importorskip("safetensors")
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "count": np.int64(3)}
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    files.write_torch(str(path), tensors)
    found = files.read_torch(str(path))
    assert found["count"].shape == ()
    np.testing.assert_array_equal(found["a"], tensors["a"])
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UserError, match="cannot be written"):
        files.write_torch(str(path / "model.pth"), tensors)


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bfloat16_is_read_as_float32(tmp_path, suffix):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("safetensors.torch")
    path = tmp_path / f"model{suffix}"
    save = package.save_file if suffix == ".safetensors" else torch.save
    save({"a": torch.arange(3).to(torch.bfloat16)}, str(path))
    found = files.read_torch(str(path))["a"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [0, 1, 2])
