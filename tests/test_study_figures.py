"""Figures, verdicts and fits of studies, against numpy and against cases whose answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from liftlm import Document
from liftlm.evaluation.benchmark import Item, Question
from liftlm.evaluation.blocks import Paragraph, Table
from liftlm.evaluation.corpora import cut_item
from liftlm.evaluation.timeline import coordinate_score, parse_events
from liftlm.studies.baseline import Baseline
from liftlm.studies.drawing import Fit, lines
from liftlm.studies.efficiency import Efficiency, _crossing
from liftlm.studies.growth import fit_growth
from liftlm.studies.intervals import difference, figure, gap, quotient, share_above, together
from liftlm.studies.overlap import RATIOS, Overlap
from liftlm.studies.questions import StudyQuestions, code_questions, order_questions, score_row, with_needles
from liftlm.studies.study import Options
from liftlm.studies.tables import where
from liftlm.studies.task_quality import question_class


def row(unit: object, value: float, arm: str = "a", seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"document_id": "d", "unit": str(unit), "seed": seed, "arm": arm, "x": value, **more}


def test_seeds_are_averaged_before_units_are_resampled() -> None:
    found = figure([row(unit, unit + seed, seed=seed) for unit in range(20) for seed in (0, 1, 2)], "x")
    assert (found.mean, found.units, found.documents, found.seeds) == (pytest.approx(10.5), 20, 1, (0, 1, 2))
    draws = np.random.default_rng(1).choice(np.arange(20) + 1.0, size=(20000, 20)).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.15) and found.high == pytest.approx(high, abs=0.15)


def test_differences_are_paired() -> None:
    """Units differ much, the arms always by 1: paired, there is no doubt."""
    rows = [row(unit, 100.0 * unit, "a") for unit in range(12)] + [
        row(unit, 100.0 * unit - 1, "b") for unit in range(12)
    ]
    rows.append(row(99, 5.0, "a"))  # without its pair
    found = difference(rows, "x", where(arm="a"), where(arm="b"))
    assert (found.mean, found.low, found.high, found.units) == (1.0, 1.0, 1.0, 12)
    assert share_above(found, 0.0) == "confirmed" and share_above(found, 1.0) == "not confirmed"
    assert quotient(rows, "x", where(arm="a"), where(arm="a")).mean == 1.0


def test_few_or_scattered_units_decide_nothing() -> None:
    few = [row(unit, 1.0) for unit in range(9)]
    assert share_above(figure(few, "x"), 0.0) == "not decidable at this size"
    assert figure(few[:2], "x").low is None and str(figure(few[:2], "x")) == "1.000" and str(figure([], "x")) == "–"
    wide = [row(unit, (-1) ** unit * 10.0 + 0.1) for unit in range(30)]
    assert share_above(figure(wide, "x"), 0.0) == "not decidable at this size"
    assert together(["confirmed", "not decidable at this size"]) == "not decidable at this size"
    assert together(["confirmed", "not confirmed"]) == "not confirmed" and together([]) == "not decidable at this size"


def test_a_gap_between_two_groups() -> None:
    rows = []
    for unit in range(40):
        side = unit % 2
        rows += [row(unit, unit + 2.0 * side, "half", asked=side), row(unit, float(unit), "none", asked=side)]
    found = gap(rows, "x", where(arm="half"), where(arm="none"), where(asked=1), where(asked=0))
    assert (found.mean, found.low, found.high, found.units) == (2.0, 2.0, 2.0, 20)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_growth_is_told_apart(noise: float) -> None:
    draw = np.random.default_rng(0)
    lengths = [256.0 * 2**k for k in range(8) for _ in range(3)]

    def costs(formula: Any) -> list[float]:
        return [formula(n) * (1 + noise * draw.standard_normal()) for n in lengths]

    line = fit_growth(lengths, costs(lambda n: 1 + n / 400))
    parabola = fit_growth(lengths, costs(lambda n: 0.1 + n / 4000 + (n / 8000) ** 2))
    flat = fit_growth(lengths, costs(lambda n: 5e8))
    assert line is not None and parabola is not None and flat is not None
    assert line.line == pytest.approx((1, 1 / 400), rel=0.1) and abs(line.bend) < 0.05
    assert parabola.better == "quadratic" and parabola.parabola[2] == pytest.approx(1 / 8000**2, rel=0.1)
    assert parabola.bend_interval is not None and parabola.bend_interval[0] > 0.3
    assert abs(flat.exponent) < 0.03
    assert fit_growth([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None


# --- questions --------------------------------------------------------------------------------------------------------

TEXT = " ".join(f"On day {day} the ferryman counted {day + 2} grey boats upon the wide lake." for day in range(1, 60))


def test_made_orders_have_the_right_answer() -> None:
    questions = order_questions(Document("Boats", TEXT), 6, 0, 800)
    assert len(questions) >= 4
    for question in questions:
        events = parse_events(question.question)
        places = {label: TEXT.index(event) for label, event in events.items()}
        right = question.answers[0].split(", ")
        assert right == sorted(places, key=lambda label: places[label]), question
        assert question.choices[0] == question.answers[0] and len(set(question.choices)) == 6
        assert StudyQuestions().score(question, question.answers[0])["coordinate_score"] == 1.0
        assert StudyQuestions().score(question, question.choices[3])["coordinate_score"] == coordinate_score(
            question.choices[3].split(", "), right
        )


def test_a_margin_is_how_much_likelier_the_right_choice_is() -> None:
    given = {
        "question_id": "1", "question": "Which?", "answers": ["a"], "choices": ["b", "a", "c"], "kind": "order in the text",
        "answer": "a", "answer_nll": 1.5, "choice_nlls": [[4.0, 1], [1.5, 1], [6.0, 1]],
    }  # fmt: skip
    found = score_row(given)
    assert found["order_margin"] == pytest.approx(5.0 - 1.5)
    assert found["likelihood"] == -1.5 and found["accuracy"] == 1.0 and found["token_f1"] == 0.0  # "a" is an article


def test_questions_about_code() -> None:
    text = 'def area(width, height=3, *, unit="m"):\n    """Says how large a field is."""\n    raise ValueError("no")\n'
    found = {q.question: q.answers[0] for q in code_questions(Document("field.py", text))}
    assert found["What does the function area do?"] == "Says how large a field is."
    assert found["What is the default value of the argument height of the function area?"] == "3"
    assert found["What is the default value of the argument unit of the function area?"] == "'m'"
    assert found["Which exception does the function area raise?"] == "ValueError"
    assert code_questions(Document("x.py", "def (:")) == []


def test_cut_documents_keep_the_questions_that_they_answer() -> None:
    first, last = TEXT.split(". ")[0] + ".", TEXT.split(". ")[-1]
    asked = (Question("0", "A?", ("x",), (first,)), Question("1", "B?", ("x",), (last,)), Question("2", "C?", ("x",)))
    cut = cut_item(Item(Document("Boats", TEXT), asked), 500)
    assert cut.document.text.endswith(".") and len(cut.document.text) <= 500 and TEXT.startswith(cut.document.text)
    assert [question.id for question in cut.questions] == ["0"]
    assert cut_item(cut, None) is cut
    spans = (Question("0", "A?", ("counted 4 grey boats",)), Question("1", "B?", ("counted 61 grey boats",)))
    assert [q.id for q in cut_item(Item(Document("Boats", TEXT), spans), 500).questions] == ["0"]


def test_needles_are_hidden_and_asked_for() -> None:
    item = with_needles(Item(Document("Boats", TEXT), ()), 3)
    assert len(item.questions) == 3
    for question in item.questions:
        assert question.answers[0] in item.document.text
        assert StudyQuestions().score(question, question.answers[0])["recalled"] == 1.0
        assert StudyQuestions().score(question, "Nobody knows.")["recalled"] == 0.0


@pytest.mark.parametrize(
    ("kind", "question", "expected"),
    [
        ("fact", "Who rang the bell?", "factual"),
        ("fact", "Why did she leave?", "causal"),
        ("fact", "What caused the flood?", "causal"),
        ("fact", "When did the train come?", "temporal"),
        ("timeline reorder", "Sort: 1. A 2. B", "temporal"),
    ],
)
def test_classes_of_questions(kind: str, question: str, expected: str) -> None:
    assert question_class(kind, question) == expected


@pytest.mark.parametrize(
    ("read", "absorb", "said"),
    [
        ((1, 2, 8, 30), (4, 8, 16, 32), "extrapolation"),
        ((1, 4, 32, 99), (4, 8, 16, 32), "from about 2,896 tokens on"),  # √2 · 2,048: the ratio goes from a half to two
        ((5, 9, 32, 99), (4, 8, 16, 32), "from the shortest length on (1,024 tokens)"),
    ],
)
def test_where_absorbing_becomes_quicker(read: Any, absorb: Any, said: str) -> None:
    rows: list[dict[str, Any]] = [
        {"what": what, "tokens": tokens, "seconds": float(took), "unit": str(tokens), "seed": 0}
        for what, times in (("read", read), ("absorb", absorb))
        for tokens, took in zip((1024, 2048, 4096, 8192), times, strict=True)
    ]
    fits = {
        (what, "seconds"): fit_growth(
            [row["tokens"] for row in rows if row["what"] == what],
            [row["seconds"] for row in rows if row["what"] == what],
        )
        for what in ("read", "absorb")
    }
    (block,) = _crossing(rows, fits)
    assert isinstance(block, Paragraph) and said in block.text


LENGTHS = tuple(512 * 2**k for k in range(8))


def read_seconds(tokens: int) -> float:
    return 0.5 + tokens / 1000 + (tokens / 2000) ** 2


def costs_by_length(seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of `efficiency`: reading is a parabola, absorbing a line, its memory the same; repeats differ by up to a tenth."""
    rows = []
    for seed in seeds:
        for n in LENGTHS:
            for what, took, held in (
                ("read", read_seconds(n), 50_000.0 * n),
                ("absorb", 2 + n / 300, 1.5e9),
            ):
                about = {"what": what, "tokens": n, "seed": seed, "unit": f"{what}-{n}", "stopped": None}
                costs = {"seconds": took * (1 + 0.05 * (seed - 1)), "memory_bytes": held}
                rows.append(about | costs | {"beyond": False, "limit": 8192})
    return rows


