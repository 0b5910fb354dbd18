"""The files of a run's folder that say whose it is and how far it got."""

import json
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from sephjax import atomic, checkpoint, observe
from sephjax.errors import UserError
from sephjax.input.example import Categories
from sephjax.train.agreement import agreed

# Keys that may differ when a run goes on: they change how long, how fast and what is looked at, not
# what a step computes. (With the cosine schedule train.steps does, and train.accumulate where batch
# norm learns: see `claim`.) A name with a dot at its end stands for everything below it.
HARMLESS = (
    "name",
    "lineage",
    "train.steps",
    "train.log_every",
    "train.ema",
    "train.accumulate",
    "train.remat",
    "eval.",
    "checkpoint.",
    "predict.",
    "parity.",
    "data.workers",
    "data.threads",
    "data.prefetch",
)
ABSENT = "absent"
CATEGORIES = "categories.json"


def checkpoints_of(workdir: pathlib.Path, config: ConfigDict) -> checkpoint.Checkpoints:
    """The checkpoints of a run."""
    values: Any = config.checkpoint
    return checkpoint.Checkpoints(workdir / "checkpoints", values.keep)


def claim(workdir: pathlib.Path, config: ConfigDict) -> list[str]:
    """Makes `workdir` the folder of `config`: writes `config.json`, or checks the one there.

    A folder in which nothing was trained yet is nobody's: a first command that failed for a wrong
    path can be given again with the right one.

    Returns:
        Sentences about harmless differences that the person who resumes should know.

    Raises:
        UserError: if the folder belongs to another config; it names the keys and both values.
    """
    file = workdir / "config.json"
    mine = observe.plain_config(config)
    notes = []
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; choose a folder as workdir.")
    if file.exists() and _trained_in(workdir, config):
        try:
            theirs = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error}); choose another workdir.") from error
        differences = _differences(theirs, mine)
        bad = {key: pair for key, pair in differences.items() if not key.startswith(HARMLESS)}
        if bad:
            told = "; ".join(f"{key} is {a!r} there and {b!r} here" for key, (a, b) in bad.items())
            raise UserError(
                f"{workdir} belongs to another config: {told};"
                " choose another workdir or set these keys back."
            )
        if "train.steps" in differences and mine["schedule"]["name"] == "cosine":
            before, now = differences["train.steps"]
            notes.append(
                f"train.steps was {before} and is {now}: the cosine of the learning rate now ends"
                " there, so this is not the run that would have had it from the start."
            )
        if "train.ema" in differences:
            before, now = differences["train.ema"]
            notes.append(f"train.ema was {before} and is {now}: other averages, the same training.")
        before, now = differences.get("train.accumulate", (1, 1))
        if now != (before := 1 if before == ABSENT else before):
            notes.append(
                f"train.accumulate was {before} and is {now}: other batches for batch norm that"
                " learns, else the same training."
            )
    write_json(file, mine)
    return notes


def _trained_in(workdir: pathlib.Path, config: ConfigDict) -> bool:
    return (workdir / "metrics.jsonl").exists() or bool(checkpoints_of(workdir, config).steps())


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    a, b = _flat(theirs), _flat(mine)
    keys = sorted(a.keys() | b.keys())
    pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves


def require_trainable(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Checks that a run in `workdir` would start from scratch or go on, whole.

    Raises:
        UserError: the folder holds weights alone, which the run would not look at.
    """
    checkpoints = checkpoints_of(workdir, config)
    if checkpoints.steps() and not checkpoints.steps(whole=True):
        raise UserError(
            f"{workdir} holds converted weights and no training to go on from; train in another "
            f"workdir, with --config.init.format=sephjax --config.init.path={workdir}."
        )


def save_categories(workdir: pathlib.Path, categories: Categories) -> None:
    """Writes `categories.json`: what each class of the model is called in the data."""
    rows = [{"id": i, "name": n} for i, n in zip(categories.ids, categories.names, strict=True)]
    atomic.write_text(workdir / CATEGORIES, json.dumps(rows, indent=1), "choose another workdir")


def load_categories(workdir: pathlib.Path) -> Categories:
    """What `save_categories` wrote.

    Raises:
        UserError: it is not there.
    """
    path = workdir / CATEGORIES
    if not path.exists():
        raise UserError(f"{path} is missing: {workdir} is no workdir of a training run.")
    rows = json.loads(path.read_text())
    return Categories(tuple(r["id"] for r in rows), tuple(r["name"] for r in rows))


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes `value` in one go, on process 0 only, making the folders above it."""
    if jax.process_index() == 0:
        atomic.write_text(file, json.dumps(value, indent=2) + "\n", "choose another workdir")


def write_manifest(workdir: pathlib.Path, config: ConfigDict, step: int) -> None:
    """Writes `manifest.json`; what earlier starts of this run wrote stays under `earlier`."""
    file = workdir / "manifest.json"
    earlier = []
    if step and file.exists():
        before = json.loads(file.read_text())
        earlier = [*before.pop("earlier", []), {k: v for k, v in before.items() if k != "config"}]
    write_json(file, observe.manifest(config) | {"from_step": step, "earlier": earlier})


def trim_metrics(workdir: pathlib.Path, step: int) -> None:
    """Removes what a killed run wrote into `metrics.jsonl` after `step`; it will come again."""
    file = workdir / "metrics.jsonl"
    if jax.process_index() or not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) != len(lines):
        atomic.write_text(file, "".join(kept), "choose another workdir")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line cut short


def evaluated(workdir: pathlib.Path, step: int) -> bool:
    """Has the evaluation of `step` left its numbers? All processes get the answer of process 0."""
    return bool(agreed((workdir / "eval" / str(step) / "metrics.json").exists()))


def latest(checkpoints: checkpoint.Checkpoints) -> int | None:
    """The newest step to go on from, or None; all processes get the answer of process 0."""
    step = checkpoints.latest(whole=True)
    found = agreed(-1 if step is None else step)
    return None if found < 0 else found


def finished(workdir: pathlib.Path, config: ConfigDict) -> int | None:
    """The last step, if all steps are done, saved and evaluated; else None. Reads no array."""
    step = latest(checkpoints_of(workdir, config))
    values: Any = config.train
    done = step is not None and step >= values.steps and evaluated(workdir, step)
    return step if done else None
