"""Metrics of the server, for Prometheus."""

import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Engine, Job

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def make(kind: Any, name: str, text: str, labels: Sequence[str] = (), **others: Any) -> Any:
            return kind(f"hierbd3lm_{name}", text, labels, registry=self.registry, **others)

        endpoint = ("endpoint", "status")
        self.requests = make(Counter, "requests_total", "Requests, by path and HTTP status.", endpoint)
        self.seconds = make(Histogram, "request_seconds", "Seconds of a request.", ("endpoint",), buckets=SECONDS)
        self.tokens = make(Counter, "tokens_total", "Tokens of answered requests, by segment.", ("segment",))
        self.passes = make(Counter, "forward_passes_total", "Forward passes (NFE), summed over answers.")
        self.cancelled = make(Counter, "cancelled_total", "Requests whose client has hung up.")
        self.batch_rows = make(Histogram, "batch_rows", "Rows of a batch.", buckets=ROWS)
        self._make = make

    def observe_batch(self, batch: Sequence[Job]) -> None:
        """Count a batch."""
        self.batch_rows.observe(len(batch))

    def observe_answer(self, answer: dict[str, Any]) -> None:
        """Count the tokens and forward passes of an answer."""
        for segment in ("question", "plan", "execution"):
            self.tokens.labels(segment).inc(answer[f"num_{segment}_tokens"])
        self.passes.inc(answer["num_forward_passes"])

    def watch(self, engine: Engine) -> None:
        """Show how much the engine has to do."""
        self._make(Gauge, "waiting", "Prompts in the queue.").set_function(lambda: engine.num_waiting)
        self._make(Gauge, "running", "Prompts of the batch that runs.").set_function(lambda: len(engine.running))

    def text(self) -> bytes:
        """Return all values in the format of Prometheus."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware that counts requests and measures their seconds.

    Args:
        paths: paths that are told apart; the others are `other`, as anybody could make up any number of them.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, has_started = time.perf_counter(), False
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def send_and_count(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                self.metrics.requests.labels(path, message["status"]).inc()  # before the client can ask for it
            await send(message)

        try:
            await self.app(scope, receive, send_and_count)
        finally:
            if not has_started:  # the client has hung up before: 499, as nginx says
                self.metrics.requests.labels(path, 499).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
