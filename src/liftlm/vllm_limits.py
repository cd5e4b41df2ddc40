"""Whether vLLM can serve an adapter, from what its documentation and source demand of a LoRA folder; vLLM is not needed.

Read in vLLM's source (vllm/lora/peft_helper.py, config/lora.py, lora_model.py, utils.py, layers/logits_processor.py; autumn
2026) and its page "LoRA Adapters". **Not run here**: vLLM needs a GPU or a build of its own. Knows nothing of the library.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be (config/lora.py, MaxLoRARanks)
_VOCABULARY = 258_048  # tokens, for a model whose head may be adapted (layers/logits_processor.py)
_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # others change the base weights on loading
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_TABLES = (
    "embed_tokens",
    "lm_head",
    "wte",
    "embed_in",
    "embed_out",
)  # embeddings and heads, by the last part of their name
# architectures that vLLM's page "Supported Models" marks for LoRA, of those that liftlm's tests absorb with
_WITH_LORA = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"),
    *("Gemma3ForCausalLM", "Phi3ForCausalLM", "GraniteForCausalLM"),
)
_WITHOUT_LORA = ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "BloomForCausalLM", "GPTJForCausalLM")


@dataclass(frozen=True)
class Serving:
    """problems: why vLLM cannot serve it (sentences); doubts: what could not be decided here. rank: for --max-lora-rank."""

    problems: tuple[str, ...]
    doubts: tuple[str, ...]
    rank: int | None

    def command(self, model: str, name: str, folder: Path) -> str:
        """How to serve it."""
        place = shlex.quote(f"{name}={folder}")
        return f"vllm serve {shlex.quote(model)} --enable-lora --max-lora-rank {self.rank} --lora-modules {place}"


def check_for_vllm(adapter: Path, base: Mapping[str, Any]) -> Serving:
    """What vLLM would say of an adapter's folder on a model with this config.json."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        return Serving(("Only LoRA can be served as an adapter; this one is of another kind.",), (), None)
    settings = json.loads(path.read_text(encoding="utf-8"))
    rank = next((allowed for allowed in _RANKS if allowed >= int(settings["r"])), None)
    problems = [*_problems_of_settings(settings), *_problems_of_tensors(adapter, bool(base.get("tie_word_embeddings")))]
    if rank is None:
        problems.append(f"Its rank {settings['r']} is above {_RANKS[-1]}, the largest that vLLM takes.")
    doubts: list[str] = []
    architecture = next(iter(base.get("architectures") or ()), "unknown")
    if architecture in _WITHOUT_LORA:
        problems.append(f"vLLM has no LoRA for {architecture}.")
    elif architecture not in _WITH_LORA:
        doubts.append(
            f"Whether vLLM has LoRA for {architecture} is not known here; its page 'Supported Models' says it."
        )
    vocabulary = int(base.get("vocab_size") or 0)
    if vocabulary > _VOCABULARY and not base.get("tie_word_embeddings"):
        problems.append(
            f"The model's vocabulary of {vocabulary:,} tokens is above {_VOCABULARY:,}, vLLM's limit with LoRA."
        )
    return Serving(tuple(problems), tuple(doubts), rank)


def _problems_of_settings(settings: Mapping[str, Any]) -> list[str]:
    found = []
    if settings.get("use_dora"):
        found.append("vLLM does not support DoRA.")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        found.append("vLLM does not support trained biases.")
    if settings.get("modules_to_save"):
        found.append(f"vLLM does not support whole modules in an adapter ({', '.join(settings['modules_to_save'])}).")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _INITIALIZATIONS:
        found.append(f"vLLM does not support init_lora_weights={start}, which changes the base weights.")
    for key in ("layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora"):
        if settings.get(key):
            found.append(f"vLLM does not support {key}.")
    return found


def _problems_of_tensors(adapter: Path, tied: bool) -> list[str]:
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:
        names = list(file.keys())
    found = [f"vLLM does not take a tensor of the name '{name}'." for name in names if not name.endswith(_ENDINGS)][:1]
    tables = {name.split(".lora_")[0].rpartition(".")[2] for name in names} & set(_TABLES)
    if tied and tables:
        found.append(
            f"It changes {' and '.join(sorted(tables))} of a model whose head is its embeddings, which vLLM holds once."
        )
    return found
