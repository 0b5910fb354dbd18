"""What each `--mode` does: joins sources, model, loop and evaluation; `main` only reads flags."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sephjax import atomic, build, check, initial, learner, restore
from sephjax.errors import UserError
from sephjax.evaluation import evaluator, gallery
from sephjax.input import buckets, pipeline, sources, transforms
from sephjax.input.example import Source
from sephjax.nets.functional import Functional
from sephjax.train import agreement, loop, programs, sharding, step
from sephjax.train import workdir as claims
from sephjax.train.setup import Setup
from sephjax.types import Batch, Detections, Params, TrainState

PICTURES = 8  # drawn after an evaluation


def train(config: ConfigDict, workdir: str) -> int:
    """Trains, or goes on training, and evaluates."""
    folder = pathlib.Path(workdir)
    check.check(config)
    for note in claims.claim(folder, config):
        print(note)
    claims.require_trainable(folder, config)
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
        claims.save_categories(workdir, source.categories)
    mesh = sharding.make_mesh()
    model = build.model(config, len(source.categories))
    learns = learner.learner(config, model, mesh)

    def init() -> TrainState:
        weights_key, run_key = jax.random.split(jax.random.key(config.seed))
        drawn = initial.weights(config, model, weights_key, workdir, source.categories)
        return learns.start(*drawn, run_key)

    return Setup(
        config=config,
        mesh=mesh,
        init=init,
        abstract=learns.abstract,
        train_step=learns.train_step,
        batches=pipeline.train_batches(
            source,
            config.data,
            seed=config.seed,
            batch=config.train.batch,
            steps=config.train.steps,
            group=config.rpn.sample_group,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            masks=config.mask.enabled,
        ),
        evaluate=_evaluation(config, model, held_out, workdir),
    )


def _open(config: ConfigDict, *, train: bool) -> Source:
    source = sources.open_source(config.data, train=train)
    if config.mask.enabled:
        sources.require_masks(source)
    if not agreement.alike(np.concatenate([source.ids, source.sizes.ravel()]).tobytes()):
        raise UserError(
            f"the processes found different images for data.{'train' if train else 'eval'}; give "
            "every machine the same data."
        )
    split = "train" if train else "eval"
    notes = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in source.notes.items())
    found = f"{len(source)} images, {len(source.categories)} classes"
    print(f"{split}: {found}; {notes}" if notes else f"{split}: {found}")
    return source


def predictor(config: ConfigDict, model: Functional, mesh: Any) -> Callable[..., Detections]:
    """(params, frozen, host batch) -> detections on the device, compiled once a canvas."""
    run = step.make_predict_step(model, build.classify(config), masks=config.mask.enabled)
    compiled = programs.predict_program(run, mesh)
    known: set[tuple[int, ...]] = set()

    def predict(params: Params, frozen: Params, batch: Batch) -> Detections:
        found = compiled(params, frozen, sharding.put_batch(mesh, batch))
        if batch.image.shape not in known:
            known.add(batch.image.shape)
            programs.give_back_memory()
        return found

    return predict


def _evaluation(
    config: ConfigDict, model: Functional, source: Source, workdir: pathlib.Path
) -> Callable[[int, Params, Params], dict[str, Any]]:
    mesh = sharding.make_mesh()
    sharding.check_batch(config.eval.batch, mesh, "eval.batch")
    predict_step = predictor(config, model, mesh)
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
            input_size=_input_size(config.data) if config.eval.reference_metric else None,
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


def _input_size(data: ConfigDict) -> Callable[[int, int], tuple[int, int]]:
    """(height, width) of a file -> of the picture on the canvas of an evaluation."""
    view = data.eval
    return lambda h, w: transforms.resized_shape(
        h, w, view.short_sides[0], view.long_side, data.resize
    )


def evaluate(config: ConfigDict, workdir: str, at: int | None) -> int:
    """Restores a checkpoint and evaluates it."""
    check.check(config)
    folder = pathlib.Path(workdir)
    step = restore.step_of(folder, at)
    source = _open(config, train=False)
    listed = folder / claims.CATEGORIES
    if listed.exists() and claims.load_categories(folder) != source.categories:
        raise UserError(
            f"data.eval has other categories than {listed}, which the model was trained on; "
            "evaluate it on data with the same list."
        )
    model = build.model(config, len(source.categories))
    params, frozen = restore.weights(config, model, folder, step)
    _evaluation(config, model, source, folder)(step, params, frozen)
    return 0


def predict(config: ConfigDict, workdir: str, at: int | None, images: str, output: str) -> int:
    """Detects objects in files; exit code 1 when a file could not be read."""
    from sephjax import predicting

    check.check(config)
    folder = pathlib.Path(workdir)
    step = restore.step_of(folder, at)
    paths = predicting.find_images(images)
    if pathlib.Path(output).is_file():
        raise UserError(f"--output={output} is a file; name a folder.")
    categories = claims.load_categories(folder)
    model = build.model(config, len(categories))
    params, frozen = restore.weights(config, model, folder, step)
    mesh = sharding.make_mesh()
    sharding.check_batch(config.eval.batch, mesh, "eval.batch")
    predict_step = predictor(config, model, mesh)
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


def export(config: ConfigDict, workdir: str, at: int | None, output: str) -> int:
    """Writes the detector of a checkpoint as one file that runs without sephjax."""
    from sephjax.export import stablehlo

    check.check(config)
    folder, file = pathlib.Path(workdir), pathlib.Path(output)
    step_number = restore.step_of(folder, at)
    if file.is_dir():
        raise UserError(f"--output={output} is a folder; name a file.")
    categories = claims.load_categories(folder)
    model = build.model(config, len(categories))
    params, frozen = restore.weights(config, model, folder, step_number)
    canvas, rows = buckets.largest(buckets.evaluation(config.data)), config.eval.batch
    content = stablehlo.serialize(
        step.make_predict_step(model, build.classify(config), masks=config.mask.enabled),
        params,
        frozen,
        category_ids=categories.ids,
        canvas=canvas,
        batch=rows,
    )
    with atomic.draft(file, "name another") as draft:
        draft.write_bytes(content)
    print(
        f"{file}: step {step_number}, {len(content) / 1e6:.1f} MB, for"
        f" {', '.join(stablehlo.PLATFORMS)}; takes uint8 [{rows}, {canvas[0]}, {canvas[1]}, 3] and"
        f" int32 [{rows}, 2]"
    )
    return 0


def prepare(config: ConfigDict) -> int:
    """Writes the config's COCO splits as a tfds dataset with masks into `data.data_dir`."""
    from sephjax.input import builder

    data = config.data
    train, held_out = data.train, data.eval
    if train.annotations and held_out.annotations and train.split == held_out.split:
        raise UserError(
            f"data.train.split and data.eval.split are both {train.split!r}; give each a name of "
            "its own."
        )
    splits = {
        view.split: (view.annotations, view.images)
        for view in (train, held_out)
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


def parity(config: ConfigDict, source: str, images: str, output: str) -> int:
    """Compares the model with torchvision's, layer by layer."""
    from sephjax.parity import run

    return run.parity(config, source, images, output)


def compile_for(
    config: ConfigDict, *, topology: str, program: str, batches: Sequence[str], output: str
) -> int:
    """Compiles for chips that need not be here; `batches` are the images a chip."""
    from sephjax.ahead import run

    check.check(config)
    if not all(batch.isdecimal() and int(batch) for batch in batches):
        raise UserError(f"--chip_batches={','.join(batches)} must be numbers, such as 1,2,4.")
    images = tuple(int(batch) for batch in batches)
    return run.compile_for(config, run.Asked(topology, program, images, output))