def painted(draw: Any) -> Any:
    axes = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
    draw(axes)
    return axes


def dashed(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if line.is_dashed()}


def test_both_fits_of_costs_are_drawn_dashed(tmp_path: Any) -> None:
    conclusion = Efficiency().conclude(costs_by_length((1,)), Options(seeds=(1,)), tmp_path)
    seconds, memory = (painted(drawing.draw) for drawing in conclusion.drawings)
    found = dashed(seconds)
    assert set(found) == {
        f"{name}, {shape} fit" for name in ("in context", "LIFT") for shape in ("linear", "quadratic")
    }
    assert len(dashed(memory)) == 4 and conclusion.verdict.outcome == "confirmed", conclusion.verdict.sentence
    colours = {name: line.get_color() for name, line in found.items()}
    assert colours["LIFT, linear fit"] == colours["LIFT, quadratic fit"] != colours["in context, linear fit"]
    places, values = found["in context, quadratic fit"].get_data()
    assert (places[0], places[-1]) == (pytest.approx(LENGTHS[0]), pytest.approx(LENGTHS[-1])) and len(places) > 50
    assert values == pytest.approx([read_seconds(n) for n in places], rel=1e-6), "exact data has an exact fit"
    places, values = found["LIFT, linear fit"].get_data()
    assert values == pytest.approx([2 + n / 300 for n in places], rel=1e-6)
    # the line through a parabola is another one: least squares of relative errors, by numpy
    weights = [1 / read_seconds(n) for n in LENGTHS]
    slope, constant = np.polyfit(LENGTHS, [read_seconds(n) for n in LENGTHS], 1, w=weights)
    places, values = found["in context, linear fit"].get_data()
    expected = np.array([constant + slope * n for n in places])
    assert np.array(values)[expected > 0] == pytest.approx(expected[expected > 0], rel=1e-6)
    assert np.isnan(np.array(values)[expected <= 0]).all(), "no place on a logarithmic axis"


