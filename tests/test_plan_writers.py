"""Every request is answered once, whichever the back end and whatever goes wrong on the way."""

import asyncio
import importlib.util
import sys
import threading
from collections import Counter
from itertools import chain
from types import ModuleType, SimpleNamespace

import pytest

from hierbd3lm.data.plans.prompt import plan_schema
from hierbd3lm.data.plans.writers import PlanReply, PlanRequest, SamplingSettings, ServerWriter, VllmWriter

from .plan_server import PlanServer

SAMPLING = SamplingSettings(temperature=0.7, top_p=0.9, max_tokens=64, structured_output=True)
needs_openai = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")


def make_requests(count):
    return [
        PlanRequest(i, i % 3, [{"role": "user", "content": f"problem {i}"}], plan_schema(1 + i % 2), seed=100 + i)
        for i in range(count)
    ]


def collect(writer, requests):
    async def run():
        return [reply async for reply in writer.write(requests)]

    return asyncio.run(run())


def echo(body):
    return f"{body['messages'][-1]['content']}, seed {body['seed']}"


def expected(requests):
    return [PlanReply(r.index, r.sample, f"problem {r.index}, seed {r.seed}", is_cut_off=False) for r in requests]


def by_index(replies):
    return sorted(replies, key=lambda reply: reply.index)


# A server


@needs_openai
def test_every_request_gets_its_own_reply():
    with PlanServer(echo) as server:
        replies = collect(ServerWriter(server.url, "some-model", SAMPLING), make_requests(40))
    assert by_index(replies) == expected(make_requests(40))
    assert len(server.bodies) == 40


@needs_openai
@pytest.mark.parametrize("structured_output", [True, False])
def test_request_carries_model_sampling_seed_and_schema(structured_output):
    sampling = SamplingSettings(temperature=0.7, top_p=0.9, max_tokens=64, structured_output=structured_output)
    (request,) = make_requests(1)
    with PlanServer(echo) as server:
        collect(ServerWriter(server.url, "some-model", sampling), [request])
    (body,) = server.bodies
    response_format = body.pop("response_format", None)
    assert body == {
        "path": "/v1/chat/completions",
        "model": "some-model",
        "messages": request.messages,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_completion_tokens": 64,
        "seed": request.seed,
    }
    assert (response_format is not None) == structured_output
    if structured_output:
        assert response_format["type"] == "json_schema"
        assert response_format["json_schema"]["schema"] == request.schema


@needs_openai
def test_as_many_requests_are_under_way_as_the_concurrency_says():
    together = threading.Barrier(4)  # breaks, and with it the test, unless four requests are there at once

    def reply(body):
        together.wait(timeout=20)
        return echo(body)

    with PlanServer(reply) as server:
        replies = collect(ServerWriter(server.url, "m", SAMPLING, concurrency=4, max_retries=0), make_requests(12))
    assert by_index(replies) == expected(make_requests(12))
    assert server.most_under_way == 4


@needs_openai
def test_requests_are_not_read_ahead_of_what_is_under_way():
    num_read = 0

    def requests():
        nonlocal num_read
        for request in make_requests(20):
            num_read += 1
            yield request

    async def run():
        num_replies = 0
        async for _ in writer.write(requests()):
            num_replies += 1
            assert num_read <= num_replies + 2 + 2  # under way, and done but not yet yielded

    with PlanServer(echo) as server:
        writer = ServerWriter(server.url, "m", SAMPLING, concurrency=2)
        asyncio.run(run())
    assert num_read == 20


@needs_openai
@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_failed_request_is_sent_again(status):
    failures = Counter()

    def reply(body):
        failures[body["seed"]] += 1
        return status if failures[body["seed"]] < 3 else echo(body)

    with PlanServer(reply) as server:
        replies = collect(ServerWriter(server.url, "m", SAMPLING, max_retries=2), make_requests(5))
    assert by_index(replies) == expected(make_requests(5))
    assert set(failures.values()) == {3}


@needs_openai
def test_request_that_takes_too_long_is_sent_again():
    late, times = threading.Event(), Counter()

    def reply(body):
        times[body["seed"]] += 1
        if body["seed"] == 101 and times[101] == 1:
            late.wait(timeout=20)
        return echo(body)

    with PlanServer(reply) as server:
        replies = collect(ServerWriter(server.url, "m", SAMPLING, timeout=0.5, max_retries=1), make_requests(3))
        late.set()
    assert by_index(replies) == expected(make_requests(3))
    assert times == {100: 1, 101: 2, 102: 1}


@needs_openai
def test_replies_that_are_there_are_yielded_before_a_failure_for_good(monkeypatch):
    async def ask(request):  # all are done in the same moment
        if request.index == 1:
            raise ConnectionError
        return expected([request])[0]

    async def run():
        async for reply in writer.write(make_requests(3)):
            got.append(reply)

    got, writer = [], ServerWriter("http://127.0.0.1:1/v1", "m", SAMPLING)
    monkeypatch.setattr(writer, "_ask", ask)
    with pytest.raises(ConnectionError):
        asyncio.run(run())
    assert by_index(got) == [reply for reply in expected(make_requests(3)) if reply.index != 1]


