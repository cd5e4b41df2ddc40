"""Tiny random models and a byte-level tokenizer made in memory; no network, no files outside pytest's own folders."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two threads on a shared machine wait for each other far longer than they compute
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")  # float32 on every machine; tests of bfloat16 ask for it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "The bell of the old town rang on the lake, and the ferryman counted forty-one silver marks in the snow. Who? Answer:"

# name → (transformers configuration class, what differs from the sizes below)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 24, "head_dim": 16}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),  # logits are not head(hidden): the slow path
}


def make_tokenizer(*, chat: bool = True, pad: bool = True, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on one sentence: every text has ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        pad_token="<|endoftext|>" if pad else None,
        bos_token="<|bos|>" if bos else None,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make_network(family: str, vocabulary: int, *, window: int = 256, seed: int = 0, width: int = 64) -> Any:
    """A random two-layer network of a family, in evaluation mode."""
    import torch
    import transformers

    kind, extra = FAMILIES[family]
    if family == "gpt2":
        sizes: dict[str, Any] = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": window}
    else:
        sizes = {
            "hidden_size": width,
            "intermediate_size": width * 3 // 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": window,
        }
        if family != "gpt-neox":
            sizes["num_key_value_heads"] = 2
    torch.manual_seed(seed)
    specials = {"bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, kind)(vocab_size=vocabulary, **(sizes | specials | extra))
    network = transformers.AutoModelForCausalLM.from_config(config)
    # random weights of the usual size give nearly uniform answers; larger ones tell inputs apart
    for parameter in network.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(3)
    return network.eval()


def save_model(
    folder: Path, family: str = "llama", *, window: int = 256, seed: int = 0, width: int = 64, **tokenizer: bool
) -> Path:
    """A model folder as transformers would save it."""
    made = make_tokenizer(**tokenizer)
    make_network(family, len(made), window=window, seed=seed, width=width).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template, window 256."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def tiny_model(tiny_folder: Path) -> Any:
    """A freshly loaded tiny Llama."""
    from liftlm.models import load_model

    return load_model(str(tiny_folder))


def load_in_float32(folder: Path) -> Any:
    """For tests of numbers, on every machine."""
    from liftlm.config import ModelConfig
    from liftlm.models import load_model

    return load_model(str(folder), ModelConfig(dtype="float32"))


def has_quick_bfloat16() -> bool:
    """Whether PyTorch's attention kernel runs in bfloat16: it takes AMX where there is, and fails without AVX-512."""
    import torch

    return not torch.cpu._is_amx_tile_supported() or "AVX512" in torch.backends.cpu.get_cpu_capability()


def attention_that_runs() -> contextlib.AbstractContextManager[object]:
    """For transformers' attention in bfloat16 under any capability."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return contextlib.nullcontext() if has_quick_bfloat16() else sdpa_kernel(SDPBackend.MATH)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a library of its own."""
    monkeypatch.setenv("LIFT_HOME", str(tmp_path / "lift-home"))
    return tmp_path / "lift-home"


@pytest.fixture
def quick_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this machine, without a key, asked again at once."""
    monkeypatch.setattr("liftlm.tasks.asking._FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