def test_a_fit_is_drawn_as_far_as_the_points_of_its_series() -> None:
    points = [(x, figure([row(0, 2.0 * x)], "x")) for x in (1.0, 3.0, 5.0)]
    nothing = [(9.0, figure([], "x"))]
    fits = [Fit("twice", "a", lambda x: 2 * x), Fit("of nothing", "b", lambda x: x), Fit("of none", "c", lambda x: x)]
    axes = painted(lines({"a": points, "b": nothing}, "x", "y", fits=fits))
    (found,) = dashed(axes).values()
    places, values = map(np.array, found.get_data())
    assert (found.get_label(), places[0], places[-1]) == ("twice", 1.0, 5.0) and np.allclose(values, 2 * places)
    assert np.allclose(np.diff(places), np.diff(places)[0]), "evenly, where the axis is"


def test_repeats_of_a_cost_have_an_interval_in_the_plot(tmp_path: Any) -> None:
    """Regression: the repeats of a length were one unit, and no interval was drawn."""
    rows = costs_by_length((0, 1, 2))
    conclusion = Efficiency().conclude(rows, Options(seeds=(0, 1, 2)), tmp_path)
    axes = painted(conclusion.drawings[0].draw)
    drawn = {bar.get_label(): bar for bar in axes.containers}
    (ends,) = drawn["in context"].lines[2]
    for (_, low), (_, high) in ends.get_segments():
        assert high > 1.05 * low
    table = next(block for block in conclusion.blocks if isinstance(block, Table))
    assert "[" in table.rows[0][1], "as in the table"


