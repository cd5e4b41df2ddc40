"""The settings of `lift serve`: how much is done at once, how much is kept in memory, what a client may ask for.

Part of the one tree (`config.LiftConfig.server`), in a file of its own. Nothing here decides what an adapter learns.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

_Whole = Annotated[int, Strict()]


class ServerConfig(BaseModel):
    """Limits and shares of a server."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    # --- answering
    batch_rows: _Whole = Field(default=16, ge=1)  # texts continued at once
    batch_tokens: _Whole = Field(default=32768, ge=1)  # prompt and answer tokens of those together (one text always)
    prefill_tokens: _Whole = Field(default=256, ge=1)  # of a prompt, before running answers go on
    queue_length: _Whole = Field(default=256, ge=1)  # questions that may wait; more get status 429
    # while a document is absorbed: the share of the time that goes to answering, if there are questions without end
    answering_share: float = Field(default=0.75, ge=0, lt=1)
    # --- memory
    adapter_megabytes: _Whole = Field(default=2048, ge=0)  # of adapters kept on the model (one always)
    prefix_megabytes: _Whole = Field(default=1024, ge=0)  # of prompts' beginnings kept computed
    # --- what one key may do
    requests_per_minute: _Whole = Field(default=1200, ge=1)
    uploads_per_hour: _Whole = Field(default=120, ge=1)
    documents_per_key: _Whole = Field(default=1000, ge=1)
    # --- documents
    upload_megabytes: _Whole = Field(default=50, ge=1)
    request_kilobytes: _Whole = Field(default=1024, ge=1)  # of a body that is not an upload
    document_tokens: _Whole = Field(default=500_000, ge=2)
    document_pages: _Whole = Field(default=3000, ge=1)  # of a PDF
    document_epochs: _Whole = Field(default=20, ge=1)  # what a client may set training.epochs to
    reading_seconds: _Whole = Field(default=60, ge=1)  # for converting a file to text
    reading_megabytes: _Whole = Field(default=2048, ge=256)  # of memory for that
