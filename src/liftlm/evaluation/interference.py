"""What absorbing costs the model itself: 20 questions of general knowledge, and the likelihood of an unrelated text.

The unrelated text is the one that `--diagnose` reads: written for it, about nothing that a document is likely to be about.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

import torch

from liftlm.adapters import use_adapter
from liftlm.config import LiftConfig
from liftlm.diagnosing import UNRELATED
from liftlm.generating import Prompt, generate
from liftlm.models import Model
from liftlm.prompts import Wording, render_prompt, worded_turn

_ANSWER = 32  # tokens


@dataclass(frozen=True)
class Interference:
    """unrelated_nll: nats a token; general_right: how many of the questions are answered with the expected word."""

    unrelated_nll: float
    general_right: int
    general_questions: int


def measure_interference(model: Model, adapter: str | None, config: LiftConfig) -> Interference:
    """With all of the adapter acting (None: the base model), greedy."""
    tokens = model.encode(UNRELATED)[: model.window]
    rows = json.loads((resources.files("liftlm.evaluation") / "general.json").read_text(encoding="utf-8"))
    prompts = [
        Prompt(render_prompt(model.tokenizer, [worded_turn(model.tokenizer, Wording(row["question"], "", ""))]))
        for row in rows
    ]
    settings = config.answering.model_copy(update={"max_new_tokens": _ANSWER, "temperature": 0.0})
    with use_adapter(model, adapter), torch.inference_mode():
        ids = torch.tensor([tokens], device=model.device)
        loss = float(model.loss_sum(ids, ids)) / (len(tokens) - 1)
        said = {text.index: text.text.lower() for text in generate(model, prompts, settings, 0)}
    right = sum(any(word in said[index] for word in row["keys"]) for index, row in enumerate(rows))
    return Interference(loss, right, len(rows))
