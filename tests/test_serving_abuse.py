"""Clients that ask for too much, break off, or never finish: the others are answered."""

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import openai
import pytest

from hierbd3lm.serving.limits import TimedProtocol

from .test_serving_refusals import USER, post, refusal
from .tiny_serving import QUESTIONS, SECONDS, Reference, held, read_chat, serving, wait_until

LIMIT = 2000  # bytes
BODY = json.dumps({"messages": USER}).encode()


@pytest.fixture(scope="module")
def server(checkpoint):
    with serving(checkpoint, max_body_bytes=LIMIT, body_timeout=1.0) as server:
        yield server


@pytest.fixture
def expected(checkpoint):
    return Reference(checkpoint)


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def head(length):
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def read_reply(connection):
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    return reply.status, json.loads(reply.read())


# Bodies


def test_a_body_that_is_too_large_is_refused_before_it_is_parsed(server):
    for size in (LIMIT + 1, 50 * LIMIT):
        body = b'{"messages": "' + b"x" * size
        error = refusal(server, body, status=413)
        assert error["message"] == f"the body must have at most {LIMIT} bytes, but got {len(body)}"
    status, _ = post(server, BODY.ljust(LIMIT))
    assert status == 200


def test_a_body_of_unknown_size_is_refused_where_it_passes_the_limit(server):
    with connect(server) as connection:
        start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        connection.sendall(start + 3 * (b"3e8\r\n" + b" " * 1000 + b"\r\n") + b"0\r\n\r\n")
        status, content = read_reply(connection)
    assert status == 413 and f"but got more than {LIMIT}" in content["error"]["message"]


def test_a_body_without_end_is_not_read_for_ever(server):
    """One that keeps sending, and one that stops sending."""
    with connect(server) as endless, connect(server) as silent:
        silent.sendall(head(500) + BODY[:10])
        endless.sendall(head(10**12))
        with pytest.raises(OSError):
            for _ in range(10_000):
                endless.sendall(b" " * 10_000)
        status, content = read_reply(silent)
    assert status == 408 and content["error"]["message"] == "the body must come within 1 seconds, but did not"


# Connections that never finish


def test_connections_that_never_finish_are_closed_and_others_are_answered(server, expected, monkeypatch):
    monkeypatch.setattr(TimedProtocol, "head_timeout", 1.0)
    answer = expected(QUESTIONS[0])
    starts = [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n", head(500), head(500) + BODY[:20]]
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(100)]
        for number, connection in enumerate(connections):
            connection.sendall(starts[number % len(starts)])
        for _ in range(3):
            assert read_chat(server.ask(QUESTIONS[0])) == answer
        for number, connection in enumerate(connections):
            reply = connection.recv(65536)
            assert reply == b"" if number % 4 < 2 else reply.startswith(b"HTTP/1.1 408 ")
        assert read_chat(server.ask(QUESTIONS[0])) == answer


def test_a_second_head_has_no_more_time_than_the_first(server, monkeypatch):
    monkeypatch.setattr(TimedProtocol, "head_timeout", 0.5)
    with connect(server) as connection:
        connection.sendall(head(len(BODY)) + BODY)
        assert read_reply(connection)[0] == 200
        start = time.monotonic()
        connection.sendall(b"POST /v1")
        assert connection.recv(1) == b"" and time.monotonic() - start < 4  # uvicorn would wait for ever


def test_an_answer_may_take_longer_than_a_head(server, monkeypatch):
    monkeypatch.setattr(TimedProtocol, "head_timeout", 0.2)
    with ThreadPoolExecutor(1) as pool:
        with held(server.model, passes=1):
            reply = pool.submit(server.ask, QUESTIONS[0])
            time.sleep(0.6)
        assert reply.result().choices


# Clients that hang up


@pytest.mark.parametrize("stream", [False, True])
def test_the_row_of_a_client_that_hangs_up_leaves_the_batch(checkpoint, expected, stream):
    body, answer = json.dumps({"messages": USER, "stream": stream}).encode(), expected(QUESTIONS[0])
    num_passes = expected("1")["num_forward_passes"]
    with (
        serving(checkpoint) as server,
        ThreadPoolExecutor(2) as pool,
        connect(server) as client,
        held(server.model) as passes,
    ):
        first = pool.submit(server.ask, "1")
        wait_until(lambda: server.engine.running)
        client.sendall(head(len(body)) + body)
        wait_until(lambda: server.engine.num_waiting == 1)
        other = pool.submit(server.ask, QUESTIONS[0])
        wait_until(lambda: server.engine.num_waiting == 2)
        passes.allow(num_passes + 1)
        wait_until(lambda: len(passes) == num_passes + 2)
        client.close()
        wait_until(lambda: server.metric("cancelled_total") == 1)
        passes.allow_all()
        assert first.result().choices and read_chat(other.result()) == answer
    # the pass that was held when the client left is the last one with its row
    assert passes == [1] * num_passes + [2] * 2 + [1] * (answer["num_forward_passes"] - 2)