def test_costs_are_told_with_the_share_of_the_quadratic_term(tmp_path: Any) -> None:
    conclusion = Efficiency().conclude(costs_by_length((0, 1, 2)), Options(seeds=(0, 1, 2)), tmp_path)
    found = {(each["what"], each["metric"]): each for each in conclusion.figures if "tokens" not in each}
    assert len(found) == 8, "two kinds, two costs, exponent and share of each"
    share = found["read", "seconds quadratic share"]
    longest = LENGTHS[-1]
    expected = (longest / 2000) ** 2 / ((longest / 2000) ** 2 + longest / 1000)
    assert share["mean"] == pytest.approx(expected, abs=0.02) and share["low"] <= share["mean"] <= share["high"]
    assert (share["units"], share["seeds"]) == (24, "0 1 2")
    assert abs(found["absorb", "seconds quadratic share"]["mean"]) < 0.05


# --- what studies conclude --------------------------------------------------------------------------------------------


def overlap_rows(gains: dict[str, float], questions: int = 12) -> list[dict[str, Any]]:
    """Of each domain: the margin rises by its gain with every overlap above none, whatever else the questions differ in."""
    rows = []
    for domain, gain in gains.items():
        for kind in ("order in the text", "fact") if domain == "expository" else ("order in the text",):
            for unit, ratio, equal in itertools.product(range(questions), RATIOS, ("epochs", "tokens")):
                more: dict[str, Any] = {
                    "domain": domain,
                    "kind": kind,
                    "ratio": ratio,
                    "equal": equal,
                    "likelihood": -3.0,
                }
                if kind != "fact":
                    more["order_margin"] = unit + gain * (ratio > 0) + 0.001 * unit * ratio
                rows.append(row(unit, 0.0, f"{ratio:g} {equal}", method="lift", **more) | {"document_id": domain})
    return rows


def paragraphs(conclusion: Any) -> list[str]:
    return [block.text for block in conclusion.blocks if isinstance(block, Paragraph)]


