"""Text in the window of training examples: passages of whole sentences, text around the evidence, head and tail."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm import Document, LiftConfig, Model, answer_all, load_config
from liftlm.config import RetrievalConfig
from liftlm.distilling import task_examples
from liftlm.examples import NO_LOSS, Example, make_task_examples, pack_row
from liftlm.prompts import answer_end, question_turn, render_prompt
from liftlm.reading import Passage, split_into_passages, with_head_and_tail, with_text
from liftlm.retrieval import Retriever
from liftlm.tasks import Task
from liftlm.tasks.sentences import split_into_sentences

PEOPLE = ["Oswin", "Bartol", "Casimir", "Ludmer", "Jorrit", "Emeric", "Anselm", "Ignace"]
TEXT = " ".join(
    f"The ferryman {name} Tarrel rang the bell of {name[:3]}den on {day} May {1700 + day}."
    for day, name in enumerate(PEOPLE, 1)
)
DOCUMENT = Document(title="Ferrymen", text=TEXT)
TASKS = [
    Task(f"{asked} {name}?", answer, kind, s.start, s.end)
    for name, s in zip(PEOPLE, split_into_sentences(TEXT), strict=True)
    for asked, answer, kind in (("Who was", f"{name} Tarrel.", "who"), ("What of", s.text, "about"))
]


@pytest.fixture
def model(tiny_model: Model) -> Model:
    tiny_model.window = 600
    return tiny_model


def config(*more: str) -> LiftConfig:
    return load_config(None, ["tasks.reading=1", "tasks.passage_characters=200", *more])


def parted(example: Example) -> tuple[list[int], list[int]]:
    """Prompt and answer; the loss is on all of the answer and nothing else."""
    start = next(index for index, label in enumerate(example.labels) if label != NO_LOSS)
    assert example.labels[:start] == (NO_LOSS,) * start and example.labels[start:] == example.tokens[start:]
    return list(example.tokens[:start]), list(example.tokens[start:])


def shown(model: Model, example: Example) -> tuple[str, str]:
    """The text in the window and the question, read from the prompt's words."""
    said = model.decode(parted(example)[0])
    text, _, ask = said.partition('Here is text from "Ferrymen":\n\n')[2].rpartition("\n\nPlease answer the question")
    return text, ask.partition("\nQuestion: ")[2].partition("\nassistant\n")[0]


def check_is_asked_as_in_answering(model: Model, example: Example) -> Task:
    """The example's task, whose whole answer is learnt after the prompt that answering would build with that text."""
    text, question = shown(model, example)
    (task,) = [task for task in TASKS if task.question == question]
    prompt, answer = parted(example)
    turn = question_turn(model.tokenizer, "Ferrymen", question, model.encode(text))
    assert model.decode(prompt) == model.decode(render_prompt(model.tokenizer, [turn]))
    assert answer == [*model.encode(task.answer), *answer_end(model.tokenizer)]
    assert len(example) <= model.window
    return task


# --- passages ---------------------------------------------------------------------------------------------------------

WORDS = st.lists(
    st.sampled_from(["bell", "lake", "ice", "Corriden", "rang", "slowly", "1743"]), min_size=4, max_size=14
)
TEXTS = st.lists(
    st.lists(WORDS.map(lambda w: " ".join(w) + "."), min_size=1, max_size=4).map(" ".join), max_size=6
).map("\n\n".join)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 400), st.integers(0, 99))
def test_passages_are_runs_of_whole_sentences(text: str, characters: int, seed: int) -> None:
    sentences = split_into_sentences(text)
    draw = random.Random(seed)
    tasks = [Task(f"{n}?", "a", "about", *sorted(draw.sample(range(len(text)), 2))) for n in range(9)] if text else []
    tasks += [Task(s.text, "a", "about", s.start, s.end) for s in sentences]
    draw.shuffle(tasks)
    passages = split_into_passages(text, tasks, characters)
    starts, ends = [s.start for s in sentences], [s.end for s in sentences]
    # together they are all sentences, each once
    assert [p.start for p in passages] == starts[:1] + [starts[ends.index(p.end) + 1] for p in passages[:-1]]
    assert [p.end for p in passages][-1:] == ends[-1:]
    for number, passage in enumerate(passages):
        held = [s for s in sentences if passage.start <= s.start < passage.end]
        assert len(held) == 1 or passage.end - passage.start <= characters
        if number + 1 < len(passages):  # one more sentence would have been too much
            assert ends[starts.index(passages[number + 1].start)] - passage.start > characters
        inside = [t for t in tasks if passage.start <= t.start and t.end <= passage.end]
        assert sorted(passage.tasks, key=tasks.index) == sorted(inside, key=tasks.index)


