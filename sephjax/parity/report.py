"""What a parity report says: a table, a JSON file, and the first stage that disagrees."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sephjax.parity.compare import Difference

AGREES, DISAGREES, EMPTY = "agrees", "DISAGREES", "nothing to compare"
END = "end to end"
# The whole program is allowed so many times the tolerance of a stage, since rounding adds up over
# all of them. Measured: 1.3e-4 on mask probabilities where no stage alone was 1e-5 apart.
GROWTH = 10


@dataclasses.dataclass
class Tally:
    """Differences of one stage over all pictures.

    Attributes:
        max: largest |ours - theirs|.
        relative: largest, over the pictures, of that over the picture's largest |theirs|.
        count: numbers compared.
        unmatched: boxes of either side without a pair.
    """

    max: float = 0.0
    total: float = 0.0
    relative: float = 0.0
    count: int = 0
    unmatched: int = 0

    def add(self, one: Difference) -> None:
        """Takes in one picture."""
        apart, scale = float(one.max), float(one.scale)
        ratio = apart / scale if scale else (math.inf if apart else 0.0)
        # A NaN must win, and `max` may drop it.
        self.max = apart if math.isnan(apart) else max(self.max, apart)
        self.relative = ratio if math.isnan(ratio) else max(self.relative, ratio)
        self.total += float(one.sum)
        self.count += int(one.count)
        self.unmatched += int(one.unmatched)

    @property
    def mean(self) -> float:
        """Mean |ours - theirs|."""
        return self.total / self.count if self.count else 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; what is not finite becomes a word."""
        numbers = {"max": self.max, "mean": self.mean, "relative": self.relative}
        told = {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}
        return told | {"compared": self.count, "unmatched": self.unmatched}


@dataclasses.dataclass
class Row:
    """One stage.

    Attributes:
        name: ours.
        theirs: the peer's module.
        shape: of the value on the last picture.
        same: our stage fed with the peer's inputs; None for the whole program.
        own: fed with our own results.
    """

    name: str
    theirs: str
    shape: tuple[int, ...] = ()
    same: Tally | None = dataclasses.field(default_factory=Tally)
    own: Tally = dataclasses.field(default_factory=Tally)

    def allowed(self, tolerance: float) -> float:
        """What may be apart, where `tolerance` is a stage's."""
        return tolerance * (GROWTH if self.same is None else 1)

    def verdict(self, tolerance: float) -> str:
        """By the same inputs, so that a fault is not blamed on the stages after it."""
        judged = self.same or self.own
        if judged.relative <= self.allowed(tolerance) and not judged.unmatched:
            return AGREES if judged.count else EMPTY
        return DISAGREES  # also where a number is NaN


@dataclasses.dataclass
class Report:
    """All stages in the order of computation, and last the whole program."""

    tolerance: float
    rows: dict[str, Row] = dataclasses.field(default_factory=dict)
    pictures: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def row(self, stage: str, part: str, theirs: str) -> Row:
        """The row of a stage and part, made where it is new."""
        name = f"{stage} ({part})" if part else stage
        new = Row(name, theirs, same=None) if stage == END else Row(name, theirs)
        return self.rows.setdefault(name, new)

    @property
    def disagreeing(self) -> list[Row]:
        """Rows that disagree, the first one first."""
        return [r for r in self.rows.values() if r.verdict(self.tolerance) == DISAGREES]

    @property
    def first(self) -> Row | None:
        """The first row that disagrees."""
        return next(iter(self.disagreeing), None)

    def sentence(self) -> str:
        """The outcome."""
        count = f"{len(self.pictures)} picture{'s' if len(self.pictures) > 1 else ''}"
        if (bad := self.first) is None:
            empty = [row.name for row in self.rows.values() if not row.own.count]
            note = f"; nothing to compare in {', '.join(empty)}" if empty else ""
            return (
                f"all {len(self.rows) - len(empty)} stages agree within {self.tolerance:g} of their"
                f" largest number, and end to end within {GROWTH * self.tolerance:g}, on"
                f" {count}{note}."
            )
        judged = bad.same or bad.own
        pairs = f", {judged.unmatched} boxes without a pair" if judged.unmatched else ""
        others = [row.name for row in self.disagreeing[1:]]
        also = (
            f" Of the stages after it, these disagree too: {', '.join(others)}." if others else ""
        )
        return (
            f"the first stage that disagrees is {bad.name} (torchvision: {bad.theirs}): largest "
            f"difference {judged.max:.3g}, {judged.relative:.3g} of the largest number{pairs}; "
            f"allowed is {bad.allowed(self.tolerance):g}, on {count}.{also}"
        )

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "agrees": self.first is None,
            "first": self.first and self.first.name,
            "tolerance": self.tolerance,
            "pictures": self.pictures,
            "stages": [
                {
                    "stage": row.name,
                    "torchvision": row.theirs,
                    "shape": list(row.shape),
                    "same_inputs": row.same and row.same.plain(),
                    "own_inputs": row.own.plain(),
                    "verdict": row.verdict(self.tolerance),
                }
                for row in self.rows.values()
            ],
        }

    def show(self, console: Console) -> None:
        """Prints the table."""
        table = Table(box=None, pad_edge=False)
        for title in ("stage", "torchvision", "shape"):
            table.add_column(title, overflow="fold")
        for title in ("max |diff|", "mean |diff|", "relative", "own inputs"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for row in self.rows.values():
            table.add_row(row.name, row.theirs, _shape(row.shape), *self._numbers(row))
        console.print(table)
        console.print(
            "max, mean, relative: our stage fed with torchvision's inputs. own inputs: relative, "
            "fed with our own results. relative: max over torchvision's largest number."
        )

    def _numbers(self, row: Row) -> Sequence[str]:
        verdict = row.verdict(self.tolerance)
        colour = {AGREES: "green", DISAGREES: "bold red", EMPTY: "yellow"}[verdict]
        same = ["", "", ""]
        if row.same is not None:
            same = [f"{x:.1e}" for x in (row.same.max, row.same.mean, row.same.relative)]
        lost = row.same.unmatched if row.same else row.own.unmatched
        note = f", {lost} unmatched" if lost else ""
        return [*same, f"{row.own.relative:.1e}", f"[{colour}]{verdict}{note}[/]"]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def add(
    report: Report,
    found: Mapping[str, Mapping[str, Mapping[str, Difference]]],
    paths: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Takes in what `compare.every` found on one picture; `found` in the order of computation."""
    for stage, parts in found.items():
        for part, sides in parts.items():
            row = report.row(stage, part, paths.get(stage, ""))
            row.shape = shapes.get(stage, ())
            row.own.add(sides["own"])
            if row.same is not None:
                row.same.add(sides["same"])
