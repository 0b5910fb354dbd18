"""Weights are ported by table: pairs of name patterns, one table for loading and for saving.

A pattern is a name in which `{stage}` stands for a number; the same word on the other side is the
same number. `{stage:+1}` writes it one higher, `{block:a}` as a letter (0 is a), `{conv:a1}` as a
letter (1 is a). Every tensor of both sides must be accounted for exactly once; all problems are
gathered and raised together.
"""

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sephjax.errors import UserError

Arrays = dict[str, np.ndarray]
SHOWN = 4  # names in a summary


class Transform(NamedTuple):
    """How a tensor is laid out on the two sides: functions that undo each other."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def transpose(*axes: int) -> Transform:
    """A permutation of axes; `axes` as `np.transpose` takes them on the way to ours."""
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda x: np.transpose(x, axes), lambda x: np.transpose(x, back))


SAME = Transform(lambda x: x, lambda x: x)
CONV = transpose(2, 3, 1, 0)  # PyTorch's OIHW, ours HWIO
CONV_TRANSPOSE = transpose(2, 3, 0, 1)  # PyTorch's IOHW, ours HWIO
LINEAR = transpose(1, 0)  # PyTorch's OI, ours IO


def fc_after_pool(height: int, width: int) -> Transform:
    """A dense layer on flattened features: PyTorch's input runs (c, h, w), ours (h, w, c)."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        cells = x.reshape(x.shape[0], -1, height, width)
        return cells.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

    def to_theirs(x: np.ndarray) -> np.ndarray:
        cells = x.reshape(height, width, -1, x.shape[1])
        return cells.transpose(3, 2, 0, 1).reshape(x.shape[1], -1)

    return Transform(to_ours, to_theirs)


def background_first(then: Transform) -> Transform:
    """Class outputs whose first entry is background (torchvision, slim); ours comes last."""
    return Transform(
        lambda x: np.roll(then.to_ours(x), -1, axis=-1),
        lambda x: then.to_theirs(np.roll(x, 1, axis=-1)),
    )


class Rule(NamedTuple):
    """One pair of patterns and what happens to the tensor between them."""

    ours: str
    theirs: str
    transform: Transform = SAME


