"""Tensors of a file as float32 NumPy arrays by name. No file's code is ever executed.

PyTorch is imported when a `.pth` is read or written, safetensors when a `.safetensors` is.
"""

import errno
import io
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp  # with it NumPy knows bfloat16
import numpy as np

from sephjax import atomic
from sephjax.errors import UserError
from sephjax.weights.table import Arrays

EXTRA = "pip install 'sephjax[torch]'"


def existing(path: str) -> pathlib.Path:
    """The path of a file that is there.

    Raises:
        UserError: it is not.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"There is no weight file {path}: check the path.")
    return file


def read_npz(path: str) -> Arrays:
    """The arrays of an npz.

    Raises:
        UserError: there is no such file, or it is another or a damaged one.
    """
    if not zipfile.is_zipfile(existing(path)):
        raise UserError(f"{path} is no npz file: give one, or the format that it is of.")
    try:
        with np.load(path) as archive:
            return floats({name: archive[name] for name in archive.files})
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(_damaged(path, error)) from error


def read_torch(path: str) -> Arrays:
    """The tensors of a `.safetensors` file or of what `torch.save` wrote.

    Of a training checkpoint the part called `model` or `state_dict` is taken.

    Raises:
        UserError: there is no such file, it is another or a damaged one, it holds more than
            tensors and plain containers, or a package is missing.
    """
    file = existing(path)
    found = _from_safetensors(path) if file.suffix == ".safetensors" else _from_pth(path)
    return floats({name: value for name, value in found.items() if isinstance(value, np.ndarray)})


def write_torch(path: str, tensors: Arrays) -> None:
    """Writes a state dict, as safetensors if that is the file's ending, else with `torch.save`.

    Raises:
        UserError: nothing can be written there, or a package is missing.
        RunError: writing failed.
    """
    file = pathlib.Path(path)
    if file.suffix == ".safetensors":
        save = _safetensors().save_file
        # It wants contiguous arrays; `ascontiguousarray` would make one of no axis have one.
        content = {name: np.array(value, order="C") for name, value in tensors.items()}
    else:
        torch = _torch()
        save = torch.save
        content = {name: torch.tensor(value) for name, value in tensors.items()}
    write_with(save, content, file, "name another file")


def write_with(
    save: Callable[[Any, Any], Any], content: Any, file: pathlib.Path, instead: str
) -> None:
    """Writes a file whole with `save(content, path)`, a package's own; see `atomic.draft`."""
    with atomic.draft(file, instead) as draft:
        try:
            save(content, draft)
        except OSError:
            raise
        except Exception as error:  # RuntimeError of torch, SafetensorError: no room, say
            raise OSError(errno.EIO, _first(error)) from error


def read_pickle(path: str) -> Any:
    """What a pickle of NumPy arrays in dicts, lists and tuples holds; nothing else is allowed in.

    Raises:
        UserError: there is no such file, it is another or a damaged one, or it asks for anything
            but arrays; then nothing of it was executed.
    """
    data = existing(path).read_bytes()
    try:
        return _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # bytes that are no pickle make it raise almost anything
        raise UserError(
            f"{path} is no pickle of plain arrays ({_first(error)}): give a model-zoo file."
        ) from error


def _array_parts() -> dict[tuple[str, str], Any]:
    """What NumPy's own pickles name, by module and name: of NumPy 1 and 2, protocols 0 to 5."""
    multiarray: dict[str, Any] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "scalar": np.float32(0).__reduce__()[0],
    }
    numeric: dict[str, Any] = {"_frombuffer": np.empty(1).__reduce_ex__(5)[0]}
    found = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for core in ("numpy.core", "numpy._core"):
        found |= {(f"{core}.multiarray", name): part for name, part in multiarray.items()}
        found |= {(f"{core}.numeric", name): part for name, part in numeric.items()}
    return found


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a pickle of protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Finds what arrays are made of, and nothing that could do something."""

    _allowed: Mapping[tuple[str, str], Callable[..., Any]] = {
        **_array_parts(),
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Refuses every other name before it is imported."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._allowed[module, name]


def floats(tensors: Mapping[str, Any]) -> Arrays:
    """Floating-point arrays as float32, others as they are."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    return {
        name: value.astype(np.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value
        for name, value in arrays.items()
    }


def _from_safetensors(path: str) -> dict[str, np.ndarray]:
    package = _safetensors()
    try:
        return package.load_file(path)
    except Exception as error:  # its SafetensorError, or a type that NumPy does not have
        raise UserError(_damaged(path, error)) from error


def _from_pth(path: str) -> dict[str, Any]:
    torch = _torch()
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError ...
        raise UserError(
            f"{path} is no PyTorch file that can be read without executing code "
            f"({_first(error)}): give a state dict that torch.save wrote, or a .safetensors file."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no state dict but a {type(found).__name__}: save one.")
    return {
        str(name): (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in found.items()
        if isinstance(value, torch.Tensor)
    }


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"PyTorch files need torch, which is missing: {EXTRA}.") from error
    return torch


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(f"safetensors is missing: {EXTRA}.") from error
    return safetensors.numpy


def _damaged(path: str, error: Exception) -> str:
    kind = type(error).__name__
    return f"{path} is a damaged file or another one ({kind}: {_first(error)}); fetch it anew."


def _first(error: Exception) -> str:
    """The first line of what an error says, without its full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(". ") if lines else type(error).__name__)[:200]
