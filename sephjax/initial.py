"""What a model starts from: drawn weights, and over them those of a file, by `weights.formats`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from sephjax import atomic
from sephjax.errors import UserError
from sephjax.input.example import Categories
from sephjax.nets.backbone import resnet
from sephjax.nets.functional import Functional
from sephjax.types import Params
from sephjax.weights import contents, table
from sephjax.weights.formats import FORMATS, Reader

REPORT = "weights.txt"


def weights(
    config: ConfigDict, model: Functional, key: Any, workdir: pathlib.Path, categories: Categories
) -> tuple[Params, Params]:
    """`(params, frozen)` that a run starts from: drawn with `key`, and loaded as `init` says.

    Raises:
        UserError: the file of `init.path` does not do.
    """
    if config.init.format == "none":
        if config.optimizer.freeze and jax.process_index() == 0:
            print(
                "init.format is none: the backbone starts from random weights, and what"
                " optimizer.freeze names stays so."
            )
        return jax.jit(model.init)(key)
    if not config.init.path:
        raise UserError("init.path is empty; set it to the weights file, or init.format to 'none'.")
    # First, since the file may not do and drawing takes long.
    found = read(config, config.init.format, config.init.path)
    if config.init.backbone_only:
        paths = [path for part in model.abstract for path in table.flatten(part)]
        found = contents.backbone_of(found, paths)
    return fill(config, model, key, workdir, categories, found)


def read(
    config: ConfigDict, name: str, path: str, formats: Mapping[str, Reader] = FORMATS
) -> contents.Contents:
    """What a file of the format `name` holds, if it is for the backbone of the config.

    Raises:
        UserError: the file cannot be read, or is of another layout or depth.
    """
    found = formats[name](path)
    contents.check_backbone(found, config.backbone.layout, config.backbone.depth)
    return found


def fill(
    config: ConfigDict,
    model: Functional,
    key: Any,
    workdir: pathlib.Path,
    categories: Categories,
    found: contents.Contents,
) -> tuple[Params, Params]:
    """`(params, frozen)` with what was found; what the file does not have is drawn with `key`.

    Writes what became of each tensor into `weights.txt` of the workdir and prints a summary.

    Raises:
        UserError: tensors do not fit; the first of them are named, the others in `weights.txt`.
    """
    params, frozen = model.abstract
    eps = config.backbone.norm_eps or resnet.LAYOUTS[config.backbone.layout].eps
    try:
        arrays, report = contents.load(found, params, frozen, eps=eps, categories=categories)
    except UserError as error:
        raise UserError(_first_lines(str(error), workdir / REPORT)) from error
    if report.missing:
        params, frozen = jax.jit(model.init)(key)
    _write(workdir / REPORT, f"{report}\n")
    if jax.process_index() == 0:
        print(f"weights of {found.source}: {report.summary()}; each in {workdir / REPORT}")
    return _over(params, arrays), _over(frozen, arrays)


def _over(tree: Params, arrays: table.Arrays) -> Params:
    flat = table.flatten(tree)
    return table.unflatten({path: arrays.get(path, leaf) for path, leaf in flat.items()})


def _first_lines(message: str, file: pathlib.Path, count: int = 3) -> str:
    """A list of hundreds of tensors as one sentence; all of it in a file."""
    head, *lines = (line.strip() for line in message.splitlines())
    if len(lines) <= count:
        return " ".join([head, "; ".join(lines)]).strip()
    _write(file, f"{message}\n")
    return f"{head} {'; '.join(lines[:count])} and {len(lines) - count} more; each in {file}."


def _write(file: pathlib.Path, text: str) -> None:
    if jax.process_index() == 0:
        atomic.write_text(file, text, "choose another workdir")
