"""Short texts that the base model wrote itself, and how likely it finds each next token: where a penalty on drifting is measured.

`training.drift_weight` makes training keep that divergence small too, so that what the document does not touch stays as it
was. Nobody has to bring other text for it (self-synthesized rehearsal, arXiv 2403.01244), and the targets are the base
model's probabilities instead of its words.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from liftlm.adapters import use_adapter
from liftlm.config import AnsweringConfig, LiftConfig
from liftlm.devices import join_processes
from liftlm.errors import ConfigError
from liftlm.examples import NO_LOSS, Example
from liftlm.generating import Generated, Prompt, generate
from liftlm.losses import OTHERS
from liftlm.models import Model
from liftlm.prompts import Wording, answer_end, common_beginning, leading_tokens, render_prompt, worded_turn
from liftlm.rows import DriftTexts, SoftTargets, likeliest_tokens
from liftlm.storage import write_file

_TEXTS = 128  # at most; half of them questions with their answers, half plain text
_QUESTION_TOKENS = 32
_TOKENS = 64  # of an answer, or of plain text
_OF_THE_LIKELIEST = 50  # a text's next token is drawn
_LIKELIEST = 32  # tokens whose probabilities are kept; all others count as one
_TOGETHER = 3 << 22  # numbers over the whole vocabulary that exist at once
_SEED = 0  # whatever that of training is, so that they are written once a process


def check_drift(model: Model, config: LiftConfig) -> None:
    """Raises ConfigError where `training.drift_weight` cannot work: before anything else is begun."""
    if not config.training.drift_weight:
        return
    advice = "Use --set training.drift_weight=0."
    if model.tensor_parallel:
        raise ConfigError("A model that is divided over processes cannot write training.drift_weight's texts.", advice)
    needed = (
        len(_prompt(model, "")) + 2 * _QUESTION_TOKENS + _TOKENS
    )  # a question may take more tokens when it is read again
    if needed > model.window:
        raise ConfigError(
            f"The texts of training.drift_weight take a window of {needed} tokens, and the model's has {model.window}.",
            advice,
        )


def write_drift_texts(model: Model, config: LiftConfig, cache: Path | None = None) -> DriftTexts | None:
    """None without `training.drift_weight`, which `check_drift` has passed. Written once a process.

    cache: a safetensors file, for an interrupted run. Raises ConfigError (a model that says nothing), DiskFullError,
    NoWritePermissionError.
    """
    if not config.training.drift_weight:
        return None
    together = join_processes(model.device)  # which must all train on the same texts
    held = [_written(model, cache) if together.is_main_process else {}]
    if together.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(held)
    (table,) = held
    return DriftTexts(_examples(table), SoftTargets(table["likeliest"], table["shares"]))


def _written(model: Model, cache: Path | None) -> dict[str, Tensor]:
    """By an earlier run, for an earlier document, or now."""
    origin = hashlib.sha256(f"{model.fingerprint}/{model.dtype}/{model.window}".encode()).hexdigest()
    if cache is not None and cache.is_file():
        with safe_open(cache, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("origin") == origin:
            return dict(load_file(cache))
    if model.drift is None:
        with use_adapter(model, None):
            model.drift = _write(model)
    table: dict[str, Tensor] = model.drift
    if cache is not None:
        write_file(cache, save(table, metadata={"origin": origin}))
    return table


def _write(model: Model) -> dict[str, Tensor]:
    examples = [*_conversations(model), *_plain_texts(model)]
    if not examples:
        raise ConfigError(
            "The model says nothing where it may say what it likes, and so training.drift_weight has no texts.",
            "Use --set training.drift_weight=0.",
        )
    return _table(examples) | _probabilities(model, examples)


def _conversations(model: Model) -> list[Example]:
    """What the model asks in the user's place, and what it answers."""
    asked = [_prompt(model, question) for question in ("Who?", "7", "in")]
    beginning = common_beginning(asked) or _any_token(model, 1)[0]
    questions = {text.text for _, text in _say(model, [beginning] * (_TEXTS // 2), _QUESTION_TOKENS, _SEED)} - {""}
    examples = []
    for prompt, text in _say(model, [_prompt(model, question) for question in sorted(questions)], _TOKENS, _SEED + 1):
        said = [*text.ids, *(answer_end(model.tokenizer) if text.ended else ())][: model.window - len(prompt)]
        examples.append(Example((*prompt, *said), (*[NO_LOSS] * len(prompt), *said)))
    return [example for example in examples if example.targets]


def _plain_texts(model: Model) -> list[Example]:
    """What the model goes on with after a single token, each time another one."""
    texts = _say(model, _any_token(model, _TEXTS // 2), _TOKENS, _SEED + 2)
    return [
        Example((*beginning, *text.ids), (*[NO_LOSS] * len(beginning), *text.ids))
        for beginning, text in texts
        if text.ids
    ]


def _any_token(model: Model, count: int) -> list[list[int]]:
    """Drawn, but no special one; after what stands before every text."""
    special = set(model.tokenizer.all_special_ids)
    usual = [token for token in range(len(model.tokenizer)) if token not in special]
    lead = leading_tokens(model.tokenizer)
    return [[*lead, token] for token in random.Random(_SEED).sample(usual, min(count, len(usual)))]


def _prompt(model: Model, question: str) -> list[int]:
    return render_prompt(model.tokenizer, [worded_turn(model.tokenizer, Wording(question, "", ""))])


def _say(model: Model, prompts: list[list[int]], tokens: int, seed: int) -> list[tuple[list[int], Generated]]:
    """Prompts that the window has room for, and what the model goes on with; sampled, without the unlikeliest words."""
    settings = AnsweringConfig(max_new_tokens=tokens, temperature=0.8, top_k=_OF_THE_LIKELIEST)
    fitting = [prompt for prompt in prompts if len(prompt) + tokens <= model.window]
    said = generate(model, [Prompt(prompt, "drift") for prompt in fitting], settings, seed)
    return [(fitting[text.index], text) for text in sorted(said, key=lambda text: text.index)]


def _probabilities(model: Model, examples: list[Example]) -> dict[str, Tensor]:
    """(labelled positions, k) of all examples, in their order; the last column is that of all other tokens."""
    vocabulary = int(model.network.config.get_text_config().vocab_size)
    likeliest, given = likeliest_tokens(model, examples, _LIKELIEST, max(1, _TOGETHER // vocabulary), whole=False)
    rest = (1 - given.sum(1, keepdim=True)).clamp(min=0)
    return {
        "likeliest": torch.cat([likeliest, torch.full_like(likeliest[:, :1], OTHERS)], 1),
        "shares": torch.cat([given, rest], 1),
    }


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
