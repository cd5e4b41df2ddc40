"""Arms that are settings by name, read from YAML, and what an arm's adapter costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from liftlm.adapters import use_adapter
from liftlm.config import LiftConfig
from liftlm.diagnosing import UNRELATED
from liftlm.errors import ConfigError
from liftlm.evaluation.benchmark import Item
from liftlm.models import Model
from liftlm.studies.baseline import with_control
from liftlm.studies.bench import Bench, domain_of, with_settings
from liftlm.studies.questions import with_needles
from liftlm.studies.study import Arm, Options, Row, Study

COSTS = ("adapter_megabytes", "absorb_seconds", "training_tokens", "unrelated_rise")
_LIKE_THIS = 'Write for each arm: name: {"adapter.rank": 8}.'


class NamedArmsStudy(Study):
    """A study whose arms are settings by name, from a file; asked with needles hidden in the documents too."""

    own_arms: ClassVar[str]  # the program's own file, beside this module
    methods: ClassVar[tuple[str, ...]]

    def prepare(self, item: Item, config: LiftConfig, options: Options) -> Item:
        self.named_arms(options)  # what is wrong with them is said now, not after hours
        return with_needles(item, 1 if options.quick else 3)

    def named_arms(self, options: Options) -> dict[str, dict[str, Any]]:
        return read_arms(options.arms, self.own_arms)

    def arms(self, bench: Bench, item: Item, seed: int) -> Iterator[Arm]:
        methods = with_control(bench, item, self.methods)
        for number, (name, settings) in enumerate(self.named_arms(bench.options).items()):
            if not (bench.options.quick and bench.options.arms is None and number > 1):
                yield Arm(name, methods, settings)


def read_arms(path: Path | None, own: str) -> dict[str, dict[str, Any]]:
    """Name → settings, of a YAML file or the program's own, which lies beside this module. Raises ConfigError."""
    try:
        text = (
            (resources.files("liftlm.studies") / own).read_text(encoding="utf-8")
            if path is None
            else path.read_text(encoding="utf-8")
        )
        arms = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"The arms in {path} cannot be read: {' '.join(str(error).split())}.", _LIKE_THIS) from error
    if not isinstance(arms, dict) or not arms or not all(isinstance(each, dict | None) for each in arms.values()):
        raise ConfigError(f"{path} is not a mapping of names to settings.", _LIKE_THIS)
    found = {str(name): dict(settings or {}) for name, settings in arms.items()}
    for name, settings in found.items():
        if "seed" in settings:
            raise ConfigError(f"The arm '{name}' sets a seed.", "Seeds are given with --seeds, for all arms.")
        with_settings(LiftConfig(), settings)
    return found


def costs_of(bench: Bench, arm: Arm, seed: int, index: int) -> Row:
    """Of the arm's adapter: its size, what absorbing took (tasks and teacher included), and what it does to unrelated text."""
    began = time.monotonic()
    item = bench.items[index]
    with bench.absorbed(arm, seed, index) as adapter:
        whole = time.monotonic() - began
        stored = bench.library.path / adapter.id / "adapter"
        size = sum(path.stat().st_size for path in stored.iterdir())
        before, after = _unrelated(bench.model, None), _unrelated(bench.model, adapter.id)
        return {
            "title": item.document.title,
            "domain": domain_of(item),
            "unit": f"seed {seed}",
            "adapter_megabytes": size / 1e6,
            "absorb_seconds": adapter.report.seconds,
            "whole_seconds": whole,
            "training_tokens": adapter.report.tokens,
            "unrelated_rise": after / before - 1,
        }


@torch.inference_mode()
def _unrelated(model: Model, adapter: str | None) -> float:
    ids = torch.tensor([model.encode(UNRELATED)[: model.window]], device=model.device)
    with use_adapter(model, adapter):
        return float(model.loss_sum(ids, ids))
