"""LooGLE and LongBench: what is read, what is asked word for word, what an answer scores; and how questions are drawn."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden_longbench import GOLDEN
from liftlm.documents import Document
from liftlm.errors import BenchmarkDataError, ConfigError
from liftlm.evaluation import hub, metrics
from liftlm.evaluation.benchmark import Item, Question, draw
from liftlm.evaluation.evidence import EvidenceFinder
from liftlm.evaluation.longbench import longbench_tasks
from liftlm.evaluation.loogle import KINDS, Cloze, LongQA, ShortQA, Summarization
from liftlm.evaluation.registry import benchmark_names, make_benchmark
from liftlm.prompts import Wording

DATA = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation data is not beside the repository")

TEXT = (
    "Oswin rang the bell.[3] The bell, cast\nin 1831, hung in Corriden. Ada left first. Oswin left in the third winter."
)
DOCUMENT = Document("Corriden", TEXT)


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def loogle_row(pairs: Any, **more: Any) -> dict[str, Any]:
    return {"input": TEXT, "title": "Corriden", "qa_pairs": pairs, "output": "none"} | more


def asked(items: list[Item]) -> list[Question]:
    return [question for item in items for question in item.questions]


# --- LooGLE: reading --------------------------------------------------------------------------------------------------

PAIR = {"Q": "Who rang the bell?", "A": "Oswin.", "S": "Oswin rang the bell."}


@pytest.mark.parametrize("name", ["shortdep_qa.jsonl", "loogle/shortdep_qa.jsonl", "LooGLE-testdata/shortdep_qa.jsonl"])
def test_a_folder_or_the_file_itself(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, loogle_row(str([PAIR])))
    assert ShortQA().load(tmp_path) == ShortQA().load(path)
    (item,) = ShortQA().load(path.rename(tmp_path / "renamed.jsonl"))
    assert (item.document.title, item.document.text) == ("Corriden", TEXT)
    assert item.questions == (Question("0", "Who rang the bell?", ("Oswin.",), ("Oswin rang the bell.",)),)


@pytest.mark.parametrize(
    "pairs",
    [str([PAIR]), [PAIR], str([PAIR | {"S": ["Oswin rang the bell."]}]), json.dumps([PAIR])],
    ids=["literal", "list", "evidence in a list", "json"],
)
def test_pairs_in_any_form(pairs: Any, tmp_path: Path) -> None:
    (question,) = asked(ShortQA().load(write(tmp_path / "a.jsonl", loogle_row(pairs))))
    assert (question.answers, question.evidence) == (("Oswin.",), ("Oswin rang the bell.",))


def test_rows_of_the_hub_have_one_question_each(tmp_path: Path) -> None:
    row = {"context": TEXT, "title": "Corriden", "task": "longdep_qa", "question": "When?", "answer": 1831}
    path = write(tmp_path / "a.jsonl", row | {"evidence": "['Ada left first.']"}, row | {"question": "Where?"})
    (item,) = LongQA().load(path)
    assert [(q.id, q.question, q.answers) for q in item.questions] == [
        ("0", "When?", ("1831",)),
        ("1", "Where?", ("1831",)),
    ]
    assert item.questions[0].evidence == ("Ada left first.",) and item.questions[0].kind == ""


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [
        ("comprehension_and_reasoning", "comprehension and reasoning"),
        ("Comprehension & Reasoning", "comprehension and reasoning"),
        ("multiple_information_retrieval", "multiple information retrieval"),
        ("Computation", "computation"),
        ("timeline reorder", "timeline reorder"),
        (None, ""),
    ],
)
def test_kinds_in_any_spelling(spelling: str | None, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", loogle_row([PAIR | {"type": spelling}]))
    assert asked(LongQA().load(path))[0].kind == kind


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (loogle_row("none"), "Line 2 of .* has no questions"),
        (loogle_row("[{'Q': open('x')}]"), "qa_pairs is not a Python literal"),
        (loogle_row("[" * 500), "qa_pairs is not a Python literal"),
        (loogle_row(["Q"]), "Line 2 of .*, question 1 is not a dictionary"),
        (loogle_row([PAIR, {"Q": "?", "A": ""}]), "Line 2 of .*, question 2 has a question without an answer"),
        (loogle_row([{"A": "x"}]), 'question 1 has no text "Q"'),
        (loogle_row([PAIR | {"S": [["x"]]}]), "the evidence must be a text or a list of texts"),
        (loogle_row([PAIR], input=" "), 'Line 2 of .* has no text "input"'),
        (loogle_row([PAIR], title=None), 'Line 2 of .* has no text "title"'),
        ([1], "Line 2 of .* is not a JSON object"),
    ],
)
def test_a_wrong_row_is_named(row: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", loogle_row([PAIR]), row)
    with pytest.raises(BenchmarkDataError, match=words):
        LongQA().load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkDataError, match="holds no shortdep_qa") as caught:
        ShortQA().load(tmp_path)
    assert "--data" in caught.value.next_step and "bigai-nlco/LooGLE" in caught.value.next_step
    with pytest.raises(BenchmarkDataError, match="no file or folder"):
        ShortQA().load(tmp_path / "nowhere")


# --- LooGLE: evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["Ada left first."], ["Ada left first."]),
        (["The bell, cast in 1831, hung in Corriden."], ["The bell, cast\nin 1831, hung in Corriden."]),
        (["the bell  cast in 1831 -- hung in Corriden"], ["The bell, cast\nin 1831, hung in Corriden."]),
        (["Oswin left in the third winter.", "Ada left first."], ["Ada left first.", "Oswin left in the third winter."]),
        (["Oswin rang the bell.....Ada left first."], ["Oswin rang the bell.", "Ada left first."]),
        (["Ada left first. Nobody\nwept."], ["Ada left first.", "Nobody wept."]),
        (["Not in it at all.", "Ada left first."], ["Not in it at all.", "Ada left first."]),
        (["Ada left first.", "Ada left first.", " "], ["Ada left first."]),
        (["ADA"], ["ADA"]),  # too short to be looked up by its letters
    ],
)  # fmt: skip
def test_evidence_is_the_documents_own(given: list[str], found: list[str]) -> None:
    assert EvidenceFinder(TEXT).find(given) == tuple(found)


def test_citation_marks_and_lost_accents_do_not_hide_evidence() -> None:
    text = "He wrote of the Montjuïc castle[12] and its long siege. Nobody answered."
    (found,) = EvidenceFinder(text).find(["He wrote of the Montju?c castle and its long siege."])
    assert found == "He wrote of the Montjuïc castle[12] and its long siege."


@real_data
@pytest.mark.parametrize(("benchmark", "least"), [(ShortQA(), 0.95), (LongQA(), 0.85)])
def test_evidence_of_the_real_data_is_found(benchmark: ShortQA | LongQA, least: float) -> None:
    inside = [
        sentence in item.document.text
        for item in benchmark.load(DATA)
        for question in item.questions
        for sentence in question.evidence
    ]
    assert sum(inside) >= least * len(inside) > 0


# --- LooGLE: asking and scoring ---------------------------------------------------------------------------------------

WHO = Question("0", "Who rang the bell?", ("Oswin rang the bell.",))


def test_golden_prompts_of_loogle() -> None:
    for kind in (ShortQA, LongQA):
        assert kind().wording(DOCUMENT, WHO) == Wording(
            'Please answer the question based on "Corriden".\nQuestion: Who rang the bell?',
            'Here is text from "Corriden":\n\n',
            '\n\nPlease answer the question based on "Corriden".\nQuestion: Who rang the bell?',
        )
        assert kind(prompt="loogle").wording(DOCUMENT, WHO) == Wording(
            'Please answer the question based on "Corriden".\nQuestion: Who rang the bell?\nAnswer: ',
            "Please answer the question based on the long texts below. \n",
            "\nQuestion: Who rang the bell?\nAnswer: ",
        )
    rules = (
        " Each of the placeholder '<mask-n>' in the question could be an entity of Person, Location or Organiocation. The "
        "same masks represent the same entity. Output a json format answer, for example: {'<mask-0>': 'Bob', '<mask-1>': "
        "'Gorrosion Magazine','<mask-2>': 'Bethel Horizon'}\n"
    )
    assert Cloze().wording(DOCUMENT, Question("0", "<mask-0> rang {it}.", ("",))) == Wording(
        f'Please fill in the clozes based on "Corriden".{rules}'
        "Question: <mask-0> rang {it}. What are the masked entities? \nAnswer:",
        f"Please fill in the clozes based on the given long texts below.{rules}",
        "\n Question: <mask-0> rang {it}. What are the masked entities? \nAnswer:",
    )
    assert Summarization().wording(DOCUMENT, Question("0", "", ("",))) == Wording(
        'Please generate a summary of the paper "Corriden". \n Summarization: ',
        "Please generate a summary of the below paper. \n",
        "\n Summarization: ",
    )
    assert [kind.max_new_tokens for kind in (ShortQA, LongQA, Cloze, Summarization)] == [300, 500, 50, 500]


@real_data
def test_prompts_and_lengths_are_the_authors_files() -> None:
    prompts = json.loads((DATA / "loogle/config/task2prompt.json").read_text(encoding="utf-8"))
    lengths = json.loads((DATA / "loogle/config/task2maxlen.json").read_text(encoding="utf-8"))
    sets = {
        "shortdep_qa": ShortQA("loogle"),
        "longdep_qa": LongQA("loogle"),
        "shortdep_cloze": Cloze(),
        "longdep_summarization": Summarization(),
    }
    for task, benchmark in sets.items():
        wording = benchmark.wording(DOCUMENT, Question("0", "WHO?", ("",)))
        assert f"{wording.before}TEXT{wording.after}" == prompts[task].format(input="TEXT", Q="WHO?")
        assert benchmark.max_new_tokens == lengths[task]


def test_scores_by_hand() -> None:
    """Oswin rang (it | the bell.): two words of three and of four."""
    scores = ShortQA().score(WHO, "Oswin rang it.")
    expected = {
        "token_f1": 2 / 3,  # without the article
        "rouge_1": 4 / 7,
        "rouge_2": 2 / 5,
        "rouge_l": 4 / 7,
        "rouge_1_recall": 2 / 4,
        "rouge_2_recall": 1 / 3,
        "rouge_l_recall": 2 / 4,
        "bleu_1": 2 / 3 * 0.716531,  # exp(1 - 4/3), the penalty for brevity
        "bleu_4": 0,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert set(scores) - set(expected) == ({"meteor"} if metrics.meteor_available() else set())
    assert set(scores) <= set(ShortQA.metrics)
    assert all(value == 0 for value in ShortQA().score(WHO, "").values())


def test_timelines_by_hand() -> None:
    question = Question("0", "Order:\n1. b\n2. a\n3. c", ("2,1,3",), kind=KINDS[3])
    names = LongQA.metrics[-5:]
    for answer, expected in (
        ("2,1,3", [1, 0, 0, 0, 0]),
        ("1, 2, 3", [2 / 3, 2 / 3, 2 / 3, 1, 1]),
        ("?", [0, 8 / 3, 4 / 3, 2, 2]),
    ):
        scores = LongQA().score(question, answer)
        assert [scores[name] for name in names] == pytest.approx(expected), answer
    assert scores.keys() <= set(LongQA.metrics)
    assert not set(names) & LongQA().score(WHO, "2,1,3").keys(), "only timelines have these"


def test_cloze_row(tmp_path: Path) -> None:
    """A row as upstream's shortdep_cloze has them: S is the answered text, which the document does not hold."""
    masks = {"<mask-0>": "Oswin", "<mask-1>": "the United States"}
    pair = {"Q": "<mask-0> left <mask-1>.", "S": "Oswin left the United States.", "A": masks}
    for answer in (masks, str(masks)):
        path = write(tmp_path / "shortdep_cloze.jsonl", loogle_row(str([pair | {"A": answer}])))
        (question,) = asked(Cloze().load(path))
        assert question.answers == ("{'<mask-0>': 'Oswin', '<mask-1>': 'the United States'}",)
        assert question.data == {"masks": masks} and question.evidence == ()
    score = Cloze().score
    assert score(question, question.answers[0]) == {"exact_match": 1, "partial_match": 1}
    assert score(question, '{"<mask-0>": "Oswin", "<mask-1>": "United Kingdom"}') == {
        "exact_match": 0.5,
        "partial_match": 1,
    }
    assert score(question, "Oswin") == {"exact_match": 0, "partial_match": 0}
    for wrong in ("Oswin", {}):
        path = write(tmp_path / "b.jsonl", loogle_row([pair | {"A": wrong}]))
        with pytest.raises(BenchmarkDataError, match="Line 1 of"):
            Cloze().load(path)


