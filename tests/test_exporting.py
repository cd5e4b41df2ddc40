"""What other programs load: GGUF LoRAs read back and run by llama.cpp itself, and vLLM's demands one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import load_in_float32, make_tokenizer, save_model
from liftlm.adapters import attach_adapter, use_adapter
from liftlm.config import AdapterConfig
from liftlm.errors import ConfigError
from liftlm.gguf_lora import read_gguf_lora, write_gguf_lora
from liftlm.models import Model
from liftlm.vllm_limits import check_for_vllm

IDS = [5, 17, 40, 30, 99, 12, 7, 8, 150, 31, 60, 61]
FAMILIES = ["llama", "llama-untied", "qwen3", "phi3"]


def adapter_folder(model: Model, folder: Path, **settings: Any) -> Path:
    """A LoRA that changes answers a lot, as the library stores it; attached as 'a'."""
    attach_adapter(model, "a", AdapterConfig(rank=4, alpha=8, **settings), 0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.adapters["a"].parameters().items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.5
    folder.mkdir()
    model.adapters["a"].write(folder, model.adapters["a"].tensors())
    return folder


def base_settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def rows_as_pairs(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter stores a Llama's queries and keys: written here on its own, one row at a time."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_base(model: Model, target: Path, family: str) -> None:
    """The tiny model itself as GGUF, in float32: what llama.cpp loads the LoRA on."""
    config, kind = model.network.config, {"llama-untied": "llama"}.get(family, family)
    writer = gguf.GGUFWriter(str(target), kind)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if kind == "phi3":
        writer.add_sliding_window(0)
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    vocabulary = sorted(make_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types([3 if re.fullmatch(r"<\|.*\|>", text) else 1 for text, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in _merges()])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for path, tensor in model.network.state_dict().items():
        if tied and path.startswith("lm_head"):
            continue
        values = tensor.numpy()
        if kind == "llama" and re.search(r"[qk]_proj", path):
            queries = "q_proj" in path
            values = rows_as_pairs(values, config.num_attention_heads if queries else config.num_key_value_heads)
        name = names.get_name(path.removesuffix(".weight"))
        assert name is not None, path
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges() -> list[list[str]]:
    found: list[list[str]] = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    return found


def next_in_llama_cpp(base: Path, lora: Path | None) -> dict[int, float]:
    """Its log probabilities of the tokens that may follow IDS; the likeliest 50."""
    llama = pytest.importorskip("xllamacpp")
    settings = llama.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.fit_params = 64, 1, False, False
    settings.cpuparams.n_threads = 1
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    if lora is not None:
        settings.lora_adapters = [llama.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = llama.Server(settings)
    answer = server.handle_completions({"prompt": IDS, "max_tokens": 1, "temperature": 0, "logprobs": 50})
    (first,) = answer["choices"][0]["logprobs"]["content"]
    return {row["id"]: row["logprob"] for row in first["top_logprobs"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", family)
    model = load_in_float32(folder)
    write_base(model, tmp_path / "base.gguf", family)
    write_gguf_lora(adapter_folder(model, tmp_path / "a"), base_settings(folder), tmp_path / "a.gguf")
    ours = {}
    for name in (None, "a"):
        with torch.no_grad(), use_adapter(model, name):
            ours[name] = model.network(input_ids=torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    bare = next_in_llama_cpp(tmp_path / "base.gguf", None)
    with_lora = next_in_llama_cpp(tmp_path / "base.gguf", tmp_path / "a.gguf")
    assert apart(ours[None], bare) < 1e-3  # the comparison itself is right
    assert apart(ours["a"], with_lora) < 1e-3
    assert apart(ours[None], with_lora) > 0.1  # and the adapter did something


def apart(ours: torch.Tensor, theirs: dict[int, float]) -> float:
    """The largest difference, of the tokens that llama.cpp names."""
    assert len(theirs) >= 40
    return max(abs(float(ours[token]) - logprob) for token, logprob in theirs.items())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "qwen3")  # rows in the same order as in PEFT's file
    adapter = adapter_folder(load_in_float32(folder), tmp_path / "a", rslora=True)
    write_gguf_lora(adapter, base_settings(folder), tmp_path / "a.gguf")
    fields, tensors = read_gguf_lora(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "qwen3"
    assert fields["adapter.lora.alpha"] / 4 == pytest.approx(8 / 4**0.5)  # what PEFT multiplies by, with rslora
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == len(stored) == 2 * 7 * 2
    one = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    for letter in "AB":
        assert np.array_equal(tensors[f"blk.1.attn_output.weight.lora_{letter.lower()}"], stored[one.format(letter)])


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {}, "model of type 'gpt2' is not known"),
        ("llama", {"dora": True}, "does not know DoRA"),
    ],
)
def test_what_llama_cpp_cannot_take(family: str, settings: Any, message: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", family)
    adapter = adapter_folder(load_in_float32(folder), tmp_path / "a", **settings)
    with pytest.raises(ConfigError, match=message):
        write_gguf_lora(adapter, base_settings(folder), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


# --- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    home = tmp_path_factory.mktemp("served")
    folder = save_model(home / "m")
    return adapter_folder(load_in_float32(folder), home / "a"), base_settings(folder)


def test_what_liftlm_makes_can_be_served(served: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    found = check_for_vllm(*served)
    assert (found.problems, found.doubts, found.rank) == ((), (), 8)
    command = found.command("owner/model", "notes", Path("/a b"))
    assert command == "vllm serve owner/model --enable-lora --max-lora-rank 8 --lora-modules 'notes=/a b'"
    # PiSSA and OLoRA are written as plain LoRAs of twice the rank, since vLLM refuses their names
    model = load_in_float32(save_model(tmp_path / "m"))
    adapter = adapter_folder(model, tmp_path / "a", initialization="pissa")
    found = check_for_vllm(adapter, served[1])
    assert found.problems == () and found.rank == 8


def altered(name: str, value: Any) -> Callable[[Path, dict[str, Any]], None]:
    def alter(folder: Path, base: dict[str, Any]) -> None:
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | {name: value}))

    return alter


def of_base(**values: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda folder, base: base.update(values)


def with_tensor(name: str) -> Callable[[Path, dict[str, Any]], None]:
    def alter(folder: Path, base: dict[str, Any]) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({**load_file(path), name: torch.zeros(4, 4)}, path)

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (altered("use_dora", True), "DoRA"),
        (altered("bias", "all"), "biases"),
        (altered("lora_bias", True), "biases"),
        (altered("modules_to_save", ["lm_head"]), "whole modules in an adapter (lm_head)"),
        (altered("init_lora_weights", "pissa"), "init_lora_weights=pissa"),
        (altered("layer_replication", [[0, 1]]), "layer_replication"),
        (altered("r", 513), "rank 513 is above 512"),
        (with_tensor("base_model.model.lm_head.weight"), "'base_model.model.lm_head.weight'"),
        (
            with_tensor("base_model.model.lm_head.lora_A.weight"),
            "changes lm_head of a model whose head is its embeddings",
        ),
        (of_base(vocab_size=262144, tie_word_embeddings=False), "262,144 tokens is above 258,048"),
        (of_base(architectures=["GPT2LMHeadModel"]), "no LoRA for GPT2LMHeadModel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_vllm_cannot_serve(alter: Any, message: str, served: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    adapter = tmp_path / "a"
    adapter.mkdir()
    for path in served[0].iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    base = dict(served[1])
    alter(adapter, base)
    (problem,) = check_for_vllm(adapter, base).problems
    assert message in problem


def test_what_is_not_known_is_said(served: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    found = check_for_vllm(served[0], {"architectures": ["NewForCausalLM"]})
    assert found.problems == () and "NewForCausalLM" in found.doubts[0]
    (tmp_path / "model.safetensors").touch()  # an adapter of all weights
    assert "Only LoRA" in check_for_vllm(tmp_path, served[1]).problems[0]
