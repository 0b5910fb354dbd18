"""sephjax: Mask R-CNN in JAX that can be trusted number for number."""

__version__ = "0.1.0"