class LoadReport(NamedTuple):
    """What became of every tensor; prints as a table.

    Attributes:
        used: Pairs (ours, theirs), sorted.
        unused: Names in the file that were left out on purpose.
        missing: Paths of ours that keep their value, on purpose: the file does not have them, or
            has them for other classes.
        notes: Sentences, without a full stop, about what was done to the values.
    """

    used: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line a tensor: ours on the left, theirs on the right, `-` where there is none."""
        rows = [*self.used, *((path, "-") for path in self.missing)]
        rows += [("-", name) for name in self.unused]
        width = max((len(ours) for ours, _ in rows), default=0)
        return "\n".join([f"{ours:<{width}}  {theirs}" for ours, theirs in rows] + [self.summary()])

    def summary(self) -> str:
        """The three counts, the first names of what was not used or missing, and the notes."""
        counts = (
            f"{len(self.used)} used, {len(self.unused)} unused{_named(self.unused)}, "
            f"{len(self.missing)} missing{_named(self.missing)}"
        )
        return "; ".join([counts, *self.notes])


def _named(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f" ({', '.join(names[:SHOWN])}{more})"


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict as `{"a/b/kernel": leaf}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{path}": leaf for path, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def load(
    rules: Sequence[Rule],
    ours: Mapping[str, Any],
    theirs: Mapping[str, np.ndarray],
    *,
    source: str,
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
    anew: Sequence[str] = (),
) -> tuple[Arrays, LoadReport]:
    """Brings the tensors of a file into our names and layouts.

    Args:
        rules: The table.
        ours: `{path: anything with a shape}`: what the model has.
        theirs: `{name: array}`: what the file has.
        source: The file, for messages.
        ignore: Regexes of their names that may stay unused.
        keep: Regexes of our paths that the file need not have.
        anew: Regexes of our paths that keep their value even if the file has them.

    Returns:
        Arrays by our path (paths that keep their value are absent), and the report.

    Raises:
        UserError: some tensor is missing, left over, of the wrong shape or claimed by two rules.
    """
    arrays: Arrays = {}
    used, missing, passed, problems = [], [], set(), []
    for path in sorted(ours):
        pairs = translations(rules, path)
        name = pairs[0][0] if len(pairs) == 1 else None
        if not _unmatched([path], anew):
            missing.append(path)
            passed |= {name for name, _ in pairs}
        elif len(pairs) > 1:
            problems.append(f"ambiguous: {path} is claimed by {[name for name, _ in pairs]}")
        elif name is None or name not in theirs:
            missing.append(path)
        else:
            used.append((path, name))
            arrays[path], shape = _turned(pairs[0][1], np.asarray(theirs[name]))
            if shape != tuple(ours[path].shape):
                shapes = f"{shape} in the file, {tuple(ours[path].shape)} in the model"
                problems.append(f"wrong shape: {path} has {shapes}")
    problems += [f"missing: {path}" for path in _unmatched(missing, [*keep, *anew])]
    unused = sorted(theirs.keys() - {name for _, name in used})
    problems += [f"left over: {name}" for name in _unmatched(unused, ignore) if name not in passed]
    problems += [f"used twice: {name}" for name in _repeated(name for _, name in used)]
    if problems:
        raise UserError(
            f"The weights in {source} do not fit this model, {len(problems)} tensors disagree:\n  "
            + "\n  ".join(problems)
        )
    return arrays, LoadReport(tuple(used), tuple(unused), tuple(missing))


def save(rules: Sequence[Rule], ours: Mapping[str, Any]) -> Arrays:
    """Brings our tensors into the names and layouts of the other side.

    Raises:
        UserError: a tensor has no rule, or more than one, or two have the same name there.
    """
    arrays: Arrays = {}
    problems = []
    for path in sorted(ours):
        pairs = translations(rules, path)
        if len(pairs) != 1 or pairs[0][0] in arrays:
            problems.append(f"{path}: {[name for name, _ in pairs] or 'no rule'}")
        else:
            name, transform = pairs[0]
            arrays[name] = transform.to_theirs(np.asarray(ours[path]))
    if problems:
        raise UserError("These tensors have no single name there:\n  " + "\n  ".join(problems))
    return arrays


def _turned(transform: Transform, value: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """The array in our layout and its shape, or as the file has it if it cannot be turned."""
    try:
        array = transform.to_ours(value)
    except ValueError:  # not even the number of axes is right
        array = value
    return array, array.shape


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})


def _unmatched(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not any(re.search(p, name) for p in patterns)]


def translations(rules: Sequence[Rule], path: str) -> list[tuple[str, Transform]]:
    """What each rule that fits our `path` calls it on the other side."""
    found = []
    for rule in rules:
        if "{" not in rule.ours and rule.ours != path:
            continue
        numbers = _parse(rule.ours, path)
        if numbers is not None:
            found.append((_write(rule.theirs, numbers), rule.transform))
    return found


def _parse(pattern: str, name: str) -> dict[str, int] | None:
    """The numbers that make `name` of `pattern`, or None."""
    regex, specs = "", {}
    for text, field, spec, _ in string.Formatter().parse(pattern):
        regex += re.escape(text)
        if field is not None:
            specs[field] = spec
            regex += f"(?P<{field}>{'[a-z]' if (spec or '').startswith('a') else '[0-9]+'})"
    match = re.fullmatch(regex, name)
    if match is None:
        return None
    return {field: _number(match[field], spec) for field, spec in specs.items()}


def _number(text: str, spec: str) -> int:
    if spec.startswith("a"):
        return ord(text) - ord("a") + int(spec[1:] or 0)
    return int(text) - int(spec or 0)


def _write(pattern: str, numbers: Mapping[str, int]) -> str:
    name = ""
    for text, field, spec, _ in string.Formatter().parse(pattern):
        name += text
        if field is not None and (spec or "").startswith("a"):
            name += chr(ord("a") + numbers[field] - int((spec or "")[1:] or 0))
        elif field is not None:
            name += str(numbers[field] + int(spec or 0))
    return name
