"""LIFT, Long Input Fine-Tuning: a short-context language model absorbs a long document and answers from it.

    from liftlm import LiftConfig, absorb, answer, load_document, load_model

    model = load_model()
    adapter = absorb(load_document("book.txt"), model, LiftConfig())
    print(answer(model, adapter, "Who rang the bell?").answer)

Names are imported when they are used, so that `import liftlm` does not load PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liftlm.absorbing import Adapter as Adapter
    from liftlm.absorbing import absorb as absorb
    from liftlm.answering import Answer as Answer
    from liftlm.answering import Conversation as Conversation
    from liftlm.answering import answer as answer
    from liftlm.answering import answer_all as answer_all
    from liftlm.config import LiftConfig as LiftConfig
    from liftlm.config import load_config as load_config
    from liftlm.documents import Document as Document
    from liftlm.documents import load_document as load_document
    from liftlm.errors import LiftError as LiftError
    from liftlm.library import Library as Library
    from liftlm.models import Model as Model
    from liftlm.models import load_model as load_model

__version__ = "0.1.0"

_WHERE = {
    "Adapter": "absorbing",
    "Answer": "answering",
    "Conversation": "answering",
    "Document": "documents",
    "Library": "library",
    "LiftConfig": "config",
    "LiftError": "errors",
    "Model": "models",
    "absorb": "absorbing",
    "answer": "answering",
    "answer_all": "answering",
    "load_config": "config",
    "load_document": "documents",
    "load_model": "models",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'liftlm' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(f"liftlm.{_WHERE[name]}"), name)
    return value