@needs_openai
def test_request_that_fails_for_good_ends_with_its_error():
    openai = pytest.importorskip("openai")
    with PlanServer(lambda body: 404) as server, pytest.raises(openai.NotFoundError, match="status 404"):
        collect(ServerWriter(server.url, "m", SAMPLING), make_requests(3))


@needs_openai
def test_server_that_is_not_there_is_an_error():
    openai = pytest.importorskip("openai")
    with PlanServer(echo) as server:
        pass
    with pytest.raises(openai.APIConnectionError):
        collect(ServerWriter(server.url, "m", SAMPLING, max_retries=0), make_requests(3))


@needs_openai
@pytest.mark.parametrize("status", [400, 422])
def test_refused_request_is_answered_with_the_reason_and_the_others_go_on(status):
    with PlanServer(lambda body: status if body["seed"] == 101 else echo(body)) as server:
        replies = by_index(collect(ServerWriter(server.url, "m", SAMPLING), make_requests(3)))
    assert [reply.refusal is None for reply in replies] == [True, False, True]
    assert f"status {status}" in replies[1].refusal and replies[1].text == ""
    assert len(server.bodies) == 3, "a refused request is not sent again"


@needs_openai
@pytest.mark.parametrize(
    ("content", "finish_reason", "text", "is_cut_off"),
    [("Add", "length", "Add", True), (None, "stop", "", False), ("a\ud83d", "stop", "a?", False)],
)
def test_odd_replies_are_read(content, finish_reason, text, is_cut_off):
    with PlanServer(lambda body: {"content": content, "finish_reason": finish_reason}) as server:
        (reply,) = collect(ServerWriter(server.url, "m", SAMPLING), make_requests(1))
    assert (reply.text, reply.is_cut_off, reply.refusal) == (text, is_cut_off, None)


# vllm, whose classes are stood in for: it needs an environment of its own


class FakeSamplingParams:
    def __init__(self, *, temperature, top_p, max_tokens, seed, structured_outputs):
        self.__dict__.update(locals())


class FakeLLM:
    def __init__(self, model, *, max_model_len, tensor_parallel_size, **settings):
        self.__dict__.update(locals())
        self.batches = []

    def chat(self, messages, sampling_params):
        self.batches.append(sampling_params)
        return [
            SimpleNamespace(outputs=[SimpleNamespace(text=self.write(chat, params), finish_reason="stop")])
            for chat, params in zip(messages, sampling_params, strict=True)
        ]

    def write(self, chat, params):
        return f"{chat[-1]['content']}, seed {params.seed}"


@pytest.fixture
def fake_vllm(monkeypatch):
    """Stand in for vllm's modules; returns the platform, a GPU by default."""
    vllm, sampling_params, platforms = map(ModuleType, ("vllm", "vllm.sampling_params", "vllm.platforms"))
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: False)
    vllm.LLM, vllm.SamplingParams = FakeLLM, FakeSamplingParams
    sampling_params.StructuredOutputsParams = lambda json: ("schema", json)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling_params)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    return platforms.current_platform


def test_vllm_gets_requests_in_batches_and_each_has_its_own_seed_and_schema(fake_vllm):
    requests = make_requests(7)
    writer = VllmWriter("some-model", SAMPLING, batch_size=3, tensor_parallel_size=2)
    assert collect(writer, requests) == expected(requests)
    assert (writer.llm.model, writer.llm.tensor_parallel_size) == ("some-model", 2)
    assert [len(batch) for batch in writer.llm.batches] == [3, 3, 1]
    for request, params in zip(requests, chain.from_iterable(writer.llm.batches), strict=True):
        assert (params.seed, params.structured_outputs) == (request.seed, ("schema", request.schema))
        assert (params.temperature, params.top_p, params.max_tokens) == (0.7, 0.9, 64)


def test_vllm_is_free_to_write_anything_without_structured_output(fake_vllm):
    sampling = SamplingSettings(temperature=0, top_p=1, max_tokens=8, structured_output=False)
    writer = VllmWriter("some-model", sampling)
    collect(writer, make_requests(2))
    assert [params.structured_outputs for params in writer.llm.batches[0]] == [None, None]


def test_vllm_reads_prompts_at_once_on_a_cpu(fake_vllm):
    assert VllmWriter("some-model", SAMPLING).llm.settings == {}
    fake_vllm.is_cpu = lambda: True
    assert VllmWriter("some-model", SAMPLING).llm.settings == {"enable_chunked_prefill": False}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_a_server_is_named():
    with pytest.raises(ImportError, match=r"vllm serve MODEL.*--base_url"):
        VllmWriter("some-model", SAMPLING)


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("max_tokens", 0)],
)
def test_sampling_out_of_range_is_refused(name, value):
    fields = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "structured_output": True}
    with pytest.raises(ValueError, match=f"`{name}` must be .*, but got {value}"):
        SamplingSettings(**fields | {name: value})


@pytest.mark.parametrize(("name", "value"), [("concurrency", 0), ("max_retries", -1), ("timeout", 0.0)])
def test_server_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, but got {value}"):
        ServerWriter("http://127.0.0.1:1/v1", "m", SAMPLING, **{name: value})
