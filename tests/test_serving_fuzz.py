"""Random bodies: the server answers or refuses each, and never fails."""

import asyncio
import json
import random
from types import SimpleNamespace

import pytest

from hierbd3lm.serving.arguments import ServeArguments
from hierbd3lm.serving.schemas import ChatRequest, CompletionRequest
from hierbd3lm.serving.server import make_app

from .test_serving_engine import make_model

REQUESTS = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
VALUES = [None, True, False, 0, 1, 2, -1, 0.5, 1e308, float("nan"), float("inf"), 10**20, 10**400, "", "a", "é\ud800"]
VALUES += [
    "plan",
    "entropy",
    "ancestral",
    [],
    [1],
    ["a"],
    [[6, 7]],
    [[]],
    {},
    {"type": "text"},
    {"a": [1]},
    "<|plan|>",
]
MESSAGES = [{"role": "user", "content": "2 + 3?"}]


def random_body(path, generator):
    """A request in which some fields are random values; now and then other bytes."""
    body = {"messages": MESSAGES} if "chat" in path else {"prompt": "2 + 3?"}
    names = [*REQUESTS[path].model_fields, "zzz", "temprature"]
    for name in generator.sample(names, generator.choice([0, 1, 1, 2, 3])):
        body[name] = generator.choice(VALUES)
    if "chat" in path and generator.random() < 0.2:
        role = generator.choice(["user", "system", "tool", None, 3])
        body["messages"] = generator.choice(
            [[{"role": role, "content": generator.choice(VALUES)}], [role], MESSAGES * 2]
        )
    content = json.dumps(body, allow_nan=True).encode("utf-8", "surrogatepass")
    if generator.random() < 0.15:
        place = generator.randrange(len(content))
        content = content[:place] + bytes(generator.choices(range(256), k=3)) + content[place + 2 :]
    return content


async def post(app, path, content):
    """Call the application as uvicorn does; returns the status and the body."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "headers": headers, "http_version": "1.1"}
    scope |= {"scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": ""}
    requests = [{"type": "http.request", "body": content, "more_body": False}]
    reply, ended = SimpleNamespace(status=None, body=b""), asyncio.Event()

    async def receive():
        if requests:
            return requests.pop()
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        reply.status = message.get("status", reply.status)
        reply.body += message.get("body", b"")

    await app(scope, receive, send)
    ended.set()
    return reply.status, reply.body


async def check(number_of_bodies, seed):
    model, tokenizer = make_model("hier", length=4)
    arguments = ServeArguments(model="tiny", device="cpu", max_queue=4, timeout=30)
    app = make_app(model, tokenizer, model.generation_config, arguments)
    generator, statuses = random.Random(seed), {}
    for _ in range(number_of_bodies):
        path = generator.choice(list(REQUESTS))
        content = random_body(path, generator)
        status, reply = await post(app, path, content)
        assert status in (200, 400, 404), (content, reply)
        statuses[status] = statuses.get(status, 0) + 1
        if status != 200:
            error = json.loads(reply)["error"]
            assert error["message"] and "Traceback" not in error["message"] and len(error["message"]) < 1000
        elif reply.startswith(b"data: "):
            assert reply.endswith(b"data: [DONE]\n\n"), (content, reply)
        else:
            assert json.loads(reply)["usage"]["num_forward_passes"] >= 0
    app.state.service.engine.close()
    return statuses


def test_a_few_random_bodies_are_answered_or_refused():
    statuses = asyncio.run(check(60, seed=0))
    assert statuses[200] > 5 and statuses[400] > 5


@pytest.mark.slow
def test_ten_thousand_random_bodies_are_answered_or_refused():
    statuses = asyncio.run(check(10_000, seed=1))
    assert statuses[200] > 1000 and statuses[400] > 1000 and statuses[404] > 5
