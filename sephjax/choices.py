"""Components by name: a dict names one (`name`), the rest are its arguments.

The signature of the component is the schema of its dict.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs._chain import plain
from sephjax.errors import UserError


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """The entry `name` of a table of components, or a sentence that lists them."""
    if name not in table:
        raise UserError(f"{key} is {name!r}; use one of {', '.join(map(repr, table))}.")
    return table[name]


def bind(
    table: Mapping[str, Callable[..., Any]], choice: ConfigDict, key: str
) -> Callable[..., Any]:
    """A component with its arguments bound; an argument that it does not know is an error."""
    options = plain(choice)
    function = choose(table, options.pop("name"), f"{key}.name")
    signature = inspect.signature(function.__init__ if isinstance(function, type) else function)
    known = set(signature.parameters) - {"self"}
    if unknown := sorted(set(options) - known):
        raise UserError(
            f"{key}.{unknown[0]} is no argument of {choice.name!r}; "
            f"it knows {', '.join(sorted(known))}."
        )
    return functools.partial(function, **options)
