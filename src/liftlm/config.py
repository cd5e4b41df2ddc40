"""All settings in one frozen, typed tree, and the three places they come from.

Defaults, then a YAML file, then `key=value` overrides. Nothing else in the program has defaults of its own, and every
setting stands here once. This module knows neither torch nor any model: limits that depend on the model (its window)
are applied by `LiftConfig.resolved`, and the result is what is saved with every adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from liftlm.adapter_config import AdapterConfig as AdapterConfig
from liftlm.cluster_config import ClusterConfig
from liftlm.errors import ConfigError
from liftlm.invalid_settings import explain_invalid
from liftlm.server_config import ServerConfig
from liftlm.setting_types import Branch as _Branch
from liftlm.setting_types import Number as _Number
from liftlm.setting_types import Whole as _Whole

DEFAULT_MODEL = "smollm2-135m-instruct"
ContextPolicy = Literal["none", "truncate", "retrieve", "recite"]
AnswerForm = Literal["auto", "short", "sentence", "mixed"]


class ModelConfig(_Branch):
    """Which model, and how much of it may be used."""

    name: str = Field(default=DEFAULT_MODEL, min_length=1)  # a local folder, a hub id, or the built-in name
    window: _Whole | None = Field(default=None, ge=16)  # tokens; None = the model's own limit
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: _Whole | None = Field(default=None, ge=1)  # None = torch's own choice
    # what processes that a launcher started together share: the examples of a step, or every layer (transformers' tp_plan)
    parallel: Literal["data", "tensor"] = "data"
    # how the base weights of linear layers are held: 8 bits by torchao (any device); 8 or 4 bits by bitsandbytes (CUDA)
    quantization: Literal["none", "int8", "bnb-int8", "nf4"] = "none"


class SegmentsConfig(_Branch):
    """How a document is cut (paper: segments of 2048 tokens, s = 768 = 3/8).

    The paper's s is read both ways. By default it is what neighbours *share* (`overlap_tokens`). In the authors' code
    segments *start* every 768 tokens, so neighbours share 1280 (5/8): that is `stride_tokens = 768`, which replaces
    `overlap_tokens`.
    """

    segment_tokens: _Whole = Field(default=2048, ge=2)
    overlap_tokens: _Whole = Field(default=768, ge=0)  # where only segment_tokens is given: 3/8 of it
    stride_tokens: _Whole | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_overlap(cls, data: Any) -> Any:
        """overlap_tokens follows from what is given, so that a saved config reads the same everywhere."""
        if isinstance(data, dict) and data.get("overlap_tokens") is None:
            segment, stride = data.get("segment_tokens", 2048), data.get("stride_tokens")
            if isinstance(segment, int) and isinstance(stride, int | None):
                overlap = segment * 3 // 8 if stride is None else segment - stride
                data = data | {"overlap_tokens": max(overlap, 0)}
        return data

    @model_validator(mode="after")
    def _no_contradiction(self) -> SegmentsConfig:
        if self.stride_tokens is not None:
            implied = self.segment_tokens - self.stride_tokens
            if implied < 0:
                raise ValueError(
                    f"segments.stride_tokens ({self.stride_tokens}) is larger than segments.segment_tokens "
                    f"({self.segment_tokens}), which would skip text"
                )
            if self.overlap_tokens != implied:
                raise ValueError(
                    f"segments.overlap_tokens ({self.overlap_tokens}) contradicts segments.stride_tokens "
                    f"({self.stride_tokens}), which means an overlap of {implied}; set one of the two"
                )
        if self.overlap_tokens >= self.segment_tokens:
            raise ValueError(
                f"segments.overlap_tokens ({self.overlap_tokens}) must be smaller than segments.segment_tokens "
                f"({self.segment_tokens})"
            )
        return self

    def within(self, limit: int) -> SegmentsConfig:
        """The same cut for segments of at most `limit` tokens; a shortened segment keeps its *share* of overlap."""
        if self.segment_tokens <= limit:
            return SegmentsConfig(segment_tokens=self.segment_tokens, overlap_tokens=self.overlap_tokens)
        return SegmentsConfig(segment_tokens=limit, overlap_tokens=self.overlap_tokens * limit // self.segment_tokens)


class LlmConfig(_Branch):
    """The server that the `llm` writer asks. The key is read from the environment and never stored."""

    base_url: str | None = None  # of any OpenAI-compatible server, e.g. http://localhost:8000/v1
    model: str | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    temperature: _Number = Field(default=0.7, ge=0)
    concurrency: _Whole = Field(default=16, ge=1)  # requests at once
    timeout_seconds: _Number = Field(default=120.0, gt=0)  # of one request
    attempts: _Whole = Field(default=5, ge=1)  # for one request, with growing pauses
    budget_tokens: _Whole | None = Field(default=None, ge=1)  # prompt and answer tokens in all; None = no limit


class TasksConfig(_Branch):
    """Which questions are written from the document, and how they are trained on (paper: auxiliary tasks)."""

    writer: Literal["none", "extractive", "self", "llm"] = "extractive"
    # of the writer extractive with short answers a mean: sentences with more to be asked for get more
    per_sentence: _Whole = Field(default=3, ge=1)
    # how long their answers are, which is how long answers become: a few words, a sentence, or some of each; auto = as the
    # writer is used to (docs/tasks.md)
    answers: AnswerForm = "auto"
    # of the writers llm and self: sentences asked about as one, and how many such runs are drawn (None = all, in order)
    sentences_together: _Whole = Field(default=1, ge=1)
    requests: _Whole | None = Field(default=None, ge=1)
    # share of an epoch's tokens that are tasks: 0 = segments only, 1 = tasks only, None = all of both, once
    mix: _Number | None = Field(default=None, ge=0, le=1)
    first_epoch: _Whole = Field(default=0, ge=0)  # tasks join after so many epochs of segments
    reading: _Number = Field(default=0.0, ge=0, le=1)  # share of the tasks that are also asked with text in the window
    # that text: a passage around the evidence, with the base model as teacher of how to read it; the evidence among sentences
    # that are found for the question; or head and tail of the document as far as the window holds them (2502.14644)
    show: Literal["passage", "retrieve", "truncate"] = "passage"
    passage_characters: _Whole = Field(default=1000, ge=1)
    # context distillation: the teacher is the base model with the passage; 0 = next-token loss on the answer only
    teacher_weight: _Number = Field(default=0.0, ge=0, le=1)
    teacher_tokens: _Whole = Field(default=16, ge=1)  # its likeliest ones that are learnt, at each token of an answer
    llm: LlmConfig = LlmConfig()


class TrainingConfig(_Branch):
    """The plain loop. Betas, eps, clipping and weight decay are those of the authors' code."""

    epochs: _Whole = Field(default=1, ge=1)
    total_tokens: _Whole | None = Field(
        default=None, ge=1
    )  # instead of epochs: as many as this takes, the last one cut
    learning_rate: _Number = Field(default=7e-4, gt=0)
    batch_tokens: _Whole = Field(default=512, ge=1)  # tokens an optimiser step sees, over all devices
    micro_batch_tokens: _Whole = Field(default=2048, ge=1)  # tokens in one forward pass on one device; memory
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_fraction: _Number = Field(default=0.05, ge=0, le=1)  # of all steps
    weight_decay: _Number = Field(default=1e-4, ge=0)
    beta1: _Number = Field(default=0.9, ge=0, lt=1)
    beta2: _Number = Field(default=0.98, ge=0, lt=1)
    eps: _Number = Field(default=1e-8, gt=0)
    max_grad_norm: _Number = Field(default=1.0, gt=0)
    # of a penalty: the KL divergence from the base model, a token of short texts that it wrote itself (`liftlm.drift`)
    drift_weight: _Number = Field(default=0.0, ge=0, le=1000)
    gradient_checkpointing: bool = False
    checkpoint_seconds: _Number = Field(default=30.0, ge=0)  # 0 = after every step


