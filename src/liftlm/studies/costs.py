"""One cost at one length: in-context reading or absorbing, each in a process of its own.

A fresh process, because memory that was freed may stay with a process. Memory is counted beyond the loaded model's.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from liftlm.absorbing import absorb
from liftlm.config import LiftConfig
from liftlm.devices import current_memory, peak_memory, reset_peak_memory
from liftlm.documents import Document
from liftlm.errors import LiftError, NotEnoughMemoryError
from liftlm.models import Model, load_model

Cost = dict[str, Any]
_WARM_UP = 32  # tokens; weights are read from disk when they are first touched


def measure_alone(kind: str, config: LiftConfig, text: str, tokens: int) -> Cost:
    """seconds, memory_bytes (beyond the loaded model) and, where it failed, stopped: "memory" or what was said.

    kind: read (a prompt of so many tokens, one new token) or absorb (a document of so many).
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, kind, config, text, tokens).result()
        except BrokenProcessPool:  # the system ended it, which is how Linux answers too much memory
            return {"seconds": None, "memory_bytes": None, "stopped": "memory"}


def text_of_length(model: Model, text: str, tokens: int) -> list[int]:
    """The text's tokens, over and over, as far as needed."""
    once = model.encode(text.strip() + "\n\n")
    return (once * -(-tokens // len(once)))[:tokens]


def _measure(kind: str, config: LiftConfig, text: str, tokens: int) -> Cost:
    model = load_model(config.model.name, config.model)
    ids = text_of_length(model, text, tokens)
    work: Callable[[], Any]
    if kind == "absorb":
        document = Document("the text", model.decode(ids))
        work = lambda: absorb(document, model, config)  # noqa: E731
    else:
        work = lambda: write_tokens(model, ids, 1)  # noqa: E731
    write_tokens(model, ids[:_WARM_UP], 1)
    reset_peak_memory(model.device)  # loading took more than the model takes
    before = current_memory(model.device)
    began = time.monotonic()
    try:
        work()
    except NotEnoughMemoryError:
        return {"seconds": None, "memory_bytes": None, "stopped": "memory"}
    except LiftError:
        raise
    except Exception as error:  # past its limit a network may fail in any way
        told = "memory" if "memory" in str(error).lower() else f"{type(error).__name__}: {error}"[:200]
        return {"seconds": None, "memory_bytes": None, "stopped": told}
    seconds = time.monotonic() - began
    return {"seconds": seconds, "memory_bytes": max(0, peak_memory(model.device) - before), "stopped": None}


@torch.inference_mode()
def write_tokens(model: Model, ids: list[int], outputs: int) -> float:
    """Seconds until exactly so many tokens are written after the prompt."""
    network: Any = model.network
    tokens = torch.tensor([ids], device=model.device)
    began = time.monotonic()
    network.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        min_new_tokens=outputs,
        max_new_tokens=outputs,
        do_sample=False,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    return time.monotonic() - began
