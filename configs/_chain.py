"""A row is its difference from its parent: the one piece of logic in `configs/`."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Row(NamedTuple):
    """One experiment of a family."""

    parent: str | None  # the row it differs from; None: the config handed to `resolve`
    asks: str  # the question it asks, one line
    diff: Mapping[str, Any]  # dotted path -> value; a component is swapped whole, as a dict
    published: str = ""  # published numbers and how certain we are of them


def plain(value: Any) -> Any:
    """`value` with every ConfigDict turned into a dict and every list into a tuple."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else value


def flat(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config as (dotted path, value), in the order of the file."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, ConfigDict | dict):
            yield from flat(value, f"{path}.")
        else:
            yield path, plain(value)


def lineage(rows: Mapping[str, Row], row: str, family: str) -> list[str]:
    """The rows from the family's head down to `row`."""
    if row not in rows:
        named = sorted(name for name in rows if name)
        if not named:
            raise ValueError(f"{family} has no rows; leave {':' + row!r} out")
        near = difflib.get_close_matches(row, named, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{family} has no row {row!r}; did you mean {near!r}? It has {', '.join(named)}"
        )
    chain = [row]
    while (parent := rows[chain[-1]].parent) is not None:
        if parent in chain:
            raise ValueError(f"{family}: {parent!r} is its own ancestor")
        chain.append(parent)
    return chain[::-1]


def apply(config: ConfigDict, diff: Mapping[str, Any], who: str) -> ConfigDict:
    """Sets every path of `diff`; a path that is unknown or already has that value is an error."""
    known = dict(flat(config))
    for path, value in diff.items():
        *scope, leaf = path.split(".")
        node = config
        for name in scope:
            node = node.get(name)
            if not isinstance(node, ConfigDict):
                break
        if not isinstance(node, ConfigDict) or leaf not in node:
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
            raise KeyError(f"{who}: no key {path!r}; the nearest is {near[0]!r}")
        if plain(node[leaf]) == plain(value):
            raise ValueError(f"{who}: {path} is already {value!r}")
        if isinstance(
            value, Mapping
        ):  # a component is swapped whole, whatever keys the old one had
            with node.unlocked():
                node[leaf] = ConfigDict(dict(value))
        else:
            node[leaf] = value
    return config.lock()


def resolve(config: ConfigDict, family: str, rows: Mapping[str, Row], row: str) -> ConfigDict:
    """Applies the differences from the head of `family` down to `row` to `config`."""
    for name in lineage(rows, row, family):
        who = f"{family}:{name}" if name else family
        apply(config, rows[name].diff, who)
        if rows[name].parent is not None or name:
            config.lineage = (*config.lineage, who)
        else:
            config.lineage = (*config.lineage, family)
    config.name = f"{family}_{row}" if row else family
    return config
