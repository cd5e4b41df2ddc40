"""Continuous batching: whatever joins or leaves, each text is the one that it would be alone. Sampling, stops, prefixes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import FAMILIES, make_tokenizer, save_model
from liftlm import load_model
from liftlm.batching import Batch, Network, Prefill
from liftlm.config import ModelConfig
from liftlm.sequences import Sampling, Sequence, sample
from liftlm.server.prefixes import PrefixCache

ENDS = frozenset({2})


def naive(model: Any, prompt: list[int], count: int) -> list[int]:
    """One token after the other from full forward passes: no cache, no padding."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model.network(torch.tensor([tokens])).logits[0, -1].argmax())
        if token in ENDS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("piece", [1, 7, 256])
def test_texts_that_come_and_go_are_those_of_naive_decoding(family: str, piece: int, tmp_path: Path) -> None:
    model = load_model(str(save_model(tmp_path / "m", family)), ModelConfig(dtype="float32"))
    network, draw = Network(model), random.Random(f"{family}{piece}")
    wanted = [([draw.randrange(4, 300) for _ in range(draw.randrange(1, 60))], draw.randrange(1, 14)) for _ in range(9)]
    sequences = [Sequence(prompt, Sampling(count), model.tokenizer, ENDS) for prompt, count in wanted]
    waiting, batches, most = list(sequences), list[Batch](), 0
    while waiting or batches:
        if waiting and draw.random() < 0.6:
            prefill = Prefill(network, waiting.pop(0))
            while not prefill.done:
                prefill.advance(piece)
            prefill.first()
            if prefill.sequence.ending is None:
                if batches and batches[0].joins and network.joins(prefill.cache):
                    batches[0].join(prefill)
                else:
                    batches.append(Batch(network, prefill))
        for batch in batches:
            most = max(most, len(batch.rows))
            batch.step()
            batch.drop([row for row in batch.rows if row.ending is not None])
        batches = [batch for batch in batches if batch.rows]
    for sequence, (prompt, count) in zip(sequences, wanted, strict=True):
        assert sequence.tokens == naive(model, prompt, count)
    sliding = family in ("gemma2", "gemma3", "mistral-sliding")
    assert most == 1 if sliding else most > 2


def test_a_cancelled_row_leaves_the_others_alone(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder), ModelConfig(dtype="float32"))
    network = Network(model)
    prompts = [[5, 6, 7] * 20, [9, 10], [11] * 30]
    rows = [Sequence(prompt, Sampling(80), model.tokenizer, frozenset()) for prompt in prompts]
    batch: Batch | None = None
    for row in rows:
        prefill = Prefill(network, row)
        prefill.advance(999)
        prefill.first()
        if batch is None:
            batch = Batch(network, prefill)
        else:
            batch.join(prefill)
    assert batch is not None
    batch.step()
    batch.drop([rows[0]])  # the longest: padding of the others goes with it
    for _ in range(75):  # beyond the room that a cache is given at first
        batch.step()
    for row, prompt in zip(rows[1:], prompts[1:], strict=True):
        tokens = list(prompt)
        for _ in range(77):
            with torch.no_grad():
                tokens.append(int(model.network(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert row.tokens == tokens[len(prompt) :]


def test_known_beginnings_change_nothing(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder), ModelConfig(dtype="float32"))
    network = Network(model)
    cache = PrefixCache(network, 10**8)
    text = [random.Random(0).randrange(4, 300) for _ in range(100)]
    for ending, expected in ([7, 8], 0), ([9], 100), ([7, 8, 9], 102), ([7], 100):
        prompt = [*text, *ending]
        known, length = cache.find("a", prompt)
        assert length == expected
        row = Sequence(prompt, Sampling(6), model.tokenizer, frozenset())
        prefill = Prefill(network, row, known, length)
        prefill.advance(999)
        cache.keep("a", prompt, prefill.cache)
        prefill.first()
        batch = Batch(network, prefill)
        for _ in range(5):
            batch.step()
        assert row.tokens == naive(model, prompt, 6)
    assert cache.find(("b", 1.0), text) == (None, 0)  # another adapter's are not its own


def test_the_memory_of_beginnings_is_bounded(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder))
    network = Network(model)

    def fill(cache: PrefixCache, count: int) -> None:
        for number in range(count):
            prefill = Prefill(network, Sequence([number + 4] * 100, Sampling(1), model.tokenizer, ENDS))
            prefill.advance(999)
            cache.keep((f"entry{number}", 1.0), prefill.sequence.prompt, prefill.cache)

    whole = PrefixCache(network, 10**9)
    fill(whole, 1)
    one = whole.bytes
    small = PrefixCache(network, int(one * 3.5))
    fill(small, 8)
    assert small.bytes == 3 * one
    assert small.find(("entry7", 1.0), [11] * 100)[1] == 99 and small.find(("entry0", 1.0), [4] * 100)[1] == 0
    small.forget("entry7")
    assert small.bytes == 2 * one
    nothing = PrefixCache(network, 0)
    fill(nothing, 2)
    assert nothing.bytes == 0


# --- one text ---------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", "replace")


def tell(data: bytes, **sampling: Any) -> tuple[str, list[str], Any]:
    sequence = Sequence([1], Sampling(len(data), **sampling), Words(), frozenset({0}))
    pieces = []
    for byte in data:
        logits = torch.zeros(256)
        logits[byte] = 9.0
        pieces.append(sequence.take(logits))
        if sequence.ending is not None:
            break
    return "".join(pieces), pieces, sequence.ending


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=4))
@example(" 0", [" 0"])  # a stop that begins with what is cut from an answer
def test_told_pieces_are_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    data = text.replace("\0", "").encode()
    text = data.decode()
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    assert tell(data, stop=tuple(stops), answer=False)[0] == text[:cut]
    assert tell(data, stop=tuple(stops))[0].strip() == text[:cut].strip() or not data


def test_characters_of_several_bytes_come_whole() -> None:
    text, pieces, _ = tell("naïve “日本”".encode(), answer=False)
    assert text == "naïve “日本”" and not any("\ufffd" in piece for piece in pieces)
    assert tell(b"a\xe2\x80", answer=False)[0] == "a\ufffd"  # cut by the limit
    assert tell(b"ab\0c") == ("ab", ["a", "b", ""], "stop")


def test_sampling_draws_as_often_as_the_shares_say() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = [sample(scores, 1.0, 0, generator) for _ in range(4000)]
    assert [drawn.count(token) / 4000 for token in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert {sample(scores, 0.75, 0, generator) for _ in range(200)} == {0, 1}  # 0.5 is not enough, 0.8 is
    assert {sample(scores, 1.0, 3, generator) for _ in range(300)} == {0, 1, 2}
    assert {sample(scores, 0.0, 0, generator) for _ in range(50)} == {0}


def test_repetition_penalty_is_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, logits = [1, 5], torch.randn(50, generator=torch.Generator().manual_seed(1))
    sequence = Sequence(prompt, Sampling(3), make_tokenizer(), frozenset(), penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits[None])[0]
    assert torch.equal(sequence._penalized(logits), expected)
