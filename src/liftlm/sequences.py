"""One text that is being continued: which token comes next, what of the text is certain, when it ends.

Knows token ids and logits; no network, no batches, no documents.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Ending = Literal["stop", "length"]
_GREEDY_BELOW = 1e-5  # a temperature that float32 cannot divide by
_LIKELIEST = 1000  # tokens that are mostly enough for top_p
_CONTEXT = 6  # tokens of the prompt that are decoded with the first new ones, for tokenizers that drop a leading space


@dataclass(frozen=True)
class Sampling:
    """How a text is to be continued. temperature 0 = greedy; seed None = another text each time."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # so many of the likeliest tokens are told with each token
    echo: bool = False  # also those of the prompt
    answer: bool = True  # an answer: no white space around it; else a prompt's continuation as it is
    whole: bool = False  # the text is told in the end only


@dataclass(frozen=True)
class Choice:
    """A token, and what the model thought of it: -inf < log p <= 0. top: (token, log p) of the likeliest."""

    token: int
    logprob: float | None = None  # nothing is known of a prompt's first token
    top: tuple[tuple[int, float], ...] = ()


class Sequence:
    """A prompt and its continuation so far.

    ends: tokens that end it; penalty: the model's own repetition penalty (1 = none).
    """

    def __init__(
        self, prompt: list[int], sampling: Sampling, tokenizer: Any, ends: frozenset[int], penalty: float = 1.0
    ) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.tokens: list[int] = []
        self.choices: list[Choice] = []  # of the continuation, where logprobs are wanted
        self.ending: Ending | None = "length" if sampling.max_tokens == 0 else None
        self._tokenizer, self._ends, self._penalty = tokenizer, ends, penalty
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63)
        context = [] if sampling.answer else prompt[-_CONTEXT:]
        self._ids = list(context)
        self._from, self._read = 0, len(context)
        self._text = ""  # decoded
        self._told = 0  # characters of it

    @property
    def text(self) -> str:
        """What was decoded of it; of an answer, without white space around it."""
        return self._text.strip() if self.sampling.answer else self._text

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def greedy(self) -> bool:
        """Whether the next token is the likeliest one, and nothing else is asked of the logits."""
        sampling = self.sampling
        return sampling.temperature < _GREEDY_BELOW and self._penalty == 1.0 and sampling.logprobs is None

    def take(self, logits: Tensor, likeliest: int | None = None) -> str:
        """(vocabulary,) logits of the next token → the text that became certain by it; sets `ending`.

        likeliest: where the caller knows it, and the sequence is `greedy`.
        """
        choice = Choice(likeliest) if likeliest is not None else self._choose(logits.float().cpu())
        if self.sampling.logprobs is not None:
            self.choices.append(choice)  # the end token too, as clients count on one for every token that was computed
        if choice.token in self._ends:
            self.ending = "stop"
            return self._certain(last=True)
        self.tokens.append(choice.token)
        self._ids.append(choice.token)
        if len(self.tokens) >= self.sampling.max_tokens:
            self.ending = "length"
        return self._certain(last=self.ending is not None)

    def _choose(self, logits: Tensor) -> Choice:
        sampling = self.sampling
        scores = self._penalized(logits)
        if sampling.temperature < _GREEDY_BELOW:
            token = int(scores.argmax())
        else:
            token = sample(scores / sampling.temperature, sampling.top_p, sampling.top_k, self._generator)
        if sampling.logprobs is None:
            return Choice(token)
        return choices_of(logits[None], [token], sampling.logprobs)[0]

    def _penalized(self, logits: Tensor) -> Tensor:
        """As transformers' RepetitionPenaltyLogitsProcessor does it in `generate`."""
        if self._penalty == 1.0:
            return logits
        seen = torch.tensor(sorted({*self.prompt, *self.tokens}))
        scores = logits.clone()
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * self._penalty, scores[seen] / self._penalty)
        return scores

    def _certain(self, last: bool) -> str:
        """What can be told now: whole characters, nothing that may yet become a stop text, no white space around an answer."""
        if self.sampling.whole and not self.sampling.stop and not last:
            return ""
        self._decode(last)
        found = [at for stop in self.sampling.stop if (at := self._text.find(stop)) >= 0]
        if found:
            self._text, self.ending, last = self._text[: min(found)], "stop", True
        begin, end = self._told, len(self._text)
        if self.sampling.answer and not begin:
            begin = end - len(self._text.lstrip())  # kept, as a stop text may begin with it
        if not last:
            stops = self.sampling.stop
            end -= max((n for s in stops for n in range(1, len(s)) if self._text.endswith(s[:n])), default=0)
        if self.sampling.answer:
            end = len(self._text[:end].rstrip())
        piece = self._text[begin:end]
        self._told = max(self._told, end)
        return piece

    def _decode(self, last: bool) -> None:
        """Adds to the text what the newest tokens stand for, unless they end in the middle of a character."""
        before = self._tokenizer.decode(self._ids[self._from : self._read], skip_special_tokens=True)
        whole = self._tokenizer.decode(self._ids[self._from :], skip_special_tokens=True)
        if last or not whole.endswith("\ufffd"):
            self._text += whole[len(before) :]
            self._from, self._read = self._read, len(self._ids)


def sample(scores: Tensor, top_p: float, top_k: int, generator: torch.Generator) -> int:
    """A token drawn from (vocabulary,) scores: of the top_k likeliest, of those whose probabilities reach top_p together."""
    shares = scores.softmax(-1)
    if not top_k and top_p >= 1:
        return int(torch.multinomial(shares, 1, generator=generator))
    ordered, ids = shares.topk(min(top_k or _LIKELIEST, len(shares)))
    if top_k:
        ordered /= ordered.sum()
    elif float(ordered.sum()) < top_p:  # ordering the whole vocabulary takes twenty times as long
        ordered, ids = shares.sort(descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(0) - ordered >= max(top_p, 1e-9), 0.0)
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])


def choices_of(logits: Tensor, tokens: Tokens[int], count: int) -> list[Choice]:
    """What (rows, vocabulary) logits say of one token each, with the `count` likeliest."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(list(tokens), device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    tops = [tuple(zip(row, scores, strict=True)) for row, scores in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Choice(token, logprob, top) for token, logprob, top in zip(tokens, own, tops, strict=True)]
