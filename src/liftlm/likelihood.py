"""How likely the model, with whatever adapter is on, finds given texts: of answers, of choices, of a document's sentences.

Knows token ids and prompts; nothing of documents or of adapters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from liftlm.decoding import Decoder, apart, attends_fully, in_one_row, open_decoder
from liftlm.models import Model
from liftlm.prompts import encode_text, question_prompt

_ROWS = 16  # continuations at once
_ROW_TOKENS = 512  # of continuations in one row; more attend to more that they do not see
_HEAD_TOKENS = 128  # whose logits are in float32 at once
_NOTHING_ASKED = "What does the text say?"


@torch.inference_mode()
def continuation_nlls(model: Model, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
    """Of each continuation of the prompt (token ids, none empty), the sum of -log p of its tokens in nats.

    The prompt is computed once for all of them.
    """
    if len(continuations) == 1 or len(prompt) < 2 or not attends_fully(model):
        return [_alone(model, prompt, continuation) for continuation in continuations]
    from transformers import DynamicCache

    network: Any = model.network
    first = DynamicCache(config=network.config)
    decoder = open_decoder(model)
    if decoder is not None:
        return _packed(model, decoder, prompt, continuations, first)
    network.base_model(
        input_ids=torch.tensor([prompt[:-1]], device=model.device), past_key_values=first, use_cache=True
    )
    sums = [0.0] * len(continuations)
    by_length = sorted(range(len(continuations)), key=lambda index: len(continuations[index]))
    for start in range(0, len(by_length), _ROWS):
        chosen = by_length[start : start + _ROWS]
        part = [continuations[index] for index in chosen]
        longest = max(map(len, part))
        rows = [[prompt[-1], *tokens[:-1], *[0] * (longest - len(tokens))] for tokens in part]
        cache = DynamicCache(config=network.config)
        for index, layer in enumerate(first.layers):
            cache.update(layer.keys.expand(len(part), -1, -1, -1), layer.values.expand(len(part), -1, -1, -1), index)
        ids = torch.tensor(rows, device=model.device)
        logits = network(input_ids=ids, past_key_values=cache, use_cache=True).logits.float()
        for place, scores, tokens in zip(chosen, logits, part, strict=True):
            wanted = torch.tensor(list(tokens), device=model.device)
            sums[place] = float(torch.nn.functional.cross_entropy(scores[: len(tokens)], wanted, reduction="sum"))
    return sums


def _packed(
    model: Model, decoder: Decoder, prompt: Sequence[int], continuations: Sequence[Sequence[int]], first: Any
) -> list[float]:
    """On a CPU: many continuations as one row, so that none is filled up to the longest. first: an empty cache."""
    known = len(prompt) - 1
    decoder.read(torch.tensor(prompt[:-1]), torch.arange(known), first, None, torch.tensor([0]))
    sums: list[float] = []
    waiting = [[prompt[-1], *tokens[:-1]] for tokens in continuations]
    while waiting:
        lengths = itertools.accumulate(map(len, waiting))
        count = max(1, sum(length <= _ROW_TOKENS for length in lengths))
        row, waiting = waiting[:count], waiting[count:]
        part = continuations[len(sums) : len(sums) + count]
        cache = type(first)(config=model.network.config)
        for index, layer in enumerate(first.layers):
            cache.update(layer.keys, layer.values, index)
        ids, positions, _ = in_one_row(row, known)
        logits = decoder.read(ids, positions, cache, apart(row, known), torch.arange(len(ids)))
        wanted = torch.tensor([token for tokens in part for token in tokens])
        losses = [
            torch.nn.functional.cross_entropy(scores.float(), tokens, reduction="none")
            for scores, tokens in zip(torch.split(logits, _HEAD_TOKENS), torch.split(wanted, _HEAD_TOKENS), strict=True)
        ]
        sums += [float(loss.sum()) for loss in torch.split(torch.cat(losses), [len(tokens) for tokens in part])]
    return sums


def _alone(model: Model, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    tokens = torch.tensor([[*prompt, *continuation]], device=model.device)
    labels = torch.tensor([[*[-100] * len(prompt), *continuation]], device=model.device)
    return float(model.loss_sum(tokens, labels))


class Ranker:
    """Ranks texts of one document for many questions; what does not depend on the question is computed once a text."""

    def __init__(self, model: Model, title: str) -> None:
        self._model, self._title = model, title
        self._not_asked: dict[str, float] = {}

    def relevance(self, question: str, texts: Sequence[str]) -> list[float]:
        """How much more likely the question makes each text as its answer: log p(text | question) - log p(text | no question).

        With the adapter of an absorbed document on this ranks the document's sentences by what was learnt of them: it was
        trained to answer questions with the sentences that they are about. The second term takes away what makes a sentence
        likely anyway (pointwise mutual information, as in Li et al. 2016, arXiv 1510.03055).
        """
        fresh = [text for text in dict.fromkeys(texts) if text not in self._not_asked]
        self._not_asked |= dict(zip(fresh, self._nlls(_NOTHING_ASKED, fresh), strict=True))
        asked = self._nlls(question, texts)
        return [self._not_asked[text] - given for text, given in zip(texts, asked, strict=True)]

    def _nlls(self, question: str, texts: Sequence[str]) -> list[float]:
        tokenizer = self._model.tokenizer
        prompt = question_prompt(tokenizer, self._title, question)
        return continuation_nlls(self._model, prompt, [encode_text(tokenizer, text) for text in texts])
