"""Rows of docs/SCALING.md: `python -m benchmarks.scaling FILE ...`.

The files are those of `--mode=compile --output=FILE`; they are taken in the order given.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

HEADS = (
    "config", "step", "topology", "images a chip", "fits", "arguments GB", "temporaries GB",
    "of the chip's memory", "TFLOP a chip", "compiled over counted", "collectives", "compiled in s",
)  # fmt: skip
SMALL = 5000  # bytes: labels and scalars


def table(paths: Sequence[pathlib.Path]) -> str:
    """The Markdown table of all batches in the files."""
    lines = [f"| {' | '.join(HEADS)} |", "|---|---|---|---:|---|" + "---:|" * 5 + "---|---:|"]
    for path in paths:
        told = json.loads(path.read_text())
        lines += [f"| {' | '.join(cells(told, row))} |" for row in told["batches"]]
    return "\n".join(lines)


def cells(told: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """One batch of one file."""
    first = [told["config"], told["program"], told["topology"], str(row["images"])]
    seconds = f"{row['compile_seconds']:.0f}"
    if "refused" in row:
        return [*first, f"no: {row['refused']}", *["-"] * 6, seconds]
    spent, counted = row["memory_bytes"], told["model_flops_an_image"]["total"] * row["images"]
    work = row["flops"]
    return [
        *first,
        "yes" if row["fits"] else "no",
        f"{spent['arguments'] / 1e9:.2f}",
        f"{spent['temporary'] / 1e9:.2f}",
        f"{100 * spent['peak'] / told['hbm_bytes']:.0f} %",
        f"{work / 1e12:.2f}" if work else "-",
        f"{work / counted:.3f}" if work and counted else "-",
        _collectives(row["collectives"]),
        seconds,
    ]


def _collectives(sent: dict[str, dict[str, int]]) -> str:
    order = sorted(sent, key=lambda name: -sent[name]["bytes"])
    return "; ".join(_collective(name, **sent[name]) for name in order) or "none"


def _collective(name: str, count: int, bytes: int) -> str:
    size = "under 5 kB" if bytes < SMALL else f"{bytes / 1e6:.2f} MB"
    return f"{count} {name}{'' if count == 1 else 's'}, {size}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rows of docs/SCALING.md")
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    print(table(parser.parse_args(arguments).files))


if __name__ == "__main__":
    main()