def test_summaries(tmp_path: Path) -> None:
    path = write(tmp_path / "longdep_summarization.jsonl", loogle_row("none", output="Bells ring."))
    (question,) = asked(Summarization().load(tmp_path))
    assert question.answers == ("Bells ring.",)
    assert Summarization().score(question, "Bells ring.")["rouge_l"] == 1
    write(path, loogle_row([PAIR]))
    with pytest.raises(BenchmarkDataError, match="has no summary"):
        Summarization().load(path)


@real_data
def test_real_loogle() -> None:
    short, long, papers = ShortQA().load(DATA), LongQA().load(DATA / "loogle"), Summarization().load(DATA)
    assert [(len(items), len(asked(items))) for items in (short, long, papers)] == [(3, 39), (3, 26), (3, 3)]
    assert {question.kind for question in asked(long)} == set(KINDS)
    timelines = [question for question in asked(long) if question.kind == KINDS[3]]
    assert [LongQA().score(q, q.answers[0])["coordinate_score"] for q in timelines] == [1, 1, 1]
    assert all(ShortQA().score(question, question.answers[0])["token_f1"] == 1 for question in asked(short))


# --- LongBench --------------------------------------------------------------------------------------------------------


def bench(task: str) -> Any:
    return longbench_tasks()[task]()


