"""What a weights file holds, in its own names, and how that goes into a model.

Each format has a reader that returns `Contents`; from there all formats are alike.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sephjax.errors import UserError
from sephjax.input.example import Categories
from sephjax.nets.backbone import resnet
from sephjax.types import Params
from sephjax.weights import classes, table


@dataclasses.dataclass(frozen=True)
class Contents:
    """Tensors of a file and what must be known to use them.

    Attributes:
        source: The file, for messages.
        tensors: By their names. Values may have been folded into others: see `folded`.
        rules: From their names to our paths in the whole detector.
        layout: The backbone layout that they were trained in.
        eps: Of the batch norm that they were trained with; None: nothing is to be made up for.
        whole: A whole detector; else a backbone.
        classes: Number of classes of a detector, without background.
        coco: 80 or 90 classes are COCO's categories.
        names: Of the classes, by label; None: not known.
        ignore: Regexes of their names that no model here has a place for.
        folded: Names whose values went into another one: `{name: that one}`.
        notes: Sentences about what was done, without a full stop.
    """

    source: str
    tensors: table.Arrays
    rules: Sequence[table.Rule]
    layout: str
    eps: float | None = None
    whole: bool = False
    classes: int | None = None
    coco: bool = False
    names: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    folded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def depth(self) -> int | None:
        """The deepest ResNet that is wholly there, or None."""
        return max((d for d in resnet.DEPTHS if self._has(d)), default=None)

    def _has(self, depth: int) -> bool:
        convs = (1, 2, 3) if depth >= 50 else (1, 2)
        paths = [
            f"backbone/stage{s}/block{b}/conv{c}/kernel"
            for s, units in enumerate(resnet.DEPTHS[depth], 1)
            for b in (0, units - 1)
            for c in convs
        ]
        names = [name for path in paths for name, _ in table.translations(self.rules, path)]
        return len(names) == len(paths) and all(name in self.tensors for name in names)


def backbone_of(contents: Contents, ours: Sequence[str]) -> Contents:
    """The backbone of a detector's file alone; the rest counts as no part of it.

    Args:
        contents: What a reader found.
        ours: Paths of the model.
    """
    paths = [path for path in ours if path.startswith("backbone/")]
    names = {name for path in paths for name, _ in table.translations(contents.rules, path)}
    tensors = {name: value for name, value in contents.tensors.items() if name in names}
    note = f"its backbone alone: {len(contents.tensors) - len(tensors)} other tensors are left out"
    return dataclasses.replace(
        contents, tensors=tensors, whole=False, classes=None, notes=(*contents.notes, note)
    )


def check_backbone(contents: Contents, layout: str, depth: int) -> None:
    """Compares layout and depth with what the config asks for.

    Raises:
        UserError: they differ; it says what to set.
    """
    found = contents.depth or depth  # without a whole backbone the table tells what is missing
    if (contents.layout, found) != (layout, depth):
        raise UserError(
            f"The weights in {contents.source} are a ResNet-{found} of layout {contents.layout!r} "
            f"and the config asks for a ResNet-{depth} of layout {layout!r}: set "
            f"backbone.layout={contents.layout} and backbone.depth={found}, or take other weights."
        )


def load(
    contents: Contents,
    params: Params,
    frozen: Params,
    *,
    eps: float,
    categories: Categories | None = None,
) -> tuple[table.Arrays, table.LoadReport]:
    """Brings a file into the names and layouts of a model.

    Args:
        contents: What a reader found.
        params: Trained values of the detector, or their shapes; at least `backbone`.
        frozen: Frozen values, likewise.
        eps: Of the model's batch norm; the difference to the file's goes into the variance.
        categories: Of the model. A COCO file gives the rows of these categories, if they are
            COCO's, a checkpoint of ours those of the same names; else, for another number of
            classes, the predictors keep their value.

    Returns:
        float32 arrays by our path, those that keep their value absent; and the report.

    Raises:
        UserError: tensors that are missing, left over or of the wrong shape; all are named.
    """
    ours = table.flatten(params) | table.flatten(frozen)
    plan = _plan(contents, ours, categories)
    arrays, report = table.load(
        contents.rules,
        ours | plan.stored,
        contents.tensors,
        source=contents.source,
        ignore=contents.ignore,
        keep=() if contents.whole else ("^(?!backbone/)",),
        anew=plan.anew,
    )
    for path in plan.stored:
        arrays[path] = classes.choose(path, arrays[path], plan.rows, contents.classes or 0)
    if shift := np.float32((eps if contents.eps is None else contents.eps) - eps):
        moved = [path for path in arrays if re.search("^backbone/.*/variance$", path)]
        arrays |= {path: arrays[path] + shift for path in moved}
    by_name = {name: path for path, name in report.used}
    folded = [(by_name[into], name) for name, into in contents.folded.items() if into in by_name]
    return (
        {path: np.asarray(array, np.float32) for path, array in arrays.items()},
        report._replace(
            used=tuple(sorted([*report.used, *folded])), notes=(*contents.notes, *plan.notes)
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What happens to the predictors.

    Attributes:
        stored: Shapes that the file has, of the tensors of which classes are chosen.
        rows: The classes to choose.
        anew: Regexes of the paths that keep their value.
        notes: As in `Contents`.
    """

    stored: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: Sequence[int] = ()
    anew: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _plan(contents: Contents, ours: Mapping[str, Any], wanted: Categories | None) -> _Plan:
    has = contents.classes
    if has is None or wanted is None:
        return _Plan()
    rows = _rows(contents, has, wanted)
    if has == len(wanted) and (rows is None or rows == list(range(has))):
        other = rows is None and contents.names is not None
        note = "its classes have other names: the predictors are taken over by place"
        return _Plan(notes=(note,) if other else ())
    paths = [
        path
        for path, leaf in ours.items()
        if classes.depends(path, leaf.shape, len(wanted)) and not _agnostic(contents, path, has)
    ]
    if rows is None:
        note = (
            f"it has {has} classes and the model {len(wanted)}: {', '.join(_layers(paths))} start "
            "anew"
        )
        return _Plan(anew=tuple(f"^{re.escape(path)}$" for path in paths), notes=(note,))
    shapes = {
        path: np.empty((*ours[path].shape[:-1], classes.width(path, has)), np.bool_)
        for path in paths
    }
    by = "COCO category" if contents.coco else "name"
    note = f"{len(rows)} of its {has} classes are taken, by {by}"
    return _Plan(stored=shapes, rows=rows, notes=(note,))


def _rows(contents: Contents, count: int, wanted: Categories) -> list[int] | None:
    """Which of the file's classes each wanted category is, or None unless it has them all."""
    if contents.coco:
        return classes.rows_of(count, wanted)
    names = contents.names or ()
    if len(set(names)) < len(names) or not set(wanted.names) <= set(names):
        return None
    return [names.index(name) for name in wanted.names]


def _agnostic(contents: Contents, path: str, count: int) -> bool:
    """Is this tensor of the file, of a predictor, one for all its `count` classes?

    Deltas for all classes are as wide as those of a single one.
    """
    for name, _ in table.translations(contents.rules, path):
        if name in contents.tensors:
            return 4 in contents.tensors[name].shape and "deltas" in path and count != 1
    return False


def _layers(paths: Sequence[str]) -> list[str]:
    return sorted({path.rpartition("/")[0] for path in paths})