class RetrievalConfig(_Branch):
    """What of the text `answering.context=retrieve` shows: the pieces that BM25 finds for the question."""

    unit: Literal["sentence", "segment"] = "sentence"
    count: _Whole | None = Field(default=2, ge=1)  # pieces; None = as many as fit
    # of those only such as the ranking finds at most so many nats worse than the first; None = all
    margin: _Number | None = Field(default=10.0, ge=0)
    neighbours: _Whole = Field(default=0, ge=0)  # sentences found and shown with each sentence, on either side
    segment_tokens: _Whole = Field(default=256, ge=1)  # of the unit "segment"
    # so many of BM25's best are ranked anew by the model: by how likely the question makes each as its answer; 0 = none
    rerank: _Whole = Field(default=8, ge=0)


class RecitationConfig(_Branch):
    """What the model says by heart for `answering.context=recite`; what of it is shown is chosen as `retrieval` says."""

    beams: _Whole = Field(default=16, ge=1)  # answers that are begun, the likeliest by a beam search
    # so many ways of asking for what the question names in the extractive writer's words, three more answers each
    rewordings: _Whole = Field(default=0, ge=0)
    beginning_tokens: _Whole = Field(default=6, ge=1)  # of each; the rest is greedy
    rest_tokens: _Whole = Field(default=64, ge=1)


