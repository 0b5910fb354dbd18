"""What each `--mode` does: joins sources, model, loop and evaluation; `main` only reads flags."""

import functools
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sephjax import build, check
from sephjax.checkpoint import Checkpoints
from sephjax.errors import UserError
from sephjax.evaluation import evaluator, gallery
from sephjax.input import pipeline, sources
from sephjax.input.example import Categories, Source
from sephjax.nets.functional import Functional
from sephjax.train import loop, optimizer, sharding, step
from sephjax.train import workdir as claims
from sephjax.train.setup import Setup
from sephjax.types import Batch, Detections, Params, TrainState
from sephjax.weights import keras

CATEGORIES = "categories.json"
PICTURES = 8  # drawn after an evaluation


def train(config: ConfigDict, workdir: str) -> int:
    """Trains, or goes on training, and evaluates."""
    folder = pathlib.Path(workdir)
    check.check(config)
    for note in claims.claim(folder, config):
        print(note)
    if (done := claims.finished(folder, config)) is not None:
        print(f"{workdir} is trained to step {done} and evaluated: nothing to do.")
        return 0
    loop.train(make_setup(config, folder), folder)
    return 0


def make_setup(config: ConfigDict, workdir: pathlib.Path) -> Setup:
    """Everything that the loop needs; opens both splits."""
    source = _open(config, train=True)
    held_out = _open(config, train=False)
    if held_out.categories != source.categories:
        raise UserError(
            "data.train and data.eval have different categories; "
            "use annotations with the same list."
        )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        _save_categories(workdir, source.categories)
    mesh = sharding.make_mesh()
    model = build.model(config, len(source.categories))
    params, frozen = model.abstract
    constants = optimizer.parameter_names(frozen)
    mask = optimizer.frozen_mask(params, config.optimizer.freeze, constants)
    trained, fixed = optimizer.split_by_mask(params, mask)
    known = [*optimizer.parameter_names(fixed), *constants]
    tx = optimizer.make_optimizer(config, trained, known)

    def state_of(params: Params, frozen: Params, key: Any) -> TrainState:
        trained, _ = optimizer.split_by_mask(params, mask)
        return TrainState(jnp.int32(0), params, frozen, tx.init(trained), key)

    def init() -> TrainState:
        weights_key, run_key = jax.random.split(jax.random.key(config.seed))
        return state_of(*_initial_weights(config, model, weights_key, workdir), run_key)

    return Setup(
        config=config,
        mesh=mesh,
        init=init,
        abstract=jax.eval_shape(state_of, params, frozen, jax.random.key(0)),
        train_step=step.make_train_step(model, tx, build.losses(config), mask),
        batches=pipeline.train_batches(
            source,
            config.data,
            seed=config.seed,
            batch=config.train.batch,
            steps=config.train.steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            masks=config.mask.enabled,
        ),
        evaluate=_evaluation(config, model, held_out, workdir),
    )


def _initial_weights(
    config: ConfigDict, model: Functional, key: Any, workdir: pathlib.Path
) -> tuple[Params, Params]:
    loaded = None
    if config.init.format == "keras":  # first, since the file may not do and drawing takes long
        params, frozen = model.abstract
        loaded = _load_keras(config, params["backbone"], frozen["backbone"], workdir)
    params, frozen = jax.jit(model.init)(key)
    if loaded:
        params["backbone"], frozen["backbone"], report = loaded
        _tell_weights(report, config, workdir)
    return params, frozen


def _load_keras(
    config: ConfigDict, params: Params, frozen: Params, workdir: pathlib.Path
) -> tuple[Params, Params, Any]:
    path, back = config.init.path, config.backbone
    if not path:
        raise UserError("init.path is empty; set it to the weights file, or init.format to 'none'.")
    if pathlib.Path(path).is_file() and not zipfile.is_zipfile(path):
        raise UserError(f"init.path={path} is no npz file; give the one that init.format names.")
    try:
        eps = back.norm_eps or None
        return keras.load_keras_resnet50(path, params, frozen, back.layout, back.depth, eps=eps)
    except UserError as error:
        raise UserError(_first_lines(str(error), workdir / "weights.txt")) from error
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"init.path={path} is a damaged file or another one ({type(error).__name__}: {error}); "
            "fetch it anew."
        ) from error


def _first_lines(message: str, file: pathlib.Path, count: int = 3) -> str:
    """A list of hundreds of tensors as one sentence; all of it in a file."""
    head, *lines = (line.strip() for line in message.splitlines())
    if len(lines) <= count:
        return " ".join([head, "; ".join(lines)]).strip()
    if jax.process_index() == 0:
        file.write_text(f"{message}\n")
    return f"{head} {'; '.join(lines[:count])} and {len(lines) - count} more; each in {file}."


def _tell_weights(report: Any, config: ConfigDict, workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        (workdir / "weights.txt").write_text(f"{report}\n")
        print(f"weights of {config.init.path}: {report.summary()}; each in {workdir}/weights.txt")


def _open(config: ConfigDict, *, train: bool) -> Source:
    source = sources.open_source(config.data, train=train)
    if config.mask.enabled:
        sources.require_masks(source)
    split = "train" if train else "eval"
    notes = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in source.notes.items())
    found = f"{len(source)} images, {len(source.categories)} classes"
    print(f"{split}: {found}; {notes}" if notes else f"{split}: {found}")
    return source