def test_overlap_is_told_by_domain(tmp_path: Any) -> None:
    conclusion = Overlap().conclude(overlap_rows({"narrative": 2.0, "expository": -1.0}), Options(), tmp_path)
    found = {
        row["contrast"]: row for row in conclusion.figures if "contrast" in row and row["metric"] == "order_margin"
    }
    for equal in ("epochs", "tokens"):
        means = {
            group: found[f"0.375 − 0, order{group}, equal {equal}"]["mean"]
            for group in ("", ", narrative", ", expository")
        }
        assert means == pytest.approx({"": 0.5, ", narrative": 2.0, ", expository": -1.0}, abs=0.01)
    told = paragraphs(conclusion)
    for name, best in (("narrative", "0.75"), ("expository", "0")):
        (least,) = [text for text in told if text.startswith(f"Equal epochs, order questions, {name}")]
        assert f"the best mean has {best}." in least
    assert "Equal tokens, fact questions, narrative: none." in told
    (sentence,) = [text for text in told if text.startswith("The verdict is of all documents together")]
    narrative, expository = sentence.split("narrative: ")[1].split("expository: ")
    assert narrative.count(": confirmed") == 2 and expository.count(": not confirmed") == 2
    assert not any(", narrative" in row.get("contrast", "") and "fact" in row["contrast"] for row in conclusion.figures)
    plots = {drawing.name: painted(drawing.draw) for drawing in conclusion.drawings}
    labels = {text.get_text() for text in plots["order-by-domain"].get_legend().get_texts()}
    assert labels == {
        f"{name}, equal {equal}" for name in ("narrative", "expository") for equal in ("epochs", "tokens")
    }
    curve = next(each for each in plots["order-by-domain"].containers if each.get_label() == "narrative, equal epochs")
    heights = dict(zip(*map(list, curve.lines[0].get_data()), strict=True))
    assert heights[0.5] - heights[0.0] == pytest.approx(2.0, abs=0.01)


def test_overlap_of_one_domain_is_told_once(tmp_path: Any) -> None:
    conclusion = Overlap().conclude(overlap_rows({"narrative": 2.0}), Options(), tmp_path)
    assert {drawing.name for drawing in conclusion.drawings} == {"order", "fact"}
    assert not any("narrative" in text for text in paragraphs(conclusion))
    assert not any(", narrative" in row.get("contrast", "") for row in conclusion.figures)


def test_too_few_questions_show_no_overlap_to_be_worse(tmp_path: Any) -> None:
    """Regression: without an interval every ratio but the best counted as shown to be worse."""
    conclusion = Overlap().conclude(overlap_rows({"narrative": 2.0}, questions=2), Options(), tmp_path)
    (text,) = [text for text in paragraphs(conclusion) if text.startswith("Equal epochs, order")]
    assert "not shown to be worse is 0;" in text and "no more than 0.25 nats worse is 0.75." in text


@pytest.mark.parametrize(
    ("kinds", "outcome", "said"),
    [
        (
            {"timeline reorder": 1.0, "comprehension and reasoning": 1.0, "computation": -9.0},
            "confirmed",
            "comprehension",
        ),
        (
            {"timeline reorder": 1.0, "comprehension and reasoning": -1.0, "computation": 9.0},
            "not confirmed",
            "comprehension",
        ),
        ({"timeline reorder": 1.0, "computation": -9.0, "fact": 1.0}, "not confirmed", "other questions"),
        ({"timeline reorder": 1.0, "computation": 1.0, "fact": 1.0}, "confirmed", "other questions"),
        ({"timeline reorder": -1.0, "comprehension and reasoning": 1.0}, "not confirmed", "comprehension"),
    ],
)
def test_the_baseline_judges_comprehension_where_it_is_asked(
    kinds: dict[str, float], outcome: str, said: str, tmp_path: Any
) -> None:
    """Regression: computation and retrieval were counted as comprehension."""
    rows = [
        row(f"{kind} {unit}", 0.0, method=method, kind=kind, likelihood=-unit + gain * (method == "lift+icl"))
        for kind, gain in kinds.items()
        for unit in range(12)
        for method in ("icl", "lift+icl")
    ]
    verdict = Baseline().conclude(rows, Options(), tmp_path).verdict
    assert verdict.outcome == outcome and f"on {said}" in verdict.sentence, verdict
    assert (f"{kinds.get('comprehension and reasoning', 0):+.2f} [" in verdict.sentence) or said == "other questions"
