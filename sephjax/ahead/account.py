"""What a compiled program says of itself: memory, work, and what its devices send each other."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2} | {
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_CALL = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([0-9,]*)\]")


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: int  # state and batch
    results: int  # that are not written over arguments
    temporary: int
    peak: int


def memory(compiled: Any) -> Memory:
    """Memory of a compiled program; the peak is arguments, results and temporaries together."""
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = stats.argument_size_in_bytes, results, stats.temp_size_in_bytes
    return Memory(*parts, sum(parts))


class Work(NamedTuple):
    """Of one device, as its compiler counts: a loop's body once, a conditional's dearest branch."""

    flops: float | None  # None: the compiler does not say (XLA's for GPUs without one)
    bytes: float | None


def work(compiled: Any) -> Work:
    """FLOPs and bytes accessed."""
    told = compiled.cost_analysis() or {}
    return Work(told.get("flops"), told.get("bytes accessed"))


def collectives(text: str) -> list[tuple[str, int]]:
    """(operation, bytes of its result) of every collective in the text of a compiled program.

    An asynchronous one (`all-reduce-start`) counts once. Where its result names operand and result
    together, as for a started all-gather, both are counted.
    """
    found = []
    for shapes, name in _CALL.findall(text):
        sizes = (
            _BYTES[kind] * math.prod(int(side) for side in sides.split(",") if side)
            for kind, sides in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shapes))
            if kind in _BYTES
        )
        found.append((name, sum(sizes)))
    return found


def summed(found: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """By operation: how many, and their bytes."""
    total: dict[str, dict[str, int]] = {}
    for name, size in found:
        entry = total.setdefault(name, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return total
