"""Timing of two sides back to back, their peak memory, and the table of both."""

import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Row:
    """One piece of work on both sides: seconds, and GB of a process that does nothing else."""

    name: str
    ours_wall: float
    theirs_wall: float
    ratio: float
    ours_cpu: float
    theirs_cpu: float
    compile_s: float
    ours_peak_gb: float
    theirs_peak_gb: float


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison, ready to be timed."""

    run: Run  # returns when the work is done
    compile_s: float = 0.0


def compare(
    name: str, ours: Side, theirs: Side, *, repeats: int, peaks: tuple[float, float]
) -> Row:
    """Times both sides in turn, after one warm-up each.

    The wall and processor seconds are medians of the repeats; the ratio is the median of the ratios
    of neighbouring runs, so that a load that comes and goes falls on both.
    """
    ours.run()
    theirs.run()
    pairs = [(_once(ours.run), _once(theirs.run)) for _ in range(repeats)]
    median = lambda side, kind: statistics.median(pair[side][kind] for pair in pairs)
    return Row(
        name=name,
        ours_wall=median(0, 0),
        theirs_wall=median(1, 0),
        ratio=statistics.median(mine[0] / other[0] for mine, other in pairs),
        ours_cpu=median(0, 1),
        theirs_cpu=median(1, 1),
        compile_s=ours.compile_s,
        ours_peak_gb=peaks[0],
        theirs_peak_gb=peaks[1],
    )


def _once(run: Run) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_gb() -> float:
    """The greatest resident memory of this process so far, in GB (10^9 bytes)."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss of a child begins at that of its parent
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def peak_of(module: str, *arguments: str) -> float:
    """The peak memory of `python -m module arguments`, whose last line is that of `peak_gb`."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: milliseconds, seconds of compilation, GB."""
    lines = [
        "| work | ours ms | theirs ms | ratio | ours cpu ms | theirs cpu ms | cpu ratio "
        "| compile s | ours GB | theirs GB |",
        "|---|" + "---:|" * 9,
    ]
    for row in rows:
        cells = [
            f"{row.ours_wall * 1e3:.1f}",
            f"{row.theirs_wall * 1e3:.1f}",
            f"{row.ratio:.2f}",
            f"{row.ours_cpu * 1e3:.1f}",
            f"{row.theirs_cpu * 1e3:.1f}",
            f"{row.ours_cpu / row.theirs_cpu:.2f}",
            f"{row.compile_s:.1f}",
            f"{row.ours_peak_gb:.2f}",
            f"{row.theirs_peak_gb:.2f}",
        ]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