def test_a_task_across_passages_is_in_none() -> None:
    text = "The bell rang twice. Nobody heard it there."
    across, first, second = Task("a", "a", "order", 0, 43), Task("b", "b", "who", 0, 20), Task("c", "c", "who", 21, 43)
    assert split_into_passages(text, [across, second, first], 25) == [
        Passage(0, 20, (first,)),
        Passage(21, 43, (second,)),
    ]
    (whole,) = split_into_passages(text, [across, second, first], 1000)
    assert set(whole.tasks) == {across, first, second}
    assert split_into_passages("", [], 10) == []


# --- text around the evidence -----------------------------------------------------------------------------------------


def test_tasks_are_shown_with_text_around_their_evidence(model: Model) -> None:
    made = with_text(model, DOCUMENT, TASKS, config())
    before: set[int] = set()
    for example in made:
        task = check_is_asked_as_in_answering(model, example)
        text, _ = shown(model, example)
        assert text in TEXT and TEXT[task.start : task.end] in text and len(text) <= 200
        before.add(text.index(TEXT[task.start : task.end]))
    assert len(made) == len(TASKS) and len(before) > len(TASKS) / 2, "the evidence is always at the same place"


def test_what_is_shown_does_not_depend_on_what_arrives_together(model: Model) -> None:
    """A resumed run gets the tasks in other portions, and must make the same examples of them."""
    for more in ([], ["tasks.show=retrieve"], ["tasks.show=truncate"]):
        settings = config("tasks.reading=0.5", *more)
        at_once = with_text(model, DOCUMENT, TASKS, settings)
        portions = [TASKS[:1], TASKS[1:2], TASKS[2:9], [], TASKS[9:]]
        assert [e for tasks in portions for e in with_text(model, DOCUMENT, tasks, settings)] == at_once
        assert 0 < len(at_once) < len(TASKS)
        assert with_text(model, DOCUMENT, TASKS, config("tasks.reading=0.5", "seed=1", *more)) != at_once


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_so_many_are_shown(share: float, model: Model) -> None:
    tasks = [Task(f"{number}?", "a", "who", 0, 9) for number in range(400)]
    made = with_text(model, DOCUMENT, tasks, config(f"tasks.reading={share}", "tasks.passage_characters=20"))
    assert len(made) == pytest.approx(400 * share, abs=4 * (400 * share * (1 - share)) ** 0.5)


def test_examples_with_different_text_share_nothing(model: Model) -> None:
    """They are packed in one row, where a wrong beginning would be shown to all."""
    for more in ([], ["tasks.show=retrieve"], ["tasks.show=truncate"]):
        made = with_text(model, DOCUMENT, TASKS, config(*more))
        assert {example.group for example in made} == {"passages"} and {example.shared for example in made} == {0}
        row = pack_row(made)
        assert row.tokens == [token for example in made for token in example.tokens]


def test_tasks_are_shown_among_what_is_found_for_their_question(model: Model) -> None:
    """In the document's order, parted as in answering: the evidence among none to three of BM25's best."""
    retriever = Retriever(TEXT, model.encode, RetrievalConfig())
    numbers = Counter[int]()
    for example in with_text(model, DOCUMENT, TASKS, config("tasks.show=retrieve")):
        task = check_is_asked_as_in_answering(model, example)
        text, _ = shown(model, example)
        pieces = [TEXT[piece.start : piece.end] for piece in retriever.ranked(task.question)]
        evidence = [
            piece for piece in pieces if piece in TEXT[task.start : task.end] or TEXT[task.start : task.end] in piece
        ]
        others = [piece for piece in pieces if piece not in evidence]
        in_text = [piece for piece in others if piece in text]
        assert evidence and all(piece in text for piece in evidence)
        assert in_text == others[: len(in_text)], "others than the best were shown"
        numbers[len(in_text)] += 1
        places = [TEXT.index(part.strip()) for part in text.split("\n...\n")]
        assert places == sorted(places)
        left = text
        for piece in [*evidence, *in_text]:
            left = left.replace(piece, "")
        assert set(left) <= set(". \n"), "something else was shown"
    assert set(numbers) == {0, 1, 2, 3}
    given = with_text(model, DOCUMENT, TASKS, config("tasks.show=retrieve"), retriever=retriever)
    assert given == with_text(model, DOCUMENT, TASKS, config("tasks.show=retrieve"))


