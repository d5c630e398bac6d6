"""The server: an OpenAI-compatible API over one engine."""

import asyncio
import json
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..evaluation.prompts import Prompt
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, did_you_mean, resolve_settings
from .answers import check_settings
from .arguments import ServeArguments
from .engine import Closed, Delta, Done, Engine, Failed, Job, QueueFull
from .errors import ApiError, error_response, read_validation_error
from .limits import Gate
from .metrics import CountRequests, Metrics
from .prompts import encode_messages, encode_question_or_ids
from .replies import ChatReply, CompletionReply, Reply
from .schemas import ChatRequest, CompletionRequest, GenerationRequest

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
CLOSED_REQUEST = 499  # never sent: the client has hung up


class Service:
    """What the endpoints share: the model, its engine, and how a request becomes jobs.

    Args:
        settings: generation settings of a request that gives none.
    """

    def __init__(
        self,
        model: HierBD3LMForBlockDiffusion,
        tokenizer: PreTrainedTokenizerBase,
        settings: HierBD3LMGenerationConfig,
        args: ServeArguments,
    ):
        self.model, self.tokenizer, self.settings, self.args = model, tokenizer, settings, args
        self.metrics, self.created = Metrics(), int(time.time())
        self.engine = Engine(model, tokenizer, args.batch_size, args.max_queue, self.metrics.observe_batch)
        self.metrics.watch(self.engine)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer `POST /v1/chat/completions`."""
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        prompt = await self._encode("messages", encode_messages, messages, body.plan)
        reply = ChatReply(self.args.served_name, body.plan is not None)
        return await self._respond(body, request, [prompt], reply)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer `POST /v1/completions`."""
        prompts = [await self._encode("prompt", encode_question_or_ids, one, body.plan) for one in body.prompts]
        if not prompts:
            raise ApiError(400, "`prompt` must have at least one question, but has none", "prompt")
        reply = CompletionReply(self.args.served_name, body.plan is not None)
        return await self._respond(body, request, prompts, reply)

    def describe(self) -> dict[str, Any]:
        """Return the entry of `/v1/models`."""
        config = self.model.config
        lengths = {name: getattr(config, name) for name in ("question_len", "plan_len", "execution_len")}
        owner = {"object": "model", "created": self.created, "owned_by": "hierbd3lm"}
        return {"id": self.args.served_name} | owner | lengths

    async def _encode(self, param: str, encode: Any, *args: Any) -> Prompt:
        """Encode in another thread: a text of the largest size takes a while."""
        try:
            return await run_in_threadpool(encode, *args, self.tokenizer, self.model.config)
        except ValueError as error:
            code = "context_length_exceeded" if "must have at most" in str(error) else None
            raise ApiError(400, str(error), param, code) from error

    def _read_settings(self, body: GenerationRequest, plan_ids: list[int] | None) -> HierBD3LMGenerationConfig:
        if body.model not in (None, self.args.served_name):
            nearest = did_you_mean(body.model, [self.args.served_name])
            message = f"`model` must be {self.args.served_name!r}, but got {body.model!r:.80}{nearest}"
            raise ApiError(404, message, "model", "model_not_found")
        try:
            settings = resolve_settings(self.settings, body.settings())
            check_settings(self.model, settings, plan_ids)
        except ValueError as error:
            raise ApiError(400, str(error), str(error).split("`")[1] if "`" in str(error) else None) from error
        return settings

    async def _respond(
        self, body: GenerationRequest, request: Request, prompts: Sequence[Prompt], reply: Reply
    ) -> Response:
        settings, events = self._read_settings(body, prompts[0].plan_ids), Events()
        jobs = [Job(prompt, settings, events.of(number), bool(body.stream)) for number, prompt in enumerate(prompts)]
        if len(jobs) > self.args.max_queue:
            message = f"`prompt` must have at most {self.args.max_queue} questions, but got {len(jobs)}"
            raise ApiError(400, message, "prompt")
        try:
            self.engine.submit(jobs)
        except QueueFull:
            raise ApiError(429, f"the queue is full: {self.args.max_queue} questions wait already") from None
        except Closed:
            raise ApiError(503, "the server is shutting down") from None
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(self._stream(jobs, events, reply, wants_usage), media_type="text/event-stream")
        return await self._wait(jobs, events, reply, request)

    async def _wait(self, jobs: list[Job], events: "Events", reply: Reply, request: Request) -> Response:
        """Return the whole answers; give up when the client hangs up or the time is over."""
        answering = asyncio.create_task(self._collect(len(jobs), events))
        hanging_up = asyncio.create_task(wait_for_hang_up(request))
        try:
            await asyncio.wait({answering, hanging_up}, timeout=self.args.timeout, return_when=FIRST_COMPLETED)
            if answering.done():
                return JSONResponse(reply.whole(answering.result()))
            if hanging_up.done():
                self.metrics.cancelled.inc()
                return Response(status_code=CLOSED_REQUEST)
            raise self._out_of_time()
        finally:
            answering.cancel()
            hanging_up.cancel()
            cancel(jobs)

    async def _collect(self, number_of_jobs: int, events: "Events") -> list[dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < number_of_jobs:
            number, event = await events.get()
            answers[number] = self._read_end(event)
        return [answers[number] for number in range(number_of_jobs)]

    async def _stream(self, jobs: list[Job], events: "Events", reply: Reply, wants_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events: what the segments gain, the ends, the usage, and `[DONE]`."""
        answers: list[dict[str, Any] | None] = [None] * len(jobs)
        deadline = anyio.current_time() + self.args.timeout
        try:
            for number in range(len(jobs)):
                if (first := reply.first(number)) is not None:
                    yield to_event(first)
            while None in answers:
                with anyio.fail_after(deadline - anyio.current_time()):
                    number, event = await events.get()
                if isinstance(event, Delta):
                    if (chunk := reply.delta(number, event)) is not None:
                        yield to_event(chunk)
                else:
                    answers[number] = self._read_end(event)
                    yield to_event(reply.last(number, answers[number]))
            if wants_usage:
                yield to_event(reply.usage(answers))
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield to_event(self._out_of_time().body())
        except ApiError as error:  # the status is sent already
            yield to_event(error.body())
        except asyncio.CancelledError:
            self.metrics.cancelled.inc()
            raise
        finally:
            cancel(jobs)

    def _read_end(self, event: Done | Failed) -> dict[str, Any]:
        if isinstance(event, Failed):
            raise ApiError(500, event.message)
        self.metrics.observe_answer(event.answer)
        return event.answer

    def _out_of_time(self) -> ApiError:
        return ApiError(504, f"the answer took more than {self.args.timeout:g} seconds", code="timeout")


class Events:
    """What the engine reports, brought from its thread to the event loop, with the number of the job."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta | Done | Failed]] = asyncio.Queue()
        self.get = self._queue.get

    def of(self, number: int) -> Any:
        """Return the function that takes the reports of one job."""

        def report(event: Delta | Done | Failed) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        return report


async def wait_for_hang_up(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def cancel(jobs: Sequence[Job]) -> None:
    """Tell the engine that nobody waits for jobs; those that are done stay as they are."""
    for job in jobs:
        job.cancelled = True


def to_event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def make_app(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    settings: HierBD3LMGenerationConfig,
    args: ServeArguments,
) -> FastAPI:
    """Return the application; its engine runs from the start to the end of its lifespan."""
    service = Service(model, tokenizer, settings, args)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.close)

    # the pages at /docs and /redoc would load scripts from elsewhere
    app = FastAPI(title="hierbd3lm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    # the last one added is the first one asked
    app.add_middleware(Gate, api_key=args.api_key, max_body_bytes=args.max_body_bytes, body_timeout=args.body_timeout)
    app.add_middleware(CountRequests, metrics=service.metrics, paths=PATHS)
    add_error_handlers(app)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        if name != args.served_name:
            raise ApiError(404, f"there is no model {name!r:.80}", "model", "model_not_found")
        return service.describe()

    @app.get("/health")
    async def health() -> Response:
        if service.engine.is_ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def add_error_handlers(app: FastAPI) -> None:
    """Have all errors told in the form of OpenAI's API."""
    bodies = {PATHS[0]: ChatRequest, PATHS[1]: CompletionRequest}

    @app.exception_handler(ApiError)
    async def tell(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def tell_fault(request: Request, error: RequestValidationError) -> Response:
        kind = bodies.get(request.url.path)
        return error_response(read_validation_error(error, tuple(kind.model_fields) if kind else ()))

    @app.exception_handler(HTTPException)
    async def tell_status(request: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, f"{request.method} {request.url.path:.80}: {error.detail}"))

    @app.exception_handler(Exception)
    async def tell_failure(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "the server failed; its log says where"))
