"""The context policies never exceed their budget and keep both ends of a document."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.context import select_context
from liftlm.errors import ConfigError

MARK = (-1, -2, -3)


def document(count: int) -> list[int]:
    return list(range(count))


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(-5, 250), st.integers(0, 5))
def test_truncate_is_the_whole_text_or_head_mark_and_tail(count: int, budget: int, mark_tokens: int) -> None:
    tokens, mark = document(count), list(range(-mark_tokens, 0))
    chosen = select_context("truncate", tokens, budget, mark)
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
    assert select_context("truncate", document(100), 10, MARK) == [0, 1, 2, 3, *MARK, 97, 98, 99]
    assert select_context("truncate", document(100), 11, MARK) == [0, 1, 2, 3, *MARK, 96, 97, 98, 99]
    assert select_context("truncate", document(11), 11, MARK) == document(11)
    assert select_context("truncate", (), 11, MARK) == []


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(-5, 60))
def test_none_is_nothing(count: int, budget: int) -> None:
    assert select_context("none", document(count), budget, MARK) == []


def test_retrieve_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"retrieve.*not implemented") as caught:
        select_context("retrieve", document(5), 50, MARK)
    assert "truncate" in caught.value.next_step
