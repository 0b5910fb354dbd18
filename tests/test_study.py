"""benchmarks/study.py: what is run, and when a question counts as answered."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import study, study_report


def result(ap: float, kind: str = "bbox") -> dict:
    return {kind: {"AP": ap / 100}}


def runs_of(**aps: list[float]) -> dict:
    return {row: {str(i): result(ap) for i, ap in enumerate(found)} for row, found in aps.items()}


def test_every_question_is_about_two_rows():
    known = {row or "base" for row in study.arms()}
    asked = {name for q in study_report.QUESTIONS for name in (q.row, q.against)}
    assert asked == known


def test_what_is_missing_goes_by_seed():
    runs = {"base": {"0": {}}, "bn": {"1": {}}}
    found = study.missing(runs, ["", "bn"], 2)
    assert found == [("bn", 0), ("", 1)]


def test_a_finished_run_is_added_to_the_others(tmp_path):
    output = tmp_path / "study.json"
    study._save(output, "", 0, result(10.0))
    study._save(output, "bn", 2, result(20.0))
    assert json.loads(output.read_text()) == {"base": {"0": result(10)}, "bn": {"2": result(20)}}


def test_the_interval_is_welchs():
    ours, theirs = np.array([10.0, 11.0, 12.0]), np.array([5.0, 9.0, 7.0])
    low, high = study_report.interval(ours, theirs)
    # By hand: difference 4, standard error sqrt(1/3 + 4/3), Welch-Satterthwaite degrees of freedom.
    error, freedom = np.sqrt(5 / 3), (5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * error
    assert (low, high) == pytest.approx((4 - half, 4 + half))


def test_one_run_a_side_answers_nothing():
    low, high = study_report.interval(np.array([30.0]), np.array([1.0]))
    question = study_report.Question("base", "bn", 1, "")
    assert study_report.verdict(question, low, high) == "cannot tell at this scale"


@pytest.mark.parametrize(
    ("sign", "low", "high", "says"),
    [
        (1, 0.1, 2.0, "agrees"),
        (1, -2.0, -0.1, "disagrees"),
        (-1, -2.0, -0.1, "agrees"),
        (-1, 0.1, 2.0, "disagrees"),
        (1, -0.1, 2.0, "cannot tell at this scale"),
        (0, 0.1, 2.0, "`base` is better; the log does not say"),
        (0, -2.0, -0.1, "`bn` is better; the log does not say"),
    ],
)
def test_a_verdict_needs_an_interval_beside_zero(sign, low, high, says):
    assert study_report.verdict(study_report.Question("base", "bn", sign, ""), low, high) == says


def test_the_table_shows_means_spreads_and_what_was_not_run():
    text = study_report.table(runs_of(base=[10.0, 11.0, 12.0], bn=[1.0, 2.0, 3.0]))
    lines = text.splitlines()
    assert len(lines) == 2 + len(study_report.QUESTIONS)
    assert "11.0 ± 1.0 against 2.0 ± 1.0 | +9.0 (+6.7 to +11.3)" in lines[2]
    assert lines[2].endswith("| agrees |")
    assert lines[3].endswith("| not run |")


def test_the_plot_is_a_picture(tmp_path):
    path = tmp_path / "plot.png"
    study_report.plot(runs_of(base=[10.0, 11.0], bn=[1.0]), path)
    assert path.read_bytes().startswith(b"\x89PNG")