class AnsweringConfig(_Branch):
    """How questions are answered. temperature 0 = greedy."""

    context: ContextPolicy = "retrieve"
    # how much of the adapter acts where text of the document is in the window: with all of it the model recites
    strength_with_text: _Number = Field(default=0.5, ge=0, le=1)
    max_new_tokens: _Whole = Field(default=64, ge=1)
    temperature: _Number = Field(default=0.0, ge=0)
    top_p: _Number = Field(default=1.0, gt=0, le=1)
    top_k: _Whole = Field(default=0, ge=0)  # 0 = off
    batch_tokens: _Whole = Field(
        default=8192, ge=1
    )  # prompts and answers written together; a common beginning counts once
    retrieval: RetrievalConfig = RetrievalConfig()
    recitation: RecitationConfig = RecitationConfig()


_ONLY_HOW = {"base_url", "api_key_variable", "concurrency", "timeout_seconds", "attempts"}  # not what is written
_SAME_AS_AUTO = {("extractive", "mixed"), ("self", "sentence")}  # (tasks.writer, tasks.answers)
_HOW_TASKS_ARE_WRITTEN = {"writer", "per_sentence", "answers", "sentences_together", "requests", "llm"}


class PreSftConfig(_Branch):
    """Fine-tuning over many documents (`lift pre-sft`); how a document is absorbed stands in the other branches."""

    documents_per_step: _Whole = Field(default=4, ge=1)  # whose gradients one step of the outer loop averages
    document_tokens: _Whole = Field(default=4096, ge=64)  # of a document, from a random place; more is left out
    learning_rate: _Number = Field(default=1e-4, gt=0)  # of the outer loop
    tasks: _Whole = Field(default=16, ge=1)  # questions a document is asked after it was absorbed
    reading: _Number = Field(default=0.25, ge=0, le=1)  # share of those that are asked with text in the window
    # --mode meta: how the start is moved, and how far a document is absorbed before it is asked
    algorithm: Literal["fomaml", "reptile"] = "fomaml"
    inner_steps: _Whole = Field(default=4, ge=1)
    inner_learning_rate: _Number = Field(default=7e-4, gt=0)


