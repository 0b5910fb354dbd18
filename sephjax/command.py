"""What is wrong with a command line, as one sentence with the nearest right name.

absl and ml_collections would print tracebacks, whole configs or nothing; so the config part of the
command is looked at here before they see it.
"""

import difflib
import pathlib
import re
import runpy
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs._chain import flat
from sephjax.errors import UserError

_REASONS = {  # a word of absl's or ml_collections' explanation, and what to say instead
    "int()": "it takes a whole number",
    "to float": "it takes a number",
    "oolean": "it takes True or False",
    "ConfigDict": "it is a group of keys, of which one can be set",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The most similar of `known`; of dotted names the last part counts once more."""

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def score(other: str) -> float:
        return alike(name, other) + alike(name.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1])

    return max(known, key=score)


def check_config(argv: Sequence[str]) -> None:
    """Checks the config file, its row and the names of the keys that a command sets.

    Raises:
        UserError: the file or the row is not there, or the config has no such key.
    """
    default = _default(argv)
    if default is None:
        return
    names = _names(default)
    for key, _ in _overrides(argv):
        if (plain := re.sub(r"\[\d+\]", "", key)) not in names:
            raise UserError(
                f"--config.{key}: the config has no key {plain!r}; did you mean "
                f"{nearest(plain, names)!r}?"
            )


def check_values(argv: Sequence[str], config: Any) -> None:
    """Checks that numbers stand in the tuples that hold numbers.

    Raises:
        UserError: something else does.
    """
    default = _default(argv)
    if default is None:
        return
    now = dict(flat(config))
    for path, value in flat(default):
        if isinstance(value, tuple) and value and all(map(_is_number, value)):
            wrong = [item for item in now.get(path, ()) if not _is_number(item)]
            if wrong:
                raise UserError(
                    f"--config.{path} holds {wrong[0]!r}, which is no number: give something like "
                    f"{value}."
                )


def one_sentence(error: Exception) -> str:
    """What absl or ml_collections says, cut down."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    if found := re.match(r"flag --(?P<flag>[\w.\[\]]+)=(?P<value>.*?): (?P<why>.*)", text):
        flag, value = found["flag"], found["value"]
        if flag.startswith("config."):
            return f"--{flag}={value} has a value of the wrong kind ({_reason(found['why'])})."
        return f"--{flag}={value} is wrong: {_reason(found['why'])}."
    return f"{text.rstrip('.')}."


def unknown_flag(name: str, known: Iterable[str]) -> str:
    """What to say to a flag that does not exist."""
    return f"there is no flag --{name}; did you mean --{nearest(name, known)}?"


def _reason(text: str) -> str:
    return next((words for sign, words in _REASONS.items() if sign in text), text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _default(argv: Sequence[str]) -> ConfigDict | None:
    """The config that a command names, without what the command changes in it."""
    named = [value for flag, value in _pairs(argv) if flag == "config"]
    if not named:
        return None
    path, colon, row = named[-1].partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={path} is no file; {_another(path)}")
    try:
        config = runpy.run_path(path)["get_config"](*([row] if colon else []))
    except (KeyError, ValueError) as error:  # of a row; `configs/_chain.py` says it in words
        raise UserError(f"--config={named[-1]}: {error.args[0]}.") from error
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"--config={path} does not run: {kind}: {error}.") from error
    return config


def _another(path: str) -> str:
    folder = pathlib.Path(path).parent
    files = [str(file) for file in sorted(folder.glob("[a-z]*.py"))] if folder.is_dir() else []
    return f"did you mean {nearest(path, files)}?" if files else "check the path."


def _names(config: ConfigDict) -> dict[str, type]:
    """Every dotted path, of groups too, and the type of its value."""
    found: dict[str, type] = {}
    for path, value in flat(config):
        parts = path.split(".")
        found |= {".".join(parts[:n]): ConfigDict for n in range(1, len(parts))}
        found[path] = type(value)
    return found


def _overrides(argv: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (flag.removeprefix("config."), value)
        for flag, value in _pairs(argv)
        if flag.startswith("config.")
    ]


def _pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Flags and values of a command, for `--flag=value` and `--flag value`."""
    found = []
    for place, word in enumerate(argv[1:], start=1):
        if word == "--":
            break
        if word.startswith("-"):
            flag, equals, value = word.lstrip("-").partition("=")
            after = argv[place + 1] if place + 1 < len(argv) else ""
            found.append((flag, value if equals else after))
    return found