def test_a_batch_that_nobody_waits_for_ends_at_once(checkpoint):
    with serving(checkpoint) as server, connect(server) as client:
        with held(server.model, passes=2) as passes:
            client.sendall(head(len(BODY)) + BODY)
            wait_until(lambda: len(passes) == 3)
            client.close()
            wait_until(lambda: server.metric("cancelled_total") == 1)
            passes.allow_all()
            wait_until(lambda: not server.engine.running)
        assert passes == [1, 1, 1]
        assert server.ask(QUESTIONS[0]).choices


def test_a_question_whose_client_has_hung_up_is_never_begun(checkpoint):
    with serving(checkpoint, max_queue=1) as server, ThreadPoolExecutor(1) as pool, connect(server) as client:
        with held(server.model):
            first = pool.submit(server.ask, QUESTIONS[0])
            wait_until(lambda: server.engine.running)
            client.sendall(head(len(BODY)) + BODY)
            wait_until(lambda: server.engine.num_waiting == 1)
            client.close()
            wait_until(lambda: server.metric("cancelled_total") == 1)
            second = ThreadPoolExecutor(1).submit(server.ask, QUESTIONS[1])  # there is room again
            wait_until(lambda: second.done() or server.engine.num_waiting == 1)
        assert first.result().choices and second.result().choices
        assert server.batches == [1, 1]


# Queue and time


def test_a_full_queue_says_so(checkpoint):
    with serving(checkpoint, max_queue=2) as server, ThreadPoolExecutor(3) as pool:
        with held(server.model):
            first = pool.submit(server.ask, QUESTIONS[0])
            wait_until(lambda: server.engine.running)
            others = [pool.submit(server.ask, question) for question in QUESTIONS[:2]]
            wait_until(lambda: server.engine.num_waiting == 2)
            with pytest.raises(openai.RateLimitError, match="the queue is full: 2 questions wait already") as error:
                server.ask(QUESTIONS[2])
            assert error.value.response.headers["retry-after"] == "1"
            refusal(server, {"prompt": ["a", "b", "c"]}, "/v1/completions")
        assert all(reply.result().choices for reply in (first, *others))


def test_an_answer_that_takes_too_long_is_given_up(checkpoint, expected):
    with serving(checkpoint, timeout=0.5) as server:
        with held(server.model, passes=1) as passes:
            with pytest.raises(openai.APIStatusError, match=r"the answer took more than 0\.5 seconds") as error:
                server.ask(QUESTIONS[0])
            assert error.value.status_code == 504
            with pytest.raises(openai.APIError, match=r"the answer took more than 0\.5 seconds"):
                list(server.ask(QUESTIONS[0], stream=True))
            num_passes = len(passes)
        wait_until(lambda: not server.engine.running)
        server.service.args.timeout = SECONDS
        assert num_passes == 2 and server.engine.num_waiting == 0
        assert read_chat(server.ask(QUESTIONS[0])) == expected(QUESTIONS[0])


def test_a_failure_of_one_batch_is_told_and_the_next_is_answered(checkpoint, expected, capture_warnings):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with serving(checkpoint) as server:
        encode, server.model.encode = server.model.encode, fail
        with pytest.raises(openai.InternalServerError, match="generation failed: RuntimeError"):
            server.ask(QUESTIONS[0])
        with pytest.raises(openai.APIError, match="generation failed: RuntimeError"):
            list(server.ask(QUESTIONS[0], stream=True))
        server.model.encode = encode
        assert read_chat(server.ask(QUESTIONS[0])) == expected(QUESTIONS[0])
    assert "generation failed" in capture_warnings


def test_a_server_that_shuts_down_finishes_what_it_has_taken(checkpoint, expected):
    answers = [expected(question) for question in QUESTIONS]
    with ThreadPoolExecutor(5) as pool, serving(checkpoint) as server:
        with held(server.model):
            replies = [pool.submit(server.ask, question) for question in QUESTIONS]
            wait_until(lambda: server.engine.num_waiting + len(server.engine.running) == len(QUESTIONS))
            closing = ThreadPoolExecutor(1).submit(server.engine.close)
            wait_until(lambda: not server.engine.is_ready)
            assert refusal(server, {"messages": USER}, status=503)["message"] == "the server is shutting down"
        assert [read_chat(reply.result()) for reply in replies] == answers
        closing.result()