def bench_row(**more: Any) -> dict[str, Any]:
    row = {"input": "Who?", "context": TEXT, "answers": ["Oswin"], "length": 12, "dataset": "x", "language": "en"}
    return row | {"all_classes": None, "_id": "ab12"} | more


@pytest.mark.parametrize("task", GOLDEN)
def test_golden_prompts_of_longbench(task: str) -> None:
    before, after, alone = GOLDEN[task]
    assert bench(task).wording(DOCUMENT, Question("0", "WHO?", ("",))) == Wording(alone, before, after)


@real_data
def test_longbench_prompts_and_lengths_are_upstreams_files() -> None:
    prompts = json.loads((DATA / "longbench/config/dataset2prompt.json").read_text(encoding="utf-8"))
    lengths = json.loads((DATA / "longbench/config/dataset2maxlen.json").read_text(encoding="utf-8"))
    assert len(longbench_tasks()) == 16 and set(longbench_tasks()) == set(GOLDEN) == set(metrics.LONGBENCH_TASKS)
    for task, kind in longbench_tasks().items():
        wording = kind().wording(DOCUMENT, Question("0", "WHO?", ("",)))
        assert f"{wording.before}TEXT{wording.after}" == prompts[task].format(context="TEXT", input="WHO?")
        assert kind.max_new_tokens == lengths[task]