class LiftConfig(_Branch):
    """The whole tree. `LiftConfig()` is the default recipe."""

    model: ModelConfig = ModelConfig()
    segments: SegmentsConfig = SegmentsConfig()
    tasks: TasksConfig = TasksConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    answering: AnsweringConfig = AnsweringConfig()
    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    pre_sft: PreSftConfig = PreSftConfig()
    seed: _Whole = Field(default=0, ge=0, lt=2**32)  # torch's 64 bits hold it and the number of a step

    @field_validator(
        "model", "segments", "tasks", "adapter", "training", "answering", "pre_sft", "server", "cluster", mode="before"
    )
    @classmethod
    def _empty_group(cls, value: Any) -> Any:
        """A heading with nothing below it, in YAML."""
        return {} if value is None else value

    @model_validator(mode="after")
    def _tasks_go_together(self) -> LiftConfig:
        if self.tasks.writer == "self" and self.tasks.answers in ("short", "mixed"):
            raise ValueError(
                f"tasks.answers={self.tasks.answers} needs the writer extractive or llm: self answers with whole sentences"
            )
        if self.training.total_tokens is not None:
            if self.tasks.writer in ("self", "llm") and not self.tasks.teacher_weight:
                raise ValueError(
                    f"training.total_tokens needs all tasks before training, and tasks.writer is {self.tasks.writer}, which "
                    "writes while it goes on"
                )
            return self
        if self.tasks.writer != "none" and self.tasks.first_epoch >= self.training.epochs:
            raise ValueError(
                f"tasks.first_epoch ({self.tasks.first_epoch}) is not below training.epochs ({self.training.epochs}), so tasks "
                "would never be trained on"
            )
        return self

    def resolved(self, window: int, reserved: int = 0) -> LiftConfig:
        """The config as it will be used with a model of this window (tokens): segments capped, nothing implicit left.

        `reserved` tokens of the window stay free of document text (the tokenizer's own leading token).
        """
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"window": window}),
                "segments": self.segments.within(window - reserved),
            }
        )

    def recipe(self, tasks_given: bool = False) -> dict[str, Any]:
        """The part that decides what an adapter learns: with document and model, the key of a library entry.

        Left out is what only decides where, how safely or in how large pieces the same training runs; with `tasks_given`
        also how tasks are written.
        """
        training = self.training.model_dump(
            mode="json", exclude={"checkpoint_seconds", "gradient_checkpointing", "micro_batch_tokens"}
        )
        if training["total_tokens"] is None:
            del training["total_tokens"]  # recipes from before it was there keep their ids
        else:
            del training["epochs"]
        if not training["drift_weight"]:
            del training["drift_weight"]
        adapter = self.adapter.recipe()
        segments = self.segments.model_dump(mode="json")
        tasks = self.tasks.model_dump(mode="json", exclude={"llm": _ONLY_HOW})
        if self.tasks.writer != "llm":
            del tasks["llm"]
        if self.tasks.answers == "auto" or (self.tasks.writer, self.tasks.answers) in _SAME_AS_AUTO:
            del tasks["answers"]  # recipes from before it was there keep their ids
        if tasks_given:
            tasks = {key: value for key, value in tasks.items() if key not in _HOW_TASKS_ARE_WRITTEN}
        elif self.tasks.writer == "none":
            tasks = {"writer": "none"}
        return {"segments": segments, "tasks": tasks, "adapter": adapter, "training": training, "seed": self.seed}


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), below: Mapping[str, Any] | None = None
) -> LiftConfig:
    """Defaults → YAML file → overrides such as `training.learning_rate=1e-4`.

    below: other defaults for some settings (dotted keys), where neither file nor overrides say anything. Raises ConfigError
    for an unreadable file, an unknown key (with the nearest one), a wrong value or contradictory settings.
    """
    tree: dict[str, Any] = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"'{override}' is not of the form key=value.", "For example: --set training.epochs=2.")
        try:
            value = yaml.safe_load(text)
        except _YAML_ERRORS as error:
            raise ConfigError(
                f"The value of '{override}' is not valid YAML.", "Quote it, for example 'key=\"a: b\"'."
            ) from error
        _put(tree, key.strip(), value)
    for key, value in (below or {}).items():
        if not _is_set(tree, key):
            _put(tree, key, value)
    return parse_config(tree, str(path) if path is not None else "the settings given")


def parse_config(tree: dict[str, Any], origin: str) -> LiftConfig:
    """A LiftConfig from plain data; `origin` names it in messages."""
    try:
        return LiftConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            explain_invalid(error, origin, LiftConfig), "`lift config` prints every setting with its value."
        ) from None


def to_yaml(config: LiftConfig) -> str:
    """The tree as YAML that `load_config` reads back."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


# the parser lets ValueError through for what looks like a date and is none
_YAML_ERRORS = (yaml.YAMLError, ValueError)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"The config file {path} does not exist.", "Check the path given with --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The config file {path} cannot be read: {error}.", "It must be a readable UTF-8 file."
        ) from error
    except _YAML_ERRORS as error:
        raise ConfigError(
            f"The config file {path} is not valid YAML: {' '.join(str(error).split())}.", "Mend it."
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"The config file {path} is not a mapping of settings.", "It should look like `lift config` prints."
        )
    return tree


def _is_set(tree: Mapping[str, Any], key: str) -> bool:
    branch, _, leaf = key.rpartition(".")
    for name in branch.split(".") if branch else []:
        tree = tree.get(name) or {}
        if not isinstance(tree, Mapping):
            return True  # wrong, and explained when it is parsed
    return leaf in tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the branches on the way."""
    *branches, leaf = key.split(".")
    for branch in branches:
        below = tree.get(branch)
        if below is None:
            below = tree[branch] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"'{key}' is not a setting: '{branch}' has no settings below it.", "See `lift config`.")
        tree = below
    tree[leaf] = value
