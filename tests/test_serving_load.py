"""The server as a process of its own: under load, under abuse, and when it is told to end."""

import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest

from .tiny_serving import NAME, SECONDS, Reference, read_chat, read_stream

pytestmark = pytest.mark.slow

NUM_REQUESTS, CONCURRENCY = 200, 16
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
FLAGS = ["--served_name", NAME, "--port", "0", "--device", "cpu", "--max_plan_len", "8", "--max_execution_len", "8"]


@contextmanager
def serving_process(checkpoint, *flags):
    """The process of a server, its port and a client."""
    command = [sys.executable, "-m", "hierbd3lm.cli", "serve", checkpoint, *FLAGS, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed = []
            for line in process.stderr:
                printed.append(line)
                if port := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                    break
            assert port, "".join(printed)
            url = f"http://127.0.0.1:{port[1]}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS) as client:
                yield process, int(port[1]), client
        finally:
            process.kill()


def ask(client, question, **fields):
    return client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": question}], **fields)


def memory_of(process):
    """Resident memory in MB."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.is_file():
        pytest.skip("needs /proc")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) / 1024


def test_200_requests_at_concurrency_16_are_all_answered_as_generate_answers(checkpoint):
    questions = [f"Ann has {i} apples" + " and a pen" * (i % 7) + "?" for i in range(NUM_REQUESTS)]

    def answer(number):
        if number % 2:
            return read_stream(ask(client, questions[number], **STREAM))[0]
        return read_chat(ask(client, questions[number]))

    with serving_process(checkpoint) as (_, _, client), ThreadPoolExecutor(CONCURRENCY) as pool:
        replies = list(pool.map(answer, range(NUM_REQUESTS)))
    reference = Reference(checkpoint)
    assert replies == [reference(question) for question in questions]


def test_memory_does_not_grow_under_abuse(checkpoint):
    """Rounds of 100 connections that never finish, and of bodies that are too large, while others are answered."""
    with serving_process(checkpoint, "--body_timeout", "1") as (process, port, client), ThreadPoolExecutor(8) as pool:

        def abuse():
            with ExitStack() as stack:
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n"
                for number in range(100):
                    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=SECONDS))
                    length = 900_000 if number % 2 else 10**9
                    connection.sendall(head.format(length).encode() + (b"\r\n" + b"x" * 100_000) * (number % 3 > 0))
                replies = list(pool.map(lambda number: ask(client, f"Ann has {number}?"), range(20)))
                assert all(reply.choices for reply in replies)
            for text in ("1 " * 10_000, "1" * 2_000_000):
                with pytest.raises(openai.APIStatusError):
                    ask(client, text)

        for _ in range(2):
            abuse()
        before = memory_of(process)
        for _ in range(5):
            abuse()
        time.sleep(1.5)  # the bodies time out
        assert memory_of(process) - before < 30


def test_a_signal_ends_the_process_when_all_is_answered(checkpoint):
    with serving_process(checkpoint) as (process, port, client), ThreadPoolExecutor(CONCURRENCY) as pool:
        ask(client, "Ann?")
        with socket.create_connection(("127.0.0.1", port)):  # says nothing, and keeps nobody waiting
            fields = {"extra_body": {"sampler": "first_hitting"}}
            replies = [pool.submit(ask, client, f"Ann has {number}?", **fields) for number in range(CONCURRENCY)]
            while not any(reply.done() for reply in replies):
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            outcomes = []
            for reply in replies:
                try:
                    outcomes.append(bool(reply.result().choices))
                except openai.APIConnectionError as error:  # came after the signal: never taken
                    assert "refused" in repr(error.__cause__).lower() or "Errno 111" in repr(error.__cause__)
            assert sum(outcomes) >= 1 and all(outcomes)
            assert process.wait(SECONDS) in (0, -signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            ask(client, "Ann?")


def test_two_signals_end_the_process_at_once(checkpoint):
    with (
        serving_process(checkpoint, "--timeout", "600") as (process, port, _),
        socket.create_connection(("127.0.0.1", port)) as connection,
    ):
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n")
        time.sleep(0.3)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        process.wait(20)
