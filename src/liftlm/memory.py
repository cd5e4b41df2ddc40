"""Predicts what training will take before it starts, so that a machine that is too small is told so, and how to fit.

Knows nothing of how training runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from liftlm.adapters.full import base_parameters
from liftlm.config import TrainingConfig
from liftlm.devices import available_memory
from liftlm.errors import NotEnoughMemoryError
from liftlm.examples import Example
from liftlm.layers import keeps_little
from liftlm.models import Model

MEMORY_ADVICE = (
    "Lower training.micro_batch_tokens or segments.segment_tokens, or set training.gradient_checkpointing=true; "
    "a smaller adapter.rank helps a little."
)


def predict_memory(
    model: Model, parameters: dict[str, Any], examples: Sequence[Example], settings: TrainingConfig
) -> int:
    """Bytes that training takes beyond the loaded model; an estimate from above, compared in docs/results/memory.md.

    Optimiser: gradient and two moments for each trainable number. Activations: what the linear layers take in and give
    out, kept for the backward pass, with a factor for norms, activations and attention between them.
    """
    trainable = sum(p.numel() for p in parameters.values())
    longest = max(
        (len(example) for example in examples), default=0
    )  # none yet where tasks alone are trained on as they come
    tokens = max(longest, min(settings.micro_batch_tokens, settings.batch_tokens))
    shapes = [p.shape for p in base_parameters(model.network).values() if p.dim() == 2]
    head = model.network.get_output_embeddings()
    vocabulary = head.weight.shape[0] if head is not None else 0
    through = sum(sum(shape) for shape in shapes if vocabulary not in shape)
    layers = int(getattr(model.network.config.get_text_config(), "num_hidden_layers", 1))
    hidden = int(getattr(model.network.config.get_text_config(), "hidden_size", 1024))
    width = model.dtype.itemsize
    # of adapters at the attention, (heads, outputs, inputs) or (heads, tokens, size): each output or score, and its activation
    beside = sum(p.shape[0] * p.shape[1] for p in parameters.values() if p.dim() == 3)
    plain = all(".lora_A." in name or ".lora_B." in name for name in parameters)
    written_out = plain and not settings.gradient_checkpointing and keeps_little(model.network)
    kept = tokens * (through * width * (0.75 if written_out else 1.6) + beside * 8)
    if settings.gradient_checkpointing:
        kept = tokens * layers * hidden * width + kept / layers
    return int(trainable * 12 + kept + 6 * (1 << 26))


def check_memory(
    model: Model, parameters: dict[str, Any], examples: Sequence[Example], settings: TrainingConfig
) -> None:
    """Raises NotEnoughMemoryError, with both figures, where the prediction is more than what is free."""
    needed, free = predict_memory(model, parameters, examples, settings), available_memory(model.device)
    if needed > free:
        raise NotEnoughMemoryError(
            f"Training needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free.", MEMORY_ADVICE
        )
