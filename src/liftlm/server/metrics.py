"""What /metrics tells, in Prometheus's terms. One registry a server, so that several can live in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Numbers only: no text, no ids of documents, no keys."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.queue_length = self._gauge("queue_length", "Questions that wait for a place")
        self.running = self._gauge("running_answers", "Answers being written")
        self.jobs = self._gauge("queued_documents", "Documents that wait to be absorbed")
        self.absorb_speed = self._gauge(
            "absorb_tokens_per_second", "Of the last training step; 0 when nothing is absorbed"
        )
        self.adapter_bytes = self._gauge("adapter_bytes", "Memory of the adapters on the model")
        self.prefix_bytes = self._gauge("prefix_bytes", "Memory of prompts' beginnings")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a question's arrival to its first token", _SECONDS
        )
        self.question_wait = self._histogram(
            "question_wait_seconds", "From a question's arrival to the first work on it", _SECONDS
        )
        waited = "Training steps between a question's arrival and its first token"
        self.steps_waited = self._histogram("training_steps_waited", waited, (0, 1, 2, 5))
        self.step_seconds = self._histogram("training_step_seconds", "Of one training step", _SECONDS)
        piece = "Absorbing between two moments at which it gives way to questions"
        self.piece_seconds = self._histogram("absorbing_piece_seconds", piece, _SECONDS)
        self.answer_speed = self._histogram(
            "answer_tokens_per_second",
            "Of one answer, after its first token",
            (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
        )
        self.batch_rows = self._histogram(
            "batch_rows", "Answers continued together in one step", (1, 2, 4, 8, 16, 32, 64)
        )
        self.answer_tokens = Counter("liftlm_answer_tokens", "Tokens written", registry=self.registry)
        self.absorbed_tokens = Counter("liftlm_absorbed_tokens", "Tokens trained on", registry=self.registry)
        self.cache = Counter(
            "liftlm_cache_lookups",
            "Adapters and beginnings of prompts looked for",
            ["cache", "result"],
            registry=self.registry,
        )
        self.requests = Counter(
            "liftlm_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.errors = Counter("liftlm_errors", "Failures by kind", ["kind"], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"liftlm_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"liftlm_{name}", text, buckets=buckets, registry=self.registry)

    def answered(self, tokens: int, seconds: float) -> None:
        """One answer has ended. seconds: since its first token."""
        self.answer_tokens.inc(tokens)
        if tokens > 1:
            self.answer_speed.observe((tokens - 1) / max(seconds, 1e-6))

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
