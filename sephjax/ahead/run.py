"""`--mode=compile`: the train or the predict step of a config, compiled for a topology by name.

Nothing runs and no chip is asked. What is estimated and what the compiler says: docs/SCALING.md.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from sephjax import atomic, build, describe, learner
from sephjax.ahead import account, chips, flops
from sephjax.errors import RunError, UserError
from sephjax.input import buckets
from sephjax.nets.functional import Functional
from sephjax.train import programs, sharding, step
from sephjax.types import Batch

PROGRAMS = ("train", "predict")
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to compile."""

    topology: str  # see `chips.topology`
    program: str  # one of PROGRAMS
    batches: tuple[int, ...]  # images a chip
    output: str  # JSON file, or empty


def compile_for(config: ConfigDict, asked: Asked) -> int:
    """Compiles at every batch, prints a table and writes JSON; 1 if no batch fits.

    Raises:
        UserError: the topology is unknown here, the program is none, or a batch cannot be cut into
            the groups of images that share a sample.
        RunError: the compiler refuses the program for another reason than memory.
    """
    if asked.program not in PROGRAMS:
        raise UserError(f"--program={asked.program} is none; use {' or '.join(PROGRAMS)}.")
    topology = chips.topology(asked.topology)
    if asked.program == "train":
        for images in asked.batches:
            _check_groups(config.rpn.sample_group, images, len(topology.devices))
            _check_parts(config.train.accumulate, images)
    model = build.model(config, describe.CLASSES)
    canvas = _canvas(config, asked.program)
    told = _head(config, model, topology, asked.program, canvas)
    for images in sorted(set(asked.batches)):
        row = _compile(config, model, topology, asked.program, canvas, images)
        told["batches"].append(row)
        print(json.dumps(row), flush=True)
        _write(asked.output, told)
        if not row["fits"]:
            break  # more will not fit either
    told["largest_batch"] = _largest(told["batches"], topology.chip)
    _write(asked.output, told)
    _print(told)
    return 0 if told["largest_batch"]["compiled"] else 1


def _check_groups(group: int, images: int, count: int) -> None:
    if images * count % group:
        raise UserError(
            f"--chip_batches={images} makes {images * count} images on {count} chips, which groups"
            f" of rpn.sample_group={group} do not divide; use a multiple of"
            f" {group // math.gcd(group, count)}."
        )


def _check_parts(parts: int, images: int) -> None:
    if images % parts:
        raise UserError(
            f"--chip_batches={images} cannot be cut into train.accumulate={parts} micro-batches;"
            f" use a multiple of {parts}."
        )


def _canvas(config: ConfigDict, program: str) -> tuple[int, int]:
    """The largest canvas; its portrait is the same work."""
    of = {"train": buckets.training, "predict": buckets.evaluation}
    return buckets.largest(of[program](config.data))


def _head(
    config: ConfigDict,
    model: Functional,
    topology: chips.Topology,
    program: str,
    canvas: tuple[int, int],
) -> dict[str, Any]:
    params, _ = model.abstract
    count = flops.train_flops if program == "train" else flops.predict_flops
    parts = count(config, params, canvas) if flops.countable(config) else {}
    mask = learner.fixed_mask(config, model)
    trained = [
        leaf.size * leaf.dtype.itemsize
        for leaf, fixed in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
        if not fixed
    ]
    return {
        "config": config.name,
        "program": program,
        "topology": topology.name,
        "chips": len(topology.devices),
        "compute_dtype": config.compute_dtype,
        "canvas": list(canvas),
        "hbm_bytes": int(topology.chip.memory),
        "trained_parameter_bytes": sum(trained),
        "model_flops_an_image": parts | {"total": sum(parts.values())},
        "jax": jax.__version__,
        "optimization_level": _effort(),
        "batches": [],
    }


def _effort() -> str:
    """JAX's own setting JAX_OPTIMIZATION_LEVEL (`O1`), or `default`."""
    level = str(jax.config.values["jax_optimization_level"])
    return "default" if level == "UNKNOWN" else level


def _compile(
    config: ConfigDict,
    model: Functional,
    topology: chips.Topology,
    program: str,
    canvas: tuple[int, int],
    images: int,
) -> dict[str, Any]:
    """What the compiler says of one per-chip batch."""
    mesh = Mesh(np.asarray(topology.devices), (sharding.AXIS,))
    batch = describe.abstract_batch(config, images * mesh.size, *canvas)
    row: dict[str, Any] = {"images": images, "fits": False}
    began = time.perf_counter()
    lowered = _lower(config, model, mesh, program, batch)
    row["trace_seconds"] = round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise RunError(
                f"the compiler of {topology.name} refuses this program:"
                f" {str(error).strip().splitlines()[0]}."
            ) from error
        return row | {"refused": _memory_words(str(error)), **_took(began)}
    spent, work = account.memory(compiled), account.work(compiled)
    if program == "train" and config.train.accumulate > 1:
        work = account.Work(None, None)  # of the loop over micro-batches one turn would count
    text = compiled.as_text()
    _dump(text, f"{config.name}-{program}-{topology.name}-{images}")
    return row | {
        "fits": spent.peak <= topology.chip.memory,
        **_took(began),
        "memory_bytes": spent._asdict(),
        "flops": work.flops,
        "bytes_accessed": work.bytes,
        "collectives": account.summed(account.collectives(text)),
    }