def test_braces_in_a_question_stay() -> None:
    wording = bench("qmsum").wording(DOCUMENT, Question("0", "What is {context} or {input} or {x}?", ("",)))
    assert "Query: What is {context} or {input} or {x}?\nAnswer:" in wording.after


def test_plain_text_tasks() -> None:
    plain = {task for task, kind in longbench_tasks().items() if not kind.chat_template}
    assert plain == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}


def test_rows_with_one_context_are_one_item(tmp_path: Path) -> None:
    rows = [
        bench_row(),
        bench_row(context="Another."),
        bench_row(input="When?", _id="cd", answers=["1831", "", "in 1831"]),
    ]
    write(tmp_path / "longbench/musique.jsonl", *rows)
    first, second = bench("musique").load(tmp_path)
    assert [q.id for q in first.questions] == ["ab12", "cd"] and first.document.title == "LongBench musique ab12"
    assert first.questions[1].answers == ("1831", "in 1831") and second.document.text == "Another."


def test_tasks_without_a_question_have_one_to_show(tmp_path: Path) -> None:
    for task in ("gov_report", "multi_news", "passage_count", "lcc"):
        path = write(tmp_path / "a.jsonl", bench_row(input=""))
        (question,) = asked(bench(task).load(path))
        assert (
            question.question.endswith((".", "?"))
            and question.question not in bench(task).wording(DOCUMENT, question).after
        )


