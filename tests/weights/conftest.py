"""torchvision first: the library of triton, which it imports, crashes once TensorFlow is loaded."""

import contextlib

with contextlib.suppress(ImportError):
    import torchvision  # noqa: F401
