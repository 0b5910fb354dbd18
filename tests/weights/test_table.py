"""weights/table.py: both directions, and every kind of disagreement."""

import numpy as np
import pytest

from sephjax.errors import UserError
from sephjax.weights import table
from sephjax.weights.table import Rule

RULES = [
    Rule("stage{s}/block{b}/conv{c}/kernel", "res{s:+1}{b:a}_branch2{c:a1}/weights", table.CONV),
    Rule("head/kernel", "fc.weight", table.LINEAR),
    Rule("head/bias", "fc.bias"),
]


def theirs():
    return {
        "res2a_branch2c/weights": np.arange(24.0).reshape(4, 3, 2, 1),
        "fc.weight": np.arange(6.0).reshape(3, 2),
        "fc.bias": np.arange(3.0),
    }


def ours():
    return {
        "stage1/block0/conv3/kernel": np.zeros((2, 1, 3, 4)),
        "head/kernel": np.zeros((2, 3)),
        "head/bias": np.zeros(3),
    }


def test_numbers_shift_and_become_letters():
    arrays, report = table.load(RULES, ours(), theirs(), source="x")
    np.testing.assert_array_equal(arrays["head/kernel"], [[0, 2, 4], [1, 3, 5]])
    kernel = arrays["stage1/block0/conv3/kernel"]
    assert kernel[1, 0, 2, 3] == theirs()["res2a_branch2c/weights"][3, 2, 1, 0]
    assert report.used[-1] == ("stage1/block0/conv3/kernel", "res2a_branch2c/weights")


def test_what_was_loaded_is_saved_as_it_was():
    arrays, _ = table.load(RULES, ours(), theirs(), source="x")
    back = table.save(RULES, arrays)
    assert back.keys() == theirs().keys()
    for name, value in theirs().items():
        np.testing.assert_array_equal(back[name], value)


def test_all_disagreements_are_raised_together():
    model = ours() | {"neck/kernel": np.zeros(1), "head/bias": np.zeros(4)}
    file = theirs() | {"stray": np.zeros(1)}
    del file["fc.weight"]
    with pytest.raises(UserError) as caught:
        table.load(RULES, model, file, source="file.npz")
    message = str(caught.value)
    assert "file.npz" in message
    assert "4 tensors" in message
    assert "missing: neck/kernel" in message
    assert "missing: head/kernel" in message
    assert "left over: stray" in message
    assert "wrong shape: head/bias has (3,) in the file, (4,) in the model" in message


def test_two_rules_for_one_tensor_and_one_tensor_for_two_are_errors():
    with pytest.raises(UserError, match="ambiguous: head/bias"):
        table.load([*RULES, Rule("head/bias", "other")], ours(), theirs(), source="x")
    rules = [*RULES, Rule("tail/bias", "fc.bias")]
    with pytest.raises(UserError, match=r"used twice: fc\.bias"):
        table.load(rules, ours() | {"tail/bias": np.zeros(3)}, theirs(), source="x")
    with pytest.raises(UserError, match="no rule"):
        table.save(RULES, {"neck/kernel": np.zeros(1)})


def test_what_may_be_absent_is_reported():
    model = ours() | {"neck/kernel": np.zeros(1)}
    file = theirs() | {"stray": np.zeros(1)}
    arrays, report = table.load(RULES, model, file, source="x", ignore=["^stray$"], keep=["^neck/"])
    assert "neck/kernel" not in arrays
    assert report.unused == ("stray",)
    assert report.missing == ("neck/kernel",)
    last = str(report).splitlines()[-1]
    assert last == "3 used, 1 unused (stray), 1 missing (neck/kernel)"
    assert any(line.split() == ["head/bias", "fc.bias"] for line in str(report).splitlines())


def test_a_dense_layer_after_pooling_gives_the_same_product_in_both_orders():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, 4, 5))  # h, w, c = 3, 4, 5
    weight = rng.normal(size=(7, 60))  # PyTorch: out, (c, h, w)
    expected = features.transpose(0, 3, 1, 2).reshape(2, -1) @ weight.T
    transform = table.fc_after_pool(3, 4)
    np.testing.assert_allclose(features.reshape(2, -1) @ transform.to_ours(weight), expected)
    np.testing.assert_array_equal(transform.to_theirs(transform.to_ours(weight)), weight)


def test_background_moves_from_first_to_last_and_back():
    transform = table.background_first(table.LINEAR)
    weight = np.arange(6.0).reshape(3, 2)  # background, class 0, class 1
    np.testing.assert_array_equal(transform.to_ours(weight), [[2, 4, 0], [3, 5, 1]])
    np.testing.assert_array_equal(transform.to_theirs(transform.to_ours(weight)), weight)


def test_a_nested_dict_survives_flattening():
    tree = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert table.flatten(tree) == {"a/b/c": 1, "a/d": 2, "e": 3}
    assert table.unflatten(table.flatten(tree)) == tree
