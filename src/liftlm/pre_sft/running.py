"""A corpus → a folder that is a model (`--model`) and holds a starting adapter (`--start`). Written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from liftlm.adapters import START_FOLDER, attach_adapter, load_adapter, remove_adapter, use_adapter
from liftlm.config import LiftConfig, ModelConfig
from liftlm.devices import describe_machine, join_processes
from liftlm.errors import ConfigError
from liftlm.models import Model, load_model, quiet_transformers
from liftlm.pre_sft.corpus import Corpus, check_corpus, stream_corpus
from liftlm.pre_sft.gradients import Mode
from liftlm.pre_sft.loop import run_outer_loop
from liftlm.storage import new_folder
from liftlm.training import OnStep, TrainingReport

CARD = "pre-sft.json"
_NAME = "start"
_KINDS = ("lora", "full")  # what can be merged into weights


def pre_sft(
    paths: Sequence[str],
    out: Path,
    config: LiftConfig,
    *,
    mode: Mode = "sft",
    keep_out: Sequence[str] = (),
    model: Model | None = None,
    on_step: OnStep = lambda metrics: None,
    on_corpus: Callable[[Corpus], None] = lambda corpus: None,
) -> TrainingReport:
    """Fine-tunes on every document of `paths` once. Unfinished work lies in OUT.unfinished; the same call continues it.

    keep_out: documents that must not be in the corpus, nor be trained on. model: one that is loaded already.
    Raises CorpusError, ConfigError (OUT exists; another kind of adapter than lora or full; a teacher; a penalty on drifting),
    and what `run_outer_loop` and `load_model` raise.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already.", "Give --out a folder that does not exist yet.")
    if config.adapter.kind not in _KINDS:
        raise ConfigError(
            f"What adapter.kind={config.adapter.kind} learns is no part of a model's weights, which `lift pre-sft` writes.",
            f"Use --set adapter.kind={' or '.join(_KINDS)}.",
        )
    for setting, weight in (
        ("tasks.teacher_weight", config.tasks.teacher_weight),
        ("training.drift_weight", config.training.drift_weight),
    ):
        if weight:
            raise ConfigError(
                f"`lift pre-sft` does not know {setting}, which is {weight:g}.",
                "Leave it out here, and give it when documents are absorbed from the start that this writes.",
            )
    corpus = check_corpus(paths, keep_out)
    on_corpus(corpus)
    loaded = model or load_model(config.model.name, config.model)
    config = loaded.resolve(config)
    work = out.with_name(out.name + ".unfinished")
    attach_adapter(loaded, _NAME, config.adapter, config.seed)
    try:
        report = run_outer_loop(
            loaded,
            _NAME,
            lambda skip: stream_corpus(corpus, skip),
            corpus.documents,
            corpus.fingerprint,
            config,
            mode,
            work,
            on_step,
        )
        together = join_processes(loaded.device)
        if together.is_main_process:
            _write(loaded, out, corpus, config, mode, report, work)
            shutil.rmtree(work, ignore_errors=True)
        together.wait_for_everyone()
        return report
    finally:
        remove_adapter(loaded, _NAME)


def _write(
    model: Model, out: Path, corpus: Corpus, config: LiftConfig, mode: Mode, report: TrainingReport, work: Path
) -> None:
    """The model with what was learnt merged in; for a LoRA also the adapter alone."""
    with new_folder(out, sealed=False) as draft:
        if config.adapter.kind == "lora":
            (draft / START_FOLDER).mkdir()
            with use_adapter(model, None):
                attached = model.adapters[_NAME]
                attached.write(draft / START_FOLDER, attached.tensors())
            _write_merged(model, draft)
        else:
            with use_adapter(model, _NAME), quiet_transformers():
                model.network.save_pretrained(draft)
                model.tokenizer.save_pretrained(draft)
        shutil.copy(work / "metrics.jsonl", draft / "metrics.jsonl")
        card = {
            "mode": mode,
            "base": {"name": model.name, "fingerprint": model.fingerprint},
            "corpus": {
                "documents": corpus.documents,
                "questions": corpus.questions,
                "titles": list(corpus.titles),
                "ids": list(corpus.ids),
            },
            "config": config.model_dump(mode="json"),
            "report": dataclasses.asdict(report),
            "machine": describe_machine(model.device, model.dtype),
        }
        (draft / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_merged(model: Model, draft: Path) -> None:
    """In float32, so that merging does not round; the base model is loaded anew, since merging changes it for good."""
    fresh = load_model(str(model.folder), ModelConfig(device="cpu", dtype="float32"))
    load_adapter(fresh, _NAME, draft / START_FOLDER)
    with use_adapter(fresh, _NAME), quiet_transformers():
        fresh.peft.merge_and_unload(adapter_names=[_NAME]).save_pretrained(draft)
        fresh.tokenizer.save_pretrained(draft)
