"""Both sides in float64: the same programs, with rounding out of the way.

In float32 the gradients of a deep network say little about one number: a ReLU whose input is 0 but
for rounding opens on one side only, and batch norm over two pictures takes two digits. In float64 a
difference that is left is a difference of what is computed.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from sephjax import recipe


@contextlib.contextmanager
def everywhere(wanted: bool) -> Iterator[None]:
    """Every `jnp.float32` that sephjax names while it is built and traced is float64, if wanted."""
    if not wanted:
        yield
        return
    wide = jax.enable_x64(True), jax.numpy_dtype_promotion("standard")
    with wide[0], wide[1], pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.DTYPES, "float32", jnp.float64)
        patch.setattr(jnp, "float32", jnp.float64)
        yield
