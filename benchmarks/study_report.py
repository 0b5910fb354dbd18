"""What the small study found: table and plot, from docs/study.json (see benchmarks/study.py)."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from configs import study

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
PAGE, PLOT = DOCS / "RESULTS.md", DOCS / "study.png"
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
Runs = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Question:
    """One conclusion of the log.

    Attributes:
        row: the arm whose metric minus that of `against` is looked at.
        sign: +1 if the log says that `row` is better, -1 if worse, 0 if the log does not say.
        log: published numbers that the conclusion rests on.
        kind: of the metric, AP of "bbox" or "segm".
    """

    row: str
    against: str
    sign: int
    log: str
    kind: str = "bbox"


QUESTIONS = (
    Question("base", "bn", 1, "box 30.0 against 13.3 (with cosine)"),
    Question("base", "gn", 0, "no pair of rows"),
    Question("base", "step", 1, "no pair that differs in this alone; 28.3 against 26.7 (with P3)"),
    Question("r128", "base", 1, "box 33.1 against 31.5"),
    Question("giou", "base", -1, "box 30.1 against 31.5"),
    Question("giou8", "giou", 1, "box 32.2 against 30.1"),
    Question("giou8", "base", 1, "box 32.2 against 31.5"),
    Question("base", "plain", 1, "box 31.5 against 31.1"),
    Question("base", "iou", 1, "box 31.4 against 30.0 (with balanced sampling)"),
    Question("cascade", "base", 1, "box 33.8 against 31.5"),
    Question("masks", "masks_bn", 1, "mask 26.2 against 25.2 (with cosine)", "segm"),
)


def values(runs: Runs, row: str, kind: str) -> np.ndarray:
    """AP in percent of every seed of a row, in the order of the seeds."""
    found = sorted(runs.get(row, {}).items(), key=lambda item: int(item[0]))
    return np.array([100 * run[kind]["AP"] for _, run in found if kind in run])


def interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two means (Welch); infinite with one run on a side."""
    if min(len(ours), len(theirs)) < 2:
        return -np.inf, np.inf
    if not (ours.std() or theirs.std()):
        return (float(ours.mean() - theirs.mean()),) * 2
    found: Any = stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = found.confidence_interval(0.95)
    return float(low), float(high)


def verdict(question: Question, low: float, high: float) -> str:
    """Answered only if the interval leaves out 0."""
    if low <= 0 <= high:
        return "cannot tell at this scale"
    better = low > 0
    if question.sign == 0:
        return f"`{question.row if better else question.against}` is better; the log does not say"
    return "agrees" if better == (question.sign > 0) else "disagrees"


def table(runs: Runs) -> str:
    """A line a question."""
    lines = [
        "| question | arms | runs | AP, mean ± s.d. | difference, 95 % | the log | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for question in QUESTIONS:
        ours = values(runs, question.row, question.kind)
        theirs = values(runs, question.against, question.kind)
        arms = f"`{question.row}` against `{question.against}`"
        cells = [_asked(question), arms, f"{len(ours)}, {len(theirs)}"]
        if len(ours) and len(theirs):
            low, high = interval(ours, theirs)
            cells += [
                f"{_spread(ours)} against {_spread(theirs)}",
                f"{ours.mean() - theirs.mean():+.1f} ({low:+.1f} to {high:+.1f})",
                question.log,
                verdict(question, low, high),
            ]
        else:
            cells += ["", "", question.log, "not run"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _asked(question: Question) -> str:
    row = question.row if question.row != "base" else question.against
    return study.ROWS[row].asks


def _spread(found: np.ndarray) -> str:
    return f"{found.mean():.1f} ± {found.std(ddof=1):.1f}" if len(found) > 1 else f"{found[0]:.1f}"


def plot(runs: Runs, path: pathlib.Path) -> None:
    """Every run as a dot, mean and standard deviation as a bar, for boxes and for masks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(name for q in QUESTIONS for name in (q.row, q.against)))
    masked = [row for row in rows if len(values(runs, row, "segm"))]
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, width_ratios=(3, 1.6))
    for axes, kind, shown in zip(panels, ("bbox", "segm"), (rows, masked), strict=True):
        _panel(axes, {row: values(runs, row, kind) for row in shown})
        axes.set_xlabel(f"{'box' if kind == 'bbox' else 'mask'} AP, %")
    figure.suptitle("Same budget, 256 held-out drawn pictures; dots are seeds", fontsize=10)
    figure.savefig(path, dpi=120, format="png")


def _panel(axes: Any, found: Mapping[str, Sequence[float]]) -> None:
    for at, (row, aps) in enumerate(found.items()):
        colour = "C3" if row in ("base", "masks") else "C0"
        axes.plot(aps, [at] * len(aps), "o", ms=4, alpha=0.5, color=colour)
        if len(aps) > 1:
            spread = np.std(aps, ddof=1)
            axes.errorbar(np.mean(aps), at, xerr=spread, fmt="|", ms=12, capsize=4, color=colour)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def page(text: str, runs: Runs) -> str:
    """`text` with the table between its two markers renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(runs)}\n{END}{after}"


def write(runs: Runs) -> None:
    PAGE.write_text(page(PAGE.read_text(), runs))
    plot(runs, PLOT)
    print(f"written to {PAGE} and {PLOT}")
