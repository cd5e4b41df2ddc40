"""Short texts that the base model wrote itself, and how likely it finds each next token: where a penalty on drifting is measured.

`training.drift_weight` makes training minimise that divergence too, so that what the document does not touch stays as it was.
Nobody has to bring other text for it (self-synthesized rehearsal, arXiv 2403.01244), and the targets are the base model's
probabilities instead of its words.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from liftlm.adapters import use_adapter
from liftlm.config import AnsweringConfig, LiftConfig
from liftlm.devices import join_processes
from liftlm.errors import ConfigError
from liftlm.examples import NO_LOSS, Example, split_step
from liftlm.generating import Generated, Prompt, generate
from liftlm.models import Model
from liftlm.prompts import Wording, answer_end, encode_text, leading_tokens, render_prompt, worded_turn
from liftlm.rows import DriftTexts, SoftTargets, row_tensors
from liftlm.storage import write_file

_TEXTS = 128  # half of them questions with their answers, half plain text
_QUESTION_TOKENS = 32
_TOKENS = 64  # of an answer, or of plain text
_OF_THE_LIKELIEST = 50  # a text's next token is drawn
_LIKELIEST = 32  # tokens whose probabilities are kept; one of the others stands for those
_TOGETHER = 512  # tokens whose probabilities over the whole vocabulary exist at once


def write_drift_texts(model: Model, config: LiftConfig, cache: Path | None = None) -> DriftTexts | None:
    """None without `training.drift_weight`. Written once a model and seed; cache: a safetensors file, for an interrupted run.

    Raises ConfigError (a model divided over processes, a window that is too small), DiskFullError, NoWritePermissionError.
    """
    if not config.training.drift_weight:
        return None
    if model.tensor_parallel:
        raise ConfigError(
            "A model that is divided over processes cannot write the texts for training.drift_weight.",
            "Use --set training.drift_weight=0.",
        )
    together = join_processes(model.device)  # which must all train on the same texts
    held = [_written(model, config.seed, cache) if together.is_main_process else {}]
    if together.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(held)
    (table,) = held
    return DriftTexts(_examples(table), SoftTargets(table["likeliest"], table["shares"]))


def _written(model: Model, seed: int, cache: Path | None) -> dict[str, Tensor]:
    """By an earlier run, for an earlier document, or now."""
    known: dict[int, dict[str, Tensor]] = model.drift  # one for each seed
    if cache is not None and cache.is_file():
        known[seed] = load_file(cache)
    elif seed not in known:
        with use_adapter(model, None):
            known[seed] = _write(model, seed)
    if cache is not None and not cache.is_file():
        write_file(cache, save(known[seed]))
    return known[seed]


def _write(model: Model, seed: int) -> dict[str, Tensor]:
    examples = [*_conversations(model, seed), *_plain_texts(model, seed)]
    if not examples:
        raise ConfigError(
            f"The model's window of {model.window} tokens has no room for the texts of training.drift_weight.",
            "Use --set training.drift_weight=0.",
        )
    return _table(examples) | _probabilities(model, examples, seed)


def _conversations(model: Model, seed: int) -> list[Example]:
    """What the model asks in the user's place, and what it answers."""
    tokenizer = model.tokenizer
    asked = [_prompt(model, question) for question in ("Who?", "7", "in")]
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*asked, strict=False))
    beginning = [column[0] for column in columns] or _nothing(model)
    questions = {text.text for _, text in _say(model, [beginning] * (_TEXTS // 2), _QUESTION_TOKENS, seed) if text.text}
    examples = []
    for prompt, text in _say(model, [_prompt(model, question) for question in sorted(questions)], _TOKENS, seed):
        said = [*text.ids, *(answer_end(tokenizer) if text.ended else ())]
        examples.append(Example((*prompt, *said), (*[NO_LOSS] * len(prompt), *said)))
    return [example for example in examples if example.targets]


def _plain_texts(model: Model, seed: int) -> list[Example]:
    """What the model writes where nothing stands before."""
    beginning = _nothing(model)
    said = [text.ids for _, text in _say(model, [beginning] * (_TEXTS // 2), _TOKENS, seed) if text.ids]
    return [Example((*beginning, *ids), (*[NO_LOSS] * len(beginning), *ids)) for ids in said]


def _nothing(model: Model) -> list[int]:
    """What stands before the first word of a text; the end token where that is nothing."""
    end = model.tokenizer.eos_token_id
    return leading_tokens(model.tokenizer) or ([end] if end is not None else encode_text(model.tokenizer, "\n"))


def _prompt(model: Model, question: str) -> list[int]:
    return render_prompt(model.tokenizer, [worded_turn(model.tokenizer, Wording(question, "", ""))])


def _say(model: Model, prompts: list[list[int]], tokens: int, seed: int) -> list[tuple[list[int], Generated]]:
    """Prompts that the window has room for, and what the model goes on with; sampled, without the unlikeliest words."""
    settings = AnsweringConfig(max_new_tokens=tokens, temperature=0.8, top_k=_OF_THE_LIKELIEST)
    fitting = [prompt for prompt in prompts if len(prompt) + tokens <= model.window]
    said = generate(model, [Prompt(prompt, "drift") for prompt in fitting], settings, seed)
    return [(fitting[text.index], text) for text in sorted(said, key=lambda text: text.index)]


def _probabilities(model: Model, examples: list[Example], seed: int) -> dict[str, Tensor]:
    """(labelled positions, k) of all examples, in their order."""
    draw = torch.Generator(model.device).manual_seed(seed)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in split_step(range(len(examples)), examples, _TOGETHER, 1, model.can_pack):
        rows = [examples[index] for index in batch]
        ids, shares = model.top_tokens(_LIKELIEST, *row_tensors(model, rows), draw=draw)
        counts = [row.targets for row in rows]
        parts = zip(torch.split(ids.int().cpu(), counts), torch.split(shares.cpu(), counts), strict=True)
        found |= dict(zip(batch, parts, strict=True))
    both = [torch.cat([found[index][part] for index in range(len(examples))]).contiguous() for part in (0, 1)]
    return {"likeliest": both[0], "shares": both[1]}


def _table(examples: list[Example]) -> dict[str, Tensor]:
    return {
        "tokens": torch.tensor([token for example in examples for token in example.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(example) for example in examples], dtype=torch.int32),
        "targets": torch.tensor([example.targets for example in examples], dtype=torch.int32),
    }


def _examples(table: dict[str, Tensor]) -> list[Example]:
    """The labelled tokens of each are its last ones."""
    texts = torch.split(table["tokens"], table["lengths"].tolist())
    examples: list[Example] = []
    row = 0
    for text, targets in zip(texts, table["targets"].tolist(), strict=True):
        tokens = tuple(text.tolist())
        labels = (*[NO_LOSS] * (len(tokens) - targets), *tokens[-targets:])
        examples.append(Example(tokens, labels, soft=row, soft_weight=1.0))
        row += targets
    return examples
