"""All comparisons with torchvision: `python -m benchmarks.run [--repeats K] [--only NAME]`."""

import argparse
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Sequence

from benchmarks import model, ops, timing

PACKAGES = ("sephjax", "jax", "jaxlib", "flax", "torch", "torchvision", "numpy")


def header(repeats: int) -> str:
    """Machine, threads, load and versions, and how to read the table."""
    import torch

    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return "\n".join(
        [
            f"{_processor()}, {os.cpu_count()} cores; "
            f"{torch.get_num_threads()} threads of torch; load average before {load}",
            f"Python {platform.python_version()}, {versions}",
            f"float32; medians of {repeats} repeats (NMS: ten times as many), both sides in turn; "
            "ratio: ours / theirs, below 1 ours is faster; GB: peak of a process of its own",
            "",
        ]
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    """The processor's name where the system says it (Linux)."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="all comparisons with torchvision")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the names to measure")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    options = parser.parse_args(arguments)
    print(header(options.repeats), flush=True)
    measured = [
        row
        for part in (ops, model)
        for row in part.rows(options.repeats, options.only, memory=not options.no_memory)
    ]
    print(timing.table(measured))


if __name__ == "__main__":
    main()
