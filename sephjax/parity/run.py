"""`--mode=parity`: our detector and torchvision's with the weights of one file, on pictures."""

import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from sephjax import atomic, build, check, initial, observe, predicting
from sephjax.errors import RunError, UserError
from sephjax.export import peer_stages
from sephjax.input import batches, transforms
from sephjax.nets.backbone import resnet
from sephjax.nets.functional import Functional
from sephjax.parity import compare, report
from sephjax.parity import stages as our_stages
from sephjax.train import step
from sephjax.types import Batch, Params
from sephjax.weights import contents, table

PEERS = {"torchvision": peer_stages.Peer}
PREPROCESSING = (
    "Both sides see the same pixels: resized as `data.eval` says (bilinear, half-pixel centres, no "
    "antialiasing), which is not torchvision's own resize; torchvision then normalises them and "
    "pads them to a multiple of 32, and our canvas has that size."
)


class Sides(NamedTuple):
    """Two models with the same weights."""

    config: ConfigDict
    model: Functional
    params: Params
    frozen: Params
    peer: peer_stages.Peer


def parity(config: ConfigDict, source: str, images: str, output: str) -> int:
    """Prints the report and writes `parity.json`.

    Args:
        config: of our model; `data.eval` says how pictures are resized and, with its `limit`, how
            many are looked at; `parity.tolerance` what agrees.
        source: `torchvision:<file>`.
        images: a file, a folder or a glob.
        output: folder for `parity.json`.

    Returns:
        0, where all stages agree.

    Raises:
        RunError: a stage disagrees; it names the first.
        UserError: something does not fit.
    """
    check.check(config)
    paths = predicting.find_images(images)[: config.data.eval.limit or None]
    folder = pathlib.Path(output)
    if folder.is_file():
        raise UserError(f"--output={output} is a file; name a folder.")
    sides = load(config, source)
    console = Console(highlight=False, soft_wrap=True)
    console.print(PREPROCESSING)
    made = make_report(sides, _read(paths), console.print)
    made.show(Console(highlight=False, width=console.width if console.is_terminal else 180))
    file = folder / "parity.json"
    about = {"source": source, "preprocessing": PREPROCESSING}
    text = json.dumps(made.plain() | about | observe.manifest(config), indent=1)
    atomic.write_text(file, f"{text}\n", "choose another --output")
    console.print(f"written to {file}")
    if made.first is not None:
        raise RunError(made.sentence())
    console.print(made.sentence())
    return 0


def load(config: ConfigDict, source: str) -> Sides:
    """Both models with the weights of a file.

    Raises:
        UserError: the file cannot be read, or is of another model than the config.
    """
    name, colon, path = source.partition(":")
    if not colon or not path or name not in PEERS:
        raise UserError(f"--source={source} is no {' or '.join(PEERS)}:<file>; write one.")
    found = initial.read(config, name, path)
    if not found.whole or found.eps is None:
        raise UserError(f"{path} holds a backbone: a parity report needs a whole detector.")
    peer = PEERS[name](found.tensors, found.eps)
    if peer.has_masks != config.mask.enabled:
        raise UserError(
            f"mask.enabled is {config.mask.enabled}, but {path} has "
            f"{'a' if peer.has_masks else 'no'} mask head; choose the config that fits."
        )
    model = build.model(config, peer.classes)
    eps = config.backbone.norm_eps or resnet.LAYOUTS[config.backbone.layout].eps
    try:
        arrays, _ = contents.load(found, *model.abstract, eps=eps)
    except UserError as error:
        head, *lines = (line.strip() for line in str(error).splitlines())
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(f"{head} {'; '.join(lines[:3])}{more}.") from error
    params, frozen = (
        table.unflatten({key: arrays[key] for key in table.flatten(part)})
        for part in model.abstract
    )
    return Sides(config, model, params, frozen, peer)


def make_report(
    sides: Sides,
    pictures: Iterable[tuple[str, np.ndarray]],
    say: Callable[[str], Any] = lambda _: None,
) -> report.Report:
    """Compares both sides on pictures (name, uint8 RGB [h, w, 3]), one after the other.

    One program is compiled for each size of canvas.
    """
    config, model = sides.config, sides.model
    classify = build.classify(config)
    look = lambda detector: our_stages.stages(detector, classify)
    names = [one.name for one in model.inside(sides.params, sides.frozen, look)]
    predict = step.make_predict_step(model, classify, masks=config.mask.enabled)

    @jax.jit
    def compared(params: Params, frozen: Params, batch: Batch, theirs: Any) -> Any:
        start = {"image": batch.image, "size": batch.size}
        see = lambda detector: compare.every(look(detector), start, theirs)
        found = model.inside(params, frozen, see)
        masks = theirs.get("mask_head/predictor")
        whole = predict(params, frozen, batch)
        ends = compare.end_to_end(whole, theirs[our_stages.DETECTIONS], masks)
        return found | {report.END: {part: {"own": one} for part, one in ends.items()}}

    made = report.Report(config.parity.tolerance)
    paths = sides.peer.paths | {report.END: "the whole model"}
    for name, picture in pictures:
        began = time.monotonic()
        theirs, batch = _both(sides.peer, picture, config)
        if other := sorted(set(names) ^ set(theirs)):
            raise UserError(f"The two sides do not have the same stages: {', '.join(other)}.")
        found = jax.device_get(compared(sides.params, sides.frozen, batch, theirs))
        ordered = {stage: found[stage] for stage in [*names, report.END]}
        report.add(made, ordered, paths, _shapes(theirs))
        size, canvas = batch.size[0].tolist(), list(batch.image.shape[1:3])
        made.pictures.append({"file": name, "size": size, "canvas": canvas})
        seconds = time.monotonic() - began
        say(f"{name}: {size[0]}x{size[1]} on {canvas[0]}x{canvas[1]}, {seconds:.1f} s")
    return made


def _both(peer: peer_stages.Peer, picture: np.ndarray, config: ConfigDict) -> tuple[Any, Batch]:
    """The peer's stages of a picture, and the picture as our batch on a canvas of the same size."""
    data = config.data
    most = {"proposals": config.rpn.proposals.test_post, "detections": config.test.detections}
    frame = batches.frame_of(data, data.eval, train=False, masks=False)
    short = frame.short_sides[0]
    high, wide = picture.shape[:2]
    size = transforms.resized_shape(high, wide, short, frame.long_side, frame.resize)
    bare = batches.blank(1, size, 0, masks=False)
    batches.place_image(bare, 0, picture, short, frame)
    theirs = peer.run(bare["image"][0], **most)
    height, width = theirs[our_stages.INPUT].shape[1:3]
    arrays = batches.blank(1, (height, width), 0, masks=False)
    batches.place_image(arrays, 0, picture, short, frame)
    return theirs, batches.to_batch(arrays)


def _shapes(theirs: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    leaf = lambda value: value["boxes"] if isinstance(value, dict) else value
    return {name: leaf(value).shape for name, value in theirs.items()}


def _read(paths: list[pathlib.Path]) -> Iterable[tuple[str, np.ndarray]]:
    for path in paths:
        image = predicting.read_image(path)
        if image is None:
            raise RunError(f"{path} is no readable picture; leave it out.")
        yield path.name, image
