"""A row is its difference from its parent: what works and what must not."""

import subprocess
import sys

import pytest

from configs import base
from configs._chain import Row, apply, flat, lineage, resolve
from tests.configs import families

ROWS = {
    "": Row(None, "the head", {"backbone.depth": 101}),
    "a": Row("", "a", {"roi.box_loss": {"name": "giou"}}),
    "b": Row("a", "b", {"roi.box_loss_scale": 8.0, "backbone.depth": 18}),
}


def test_a_row_has_its_own_lines_and_those_of_its_parents():
    config = resolve(base.get_config(), "mine", ROWS, "b")
    assert config.backbone.depth == 18
    assert config.roi.box_loss.to_dict() == {"name": "giou"}  # swapped whole: no beta is left
    assert config.roi.box_loss_scale == 8.0
    assert config.name == "mine_b"
    assert tuple(config.lineage) == ("base", "mine", "mine:a", "mine:b")
    changed = {"name", "lineage", "backbone.depth", "roi.box_loss.name", "roi.box_loss_scale"}
    was, now = dict(flat(base.get_config())), dict(flat(config))
    assert {path for path in now if now[path] != was[path]} == changed
    assert set(was) - set(now) == {"roi.box_loss.beta"}


def test_the_head_is_named_after_the_family():
    config = resolve(base.get_config(), "mine", ROWS, "")
    assert config.name == "mine"
    assert tuple(config.lineage) == ("base", "mine")


@pytest.mark.parametrize("path", ["backbone.dept", "bakbone.depth", "backbone.depth.x"])
def test_an_unknown_path_names_the_nearest(path):
    with pytest.raises(KeyError, match=f"mine: no key '{path}'; the nearest is 'backbone.depth'"):
        apply(base.get_config(), {path: 18}, "mine")


def test_an_unknown_row_names_the_nearest():
    with pytest.raises(ValueError, match="no row 'smal'; did you mean 'small'"):
        lineage({"": Row(None, "", {}), "small": Row("", "", {})}, "smal", "mine")


@pytest.mark.parametrize(
    "diff",
    [
        {"backbone.depth": 50},
        {"roi.levels": ["p2", "p3", "p4", "p5"]},
        {"rpn.box_loss": {"name": "smooth_l1", "beta": 0.0}},
    ],
)
def test_a_line_that_changes_nothing_is_an_error(diff):
    with pytest.raises(ValueError, match="is already"):
        apply(base.get_config(), diff, "mine")


def test_a_row_that_descends_from_itself_is_an_error():
    rows = {"a": Row("b", "", {}), "b": Row("a", "", {})}
    with pytest.raises(ValueError, match="its own ancestor"):
        lineage(rows, "a", "mine")


def test_a_value_of_another_type_is_an_error():
    with pytest.raises(TypeError):
        apply(base.get_config(), {"backbone.depth": "fifty"}, "mine")


def test_a_config_is_locked():
    config = resolve(base.get_config(), "mine", ROWS, "b")
    with pytest.raises((AttributeError, KeyError)):
        config.backbone.dept = 3


def test_configs_import_without_jax_or_anything_else_heavy():
    names = ", ".join(f"configs.{name}" for name in families.families())
    heavy = ["jax", "flax", "tensorflow", "torch", "numpy", "sephjax"]
    code = f"import sys, {names}; print([n for n in {heavy} if n in sys.modules])"
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=families.FOLDER.parent,
    )
    assert told.stdout.strip() == "[]"
