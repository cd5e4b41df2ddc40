"""What a model says by heart about a question: several answers, each begun in another way and followed to its end.

A document that was learnt word for word is still not found by a question: which sentence comes is decided by the first few
tokens of an answer, where other sentences' beginnings are likely too; what follows is recited without doubt
(docs/results/recall.md). So the likeliest beginnings are all followed, and somebody else judges what was recited: recite and
answer (Sun et al. 2023, arXiv 2210.01296), with a document's adapter on. Knows token ids only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liftlm.batching import Network, end_tokens
from liftlm.config import AnsweringConfig
from liftlm.generating import Prompt, generate
from liftlm.models import Model

_BRANCHES = 8  # ways on from one beginning that are looked at
_BEAMS_OF_OTHERS = 3


def recite(
    model: Model, prompt: Sequence[int], settings: AnsweringConfig, others: Sequence[Sequence[int]] = ()
) -> list[str]:
    """Different texts by the adapter that is on: at most `recitation.beams` after the prompt, the likeliest beginning first.

    others: prompts with the same question in other words, after each of which a few more are begun.
    """
    how = settings.recitation
    begun = [
        (each, tokens)
        for each, beams in ((prompt, how.beams), *((other, _BEAMS_OF_OTHERS) for other in others))
        for tokens in likeliest_beginnings(model, each, beams, how.beginning_tokens)
    ]
    ends = end_tokens(model)
    open_ones = [index for index, (_, tokens) in enumerate(begun) if tokens[-1] not in ends]
    prompts = [Prompt([*begun[index][0], *begun[index][1]], group="recited") for index in open_ones]
    greedy = settings.model_copy(update={"temperature": 0.0, "max_new_tokens": how.rest_tokens})
    rest = {open_ones[told.index]: told.ids for told in generate(model, prompts, greedy, seed=0, merged=False)}
    whole = [[*(t for t in tokens if t not in ends), *rest.get(index, ())] for index, (_, tokens) in enumerate(begun)]
    texts = [" ".join(model.decode(tokens).split()) for tokens in whole]
    return list(dict.fromkeys(text for text in texts if text))


@torch.inference_mode()
def likeliest_beginnings(model: Model, prompt: Sequence[int], beams: int, length: int) -> list[list[int]]:
    """The continuations of `length` tokens that a beam search finds, the likeliest first; those that end earlier are shorter."""
    network = Network(model)
    network.refresh()
    cache = network.new_cache()
    if len(prompt) > 1 and network.packs(len(prompt) + length):
        network.fill(list(prompt[:-1]), cache)
    ends = end_tokens(model)
    found: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(length):
        going = [(tokens, score) for tokens, score in found if not tokens or tokens[-1] not in ends]
        if not going:
            break
        logits = _after(model, network, prompt, [tokens for tokens, _ in going], cache).float()
        best = logits.log_softmax(-1).topk(min(beams if len(going) == 1 else _BRANCHES, logits.shape[-1]))
        wider = [pair for pair in found if pair[0] and pair[0][-1] in ends]
        for (tokens, score), values, ids in zip(going, best.values.tolist(), best.indices.tolist(), strict=True):
            wider += [([*tokens, token], score + value) for token, value in zip(ids, values, strict=True)]
        found = sorted(wider, key=lambda pair: -pair[1])[:beams]
    return [tokens for tokens, _ in found]


def _after(
    model: Model, network: Network, prompt: Sequence[int], beginnings: Sequence[Sequence[int]], cache: Any
) -> Tensor:
    """(beginnings, vocabulary) logits after the prompt and each of some beginnings of equal length.

    cache: holds the prompt but for its last token, and afterwards too, where the network `packs`; else nothing.
    """
    if known := cache.get_seq_length():
        texts = [[*prompt[-1:], *tokens] for tokens in beginnings]
        after = network.compute_apart(texts, known, cache)
        cache.crop(known - cache.get_seq_length())
        return after
    whole = torch.tensor([[*prompt, *tokens] for tokens in beginnings], device=model.device)
    network_itself: Any = model.network
    logits: Tensor = network_itself(input_ids=whole).logits[:, -1]
    return logits