def _save_categories(workdir: pathlib.Path, categories: Categories) -> None:
    rows = [{"id": i, "name": n} for i, n in zip(categories.ids, categories.names, strict=True)]
    (workdir / CATEGORIES).write_text(json.dumps(rows, indent=1))


def _load_categories(workdir: pathlib.Path) -> Categories:
    path = workdir / CATEGORIES
    if not path.exists():
        raise UserError(f"{path} is missing: {workdir} is no workdir of a training run.")
    rows = json.loads(path.read_text())
    return Categories(tuple(r["id"] for r in rows), tuple(r["name"] for r in rows))


def _predictor(config: ConfigDict, model: Functional, mesh: Any) -> Callable[..., Detections]:
    """(params, frozen, host batch) -> detections on the device, compiled once a canvas."""
    run = step.make_predict_step(model, build.classify(config), masks=config.mask.enabled)
    same, cut = sharding.replicated(mesh), sharding.batched(mesh)
    compiled = jax.jit(run, in_shardings=(same, same, cut), out_shardings=cut)
    return lambda params, frozen, batch: compiled(params, frozen, sharding.put_batch(mesh, batch))


def _evaluation(
    config: ConfigDict, model: Functional, source: Source, workdir: pathlib.Path
) -> Callable[[int, Params, Params], dict[str, Any]]:
    mesh = sharding.make_mesh()
    sharding.check_batch(config.eval.batch, mesh, "eval.batch")
    predict_step = _predictor(config, model, mesh)
    batches = pipeline.eval_batches(
        source,
        config.data,
        batch=config.eval.batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    def evaluate(step: int, params: Params, frozen: Params) -> dict[str, Any]:
        report = evaluator.Report(
            directory=workdir / "eval" / str(step),
            step=step,
            name=config.name,
            masks=config.mask.enabled,
            backend=config.eval.backend,
        )
        predict: Callable[[Batch], Detections] = functools.partial(predict_step, params, frozen)
        metrics = evaluator.evaluate(predict, batches, source, report)
        if unreadable := batches.dropped.get("unreadable_images"):
            print(f"images that could not be read and were evaluated as black: {unreadable}")
        if jax.process_index() == 0:
            gallery.write(
                workdir / "pictures" / str(step),
                report.directory / "detections.json",
                source,
                threshold=config.predict.score_threshold,
                count=PICTURES,
            )
        return metrics

    return evaluate


def _found(workdir: pathlib.Path, at: int | None) -> int:
    """The step to restore, before anything else takes its time."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    found = checkpoints.latest() if at is None else at
    if found is None:
        raise UserError(
            f"{workdir} holds no finished checkpoint; train first, or correct --workdir."
        )
    if found not in (steps := checkpoints.steps()):
        raise UserError(f"{workdir} holds no checkpoint of step {at}; --step may be {steps}.")
    return found


def _restored(model: Functional, workdir: pathlib.Path, step: int) -> tuple[Params, Params]:
    checkpoints = Checkpoints(workdir / "checkpoints")
    mesh = sharding.make_mesh()
    params, frozen = model.abstract
    try:
        return checkpoints.restore_weights(
            step, sharding.abstract_on(mesh, params), sharding.abstract_on(mesh, frozen)
        )
    finally:
        checkpoints.close()


def evaluate(config: ConfigDict, workdir: str, at: int | None) -> int:
    """Restores a checkpoint and evaluates it."""
    check.check(config)
    folder = pathlib.Path(workdir)
    step = _found(folder, at)
    source = _open(config, train=False)
    if (folder / CATEGORIES).exists() and _load_categories(folder) != source.categories:
        raise UserError(
            f"data.eval has other categories than {folder / CATEGORIES}, which the model was "
            "trained on; evaluate it on data with the same list."
        )
    model = build.model(config, len(source.categories))
    params, frozen = _restored(model, folder, step)
    _evaluation(config, model, source, folder)(step, params, frozen)
    return 0


def predict(config: ConfigDict, workdir: str, at: int | None, images: str, output: str) -> int:
    """Detects objects in files; exit code 1 when a file could not be read."""
    from sephjax import predicting

    check.check(config)
    folder = pathlib.Path(workdir)
    step = _found(folder, at)
    paths = predicting.find_images(images)
    if pathlib.Path(output).is_file():
        raise UserError(f"--output={output} is a file; name a folder.")
    categories = _load_categories(folder)
    model = build.model(config, len(categories))
    params, frozen = _restored(model, folder, step)
    predict_step = _predictor(config, model, sharding.make_mesh())
    done = predicting.predict_files(
        paths,
        functools.partial(predict_step, params, frozen),
        functools.partial(predicting.bucketed, data=config.data, rows=config.eval.batch),
        categories=categories,
        output=pathlib.Path(output),
        score_threshold=config.predict.score_threshold,
    )
    print(f"{done.detections} detections in {done.images} pictures; written to {done.output}")
    return 1 if done.failed else 0


def prepare(config: ConfigDict) -> int:
    """Writes the config's COCO splits as a tfds dataset with masks into `data.data_dir`."""
    from sephjax.input import builder

    data = config.data
    splits = {
        view.split: (view.annotations, view.images)
        for view in (data.train, data.eval)
        if view.annotations
    }
    if not splits:
        raise UserError(
            "--mode=prepare needs data.train.annotations, data.eval.annotations or both; set them."
        )
    print(f"written to {builder.prepare(splits, data.data_dir)}")
    return 0


def describe(config: ConfigDict) -> int:
    """Prints what the config is."""
    from sephjax import describe as description

    check.check(config)
    description.describe(config)
    return 0
