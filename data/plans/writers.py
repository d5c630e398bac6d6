"""Language models that write plans, in this process or on a server."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from ..arguments import check_at_least

Item = TypeVar("Item")


@dataclass(frozen=True)
class PlanRequest:
    """One question to the model.

    Args:
        index, sample: row of the problem, and number of the sample for it; they tell the replies apart.
        messages: the conversation that the model goes on with.
        schema: the JSON schema of what it may write.
        seed: of its random draws, in [0, 2^31).
    """

    index: int
    sample: int
    messages: list[dict[str, str]]
    schema: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class PlanReply:
    """What the model has written.

    Args:
        index, sample: those of the request.
        text: the reply as it is.
        is_cut_off: whether it has reached the greatest number of tokens.
        refusal: why the server does not answer this request, however often it is asked; None for a reply.
    """

    index: int
    sample: int
    text: str
    is_cut_off: bool
    refusal: str | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """How a reply is drawn.

    Args:
        temperature, top_p: of the tokens' distribution; temperature 0 is greedy.
        max_tokens: most tokens of a reply.
        structured_output: whether decoding is held to the request's schema.

    Raises:
        ValueError: for a value out of its range.
    """

    temperature: float
    top_p: float
    max_tokens: int
    structured_output: bool

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"`temperature` must be at least 0, but got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], but got {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, but got {self.max_tokens}")


class PlanWriter(Protocol):
    """A language model."""

    def write(self, requests: Iterable[PlanRequest]) -> AsyncIterator[PlanReply]:
        """Yields a reply for each request, in any order, as soon as it is there."""


class VllmWriter:
    """A model in this process, run by `vllm.LLM`.

    Args:
        model: folder or id of a checkpoint with a chat template.
        sampling: how replies are drawn.
        batch_size: requests that are handed over at once; their replies come at once.
        max_model_len: most tokens of a request and its reply; decides how much memory is set aside.
        tensor_parallel_size: GPUs that share the model.

    Raises:
        ImportError: if vllm is not installed.
    """

    def __init__(
        self,
        model: str,
        sampling: SamplingSettings,
        batch_size: int = 1024,
        max_model_len: int = 4096,
        tensor_parallel_size: int = 1,
    ):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                'writing plans in this process needs vllm: run `pip install -e ".[plans]"`, or give `--base_url`'
            ) from error
        self.llm = LLM(model=model, max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size)
        self.sampling = sampling
        self.batch_size = batch_size

    async def write(self, requests: Iterable[PlanRequest]) -> AsyncIterator[PlanReply]:
        """See [`PlanWriter`]."""
        for batch in _batches(requests, self.batch_size):
            outputs = self.llm.chat(
                [request.messages for request in batch], [self._sampling_of(request) for request in batch]
            )
            for request, output in zip(batch, outputs, strict=True):
                reply = output.outputs[0]
                yield PlanReply(request.index, request.sample, reply.text, reply.finish_reason == "length")

    def _sampling_of(self, request: PlanRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        return SamplingParams(
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            seed=request.seed,
            structured_outputs=(
                StructuredOutputsParams(json=request.schema) if self.sampling.structured_output else None
            ),
        )


class ServerWriter:
    """A model behind an OpenAI-compatible server.

    A request that fails (no connection, no answer in time, 408, 409, 429, 500 and above) is sent again after a while
    that doubles each time up to 8 seconds, or that the server asks for. A key is read from `OPENAI_API_KEY`.

    Args:
        base_url: where the server's API is, such as `http://localhost:8000/v1`.
        model: the model's name there.
        sampling: how replies are drawn. A server that knows no schemas may ignore them.
        concurrency: requests that are under way at once.
        timeout: seconds that an answer may take.
        max_retries: times that a request is sent again.

    Raises:
        ValueError: for a value out of its range.
        ImportError: if openai is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        sampling: SamplingSettings,
        concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 10,
    ):
        for name, value, low in (("concurrency", concurrency, 1), ("max_retries", max_retries, 0)):
            check_at_least(name, value, low)
        if not timeout > 0:
            raise ValueError(f"`timeout` must be more than 0 seconds, but got {timeout}")
        try:
            import openai
        except ImportError as error:
            raise ImportError('writing plans on a server needs openai: run `pip install -e ".[plans]"`') from error
        self.refusals = (openai.BadRequestError, openai.UnprocessableEntityError)
        self.client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # most servers of one's own ask for none
            timeout=timeout,
            max_retries=max_retries,
        )
        self.model = model
        self.sampling = sampling
        self.concurrency = concurrency

    async def write(self, requests: Iterable[PlanRequest]) -> AsyncIterator[PlanReply]:
        """See [`PlanWriter`]. Replies that are there when a request fails for good are yielded before its error.

        Raises:
            openai.OpenAIError: if a request fails for good, other than by a refusal.
        """
        waiting = iter(requests)
        under_way = self._ask_all(islice(waiting, self.concurrency))
        try:
            while under_way:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                under_way |= self._ask_all(islice(waiting, len(done)))
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    yield task.result()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def _ask_all(self, requests: Iterable[PlanRequest]) -> set[asyncio.Task[PlanReply]]:
        return {asyncio.create_task(self._ask(request)) for request in requests}

    async def _ask(self, request: PlanRequest) -> PlanReply:
        try:
            completion = await self.client.chat.completions.create(**self._parameters(request))
        except self.refusals as error:
            return PlanReply(request.index, request.sample, "", is_cut_off=False, refusal=str(error))
        choice = completion.choices[0]
        text = (choice.message.content or "").encode(errors="replace").decode()  # half a character cannot be written
        return PlanReply(request.index, request.sample, text, choice.finish_reason == "length")

    def _parameters(self, request: PlanRequest) -> dict[str, Any]:
        parameters = {
            "model": self.model,
            "messages": request.messages,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_completion_tokens": self.sampling.max_tokens,
            "seed": request.seed,
        }
        if self.sampling.structured_output:
            json_schema = {"name": "plan", "schema": request.schema, "strict": True}
            parameters["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return parameters


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