@pytest.mark.parametrize(
    ("task", "more", "words"),
    [
        ("musique", {"input": ""}, 'Line 1 of .* has no text "input"'),
        ("musique", {"context": 3}, 'has no text "context"'),
        ("musique", {"answers": []}, "a question without an answer"),
        ("musique", {"answers": {"a": 1}}, "must be a text or a list"),
        ("trec", {"all_classes": [{}]}, "all_classes must be a text or a list"),
        ("passage_retrieval_en", {"answers": ["7"]}, "must be like .Paragraph 7"),
    ],
)
def test_a_wrong_row_of_longbench_is_named(task: str, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", bench_row(**more))
    with pytest.raises(BenchmarkDataError, match=words):
        bench(task).load(path)


def test_one_id_twice_for_a_document_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", bench_row(), bench_row(input="When?"))
    with pytest.raises(BenchmarkDataError, match='have the id "ab12"'):
        bench("musique").load(path)


@pytest.mark.parametrize(
    ("task", "answer", "references", "score"),
    [
        ("musique", "The University of Toronto.", ["UT", "University of Toronto"], 1),
        ("narrativeqa", "a grey monk", ["A monk."], 2 / 3),
        ("gov_report", "a b c", ["a b d"], 2 / 3),
        ("trec", "\nNumber of something\nQuestion: what?", ["Number of something"], 1),
        ("trec", "Abbreviation or Date", ["Date"], 1 / 2),
        ("triviaqa", "Oswin\n\nPassage: Ada", ["Oswin"], 1),
        ("passage_count", "Of 30 paragraphs 12 are unique", ["12"], 1 / 2),
        ("passage_retrieval_en", "Paragraph 3, not 7", ["Paragraph 7"], 1 / 2),
        ("lcc", "# comment\nreturn x\nreturn y", ["return x"], 1),
    ],
)
def test_longbench_scores_by_hand(task: str, answer: str, references: list[str], score: float) -> None:
    classes = ["Date", "Number of something", "Abbreviation"]
    question = Question("0", "?", tuple(references), data={"all_classes": classes} if task == "trec" else {})
    scores = bench(task).score(question, answer)
    assert scores["longbench_score"] == pytest.approx(score, abs=1e-6) and set(scores) == set(bench(task).metrics)


@real_data
@pytest.mark.parametrize("path", sorted((DATA / "longbench").glob("*.jsonl")), ids=lambda path: path.stem)
def test_real_longbench(path: Path) -> None:
    items = bench(path.stem).load(DATA)
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(asked(items)) == len(lines) > 0
    for question in asked(items):
        assert bench(path.stem).score(question, question.answers[0])["longbench_score"] == pytest.approx(1, abs=1e-6)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_without_data_and_hub_the_error_says_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def fail(name: str, **more: Any) -> str:
        calls.append(more | {"name": name})
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for benchmark, wanted in ((ShortQA(), "bigai-nlco/LooGLE"), (bench("qasper"), "THUDM/LongBench")):
        with pytest.raises(BenchmarkDataError, match=f"{wanted} is not on this machine") as caught:
            benchmark.load(None)
        assert "Give it with --data" in caught.value.next_step and wanted in caught.value.next_step
    assert all(call["repo_type"] == "dataset" and call["local_files_only"] for call in calls)


def test_a_file_of_the_hub_and_a_member_of_its_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    write(snapshot / "data/shortdep_qa.jsonl", loogle_row([PAIR]))
    with zipfile.ZipFile(snapshot / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(bench_row()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: str(snapshot))
    assert len(ShortQA().load(None)) == 1
    assert len(bench("qasper").load(None)) == len(bench("qasper").load(None)) == 1
    assert [path.name for path in (tmp_path / "cache").rglob("*.jsonl")] == ["qasper.jsonl"]
    with pytest.raises(BenchmarkDataError, match="holds no 2wikimqa"):
        bench("2wikimqa").load(None)
    (snapshot / "data.zip").write_bytes(b"PK nothing")
    with pytest.raises(BenchmarkDataError, match="is damaged"):
        bench("2wikimqa").load(None)


# --- drawing, and names -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), max_size=6), st.integers(0, 40), st.integers(0, 5))
def test_draw(sizes: list[int], limit: int, seed: int) -> None:
    items = [
        Item(Document(f"d{n}", f"text {n}"), tuple(Question(str(i), "?", ("a",)) for i in range(size)))
        for n, size in enumerate(sizes)
    ]
    drawn = draw(items, limit, seed)
    assert draw(items, None, seed) == items and draw(items, limit, seed) == drawn
    assert len(asked(drawn)) == min(limit, sum(sizes))
    assert [item.document for item in drawn] == [
        item.document for item in items if item.document in [d.document for d in drawn]
    ]
    sizes_of = {item.document.title: len(item.questions) for item in drawn}
    for item in drawn:
        numbers = [int(question.id) for question in item.questions]
        assert numbers == sorted(set(numbers)) and numbers
    counts = [sizes_of.get(f"d{n}", 0) for n in range(len(sizes))]
    unfinished = [count for count, size in zip(counts, sizes, strict=True) if count < size]
    assert not unfinished or max(counts) - min(unfinished) <= 1, "spread evenly"


def test_few_questions_are_not_always_of_the_first_documents() -> None:
    items = [Item(Document(f"d{n}", f"text {n}"), (Question("0", "?", ("a",)),)) for n in range(10)]
    assert len({draw(items, 1, seed)[0].document.title for seed in range(20)}) > 3


def test_limit_goes_through_load(tmp_path: Path) -> None:
    pairs = [PAIR | {"Q": f"Question {number}?"} for number in range(30)]
    path = write(tmp_path / "a.jsonl", loogle_row(pairs), loogle_row([PAIR], input="Another."))
    chosen = [[q.id for q in asked(ShortQA().load(path, limit=6, seed=seed))] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and all(len(ids) == 6 for ids in chosen)


def test_names_and_options() -> None:
    names = benchmark_names()
    assert len(names) == len(set(names)) == 24
    assert {
        "loogle-shortqa",
        "loogle-cloze",
        "longbench/repobench-p",
        "needle",
        "multiple-choice/quality",
        "jsonl",
    } <= {*names}
    with pytest.raises(ConfigError, match="no benchmark 'longbench/musiq'") as caught:
        make_benchmark("longbench/musiq")
    assert "longbench/musique" in caught.value.next_step
    chosen = make_benchmark("loogle-longqa", prompt="loogle")
    assert isinstance(chosen, LongQA) and chosen.prompt == "loogle"
    with pytest.raises(ConfigError, match="no prompt 'mine'"):
        make_benchmark("loogle-shortqa", prompt="mine")
    with pytest.raises(ConfigError, match="loogle-cloze has no prompt") as caught:
        make_benchmark("loogle-cloze", prompt="loogle")
    assert "loogle-shortqa" in caught.value.next_step
    with pytest.raises(ConfigError, match="has no colour"):
        make_benchmark("needle", colour=1)
