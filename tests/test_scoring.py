"""Scores of small folders made by hand, against numbers computed by hand and by plain loops."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liftlm.errors import BenchmarkDataError, ConfigError
from liftlm.evaluation.benchmark import Benchmark, Question
from liftlm.evaluation.encoder_score import EncoderScores
from liftlm.evaluation.folders import compare_folders, comparison_table
from liftlm.evaluation.loogle import Cloze
from liftlm.evaluation.resampling import RESAMPLES, SEED, percentile_interval, resampled_means, sign_flip_p_values
from liftlm.evaluation.scoring import Row, Scores, choice_scores, question_of, read_predictions, read_rows, score_folder


class Toy(Benchmark):
    """An answer is right or wrong, and has a length; the second metric is one of timelines only."""

    name, dataset, source = "toy", "made by hand", "none"
    metrics = ("token_f1", "order", "meteor")

    def score(self, question: Question, answer: str) -> dict[str, float]:
        scores = {"token_f1": float(answer == question.answers[0])}
        return scores | ({"order": float(len(answer))} if question.kind == "timeline" else {})


def row(method: str, number: int = 0, **more: Any) -> Row:
    return {
        "id": f"{method}/{number}",
        "document_id": "d",
        "document_tokens": 1000,
        "question_id": str(number),
        "kind": "",
        "question": "Who rang?",
        "answers": ["Oswin"],
        "evidence": [],
        "choices": [],
        "data": {},
        "method": method,
        "answer": "Oswin",
        "answer_nll": 1.0,
        "choice_nlls": [],
        "seconds": 2.0,
        "peak_memory_bytes": 1000,
        "error": None,
    } | more


def write(folder: Path, rows: list[Row], name: str = "predictions.jsonl") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scored(folder: Path, rows: list[Row], benchmark: Benchmark | None = None) -> Scores:
    write(folder, rows)
    return score_folder(folder, benchmark or Toy())


def naive_interval(values: list[list[float]], formula: Any) -> list[float]:
    """Resamples one by one: the same draws, plain means."""
    draws = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    results = []
    for draw in draws:
        columns = zip(*(values[index] for index in draw), strict=True)
        results.append(formula(*(sum(column) / len(column) for column in columns)))
    results.sort()
    ends = []
    for share in (0.025, 0.975):  # numpy's linear rule
        place = share * (len(results) - 1)
        below = math.floor(place)
        above = results[min(below + 1, len(results) - 1)]
        ends.append(results[below] + (place - below) * (above - results[below]))
    return ends


# --- means and intervals ----------------------------------------------------------------------------------------------


def test_means_intervals_and_counts_by_hand(tmp_path: Path) -> None:
    nlls = [0.5, 1.0, 2.0, 4.0, 1.5]
    answers = ["Oswin", "Marta", "Oswin", "Oswin", "Marta"]
    rows = [row("lift", n, answer=answers[n], answer_nll=nlls[n]) for n in range(5)]
    rows.append(row("lift", 5, error="out of memory", answer="", answer_nll=None))
    entry = scored(tmp_path, rows).methods["lift"]
    assert entry["token_f1"] == 0.6 and entry["answer_nll"] == 1.8
    assert (entry["n"], entry["failed"]) == (5, 1)
    expected = naive_interval([[float(answer == "Oswin")] for answer in answers], lambda mean: mean)
    assert entry["token_f1_interval"] == pytest.approx(expected, abs=1e-6)
    assert entry["answer_nll_interval"] == pytest.approx(naive_interval([[n] for n in nlls], lambda m: m), abs=1e-6)
    assert json.loads((tmp_path / "scores.json").read_text()) == {"lift": entry}


def test_the_shape_of_the_files(tmp_path: Path) -> None:
    scores = scored(tmp_path, [row("closed-book"), row("lift")])
    assert list(scores.methods) == ["closed-book", "lift"]
    named = ["token_f1", "order", "meteor", "answer_nll", "judge", "evidence_gap_closed"]
    pairs = [part for name in named for part in (name, f"{name}_interval")]
    assert list(scores.methods["closed-book"]) == [*pairs, "n", "failed"]
    assert list(scores.methods["lift"]) == [*pairs, "reading_kept", "reading_kept_interval", "n", "failed"]
    assert json.loads((tmp_path / "details.json").read_text()) == scores.details
    assert scores.details["unavailable"] == {"meteor": "no WordNet here"}
    costs = scores.details["methods"]["lift"]
    assert (costs["seconds"], costs["peak_memory_bytes"], costs["prompt_tokens"]) == (2.0, 1000, None)
    assert scores.details["rows"] == {
        "closed-book/0": {"token_f1": 1.0, "answer_nll": 1.0},
        "lift/0": {"token_f1": 1.0, "answer_nll": 1.0},
    }


def test_a_metric_of_some_questions_is_averaged_over_these(tmp_path: Path) -> None:
    rows = [
        row("lift", 0, kind="timeline", answer="ab"),
        row("lift", 1, kind="timeline", answer="abcd"),
        row("lift", 2),
    ]
    scores = scored(tmp_path, rows)
    assert scores.methods["lift"]["order"] == 3.0
    assert scores.details["methods"]["lift"]["counts"]["order"] == 2
    assert scores.methods["lift"]["order_interval"] == [2.0, 4.0]


def test_what_is_no_finite_number_is_no_score(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row("lift", answer_nll=math.nan)) + "\n")
    entry = score_folder(tmp_path, Toy()).methods["lift"]
    assert entry["answer_nll"] is None and entry["answer_nll_interval"] is None and entry["n"] == 1


def test_resamples_leave_out_what_is_missing() -> None:
    values = np.array([[1.0, math.nan], [2.0, 5.0], [6.0, 7.0]])
    draws = np.random.default_rng(SEED).integers(3, size=(RESAMPLES, 3))
    means = resampled_means(values)
    for number in (0, 1, 17, RESAMPLES - 1):
        drawn = values[draws[number]]
        assert means[number, 0] == pytest.approx(drawn[:, 0].mean())
        known = [value for value in drawn[:, 1] if not math.isnan(value)]
        assert means[number, 1] == pytest.approx(sum(known) / len(known)) if known else math.isnan(means[number, 1])
    assert percentile_interval(np.array([math.nan] * 6 + [1.0] * 94)) is None
    assert percentile_interval(np.array([math.nan] * 5 + [1.0] * 95)) == (1.0, 1.0)


# --- the evidence gap, reading, the control ---------------------------------------------------------------------------


def test_evidence_gap_closed_is_of_means_over_common_questions(tmp_path: Path) -> None:
    closed, oracle, lift = [3.0, 4.0, 5.0, 9.0], [1.0, 1.0, 2.0, 0.0], [2.0, 1.0, 3.0, None]
    rows = [row("closed-book", n, answer_nll=value) for n, value in enumerate(closed)]
    rows += [row("oracle", n, answer_nll=value) for n, value in enumerate(oracle)]
    rows += [row("lift", n, answer_nll=value) for n, value in enumerate(lift)]
    methods = scored(tmp_path, rows).methods
    assert methods["lift"]["evidence_gap_closed"] == 0.75  # (12 − 6) / (12 − 4), without the question that lift lacks
    values = [[closed[n], lift[n], oracle[n]] for n in range(3)]
    expected = naive_interval(values, lambda c, m, o: (c - m) / (c - o))  # type: ignore[arg-type]
    assert methods["lift"]["evidence_gap_closed_interval"] == pytest.approx(expected, abs=1e-6)
    assert methods["closed-book"]["evidence_gap_closed"] == 0.0
    assert methods["oracle"]["evidence_gap_closed"] == 1.0


@pytest.mark.parametrize("missing", ["closed-book", "oracle"])
def test_no_gap_without_both_ends(tmp_path: Path, missing: str) -> None:
    rows = [row(name, answer_nll=value) for name, value in {"closed-book": 3.0, "lift": 2.0, "oracle": 1.0}.items()]
    entry = scored(tmp_path, [each for each in rows if each["method"] != missing]).methods["lift"]
    assert entry["evidence_gap_closed"] is None and entry["evidence_gap_closed_interval"] is None


def test_no_gap_where_the_oracle_does_not_help(tmp_path: Path) -> None:
    rows = [row("closed-book", answer_nll=1.0), row("lift", answer_nll=0.5), row("oracle", answer_nll=1.0)]
    assert scored(tmp_path, rows).methods["lift"]["evidence_gap_closed"] is None


def test_a_gap_that_many_resamples_do_not_have_gets_no_interval(tmp_path: Path) -> None:
    rows = [row("closed-book", n, answer_nll=value) for n, value in enumerate((5.0, 1.0))]
    rows += [row("oracle", n, answer_nll=value) for n, value in enumerate((1.0, 3.0))]
    entry = scored(tmp_path, rows).methods["oracle"]  # a quarter of the resamples has the second question only
    assert entry["evidence_gap_closed"] == 1.0 and entry["evidence_gap_closed_interval"] is None


def test_reading_kept_stands_at_every_lift_row_but_the_control(tmp_path: Path) -> None:
    rows = []
    for n, (with_adapter, without) in enumerate([(1, 1), (0, 1), (1, 1), (0, 0), (1, 1)]):
        rows += [row("lift+oracle", n, answer="Oswin" if with_adapter else "x")]
        rows += [
            row("oracle", n, answer="Oswin" if without else "x"),
            row("lift", n),
            row("lift+rag", n),
            row("rag", n),
        ]
        rows += [row("lift-other", n)]
    methods = scored(tmp_path, rows).methods
    assert {name: entry.get("reading_kept", "no") for name, entry in methods.items()} == {
        "rag": "no",
        "lift-other": "no",
        "oracle": "no",
        "lift": 0.75,
        "lift+rag": 0.75,
        "lift+oracle": 0.75,
    }
    assert methods["lift"]["reading_kept_interval"] == methods["lift+rag"]["reading_kept_interval"] is not None


def test_knowledge_is_lift_minus_another_documents_lift_question_by_question(tmp_path: Path) -> None:
    rows = [row("lift", n, answer_nll=1.0 + n) for n in range(3)]
    rows += [row("lift-other", n, answer_nll=4.0 + 2 * n, answer="x" if n else "Oswin") for n in range(4)]
    scores = scored(tmp_path, rows)
    by_metric = {entry["metric"]: entry for entry in scores.details["knowledge"]}
    assert by_metric["answer_nll"]["difference"] == -4.0 and by_metric["answer_nll"]["n"] == 3
    assert by_metric["answer_nll"]["interval"] == [-5.0, -3.0]
    assert by_metric["token_f1"]["difference"] == pytest.approx(2 / 3, abs=1e-6)
    assert by_metric["answer_nll"]["p_value"] == 0.25  # two of eight sign patterns
    assert by_metric["answer_nll"] in scores.details["paired"]
    assert scored(tmp_path, rows[:3]).details["knowledge"] == []


def test_beside_text_the_control_reads_the_same_text(tmp_path: Path) -> None:
    nlls = {"lift": 2.0, "lift-other": 3.0, "lift+icl": 1.5, "lift-other+icl": 1.75, "lift+oracle": 0.5, "icl": 2.5}
    scores = scored(tmp_path, [row(name, n, answer_nll=nll) for name, nll in nlls.items() for n in range(2)])
    differences = {
        (entry["a"], entry["b"]): entry["difference"]
        for entry in scores.details["knowledge"]
        if entry["metric"] == "answer_nll"
    }
    assert differences == {("lift", "lift-other"): -1.0, ("lift+icl", "lift-other+icl"): -0.25}
    assert list(scores.methods) == ["icl", "lift-other", "lift", "lift-other+icl", "lift+icl", "lift+oracle"]
    assert "reading_kept" not in scores.methods["lift-other+icl"]


# --- differences ------------------------------------------------------------------------------------------------------


def test_every_pair_once_the_richer_method_first(tmp_path: Path) -> None:
    details = scored(tmp_path, [row(name) for name in ("oracle", "rag", "icl", "mine", "closed-book")]).details
    pairs = list(dict.fromkeys((entry["a"], entry["b"]) for entry in details["paired"]))
    order = ["closed-book", "icl", "rag", "oracle", "mine"]
    assert sorted(pairs) == sorted((b, a) for a, b in itertools.combinations(order, 2))
    assert all(entry["difference"] == 0.0 and entry["p_value"] == 1.0 for entry in details["paired"])


def test_p_values_of_few_questions_are_exact() -> None:
    differences = np.array([[0.5, 0.0], [1.0, math.nan], [-0.25, 2.0], [0.75, 1.0]])
    for column, chance in enumerate(sign_flip_p_values(differences)):
        known = [value for value in differences[:, column] if not math.isnan(value)]
        sums = [
            sum(s * d for s, d in zip(signs, known, strict=True))
            for signs in itertools.product((1, -1), repeat=len(known))
        ]
        assert chance == pytest.approx(sum(abs(each) >= abs(sum(known)) - 1e-9 for each in sums) / len(sums))


def test_p_values_of_many_questions_are_close_to_exact_ones() -> None:
    differences = np.zeros((30, 2))
    differences[:14, 0] = [1.0] * 11 + [-1.0] * 3  # zeros cannot matter: a sign test of 14
    differences[:, 1] = 1.0
    exact = 2 * sum(math.comb(14, k) for k in range(4)) / 2**14
    found = sign_flip_p_values(differences)
    assert found[0] == pytest.approx(exact, abs=0.01) and 0 < found[1] < 0.001


def test_differences_are_resampled_over_common_questions_only(tmp_path: Path) -> None:
    ours, theirs = {0: 1.0, 1: 2.5, 2: 0.5, 4: 9.0, 5: 2.0, 7: 1.0}, {0: 2.0, 1: 2.75, 2: 3.5, 3: 4.0, 5: 6.0, 7: 1.5}
    rows = [row("lift", n, answer_nll=value) for n, value in ours.items()]
    rows += [row("rag", n, answer_nll=value) for n, value in theirs.items()]
    found = scored(tmp_path, rows).details["paired"]
    entry = next(each for each in found if each["metric"] == "answer_nll")
    values = [[ours[n] - theirs[n]] for n in (0, 1, 2, 5, 7)]
    assert (entry["a"], entry["b"], entry["n"], entry["difference"]) == ("lift", "rag", 5, -1.75)
    assert entry["interval"] == pytest.approx(naive_interval(values, lambda mean: mean), abs=1e-6)
    assert entry["p_value"] == 2 / 32  # all have one sign


def test_by_kind_and_by_length(tmp_path: Path) -> None:
    rows = [row("lift", 0, kind="b", document_tokens=1500), row("lift", 1, kind="a", document_tokens=1501, answer="x")]
    rows += [
        row("lift", 2, kind="a", document_tokens=200_000),
        row("lift-other", 2, kind="a", answer="x", document_tokens=200_000),
    ]
    details = scored(tmp_path, rows).details
    assert list(details["kinds"]) == ["a", "b"]
    assert list(details["lengths"]) == ["up to 1,500 tokens", "up to 3,000 tokens", "over 96,000 tokens"]
    first = details["kinds"]["a"]
    assert (first["questions"], first["methods"]["lift"]["token_f1"], first["methods"]["lift"]["n"]) == (2, 0.5, 2)
    assert first["methods"]["lift-other"]["n"] == 1 and details["kinds"]["b"]["methods"]["lift-other"]["n"] == 0
    difference = next(entry for entry in first["paired"] if entry["metric"] == "token_f1")
    assert (difference["a"], difference["b"], difference["difference"], difference["n"]) == (
        "lift",
        "lift-other",
        1.0,
        1,
    )
    assert scored(tmp_path, [row("lift")]).details["kinds"] == {}


# --- weights ----------------------------------------------------------------------------------------------------------


def test_cloze_counts_masks_not_questions(tmp_path: Path) -> None:
    """LooGLE divides all matches by all masks: 1 of 1, 1 of 2, 0 of 5 are 2 of 8, not the mean of 1, 0.5 and 0."""
    masks = [{"<mask-0>": "Ada"}, {"<mask-0>": "Ada", "<mask-1>": "Bo Lee"}, {f"<mask-{n}>": f"X{n}" for n in range(5)}]
    answers = {
        "lift": ["{'<mask-0>': 'Ada'}", "{'<mask-0>': 'Ada', '<mask-1>': 'Bo'}", "{}"],
        "icl": ["{}", "{'<mask-0>': 'Ada', '<mask-1>': 'Bo Lee'}", "{'<mask-3>': 'X3'}"],
    }
    rows = [
        row(method, n, answers=[str(each)], answer=given[n], data={"masks": each}, answer_nll=float(n))
        for method, given in answers.items()
        for n, each in enumerate(masks)
    ]
    write(tmp_path, rows)
    scores = score_folder(tmp_path, Cloze())
    lift, icl = scores.methods["lift"], scores.methods["icl"]
    assert (lift["exact_match"], lift["partial_match"]) == (2 / 8, 3 / 8)
    assert (icl["exact_match"], icl["partial_match"]) == (3 / 8, 3 / 8)
    assert lift["answer_nll"] == 1.0, "a likelihood is of the answer, not of its masks"
    pairs = [[1, 1], [1, 2], [0, 5]]
    draws = np.random.default_rng(SEED).integers(3, size=(RESAMPLES, 3))
    ratios = [sum(pairs[n][0] for n in drawn) / sum(pairs[n][1] for n in drawn) for drawn in draws]
    assert lift["exact_match_interval"] == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=1e-6)
    difference = next(
        each for each in scores.details["paired"] if (each["a"], each["metric"]) == ("lift", "exact_match")
    )
    assert difference["difference"] == -1 / 8 and difference["n"] == 3  # +1 − 1 − 1 masks of 8
    assert difference["p_value"] == 1.0, "of eight patterns of signs all have a sum at least as far from 0"


# --- choices ----------------------------------------------------------------------------------------------------------


THREE = ["a", "b", "the long one"]  # the last is right


@pytest.mark.parametrize(
    ("choices", "nlls", "right"),  # right: by the whole, by a token; None: not scored
    [
        (THREE, [[4.0, 1], [3.0, 1], [6.0, 4]], (0, 1)),  # long, so likelier a token
        (THREE, [[4.0, 1], [9.0, 1], [3.0, 1]], (1, 1)),
        (THREE, [[4.0, 4], [9.0, 1], [3.0, 1]], (1, 0)),
        (THREE, [[3.0, 1], [4.0, 1], [3.0, 1]], (0, 0)),  # a tie: the first counts as chosen
        (THREE, [[3.0, 1], [4.0, 1], [6.0, 2]], (0, 0)),  # a tie a token
        (THREE, [[0.0, 1], [0.0, 1], [0.0, 1]], (0, 0)),
        (THREE[::-1], [[3.0, 1], [4.0, 1], [3.0, 1]], (1, 1)),  # a tie that the right one leads
        (["the long one"], [[9.0, 3]], (1, 1)),  # nothing to choose
        (["the long one", "b", "the long one"], [[3.0, 1], [4.0, 1], [3.0, 1]], (1, 1)),  # the right one twice
        (["b", "b", "the long one"], [[2.0, 1], [2.0, 1], [3.0, 1]], (0, 0)),
        (["", "b", "the long one"], [[5.0, 0], [7.0, 1], [4.0, 1]], (1, 1)),  # no token counts as one
        (["", "b", "the long one"], [[3.0, 0], [7.0, 1], [4.0, 2]], (0, 1)),
        (THREE, [[4.0, 1], [3.0, 1]], None),
        (THREE, [[4.0, 1], [3.0, 1], [math.nan, 1]], None),
        (THREE, [[4.0, 1], [3.0, 1], [math.inf, 1]], None),
        (THREE, [[4.0, 1], [None, 1], [3.0, 1]], None),
        (THREE, [], None),
        (["a", "b"], [[4.0, 1], [3.0, 1]], None),  # the right one is not there
        ([], [], None),
    ],
)
def test_choices(choices: list[str], nlls: list[list[float]], right: tuple[int, int] | None) -> None:
    scores = choice_scores({"choices": choices, "answers": ["the long one"], "choice_nlls": nlls})
    expected = {} if right is None else {"accuracy": float(right[0]), "accuracy_normalized": float(right[1])}
    assert scores == expected


def test_choices_are_columns_only_where_they_are(tmp_path: Path) -> None:
    choices = {"choices": ["Oswin", "x"], "choice_nlls": [[1.0, 1], [2.0, 1]]}
    scores = scored(
        tmp_path, [row("lift", 0, **choices), row("lift", 1, **choices | {"choice_nlls": [[3.0, 1], [2.0, 1]]})]
    )
    assert scores.methods["lift"]["accuracy"] == scores.methods["lift"]["accuracy_normalized"] == 0.5
    assert scores.details["metrics"][:2] == ["accuracy", "accuracy_normalized"]
    assert "accuracy" not in scored(tmp_path, [row("lift")]).methods["lift"]


def test_the_benchmark_gets_the_question_as_it_gave_it() -> None:
    given = Question("7", "Who?", ("a", "b"), ("E.",), "kind", ("a", "c"), {"depth": 0.5})
    line = {
        "question_id": "7",
        **{name: getattr(given, name) for name in ("question", "answers", "evidence", "kind", "choices")},
    }
    assert question_of(json.loads(json.dumps(line | {"data": dict(given.data)}))) == given


# --- files ------------------------------------------------------------------------------------------------------------


def test_several_processes_files_are_one_and_the_last_of_an_id_counts(tmp_path: Path) -> None:
    write(tmp_path, [row("lift", 0, answer="x"), row("lift", 1, error="x"), row("lift", 2)], "predictions.0.jsonl")
    write(tmp_path, [row("lift", 0), row("lift", 1), row("lift", 2, error="late")], "predictions.1.jsonl")
    with (tmp_path / "predictions.1.jsonl").open("a") as file:
        file.write('{"id": "lift/3", "docu')
    rows, unreadable = read_predictions(tmp_path)
    assert [each["answer"] for each in rows] == ["Oswin"] * 3 and unreadable == 0
    assert not any(each["error"] for each in rows)  # a failure in another file does not undo an answer


def test_another_settings_row_of_the_same_question_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, [row("lift", 0, answer="x"), row("lift", 0, id="other settings")])
    assert [each["id"] for each in read_predictions(tmp_path)[0]] == ["other settings"]


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text(
        json.dumps(row("lift")) + "\n{torn\n\n[1]\n" + json.dumps(row("rag")) + "\n{to"
    )
    assert score_folder(tmp_path, Toy()).details["unreadable_lines"] == 1
    assert len(read_rows(tmp_path, "predictions")[0]) == 2
    assert read_rows(tmp_path, "absorbs") == ([], 0)


def test_the_same_predictions_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    rows = [
        row(
            method,
            n,
            answer_nll=float(generator.normal()),
            kind="ab"[n % 2],
            answer="Oswin" if generator.random() < 0.5 else "x",
        )
        for n in range(20)
        for method in ("closed-book", "lift", "lift-other", "oracle")
    ]
    write(tmp_path / "a", rows)
    write(tmp_path / "b", rows[::-2], "predictions.0.jsonl")
    write(tmp_path / "b", rows[-2::-2], "predictions.1.jsonl")
    for folder in (tmp_path / "a", tmp_path / "b"):
        score_folder(folder, Toy())
    first = {name: (tmp_path / "a" / name).read_bytes() for name in ("scores.json", "details.json")}
    assert first == {name: (tmp_path / "b" / name).read_bytes() for name in first}
    score_folder(tmp_path / "a", Toy())
    assert first == {name: (tmp_path / "a" / name).read_bytes() for name in first}


def test_all_failed_one_question_and_nothing(tmp_path: Path) -> None:
    scores = scored(tmp_path, [row("lift", n, error="broken", answer="") for n in range(3)])
    entry = scores.methods["lift"]
    assert (entry["n"], entry["failed"], entry["token_f1"], entry["token_f1_interval"]) == (0, 3, None, None)
    assert scores.details["unavailable"] == {} and scores.details["paired"] == []
    single = scored(tmp_path, [row("lift")]).methods["lift"]
    assert (single["token_f1"], single["token_f1_interval"], single["n"]) == (1.0, [1.0, 1.0], 1)
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(BenchmarkDataError, match="no predictions"):
        score_folder(tmp_path, Toy())


def test_an_encoder_adds_its_columns_and_is_named(tmp_path: Path) -> None:
    def encoder(answers: Any, references: Any) -> EncoderScores:
        assert (list(answers), list(references)) == (["Oswin"], [["Oswin"]])
        return EncoderScores("tiny, layer 1 of 2", ({"bert_f1": 0.5},))

    write(tmp_path, [row("lift"), row("rag", error="x")])
    scores = score_folder(tmp_path, Toy(), encoder=encoder)
    assert scores.methods["lift"]["bert_f1"] == 0.5 and scores.methods["rag"]["bert_f1"] is None
    assert scores.details["encoder"] == "tiny, layer 1 of 2"


def test_no_torch() -> None:
    program = (
        "import sys, liftlm.evaluation.scoring, liftlm.evaluation.judge, liftlm.evaluation.report, liftlm.evaluation.live;"
        "print([name for name in ('torch', 'transformers', 'openai', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- two folders ------------------------------------------------------------------------------------------------------


def run_of(folder: Path, name: str = "toy") -> None:
    (folder / "run.json").write_text(json.dumps({"benchmark": name}), encoding="utf-8")


def test_two_folders_are_compared_question_by_question(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    right = ["Oswin", "Oswin", "Oswin", "Marta", "Marta"]
    scored(here, [row("lift", n, answer=right[n], answer_nll=1.0 + n) for n in range(5)])
    # another recipe: other ids; one question is not asked, one is another in its place, one is new; another method
    others = [
        row("lift", n, id=f"other/{n}", answer="Marta" if n else "Oswin", answer_nll=2.0 + n) for n in (0, 1, 2, 9)
    ]
    scored(there, [*others, row("lift", 4, id="other/4", question="Who slept?"), row("icl", 0, id="other/icl")])
    entries = {entry["metric"]: entry for entry in compare_folders(here, there, Toy())}
    assert {entry["method"] for entry in entries.values()} == {"lift"}
    f1, nll = entries["token_f1"], entries["answer_nll"]
    assert (f1["n"], f1["here"], f1["there"]) == (3, 1.0, pytest.approx(1 / 3, abs=1e-6))
    assert f1["difference"] == pytest.approx(2 / 3, abs=1e-6)
    assert (nll["n"], nll["here"], nll["there"], nll["difference"], nll["interval"]) == (
        3,
        2.0,
        3.0,
        -1.0,
        [-1.0, -1.0],
    )
    # of the 8 patterns of signs of three equal differences two are as far from 0
    assert nll["p_value"] == pytest.approx(0.25)
    table = comparison_table([nll])
    assert "| lift | answer_nll | 3 | 2.000 | 3.000 | -1.000 | [-1.000, -1.000] | 0.250 |" in table


def test_the_means_of_two_folders_are_weighted_as_their_difference(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    cloze = Cloze()
    masks = [{"<mask-0>": "Oswin"}, {f"<mask-{n}>": "Oswin" for n in range(4)}]
    for folder, good in ((here, 1), (there, 0)):
        rows = []
        for n, mask in enumerate(masks):
            wanted = json.dumps(mask)
            answer = wanted if n == good else json.dumps(dict.fromkeys(mask, "x"))
            rows.append(row("lift", n, id=f"{folder.name}/{n}", answers=[wanted], answer=answer, data={"masks": mask}))
        scored(folder, rows, cloze)
    entry = next(e for e in compare_folders(here, there, cloze) if e["metric"] == "exact_match")
    assert entry["here"] - entry["there"] == pytest.approx(entry["difference"], abs=1e-5)
    assert (entry["here"], entry["there"]) == (pytest.approx(0.8), pytest.approx(0.2))  # four of five masks, and one


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    scored(here, [row("lift")])
    write(there, [row("lift")])
    with pytest.raises(ConfigError, match="holds no scores"):
        compare_folders(here, there, Toy())
    scored(there, [row("icl")])
    with pytest.raises(ConfigError, match="in common"):
        compare_folders(here, there, Toy())
    with pytest.raises(ConfigError, match="with itself"):
        compare_folders(here, here, Toy())
    run_of(here)
    run_of(there, "needle")
    with pytest.raises(ConfigError, match="of needle, not of toy"):
        compare_folders(here, there, Toy())


def test_what_two_judges_said_is_not_compared(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, judge in ((here, "one"), (there, "two")):
        scored(folder, [row("lift", n, id=f"{folder.name}/{n}") for n in range(2)])
        details = json.loads((folder / "details.json").read_text(encoding="utf-8"))
        details["judge"] = judge
        for values in details["rows"].values():
            values["judge"] = 1.0
        (folder / "details.json").write_text(json.dumps(details), encoding="utf-8")
    assert "judge" not in {entry["metric"] for entry in compare_folders(here, there, Toy())}
