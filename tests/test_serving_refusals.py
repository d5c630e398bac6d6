"""Requests that the server refuses, each with a status and a message that names the fault."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request

import openai
import pytest

from hierbd3lm.serving.arguments import API_KEY_VARIABLE, ServeArguments
from hierbd3lm.serving.schemas import IGNORED, NEUTRAL

from .tiny_serving import NAME, QUESTIONS, serving

USER = [{"role": "user", "content": "2 + 3"}]
OTHER = {"stop": "Question:", "logit_bias": {"3": 1}, "tools": [{"type": "function"}], "tool_choice": "required"}
OTHER |= {"response_format": {"type": "json_object"}, "modalities": ["audio"], "functions": [{}], "suffix": "a"}
OTHER |= {"function_call": "f", "reasoning_effort": "low", "verbosity": "low", "logprobs": True, "echo": True}


@pytest.fixture(scope="module")
def server(checkpoint):
    with serving(checkpoint) as server:
        yield server


def post(server, body, path="/v1/chat/completions", **headers):
    """Status and content of the reply."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", content, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def refusal(server, body, path="/v1/chat/completions", status=400):
    got, content = post(server, body, path)
    assert got == status, content
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    return content["error"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "is no field of this request; did you mean `temperature`?"),
        ({"zzz": 1}, "zzz", "`zzz` is no field of this request"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "but got 'tool'"),
        ({"messages": [{"role": "user", "content": "a", "zzz": 1}]}, "messages.0.zzz", "is no field"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "must end with one of the role 'user'"),
        ({"messages": USER * 2}, "messages", "must be one message of the user for this model"),
        ({"messages": [{"role": "user", "content": "a <|end|>"}]}, "messages", "must not contain special tokens"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "Unicode"),
        ({"temperature": "1"}, "temperature", "but got '1'"),
        ({"temperature": -1}, "temperature", "must be a finite number >= 0, but got -1"),
        ({"temperature": float("nan")}, "temperature", "must be a finite number >= 0, but got nan"),
        ({"top_p": 0}, "top_p", r"must be a number in \(0, 1\], but got 0"),
        ({"seed": -1}, "seed", "must be an integer >= 0"),
        ({"seed": 10**30}, "seed", "must be an integer >= 0"),
        ({"threshold": 2}, "threshold", "must be a number in"),
        ({"num_steps": 3}, "num_steps", "has no effect with sampler='confidence'"),
        ({"sampler": "greedy"}, "sampler", "must be one of first_hitting"),
        ({"max_tokens": 0}, "max_new_tokens", "must be an integer >= 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "must be one number under all of its names"),
        ({"max_plan_len": 5}, "max_plan_len", "must be a multiple of the block size 4"),
        ({"stream": "yes"}, "stream", "but got 'yes'"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "is no field"),
        ({"plan": "word " * 40}, "messages", "`plan` must have at most plan_len=32"),
        ({"stage": "plan"}, "stage", "is no field"),
        *(({name: 2}, name, f"`{name}` must be None or 1 here, but got 2") for name in ("n", "best_of")),
        *(({name: value}, name, f"`{name}` must be None") for name, value in OTHER.items()),
        *(({name: 1}, name, f"`{name}` must be None or 0") for name in ("frequency_penalty", "presence_penalty")),
        ({"top_logprobs": 2}, "top_logprobs", "must be None or 0"),
        ({"n": True}, "n", "must be None or 1 here, but got True"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(server, fields, param, message):
    error = refusal(server, {"messages": USER} | fields)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"])


def test_every_unsupported_field_is_in_the_table():
    tested = {"n", "best_of", "frequency_penalty", "presence_penalty", "top_logprobs"} | OTHER.keys()
    assert tested == NEUTRAL.keys()


def test_labels_and_values_that_change_nothing_are_accepted(server):
    _, plain = post(server, {"messages": USER})
    fields = {name: values[-1] for name, values in NEUTRAL.items()} | dict.fromkeys(IGNORED, "a")
    status, reply = post(server, {"messages": USER, "model": NAME} | fields)
    assert status == 200 and reply["choices"] == plain["choices"]


def test_a_question_that_is_too_long_is_refused_with_its_length(server):
    with pytest.raises(
        openai.BadRequestError, match=r"`question` must have at most question_len=96 tokens, but got"
    ) as e:
        server.ask("1 " * 10_000)
    assert (e.value.code, e.value.param) == ("context_length_exceeded", "messages")
    assert server.ask(QUESTIONS[0]).choices


def test_another_model_is_not_found(server):
    assert refusal(server, {"messages": USER, "model": "tinny"}, status=404) == {
        "message": "`model` must be 'tiny', but got 'tinny'; did you mean `tiny`?",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "must have at least one question"),
        ([5, 10**6], "must have token ids from 0 to"),
        ([[9], [-1]], "must have token ids from 0 to"),
        (["a"] * 257, "must have at most 256 questions, but got 257"),
        (3, "but got 3"),
    ],
)
def test_prompts_that_are_none_are_refused(server, prompt, message):
    assert message in refusal(server, {"prompt": prompt}, "/v1/completions")["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b"null"]
)
def test_what_is_no_json_object_is_refused(server, body):
    refusal(server, body)


def test_paths_and_methods_that_are_none(server):
    refusal(server, {}, "/v1/embeddings", status=404)
    refusal(server, {}, "/health", status=405)


def test_requests_need_the_key_if_there_is_one(checkpoint):
    with serving(checkpoint, api_key="secret") as server:
        for key in ("none", "secre", "secret2"):
            with pytest.raises(openai.AuthenticationError, match="must be `Bearer` with the API key"):
                server.make_client(key).models.list()
        assert refusal(server, {"messages": USER}, status=401)["code"] == "invalid_api_key"
        assert server.make_client("secret").models.list().data
        with urllib.request.urlopen(f"{server.url}/health", timeout=60) as response:
            assert response.status == 200


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_the_server_needs_is_named_with_its_extra(name):
    code = f"import sys; sys.modules[{name!r}] = None; from hierbd3lm import cli; cli.main(['serve', 'm'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and 'run `pip install -e ".[serve]"`' in done.stderr


def test_the_key_may_be_in_the_environment(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    assert ServeArguments(model="m", device="cpu").api_key == "secret"
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(ValueError, match="`api_key` must not be empty"):
        ServeArguments(model="m", device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"port": 70_000}, "`port` must be at most 65535"),
        ({"timeout": 0.0}, "`timeout` must be more than 0 seconds"),
        ({"dtype": "int8"}, "`dtype` must be one of float32"),
    ],
)
def test_settings_of_the_server_that_are_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ServeArguments(model="m", device="cpu", **fields)
