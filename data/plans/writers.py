"""Writers, which send requests to a language model in this process or on a server."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from ..arguments import check_at_least


@dataclass(frozen=True)
class PlanRequest:
    """A request to the model.

    Args:
        index, sample: row of the problem and number of the sample; they identify the reply.
        messages: the messages of the prompt.
        schema: the JSON schema of the reply.
        seed: random seed of the sampling, in [0, 2^31).
    """

    index: int
    sample: int
    messages: list[dict[str, str]]
    schema: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class PlanReply:
    """A reply of the model.

    Args:
        index, sample: those of the request.
        text: the unprocessed reply.
        is_cut_off: whether the reply reached the maximum number of tokens.
        refusal: the server's error if it refused the request permanently; None for a reply.
    """

    index: int
    sample: int
    text: str
    is_cut_off: bool
    refusal: str | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """Settings for sampling a reply.

    Args:
        temperature: sampling temperature; 0 for greedy decoding.
        top_p: cumulative probability for nucleus sampling.
        max_tokens: maximum number of tokens of a reply.
        structured_output: constrain decoding to the schema of the request.

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
        check_at_least("max_tokens", self.max_tokens, 1)


class PlanWriter(Protocol):
    """Interface of the writers."""

    def write(self, requests: Iterable[PlanRequest]) -> AsyncIterator[PlanReply]:
        """Yield a reply for each request as soon as it arrives, in any order."""


class VllmWriter:
    """Writer that runs a model in this process with `vllm.LLM`.

    Args:
        model: folder or Hub id of a checkpoint with a chat template.
        sampling: sampling settings.
        batch_size: number of requests per call of vllm; their replies arrive together.
        max_model_len: maximum number of tokens of a request and its reply; determines the reserved memory.
        tensor_parallel_size: number of GPUs for tensor parallelism.

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
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ImportError(
                "Writing plans in this process needs vllm. Its requirements differ from those of this package: run "
                "`vllm serve MODEL` in an environment of its own, and give `--base_url http://localhost:8000/v1`"
            ) from error
        # On a CPU vllm ends with an error where a request with a seed is read in several passes.
        settings = {"enable_chunked_prefill": False} if current_platform.is_cpu() else {}
        self.llm = LLM(model=model, max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size, **settings)
        self.sampling = sampling
        self.batch_size = batch_size

    async def write(self, requests: Iterable[PlanRequest]) -> AsyncIterator[PlanReply]:
        """See [`PlanWriter`]."""
        requests = iter(requests)
        while batch := list(islice(requests, self.batch_size)):
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
    """Writer that uses an OpenAI-compatible server.

    A failed request (connection error, timeout, status 408, 409, 429, 500 and above) is retried with exponential
    backoff of at most 8 seconds, or after the time that the server requests. The API key is read from
    `OPENAI_API_KEY`.

    Args:
        base_url: URL of the API, such as `http://localhost:8000/v1`.
        model: name of the model on the server.
        sampling: sampling settings. A server without support for schemas may ignore the schema.
        concurrency: maximum number of concurrent requests.
        timeout: timeout of a request in seconds.
        max_retries: maximum number of retries of a request.

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
            raise ImportError("Writing plans with a server needs openai: `pip install openai`") from error
        self.refusals = (openai.BadRequestError, openai.UnprocessableEntityError)
        self.client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # most local servers need no key
            timeout=timeout,
            max_retries=max_retries,
        )
        self.model = model
        self.sampling = sampling
        self.concurrency = concurrency

    async def write(self, requests: Iterable[PlanRequest]) -> AsyncIterator[PlanReply]:
        """See [`PlanWriter`]. If a request fails after all retries, replies that have arrived are yielded first.

        Raises:
            openai.OpenAIError: if a request fails after all retries and was not refused.
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
        text = (choice.message.content or "").encode(errors="replace").decode()  # lone surrogates cannot be encoded
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
