"""Prompts → texts: batches of similar length, a common beginning computed once, streamed or not.

Knows token ids only: nothing of documents, questions or adapters.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import TextStreamer

from liftlm.config import AnsweringConfig
from liftlm.models import Model, quiet_transformers
from liftlm.prompts import answer_stops

OnText = Callable[[str], None]
_WORTH_SHARING = 64  # tokens


@dataclass(frozen=True)
class Prompt:
    """Token ids that wait to be continued. Prompts of one group (not None) are said to begin alike, with a long text."""

    tokens: list[int]
    group: Hashable = None


@dataclass(frozen=True)
class Generated:
    """A continuation. seconds: of a batch, this one's equal share; ended: by the model itself, not by the limit."""

    index: int  # of its prompt
    text: str
    tokens: int
    seconds: float
    ended: bool


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    settings: AnsweringConfig,
    seed: int,
    on_text: OnText | None = None,
) -> Iterator[Generated]:
    """Continues every prompt, in batches, and yields each text as its batch ends: not in order. on_text streams a single one."""
    for batch, prefix in _plan(model, prompts, settings.batch_tokens):
        started = time.monotonic()
        texts = _generate(model, [prompts[index].tokens for index in batch], settings, seed, on_text, prefix)
        seconds = (time.monotonic() - started) / len(batch)
        for index, (text, count) in zip(batch, texts, strict=True):
            yield Generated(index, text, count, seconds, count < settings.max_new_tokens)


@dataclass(frozen=True)
class _Prefix:
    """The beginning that several prompts share, and what the network computed for it (keys and values, batch 1)."""

    tokens: int
    cache: Any


def _plan(model: Model, prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[tuple[list[int], _Prefix | None]]:
    """Batches of prompts by index, those that begin with the same text together with that beginning already computed."""
    groups: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.group, []).append(index)
    for group, alike in groups.items():
        prefix = None
        if group is not None and len(alike) > 1:
            prefix = _share_prefix(model, [prompts[index].tokens for index in alike])
        for batch in _batches(alike, prompts, batch_tokens):
            yield batch, prefix


@torch.inference_mode()
def _share_prefix(model: Model, prompts: Sequence[list[int]]) -> _Prefix | None:
    """Nothing for networks with sliding windows, which count the padding that then stands between prefix and question."""
    if not attends_fully(model):
        return None
    from transformers import DynamicCache

    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    length = min(sum(1 for _ in columns), min(len(tokens) for tokens in prompts) - 1)
    if length < _WORTH_SHARING:
        return None
    cache = DynamicCache(config=model.network.config)
    ids = torch.tensor([prompts[0][:length]], device=model.device)
    model.network.base_model(input_ids=ids, past_key_values=cache, use_cache=True)  # type: ignore[operator]
    return _Prefix(length, cache)


def attends_fully(model: Model) -> bool:
    config: Any = model.network.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is None


def _batches(indices: Sequence[int], prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[list[int]]:
    """Prompts of similar length together, at most `batch_tokens` padded tokens at once (one prompt always)."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda index: (-len(prompts[index].tokens), index)):
        if batch and len(prompts[batch[0]].tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands on the answer's text as soon as it is certain: no white space around it, nothing from a stop text on."""

    def __init__(self, tokenizer: Any, on_text: OnText, stops: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stops = on_text, stops
        self._text, self._told = "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        certain = _before_stops(self._text, self._stops)
        if not stream_end and len(certain) == len(self._text):  # what may yet become a stop text has to wait
            held = max(
                (n for stop in self._stops for n in range(1, len(stop)) if certain.endswith(stop[:n])), default=0
            )
            certain = certain[: len(certain) - held]
        certain = certain.strip()
        if len(certain) > self._told:
            self._on_text(certain[self._told :])
            self._told = len(certain)


@torch.inference_mode()
def _generate(
    model: Model,
    prompts: list[list[int]],
    settings: AnsweringConfig,
    seed: int,
    on_text: OnText | None,
    prefix: _Prefix | None,
) -> list[tuple[str, int]]:
    """(text, tokens) for each prompt. Padding stands on the left, or right after a shared prefix, so that all continue at the
    same position; it is masked, and positions do not count it."""
    tokenizer, device = model.tokenizer, model.device
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    shared = prefix.tokens if prefix is not None else 0
    ids = torch.tensor([p[:shared] + [pad] * (longest - len(p)) + p[shared:] for p in prompts], device=device)
    mask = torch.tensor(
        [[1] * shared + [0] * (longest - len(p)) + [1] * (len(p) - shared) for p in prompts], device=device
    )
    stops = answer_stops(tokenizer)
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "pad_token_id": pad, "use_cache": True}
    if settings.temperature > 0:
        options |= {
            "do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k
        }  # fmt: skip
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if prefix is not None:
        options["past_key_values"] = copy.deepcopy(prefix.cache)
        options["past_key_values"].batch_repeat_interleave(len(prompts))
    if stops:
        options |= {"stop_strings": stops, "tokenizer": tokenizer}
    streamer = _Streamer(tokenizer, on_text, stops) if on_text is not None else None
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        output: Any = model.network.generate(input_ids=ids, attention_mask=mask, streamer=streamer, **options)  # type: ignore[operator]
    return [_finish(model, row[longest:].tolist(), stops) for row in output]


def _finish(model: Model, tokens: list[int], stops: Sequence[str]) -> tuple[str, int]:
    """The answer's text without padding, end tokens and stop texts."""
    ends = model.network.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = set(ends if isinstance(ends, list) else [ends]) | {model.tokenizer.eos_token_id}
    count = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return _before_stops(model.decode(tokens[:count]), stops).strip(), count


def _before_stops(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text