def _lower(config: ConfigDict, model: Functional, mesh: Mesh, program: str, batch: Batch) -> Any:
    if program == "train":
        learns = learner.learner(config, model, mesh)
        jitted = programs.train_program(config, learns.train_step, mesh)
        return jitted.lower(learns.abstract, batch)
    run = step.make_predict_step(model, build.classify(config), masks=config.mask.enabled)
    return programs.predict_program(run, mesh).lower(*model.abstract, batch)


def _took(began: float) -> dict[str, float]:
    return {"compile_seconds": round(time.perf_counter() - began, 1)}


def _memory_words(message: str) -> str:
    """How much the compiler says that a program lacks."""
    if found := re.search(r"Used [\d.]+\w* of [\d.]+\w* hbm", message):
        return found.group()
    if found := re.search(
        r"temporaries \(([\d.]+\w*)\) exceeds available HBM \(([\d.]+\w*)\)", message
    ):
        return f"temporaries of {found[1]} in {found[2]}"
    return message.strip().splitlines()[0]


def _dump(text: str, name: str) -> None:
    """Leaves the compiled text in the folder of SEPHJAX_HLO, if that is set."""
    if folder := os.environ.get("SEPHJAX_HLO"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(folder) / f"{name.replace(':', '_')}.txt").write_text(text)


def _largest(rows: list[dict[str, Any]], chip: chips.Chip) -> dict[str, int | None]:
    """The largest batch that compiled and fits, and that which a line through two of them gives.

    No line for a GPU: the temporaries lack cuDNN's workspace and hardly grow with the batch.
    """
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        return {"compiled": 0, "estimated": 0}
    largest = fitting[-1]["images"]
    if chip.platform == "cuda":
        return {"compiled": largest, "estimated": None}
    if len(fitting) < 2:
        return {"compiled": largest, "estimated": largest}
    (x0, y0), (x1, y1) = [(row["images"], row["memory_bytes"]["peak"]) for row in fitting[-2:]]
    slope = (y1 - y0) / (x1 - x0)
    refused = [row["images"] - 1 for row in rows if not row["fits"]]
    guess = math.floor(x1 + (chip.memory - y1) / slope) if slope > 0 else largest
    return {"compiled": largest, "estimated": max(largest, min([guess, *refused]))}


def _write(output: str, told: dict[str, Any]) -> None:
    if output:
        text = json.dumps(told, indent=1) + "\n"
        atomic.write_text(pathlib.Path(output), text, "choose another --output")


def _print(told: dict[str, Any]) -> None:
    console = Console(highlight=False)
    height, width = told["canvas"]
    console.print(
        f"{told['config']}, {told['program']} step, {height}x{width}, {told['compute_dtype']},"
        f" {told['chips']} chips of {told['topology']}, {told['hbm_bytes'] / GB:.1f} GB each"
    )
    heads = ("images a chip", "fits", "arguments GB", "temporary GB", "peak GB", "TFLOP")
    table = Table(*heads, "over model", "GB moved", "collectives", "compiled in s", box=None)
    model = told["model_flops_an_image"]["total"]
    for row in told["batches"]:
        table.add_row(*_cells(row, model))
    console.print(table)
    largest = told["largest_batch"]
    estimated = "no estimate" if (most := largest["estimated"]) is None else f"{most} estimated"
    console.print(f"largest batch a chip: {largest['compiled']} compiled, {estimated}")


def _cells(row: dict[str, Any], model: float) -> list[str]:
    if "refused" in row:
        return [str(row["images"]), f"no: {row['refused']}"]
    spent = row["memory_bytes"]
    sent = ", ".join(
        f"{entry['count']} {name} {entry['bytes'] / 1e6:.1f} MB"
        for name, entry in row["collectives"].items()
    )
    work, moved = row["flops"], row["bytes_accessed"]
    over = f"{work / (model * row['images']):.3f}" if model and work else "-"
    gigabytes = [f"{spent[name] / GB:.2f}" for name in ("arguments", "temporary", "peak")]
    return [
        str(row["images"]),
        "yes" if row["fits"] else "no",
        *gigabytes,
        f"{work / 1e12:.3f}" if work else "-",
        over,
        f"{moved / GB:.1f}" if moved else "-",
        sent or "none",
        f"{row['compile_seconds']:.0f}",
    ]
