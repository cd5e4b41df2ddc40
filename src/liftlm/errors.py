"""Every failure a user can cause or meet, as one small class each.

An error says what happened and what to do next, in words; it carries the exit code of the command line and the HTTP
status of the server. It knows nothing about either: they only read the two numbers. Codes are listed in docs/errors.md,
which a test compares with this file.
"""

from __future__ import annotations


class LiftError(Exception):
    """Base of all expected failures.

    message: one sentence, names the cause. next_step: one sentence, what the user can do.
    """

    exit_code: int = 1
    http_status: int = 500

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()


# --- settings ---------------------------------------------------------------------------------------------------------


class ConfigError(LiftError):
    """Unknown key, wrong type, or settings that contradict each other."""

    exit_code, http_status = 2, 422


# --- documents --------------------------------------------------------------------------------------------------------


class DocumentNotFoundError(LiftError):
    """The path does not exist, or is a folder."""

    exit_code, http_status = 10, 404


class EmptyDocumentError(LiftError):
    """No text in it: empty, only white space, or a scan without a text layer."""

    exit_code, http_status = 11, 422


class BinaryDocumentError(LiftError):
    """The bytes are not text, and not of a format that can be converted."""

    exit_code, http_status = 12, 415


class UnreadableDocumentError(LiftError):
    """Permission denied, an input/output error, or a damaged file of a known format."""

    exit_code, http_status = 13, 422


class EncryptedDocumentError(LiftError):
    """A document that needs a password."""

    exit_code, http_status = 14, 422


class UnknownFormatError(LiftError):
    """A format the program knows it cannot convert (audio, images, archives …)."""

    exit_code, http_status = 15, 415


# --- questions --------------------------------------------------------------------------------------------------------


class QuestionTooLongError(LiftError):
    """The prompt without any document text does not fit the window."""

    exit_code, http_status = 16, 413


class QuestionsFileError(LiftError):
    """A file of questions that is missing, or has a row that is not `{"question": …}`."""

    exit_code, http_status = 17, 422


class TasksFileError(LiftError):
    """A file of tasks that is missing, or has a row that is not a question and an answer about the document."""

    exit_code, http_status = 18, 422


class BenchmarkDataError(LiftError):
    """A benchmark's data is missing, cannot be reached, or is not of its format."""

    exit_code, http_status = 19, 422


# --- models -----------------------------------------------------------------------------------------------------------


class UnknownModelError(LiftError):
    """Neither a folder, nor a model on the hub, nor a built-in name; or not a causal language model."""

    exit_code, http_status = 20, 404


class ModelWeightsMissingError(LiftError):
    """A model folder without (safetensors) weights, or with damaged ones."""

    exit_code, http_status = 21, 422


class HubUnreachableError(LiftError):
    """The model is not on this machine, and the place to fetch it from cannot be reached."""

    exit_code, http_status = 22, 503


class ChecksumError(LiftError):
    """A fetched file is not the one that was expected."""

    exit_code, http_status = 23, 502


class WriterUnreachableError(LiftError):
    """The server that writes tasks cannot be reached, refuses the key or the model, or stopped answering."""

    exit_code, http_status = 24, 502


class JudgeUnreachableError(LiftError):
    """The server that judges answers cannot be reached, refuses the key or the model, or stopped answering."""

    exit_code, http_status = 25, 502


class CorpusError(LiftError):
    """A corpus for pre-LIFT fine-tuning that is missing, empty or bad, or holds a document that is to be kept out."""

    exit_code, http_status = 26, 422


# --- machine ----------------------------------------------------------------------------------------------------------


class DiskFullError(LiftError):
    """No space left while writing; nothing half-written stays."""

    exit_code, http_status = 30, 507


class NoWritePermissionError(LiftError):
    """A folder that must be written to cannot be."""

    exit_code, http_status = 31, 500


class NotEnoughMemoryError(LiftError):
    """Predicted before the work starts, or met while it ran."""

    exit_code, http_status = 32, 507


class DeviceError(LiftError):
    """A device or number format was asked for that this machine does not have."""

    exit_code, http_status = 33, 422


class TrainingDivergedError(LiftError):
    """The loss or the gradient is not a finite number any more."""

    exit_code, http_status = 34, 500


# --- library ----------------------------------------------------------------------------------------------------------


class LibraryBusyError(LiftError):
    """Another process is absorbing the same document."""

    exit_code, http_status = 40, 409


class DamagedEntryError(LiftError):
    """A library entry whose files do not match their checksums, or are not all there."""

    exit_code, http_status = 41, 500


class EntryNotFoundError(LiftError):
    """No entry, or several, with that id."""

    exit_code, http_status = 42, 404


class StoreError(LiftError):
    """An object store or other file system that does not answer, does not let us in, or lacks the bucket."""

    exit_code, http_status = 43, 503


# --- server -----------------------------------------------------------------------------------------------------------


class InvalidRequestError(LiftError):
    """A request that is malformed, or asks for something that is not implemented.

    parameter: the part of the request that is meant. code: OpenAI's word for the case.
    """

    exit_code, http_status = 50, 400

    def __init__(self, message: str, next_step: str = "", *, parameter: str | None = None, code: str = "invalid_value"):
        super().__init__(message, next_step)
        self.parameter, self.code = parameter, code


class NotAuthorizedError(LiftError):
    """No bearer key, or not one that this server knows."""

    exit_code, http_status = 51, 401


class NotAllowedError(LiftError):
    """A request from a web page of another site, or under a name that is not this server's."""

    exit_code, http_status = 52, 403


class TooLargeError(LiftError):
    """A body, a document or a number of documents over a limit of the server."""

    exit_code, http_status = 53, 413


class ServerBusyError(LiftError):
    """The queue is full, or a rate limit is reached. retry_after: seconds."""

    exit_code, http_status = 54, 429

    def __init__(self, message: str, next_step: str = "", *, retry_after: int = 1) -> None:
        super().__init__(message, next_step)
        self.retry_after = retry_after


class NotReadyError(LiftError):
    """The model is still being loaded, the document is not absorbed yet, or the server is stopping."""

    exit_code, http_status = 55, 503


class WrongStateError(LiftError):
    """Something that the document's state does not allow."""

    exit_code, http_status = 56, 409


class AddressError(LiftError):
    """The server cannot listen there: taken, not this machine's, or open to others without a key."""

    exit_code, http_status = 57, 500


# --- clusters ---------------------------------------------------------------------------------------------------------


class ClusterError(LiftError):
    """No Ray cluster at that address, not enough of it free, or all its workers lost."""

    exit_code, http_status = 60, 503


class DocumentsFailedError(LiftError):
    """Of many documents some could not be absorbed; the others are."""

    exit_code, http_status = 61, 500


# --- stopping ---------------------------------------------------------------------------------------------------------


class InterruptedWorkError(LiftError):
    """Ctrl-C: what was done is saved."""

    exit_code, http_status = 130, 503


class TerminatedWorkError(InterruptedWorkError):
    """SIGTERM: what was done is saved."""

    exit_code, http_status = 143, 503

    def __init__(
        self, message: str = "Stopped by SIGTERM.", next_step: str = "The same command continues where it can."
    ) -> None:
        super().__init__(message, next_step)
