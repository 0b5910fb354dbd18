"""What a config is: its chain of parents, its differences, its parameters and its cost."""

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from configs import base
from configs._chain import flat
from sephjax import build
from sephjax.input import buckets
from sephjax.nets.functional import Functional
from sephjax.train import step
from sephjax.types import Batch, Truth

LINES = 12  # differences with a line each; more go by their part of the config
CLASSES = 80  # COCO's; the real number comes from the data


class Cost(NamedTuple):
    """Work of a traced function in convolutions and matmuls; the rest is small beside it."""

    flops: float  # a multiply-add counts two
    bytes: float  # of their outputs, which is about what a backward pass keeps


def cost(jaxpr: Any) -> Cost:
    """Counts a jaxpr: of a conditional the dearest branch, of a scan all its turns."""
    total = Cost(0.0, 0.0)
    for equation in jaxpr.eqns:
        parts = [_primitive(equation)]
        inner = [cost(sub) for sub in _inner(equation.params.values())]
        if equation.primitive.name == "cond":
            parts.append(max(inner, default=Cost(0.0, 0.0)))
        else:
            turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            parts += [Cost(part.flops * turns, part.bytes) for part in inner]
        total = Cost(
            total.flops + sum(p.flops for p in parts), total.bytes + sum(p.bytes for p in parts)
        )
    return total


def _inner(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _primitive(equation: Any) -> Cost:
    name = equation.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return Cost(0.0, 0.0)
    out, left, right = equation.outvars[0].aval, equation.invars[0].aval, equation.invars[1].aval
    if name == "dot_general":
        ((contracted, _), _) = equation.params["dimension_numbers"]
        depth = math.prod(left.shape[axis] for axis in contracted)
    else:
        spec = equation.params["dimension_numbers"].rhs_spec
        depth = math.prod(right.shape) / right.shape[spec[0]]
    return Cost(2.0 * math.prod(out.shape) * depth, math.prod(out.shape) * out.dtype.itemsize)


def describe(config: ConfigDict) -> None:
    """Prints one screen about a config; neither data nor workdir is needed (classes: COCO's 80)."""
    console = Console(highlight=False)
    family, _, row = config.lineage[-1].partition(":")
    rows = getattr(importlib.import_module(f"configs.{family}"), "ROWS", {})
    entry = rows.get(row)
    console.print(f"[bold]{config.name}[/]  {entry.asks if entry else ''}")
    console.print(f"chain       {' > '.join(config.lineage)}")
    console.print(f"published   {entry.published if entry and entry.published else 'nothing'}")
    _print_differences(console, config, entry.diff if entry else {})
    model = build.model(config, CLASSES)
    sizes = {part: tree_size(tree) / 1e6 for part, tree in model.abstract[0].items()}
    total = sum(sizes.values())
    parts = ", ".join(f"{part} {size:.2f}" for part, size in sizes.items())
    console.print(f"parameters  {total:.2f} M at {CLASSES} classes: {parts}")
    for what, (height, width, spent) in costs(config, model).items():
        console.print(
            f"{what:<11} {spent.flops / 1e9:.1f} GFLOP, {spent.bytes / 2**20:.0f} MiB of "
            f"convolution and matmul outputs, an image on {height}x{width}"
        )


def _print_differences(console: Console, config: ConfigDict, own: Mapping[str, Any]) -> None:
    was, now = dict(flat(base.get_config())), dict(flat(config))
    changed = {path for path in now if now[path] != was.get(path)} - {"name", "lineage"}
    inherited = sorted(path for path in changed if not any(_under(path, key) for key in own))
    table = Table("differs from its parent", "value", box=None, title_justify="left")
    lines = {path: _short(value) for path, value in own.items()}
    for path, value in (lines if len(own) <= LINES else _sections(own, own)).items():
        table.add_row(path, value)
    if own:
        console.print(table)
    if inherited:
        words = "; ".join(f"{k}: {v}" for k, v in _sections(inherited, now).items())
        console.print(f"[bold]inherited differences from base[/]  {words}")


def _sections(paths: Iterable[str], values: Mapping[str, Any]) -> dict[str, str]:
    """`{"fpn": "extra=conv_c5 norm=bn", ...}`: what a part of the config holds, in one line."""
    found: dict[str, list[str]] = {}
    for path in paths:
        part, _, rest = path.partition(".")
        text = _short(values[path])
        if rest:
            text = f"{rest}=({text})" if isinstance(values[path], Mapping) else f"{rest}={text}"
        found.setdefault(part, []).append(text)
    return {part: " ".join(words) for part, words in found.items()}


def _under(path: str, key: str) -> bool:
    return path == key or path.startswith(f"{key}.")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_short(item)}" for key, item in value.items())
    return str(value)


def costs(config: ConfigDict, model: Functional) -> dict[str, tuple[int, int, Cost]]:
    """Canvas and cost an image of the forward pass in training and of prediction."""
    found = {}
    data = config.data
    canvases = {"train": buckets.training(data), "predict": buckets.evaluation(data)}
    for what, choices in canvases.items():
        height, width = choices[0]  # the smallest landscape one
        batch = abstract_batch(config, 1, height, width)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        if what == "train":
            run = lambda p, f, b, k: model.apply(p, f, b, k, method="training")
            traced = jax.make_jaxpr(run)(*model.abstract, batch, keys)
        else:
            run = step.make_predict_step(model, build.classify(config), masks=config.mask.enabled)
            traced = jax.make_jaxpr(run)(*model.abstract, batch)
        found[what] = height, width, cost(traced.jaxpr)
    return found


def abstract_batch(config: ConfigDict, images: int, height: int, width: int) -> Batch:
    """Shapes and dtypes of a batch; nothing is allocated."""
    shape = lambda dtype, *sides: jax.ShapeDtypeStruct((images, *sides), dtype)
    objects = config.data.max_objects
    truth = Truth(
        boxes=shape(jnp.float32, objects, 4),
        labels=shape(jnp.int32, objects),
        valid=shape(jnp.bool_, objects),
        masks=shape(jnp.uint8, objects, 112, 112) if config.mask.enabled else None,
    )
    return Batch(
        image=shape(jnp.uint8, height, width, 3),
        size=shape(jnp.int32, 2),
        original=shape(jnp.int32, 2),
        index=shape(jnp.int32),
        valid=shape(jnp.bool_),
        truth=truth,
    )


def tree_size(tree: Any) -> int:
    """Numbers in a pytree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
