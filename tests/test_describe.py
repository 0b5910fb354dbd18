"""Costs against counts by hand; the page of every row."""

import jax
import jax.numpy as jnp
import pytest

from sephjax import describe
from tests.configs.families import IDS, ROWS, families, read

IMAGE = jnp.zeros((2, 8, 8, 3))
KERNEL = jnp.zeros((3, 3, 3, 5))
MATRIX = jnp.zeros((5, 7))


def conv(image, kernel):
    return jax.lax.conv_general_dilated(
        image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_a_convolution_and_a_matmul_cost_what_they_cost_by_hand():
    run = lambda image, kernel, matrix: jnp.tanh(conv(image, kernel)) @ matrix
    found = describe.cost(jax.make_jaxpr(run)(IMAGE, KERNEL, MATRIX).jaxpr)
    cells = 2 * 4 * 4
    assert found.flops == cells * 5 * (3 * 3 * 3) * 2 + cells * 7 * 5 * 2
    assert found.bytes == 4 * (cells * 5 + cells * 7)


def test_a_grouped_convolution_reads_only_its_group():
    run = lambda image, kernel: jax.lax.conv_general_dilated(
        image,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    traced = jax.make_jaxpr(run)(jnp.zeros((1, 4, 4, 6)), jnp.zeros((3, 3, 3, 8)))
    assert describe.cost(traced.jaxpr).flops == 16 * 8 * (3 * 3 * 3) * 2


def test_a_batched_matmul_counts_every_batch():
    traced = jax.make_jaxpr(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(
        jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    )
    assert describe.cost(traced.jaxpr).flops == 3 * 4 * 5 * 6 * 2


def test_what_is_inside_a_jit_or_a_scan_counts_each_turn():
    square = jnp.zeros((4, 4))
    turns = lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=6)[0]
    found = describe.cost(jax.make_jaxpr(jax.jit(turns))(square).jaxpr)
    assert found.flops == 6 * 4 * 4 * 4 * 2


def test_of_a_conditional_the_dearest_branch_counts():
    square = jnp.zeros((4, 4))
    branches = [lambda a: a, lambda a: a @ a @ a, lambda a: a @ a]
    traced = jax.make_jaxpr(lambda i, a: jax.lax.switch(i, branches, a))(jnp.int32(0), square)
    assert describe.cost(traced.jaxpr).flops == 2 * (4 * 4 * 4 * 2)


def test_elementwise_work_is_free():
    traced = jax.make_jaxpr(lambda a: jnp.tanh(a) + a.sum())(MATRIX)
    assert describe.cost(traced.jaxpr) == (0.0, 0.0)


def test_numbers_of_a_tree_are_counted():
    assert describe.tree_size({"a": MATRIX, "b": {"c": KERNEL}}) == 5 * 7 + 3 * 3 * 3 * 5


COUNTED = ("demo", "mask_rcnn", "sephv14", "cascade")  # tests/configs/test_rows.py traces them all


@pytest.mark.parametrize(("family", "row"), ROWS, ids=IDS)
def test_every_row_has_a_page(family, row, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    config = read(family, row)
    if row or family not in COUNTED:
        page = 64, 96, describe.Cost(0.0, 0.0)
        monkeypatch.setattr(describe, "costs", lambda *_: {"train": page, "predict": page})
    describe.describe(config)
    page = capsys.readouterr().out
    words = " ".join(page.split())
    assert page.startswith(config.name)
    assert families()[family].ROWS[row].asks in words
    assert f"chain {' > '.join(config.lineage)}" in words
    for path in families()[family].ROWS[row].diff:
        part, _, rest = path.partition(".")
        assert path in words or (f"{part} " in words and f"{rest}=" in words)
    assert page.count("\n") <= 48, "one screen"
    for line in ("parameters", "train", "predict"):
        assert f"\n{line} " in page
