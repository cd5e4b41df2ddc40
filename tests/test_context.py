"""The context policies never exceed their budget; truncation keeps both ends of a document."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.config import AnsweringConfig
from liftlm.context import WindowText, cut_out_middle

MARK = (-1, -2, -3)


def document(count: int) -> list[int]:
    return list(range(count))


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(-5, 250), st.integers(0, 5))
def test_truncate_is_the_whole_text_or_head_mark_and_tail(count: int, budget: int, mark_tokens: int) -> None:
    tokens, mark = document(count), list(range(-mark_tokens, 0))
    chosen = cut_out_middle(tokens, budget, mark)
    assert len(chosen) <= max(budget, 0)
    if count <= budget:
        assert chosen == tokens
    elif budget < mark_tokens + 2:
        assert chosen == []  # no room for a token on either side of the mark
    else:
        assert len(chosen) == budget  # nothing that was paid for is wasted
        head = chosen[: (budget - mark_tokens + 1) // 2]
        tail = chosen[len(head) + mark_tokens :]
        assert chosen == [*head, *mark, *tail]
        assert head == tokens[: len(head)] and tail == tokens[count - len(tail) :]
        assert 0 <= len(head) - len(tail) <= 1 and tail


def test_truncate_in_numbers() -> None:
    assert cut_out_middle(document(100), 10, MARK) == [0, 1, 2, 3, *MARK, 97, 98, 99]
    assert cut_out_middle(document(100), 11, MARK) == [0, 1, 2, 3, *MARK, 96, 97, 98, 99]
    assert cut_out_middle(document(11), 11, MARK) == document(11)
    assert cut_out_middle((), 11, MARK) == []


def test_what_stands_where_the_middle_was() -> None:
    settings = AnsweringConfig(context="truncate")
    cut = {
        middle: "".join(map(chr, WindowText("0123456789", characters, settings, middle=middle).select("", 8)))
        for middle in ("", "--")
    }
    assert cut == {"": "01236789", "--": "012--789"}
    assert "".join(map(chr, WindowText("0123456789" * 2, characters, settings).select("", 15))) == "01234\n...\n56789"


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_policies() -> None:
    text = "The mill stood by the river. A fire took it in May. The miller moved to Arden."
    none = WindowText(text, characters, AnsweringConfig(context="none"))
    truncate = WindowText(text, characters, AnsweringConfig(context="truncate"))
    one = AnsweringConfig.model_validate({"context": "retrieve", "retrieval": {"count": 1, "neighbours": 0}})
    retrieve = WindowText(text, characters, one)
    assert none.select("Where did the miller move?", 1000) == []
    assert truncate.select("Where did the miller move?", 1000) == characters(text)
    assert retrieve.select("Where did the miller move?", 1000) == characters("The miller moved to Arden.")
    assert retrieve.select("When was the fire?", 1000) == characters("A fire took it in May.")
    assert retrieve.sources("When was the fire?") == ("A fire took it in May.",)
    assert truncate.sources("Where did the miller move?") == retrieve.sources("Never asked?") == ()
    assert none.for_all and truncate.for_all and not retrieve.for_all
    for policy in (none, truncate, retrieve):
        assert policy.select("When was the fire?", 0) == policy.select("When was the fire?", -3) == []