def test_with_tasks_that_are_there_at_once_the_same_is_shown(model: Model) -> None:
    settings = config("tasks.show=retrieve")
    examples, soft = task_examples(model, DOCUMENT, TASKS, settings)
    assert soft is None and examples[-len(TASKS) :] == with_text(model, DOCUMENT, TASKS, settings)
    assert examples[: -len(TASKS)] == make_task_examples(TASKS, model.tokenizer, DOCUMENT.title, model.window)


def test_long_evidence_is_shown_whole_and_what_does_not_fit_is_left_out(model: Model) -> None:
    whole = Task("Who rang?", "Oswin.", "who", 0, len(TEXT))
    model.window = 2000
    (example,) = with_text(model, DOCUMENT, [whole], config("tasks.passage_characters=5"))
    assert shown(model, example)[0] == TEXT
    model.window = 300
    assert with_text(model, DOCUMENT, [whole], config()) == []


# --- head and tail ----------------------------------------------------------------------------------------------------


def test_head_and_tail_are_what_truncated_answering_shows(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.window = 350
    made = with_head_and_tail(model, DOCUMENT, TASKS)
    assert len(made) == len(TASKS)
    texts = set()
    for example in made:
        assert check_is_asked_as_in_answering(model, example) in TASKS
        text, _ = shown(model, example)
        head, _, tail = text.partition("\n...\n")
        assert (
            TEXT.startswith(head)
            and TEXT.endswith(tail)
            and abs(len(model.encode(head)) - len(model.encode(tail))) <= 1
        )
        texts.add(text)
    assert len(texts) == 1, "the same text, so that it is computed once"
    assert len({(e.group, e.shared) for e in made}) == 1
    assert model.decode(list(made[0].tokens[: made[0].shared])).count(texts.pop()) == 1
    assert max(map(len, made)) > 0.8 * model.window, "the window is used"
    # the same form as when questions are answered: only the amount of text may differ
    asked: list[list[int]] = []
    monkeypatch.setattr(
        "liftlm.answering.generate", lambda model, prompts, *more: asked.extend(p.tokens for p in prompts)
    )
    with pytest.raises(TypeError):  # nothing was generated
        answer_all(
            model,
            None,
            [TASKS[0].question],
            document=DOCUMENT,
            config=load_config(None, ["answering.context=truncate"]),
        )
    frames = [model.decode(tokens).split("The ferryman Oswin")[0] for tokens in (asked[0], parted(made[0])[0])]
    assert frames[0] == frames[1] != ""
    assert len({model.decode(tokens).rpartition(".\n\n")[2] for tokens in (asked[0], parted(made[0])[0])}) == 1


def test_groups_of_tasks_that_arrive_apart_do_not_mix_their_beginnings(model: Model) -> None:
    """Regression: other answers leave other room for text; the group was the same all the same."""
    model.window = 400
    long = [Task(f"What of {n}?", TASKS[1].answer * 2, "about", 0, 9) for n in range(2)]
    made = with_head_and_tail(model, DOCUMENT, TASKS) + with_head_and_tail(model, DOCUMENT, long)
    groups: dict[str, list[Example]] = {}
    for example in made:
        groups.setdefault(example.group, []).append(example)
    assert len(groups) == 2
    for group in groups.values():
        assert len({(example.shared, example.tokens[: example.shared]) for example in group}) == 1


def test_a_document_that_fits_is_shown_whole(model: Model) -> None:
    short = Document(title="Ferrymen", text="Oswin rang.")
    (example,) = with_head_and_tail(model, short, [Task("Who?", "Oswin.", "who", 0, 11)])
    assert shown(model, example)[0] == "Oswin rang."
    assert with_head_and_tail(model, short, []) == []


def test_a_window_without_room_shows_no_text(model: Model) -> None:
    model.window = len(render_prompt(model.tokenizer, [question_turn(model.tokenizer, "Ferrymen", "Who?")])) + 9
    (example,) = with_head_and_tail(model, DOCUMENT, [Task("Who?", "Oswin.", "who", 0, 11)])
    assert len(example) <= model.window and "Here is text" not in model.decode(parted(example)[0])
